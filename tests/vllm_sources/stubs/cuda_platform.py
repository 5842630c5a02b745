"""A platform that tells vLLM it has one Hopper GPU, whose tensors are a CPU's.

Compute capability 9.0 has no NVFP4 arithmetic: vLLM then takes its Marlin kernels for 4-bit weights, as it does
everywhere for weights without quantized activations.
"""

from __future__ import annotations

import os
import types
from typing import Any

import torch


class Stream:
    """Shared experts ask for one when they are built; nothing is ever queued on it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass


def install() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class HopperOnCpu(Platform):
        _enum = PlatformEnum.CUDA
        device_name = "cuda"
        device_type = "cpu"
        dispatch_key = "CPU"
        dist_backend = "gloo"
        simple_compile_backend = "eager"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "a CPU"

        @classmethod
        def get_attn_backend_cls(cls, selected: Any, *arguments: Any, **options: Any) -> str:
            use_mla = any(getattr(a, "use_mla", False) for a in (*arguments, *options.values()))
            name = "mla.triton_mla.TritonMLABackend" if use_mla else "flash_attn.FlashAttentionBackend"
            return f"vllm.v1.attention.backends.{name}"

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def inference_mode(cls) -> Any:
            return torch.no_grad()

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    vllm.platforms.current_platform = vllm.platforms._current_platform = HopperOnCpu()

    cuda: Any = torch.cuda
    cuda.Stream = Stream
    cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)
