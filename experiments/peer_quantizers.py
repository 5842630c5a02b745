"""NVFP4 quantizers of this package and of others, each as one function from bf16 weights to what their bytes stand for.

What another package does is computed by its own functions, imported when a quantizer is made; none of it is written
down again here. What is ours is the order in which they are called, taken from how the package itself exports a model.
A quantizer gets one *fusion group* at a time: the weights that an inference engine keeps in one layer (q, k and v; gate
and up; gate and up of one expert), for which it has one global scale.

===============================  ============================================  =========================================
name                             global scale, a multiplier                    block scale, E4M3
===============================  ============================================  =========================================
``ours``                         power of two >= amax / 2688, of the group     amax of the block, fp32, >= 2^-6
``ours-amax``                    amax / 2688 of the group                      the same
``llm-compressor``               1 / bf16(2688 / amax) of the group            bf16(amax / 6) of the block; 0 -> 2^-3
``llm-compressor-mse``           the same, of the amaxes as changed            amax times 1 to 0.81, least |error|^2.4
``llm-compressor-expanded-mse``  the same, of the amaxes as changed            amax times 1.8 to 0.8, least |error|^2.4
``modelopt``                     amax / 2688 of the group                      amax of the block, fp32, >= 2^-9
``torchao``                      amax / 2688 of the weight alone               amax of the block, fp32, >= 2^-6
``torchao-one-level``            none                                          the same
===============================  ============================================  =========================================

llm-compressor decides by the layers' names which of a group share a scale (`fuse_weight_observers`), ModelOpt by a
trial run which layers have the same input (`preprocess_linear_fusion`; `sync_moe_gate_up_amax` and halves of one tensor
for experts), which comes to the same groups. torchao does not know of fused layers.

On a GPU, llm-compressor and compressed-tensors run Triton kernels of their own, whose search for the least error may
end at another scale than the plain one does; ``CT_ENFORCE_EAGER=1`` takes the plain one.

A package's ``__init__`` files are passed over where they import more than the quantizer needs (`module_alone`), so that
a package laid on the path without its dependencies will do. llm-compressor needs compressed-tensors, pydantic, loguru
and transformers; ModelOpt needs pydantic, PyYAML and tqdm; torchao needs torch alone.

Sources: llm-compressor 0.14 ``modifiers/quantization/calibration.py``, ``observers/``; compressed-tensors 0.20
``compressors/nvfp4``; ModelOpt 0.47 ``quantization/qtensor/nvfp4_tensor.py``, ``export/unified_export_hf.py``; torchao
0.18 ``prototype/mx_formats/nvfp4_tensor.py`` and its ``NVFP4WeightOnlyConfig``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nvfp4_qat as nq
from nvfp4_qat.format import BLOCK

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from peer_kernels import module_alone  # noqa: E402

Group = Mapping[str, Tensor]
"""The weights of one fusion group, bf16 ``[N, K]`` and contiguous, by the last part of their layers' names."""


@dataclass(frozen=True)
class Rounded:
    """One weight after rounding.

    Args:
        weight: bf16 ``[N, K]``, what the package itself makes of the packed bytes.
        nbytes: bytes of codes, block scales and global scale.
    """

    weight: Tensor
    nbytes: int


Rounder = Callable[[Group], dict[str, Rounded]]


@dataclass(frozen=True)
class Quantizer:
    """A way to round weights to NVFP4.

    Args:
        name: what rows call it.
        packages: distributions whose code runs, the one it is called after first. Empty for this package's own.
        global_scale: what shares a global scale, for rows: "fusion group", "weight" or "none".
        make: imports what is needed and returns the function that rounds a group. Raises ImportError where a package,
            or one that it needs, is not installed.
    """

    name: str
    packages: tuple[str, ...]
    global_scale: str
    make: Callable[[], Rounder]

    def version(self) -> str:
        """The versions of `packages`, or of this package."""
        if not self.packages:
            return nq.__version__
        first, *others = self.packages
        return ", ".join([_version(first), *(f"{package} {_version(package)}" for package in others)])

    def installation(self) -> str:
        """A command that installs what `make` did not find."""
        return "pip install " + " ".join(self.packages)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def ours(policy: str) -> Rounder:
    """This package's definition (`nvfp4_qat.reference`) with the global scale by ``policy``, "pow2" or "amax"."""

    def rounder(group: Group) -> dict[str, Rounded]:
        amax = torch.stack([nq.amax(weight) for weight in group.values()]).amax(0)
        packed = {name: nq.quantize(weight, nq.global_scale(amax, policy)) for name, weight in group.items()}
        return {name: Rounded(value.dequantize(), value.nbytes) for name, value in packed.items()}

    return rounder


