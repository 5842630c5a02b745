"""What stands in for the compiled half of vLLM, so that its Python half builds, loads and processes models on a CPU.

Faithful: everything in vLLM's Python files, which run as they are in the wheel: configuration, model classes, weight
loaders, quantization schemes, the choice of a kernel, and `process_weights_after_loading`. Of the compiled operations,
`gptq_marlin_repack` does what the CUDA kernel does: it is made of `marlin_weights` and `get_weight_perm` of vLLM's own
`marlin_utils_test`, which vLLM's tests compare with the kernel bit for bit.

Not faithful: `marlin_gemm` returns numbers that depend on every byte of the weight and its scales and are no product
with them. It is there for multi-head latent attention, which multiplies with a packed layer to make a copy of it.
Modules that exist only compiled can be imported, and hold nothing that runs. Other operations are not there at all;
those whose names ask what a device supports answer no. No model computes here, so attention and every other kernel is
out of scope.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

PACKAGES = {"vllm.vllm_flash_attn", "vllm.vllm_flash_attn.layers"}
MODULES = PACKAGES | {
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C",
    "vllm._moe_C_stable_libtorch",
    "vllm._flashmla_C",
    "vllm._flashmla_extension_C",
    "vllm.cumem_allocator",
    "vllm.vllm_flash_attn.flash_attn_interface",
    "vllm.vllm_flash_attn.layers.rotary",
}
NAMESPACES = {"_C", "_C_stable_libtorch", "_moe_C", "_C_cache_ops", "_C_custom_ar", "_vllm_fa3_C"}

OPERATIONS: dict[tuple[str, str], Any] = {}
"""What stands in for operations that vLLM also calls without its wrappers."""


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `MODULES`; whatever is asked of one is a mock."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name in PACKAGES)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module: Any = types.ModuleType(spec.name)

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(name=name)

        module.__getattr__ = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def gptq_marlin_repack(
    b_q_weight: Tensor,
    perm: Tensor | None = None,
    *,
    size_k: int,
    size_n: int,
    num_bits: int,
    is_a_8bit: bool = False,
) -> Tensor:
    """Codes of a linear layer in the order in which a Marlin kernel reads them.

    Args:
        b_q_weight: int32[size_k / 8, size_n], eight codes along size_k in each.
        perm: empty, where vLLM has this argument.
    """
    assert (num_bits, is_a_8bit) == (4, False)
    assert perm is None or perm.numel() == 0
    assert b_q_weight.shape == (size_k // 8, size_n)
    repacked: Tensor = torch.ops.standin.marlin_repack(b_q_weight, size_k, size_n)
    return repacked


def _marlin_repack(b_q_weight: Tensor, size_k: int, size_n: int) -> Tensor:
    """One operation for PyTorch's dispatcher, as the compiled one is; the code it is made of uses numpy."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights

    shifts = torch.arange(0, 32, 4)
    codes = ((b_q_weight[:, None, :] >> shifts[None, :, None]) & 15).reshape(size_k, size_n)
    return marlin_weights(codes, size_k, size_n, 4, get_weight_perm(4))


def marlin_gemm(
    a: Tensor,
    c: None,
    b_q_weight: Tensor,
    b_bias: Tensor | None,
    b_scales: Tensor,
    a_scales: None,
    global_scale: Tensor,
    *others: Any,
    **more: Any,
) -> Tensor:
    """[a.shape[0], size_n]: a function of every byte of a layer, not its product with ``a``.

    Args:
        b_q_weight: as `gptq_marlin_repack` gives it, int32[size_k / 16, 2 * size_n].
    """
    size_n = b_q_weight.shape[1] // 2
    everything = [t.contiguous().view(-1).view(torch.uint8) for t in (b_q_weight, b_scales, global_scale)]
    values = torch.cat(everything).double()
    cells = a.shape[0] * size_n
    rows = torch.nn.functional.pad(values, (0, -len(values) % cells)).view(-1, cells)
    mixed = (rows * torch.arange(1, len(rows) + 1, dtype=torch.double)[:, None]).sum(0)
    return (mixed % 251).view(a.shape[0], size_n).to(a.dtype)


def install() -> None:
    sys.meta_path.insert(0, EmptyModules())
    namespace: Any = torch._ops._OpNamespace
    registered = namespace.__getattr__

    def operation(self: Any, name: str) -> Any:
        if (self.name, name) in OPERATIONS:
            return OPERATIONS[self.name, name]
        if self.name in NAMESPACES and "supports" in name and not name.startswith("__"):
            return lambda *arguments, **options: False
        return registered(self, name)

    namespace.__getattr__ = operation
    global _library  # its operations last as long as it does
    _library = torch.library.Library("_C", "DEF")
    # Asked for when vLLM's fused activations are imported.
    _library.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
    global _standin
    _standin = torch.library.Library("standin", "DEF")
    _standin.define("marlin_repack(Tensor b_q_weight, int size_k, int size_n) -> Tensor")
    _standin.impl("marlin_repack", _marlin_repack, "CPU")


def install_operations() -> None:
    """Once vLLM's platform is known, since its wrappers of operations are imported here."""
    import vllm._custom_ops

    operations: Any = vllm._custom_ops
    operations.gptq_marlin_repack = gptq_marlin_repack
    operations.marlin_gemm = marlin_gemm
    OPERATIONS["_C", "marlin_gemm"] = marlin_gemm
