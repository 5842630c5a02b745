"""NVFP4 fake quantization of other packages, for `bench_kernels`. Each takes a bf16 matrix and its known amax.

Packages with heavy dependencies are not imported as a whole: `module_alone` runs one module of an installed package and
the modules that it imports from there, but none of the package's ``__init__`` files. So an unpacked wheel on the path
is enough. What a package is not installed for, or was not written for this GPU, is reported and skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Maker = Callable[[Tensor, Tensor], Callable[[], object]]
"""(weight bf16 [N, K], amax float32 []) → what runs it once."""


def module_alone(name: str, *packages: str) -> Any:
    """Import a module without running the ``__init__`` files of the packages it is in, nor those of ``packages``.

    Raises:
        ModuleNotFoundError: the package is not installed, or has no such module.
    """
    for package in (name.rpartition(".")[0], *packages):
        top, *rest = package.split(".")
        spec = importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {top!r}")
        for depth in range(len(rest) + 1):
            bare = ModuleType(".".join([top, *rest[:depth]]))
            bare.__spec__ = spec if depth == 0 else None
            bare.__path__ = [str(Path(place, *rest[:depth])) for place in spec.submodule_search_locations]
            sys.modules.setdefault(bare.__name__, bare)
    return importlib.import_module(name)


def verl(w: Tensor, amax: Tensor) -> Callable[[], object]:
    quantize = module_alone("verl.utils.qat.linear").fp4_fake_quant_weight
    return lambda: quantize(w, amax)


def modelopt(w: Tensor, amax: Tensor) -> Callable[[], object]:
    name = "modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper"
    quantize = module_alone(name, "modelopt.torch.quantization.utils").fp4_fake_quant_block
    return lambda: quantize(w, amax)


def axolotl(w: Tensor, amax: Tensor) -> Callable[[], object]:
    codecs = module_alone("axolotl.integrations.kernels.libs.sonicmoe.triton_nvfp4")
    scale = amax / (6 * 448)
    return lambda: codecs.fake_quant_nvfp4_triton(w, scale)


def vllm(w: Tensor, amax: Tensor) -> Callable[[], object]:
    utilities = importlib.import_module("vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils")
    divisor = (6 * 448) / amax
    return lambda: utilities.ref_nvfp4_quant_dequant(w, divisor, 16)


def torchao(w: Tensor, amax: Tensor) -> Callable[[], object]:
    nvfp4 = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    scale = nvfp4.per_tensor_amax_to_scale(amax)
    return lambda: nvfp4.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale).dequantize(w.dtype)


def compressed_tensors(w: Tensor, amax: Tensor) -> Callable[[], object]:
    """Its block scales are made beforehand: its observers do that, not `fake_quantize`."""
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    schemes = importlib.import_module("compressed_tensors.quantization.quant_scheme")
    helpers = importlib.import_module("compressed_tensors.quantization.utils.helpers")
    scheme = schemes.NVFP4A16["weights"]
    divisor = ((6 * 448) / amax).reshape(1)
    blocks = w.view(w.shape[0], -1, 16)
    scale, zero = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme, global_scale=divisor)
    return lambda: forward.fake_quantize(w, scale, zero, scheme, global_scale=divisor)


PEERS: dict[str, tuple[str, Maker]] = {
    "verl": ("verl", verl),
    "ModelOpt": ("nvidia-modelopt", modelopt),
    "axolotl": ("axolotl", axolotl),
    "vLLM": ("vllm", vllm),
    "torchao": ("torchao", torchao),
    "compressed-tensors": ("compressed-tensors", compressed_tensors),
}
"""Name → distribution and function."""


def available(w: Tensor, amax: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, str], dict[str, str]]:
    """Those that run here, each run once; their versions; and why the others do not."""
    runs, versions, skipped = {}, {}, {}
    for name, (distribution, make) in PEERS.items():
        try:
            run = make(w, amax)
            run()
            torch.cuda.synchronize()
        except Exception as error:  # whatever it is, the benchmark of the others goes on, and the reason is printed
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        runs[name] = run
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return runs, versions, skipped