def llm_compressor(observer: str | None) -> Rounder:
    """llm-compressor's scheme NVFP4A16 without calibration data, as its QuantizationModifier goes through a model.

    Args:
        observer: its option ``weight_observer``; None is the scheme's own, "memoryless_minmax".
    """
    name = "llmcompressor.modifiers.quantization.calibration"
    calibration = module_alone(name, "llmcompressor.utils", "llmcompressor.modifiers.utils")
    observers = importlib.import_module("llmcompressor.observers")
    lifecycle = importlib.import_module("compressed_tensors.quantization.lifecycle.initialize")
    schemes = importlib.import_module("compressed_tensors.quantization.quant_scheme")
    compressor = importlib.import_module("compressed_tensors.compressors.nvfp4.base").NVFP4PackedCompressor
    scheme = schemes.preset_name_to_scheme("NVFP4A16", ["Linear"])
    if observer is not None:
        scheme.weights.observer = observer

    def rounder(group: Group) -> dict[str, Rounded]:
        parent = nn.Module()  # with layers of the names by which it knows what an engine fuses
        for name, weight in group.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            lifecycle.initialize_module_for_quantization(layer, scheme)
            calibration.initialize_observer(layer, "weight")
            parent.register_module(name, layer)
        observers.fuse_weight_observers(parent)
        layers = dict(parent.named_children())
        calibration.observe(layers.values(), "weight")
        calibration.update_qparams(list(layers.values()), "weight")
        return {name: rounded(layer) for name, layer in layers.items()}

    def rounded(layer: nn.Module) -> Rounded:
        state = {name: value.detach() for name, value in layer.named_parameters(recurse=False)}
        packed = compressor.compress(state, scheme)
        return Rounded(compressor.decompress(packed, scheme)["weight"].to(torch.bfloat16), _nbytes(*packed.values()))

    return rounder


def modelopt() -> Rounder:
    """ModelOpt's NVFP4QTensor with the largest of a group's global scales, as its export for Hugging Face has it."""
    importlib.import_module("modelopt")  # its recipes ask it for its version
    network = module_alone(
        "modelopt.torch.utils.network", "modelopt.torch.opt", "modelopt.torch.quantization.backends",
        "modelopt.torch.quantization.qtensor",
    )  # fmt: skip
    # Its utilities as a whole would need omegaconf and requests: these two are what the quantizer takes from them.
    for module in (network, importlib.import_module("modelopt.torch.utils.logging")):
        vars(sys.modules["modelopt.torch.utils"]).update({name: getattr(module, name) for name in module.__all__})
    tensors = importlib.import_module("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor

    def rounder(group: Group) -> dict[str, Rounded]:
        alone = [tensors.get_weights_scaling_factor_2(weight) for weight in group.values()]
        shared = torch.stack(alone).amax(0)
        return {name: rounded(weight, shared) for name, weight in group.items()}

    def rounded(weight: Tensor, shared: Tensor) -> Rounded:
        packed, scale, double_scale = tensors.quantize(weight, BLOCK, weights_scaling_factor_2=shared)
        back = packed.dequantize(torch.bfloat16, scale=scale, double_scale=double_scale, block_sizes={-1: BLOCK})
        return Rounded(back, _nbytes(packed._quantized_data, scale, double_scale))

    return rounder


def torchao(two_level: bool) -> Rounder:
    """torchao's NVFP4Tensor.

    Args:
        two_level: with a global scale for each weight (``use_dynamic_per_tensor_scale``, its default), or without one.
    """
    nvfp4: Any = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

    def rounded(weight: Tensor) -> Rounded:
        scale = nvfp4.per_tensor_amax_to_scale(weight.abs().max()) if two_level else None
        packed = nvfp4.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
        return Rounded(packed.dequantize(), _nbytes(packed.qdata, packed.scale, packed.per_tensor_scale))

    return lambda group: {name: rounded(weight) for name, weight in group.items()}


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


_LLM_COMPRESSOR = ("llmcompressor", "compressed-tensors")
QUANTIZERS = (
    Quantizer("ours", (), "fusion group", partial(ours, "pow2")),
    Quantizer("ours-amax", (), "fusion group", partial(ours, "amax")),
    Quantizer("llm-compressor", _LLM_COMPRESSOR, "fusion group", partial(llm_compressor, None)),
    Quantizer("llm-compressor-mse", _LLM_COMPRESSOR, "fusion group", partial(llm_compressor, "memoryless_mse")),
    Quantizer(
        "llm-compressor-expanded-mse", _LLM_COMPRESSOR, "fusion group", partial(llm_compressor, "nvfp4_expanded_mse")
    ),
    Quantizer("modelopt", ("nvidia-modelopt",), "fusion group", modelopt),
    Quantizer("torchao", ("torchao",), "weight", partial(torchao, True)),
    Quantizer("torchao-one-level", ("torchao",), "none", partial(torchao, False)),
)
"""In the order of the rows; others are compared with the first."""
