"""Engines that are started with random weights, ``load_format="dummy"``, as verl starts them.

vLLM then fills every parameter, those too from which it takes the scales of attention layers (q, k, v, and the
probabilities). No checkpoint of 4-bit weights has these, so no update brings them, and what is left there is a random
number. Most attention kernels do not look at it while the KV cache is in bf16; FlashInfer's do, and multiply by it.

`load_model` sets them back to 1, which is what they are where a checkpoint says nothing. It has to be done before CUDA
graphs are captured, as these keep plain numbers. Where it was not (vLLM's workers did not have the extension then),
`check_scales` refuses the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MismatchError

SCALE = re.compile(r"_(q|k|v|prob)_scale(_float|_cpu|_inv)?")
"""Attributes of attention layers, tensors and plain numbers."""


def load_model(worker: Any, *arguments: Any, **options: Any) -> Any:
    """Load as vLLM's worker does; of random weights, set the scales of attention back.

    Args:
        worker: of vLLM, with its configuration in ``vllm_config``.
        arguments, options: of its own ``load_model``.
    """
    result = type(worker).load_model(worker, *arguments, **options)
    if is_dummy(worker):
        reset_scales(worker.model_runner.get_model())
    return result


def is_dummy(worker: Any) -> bool:
    """Whether a worker's engine was started with random weights."""
    load_config = getattr(getattr(worker, "vllm_config", None), "load_config", None)
    return "dummy" in str(getattr(load_config, "load_format", ""))


@torch.no_grad()
def reset_scales(model: nn.Module) -> int:
    """Set all scales of attention layers to 1.

    Returns:
        How many had another value.
    """
    changed = 0
    for layer, name, value in _scales(model):
        if float(value) != 1.0:
            changed += 1
            if isinstance(value, Tensor):
                value.fill_(1.0)
            else:
                setattr(layer, name, 1.0)
    return changed


def check_scales(worker: Any, model: nn.Module) -> None:
    """See that random weights left nothing behind.

    Raises:
        MismatchError: they did.
    """
    if is_dummy(worker) and (wrong := sorted({name for _, name, value in _scales(model) if float(value) != 1.0})):
        raise MismatchError(
            f"this engine was started with random weights (load_format='dummy'), and its attention layers have random "
            f"scales from them ({', '.join(wrong)}), which no update brings: start it from a checkpoint, or with the "
            "worker extension nvfp4_qat.vllm.LiveWeights, which sets them back"
        )


def _scales(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for layer in model.modules():
        for name in {**layer._parameters, **layer._buffers, **layer.__dict__}:
            if SCALE.fullmatch(name) and (value := getattr(layer, name)) is not None:
                yield layer, name, value
