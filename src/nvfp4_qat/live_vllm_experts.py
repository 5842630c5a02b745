"""All experts of a vLLM layer prepared for Marlin at once, instead of one after the other.

vLLM repacks the weights and the scales of each expert by themselves: for 128 experts thousands of small operations a
layer. Here an expert's rows follow the last one's, so that a layer is one matrix of ``experts × rows``; vLLM's own
function for linear layers repacks that, and columns of the result are given back to the experts. Nothing about Marlin's
layout is assumed but that it keeps columns of different experts apart, and that is proved for each layer before it is
relied upon (`live_quick`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

NEEDED = tuple(
    f"{w}_{what}" for w in ("w13", "w2") for what in ("weight_packed", "weight_scale", "weight_global_scale")
)


def quicker(layer: nn.Module) -> Callable[[Mapping[str, nn.Parameter]], dict[str, Tensor]] | None:
    """A routine for a live layer of experts that Marlin computes; None for other layers."""
    weight, dtype = layer._parameters.get("w13_weight"), getattr(layer, "params_dtype", None)
    if weight is None or weight.dtype is not torch.int32 or weight.ndim != 3 or dtype is None:
        return None
    try:
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_fp4_layer_for_marlin
    except ImportError:
        return None

    def routine(own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        if any(name not in own for name in NEEDED):
            raise ValueError(f"the layer has not all of {', '.join(NEEDED)}")
        w13, w2 = (_prepared(prepare_fp4_layer_for_marlin, own, which, dtype) for which in ("w13", "w2"))
        made = {f"w13_{name}": t for name, t in w13.items()} | {f"w2_{name}": t for name, t in w2.items()}
        return {**own, **made}  # what is not made anew stays as it was loaded

    return routine


def _prepared(
    prepare: Callable[[Any], None], own: Mapping[str, nn.Parameter], which: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    packed, scale = own[f"{which}_weight_packed"].data, own[f"{which}_weight_scale"].data
    scales = own[f"{which}_weight_global_scale"].data
    experts, rows, half = packed.shape
    one = SimpleNamespace(
        weight=packed.reshape(experts * rows, half),
        weight_scale=scale.reshape(experts * rows, -1),
        weight_global_scale=1.0 / (scales[:, 0].contiguous() if scales.ndim > 1 else scales),
        output_size_per_partition=experts * rows,
        input_size_per_partition=2 * half,
        params_dtype=dtype,
    )
    prepare(one)
    return {
        "weight": _by_expert(one.weight.data, experts),
        "weight_scale": _by_expert(one.weight_scale.data, experts),
        "weight_scale_2": one.weight_global_scale.data,
    }


def _by_expert(t: Tensor, experts: int) -> Tensor:
    """[lines, experts × columns] → [experts, lines, columns], a view."""
    return t.view(t.shape[0], experts, -1).transpose(0, 1)
