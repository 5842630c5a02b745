"""What verl needs to run its FSDP engine without a GPU: a platform in its registry, small models, and their engines."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel


def use_a_cpu() -> None:
    """Let verl take the CPU for its device; before it asks for one."""
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import set_platform

    answers: dict[str, Any] = {
        "device_name": property(lambda self: "cpu"),
        "vendor_name": property(lambda self: "nvidia"),
        "device_module": property(lambda self: _MODULE),
        "current_device": lambda self: "cpu",
        "is_available": lambda self: True,
        "device_count": lambda self: 1,
        "get_device_capability": lambda self, *a: (0, 0),
        "communication_backend_name": lambda self: "gloo",
        "is_ipc_supported": lambda self: False,
        "nvtx_range": lambda self, *a, **k: contextlib.nullcontext(),
    }
    rest = {name: (lambda self, *a, **k: None) for name in PlatformBase.__abstractmethods__ - answers.keys()}
    set_platform(type("Cpu", (PlatformBase,), {**rest, **answers})())


class _Module:
    """What verl asks of ``torch.cuda``, of a CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name, lambda *a, **k: 0)

    def mem_get_info(self) -> tuple[int, int]:
        return 1, 1


_MODULE: Any = _Module()


class _Fsdp1(FullyShardedDataParallel):
    """FSDP1, which can make ranks equal on GPUs only; there is one."""

    def __init__(self, module: Any, *arguments: Any, **options: Any) -> None:
        options |= {"sync_module_states": False, "device_id": torch.device("cpu")}
        super().__init__(module, *arguments, **options)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of one."""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in ranks.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


MODELS = ("dense", "moe")


def saved_models(temporary: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each kind in a folder of its own."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128,
    }  # fmt: skip
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    found = {}
    for name, made in (("dense", Qwen3Config(**sizes)), ("moe", Qwen3MoeConfig(**sizes, **experts))):
        torch.manual_seed(0)
        found[name] = temporary.mktemp(name)
        AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(found[name])
    return found


def engine(model: Path, strategy: str, qat: dict[str, Any], rank: int = 0, **options: Any) -> Any:
    """verl's engine for a model in a folder, initialized.

    Args:
        model: saved by transformers.
        strategy: "fsdp" or "fsdp2".
        qat: of ``fsdp_config``.
        rank: of LoRA; 0: there is none.
        options: of ``fsdp_config`` too.
    """
    from transformers import AutoConfig
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, QATEngineConfig
    from verl.workers.engine.fsdp import transformer_impl

    transformer_impl.FSDP = _Fsdp1
    config = AutoConfig.from_pretrained(model)
    config._attn_implementation = "sdpa"
    model_config: Any = SimpleNamespace(
        use_remove_padding=False, lora_rank=rank, lora={}, lora_alpha=8, target_modules="all-linear",
        target_parameters=None, exclude_modules=None, hf_config=config, local_path=str(model),
        trust_remote_code=False, model_type="language_model", use_liger=False, fused_kernel_options=None,
        use_fused_kernels=False, enable_gradient_checkpointing=False, enable_activation_offload=False,
        get_processor=lambda: None, tokenizer=None, mtp=None,
    )  # fmt: skip
    made = transformer_impl.FSDPEngineWithLMHead(
        model_config,
        FSDPEngineConfig(strategy=strategy, qat=QATEngineConfig(**qat), use_torch_compile=False, **options),
        FSDPOptimizerConfig(lr=1e-2, total_training_steps=10, lr_warmup_steps=0),
        CheckpointConfig(),
    )
    made.initialize()
    return made
