"""How the layers of a running vLLM model looked before processing, also where vLLM does not record it.

vLLM 0.15 keeps no note of the parameters that its loaders filled, and later versions leave some out (0.20 to 0.33 the
routers' ``e_score_correction_bias``, 0.33 every ``bias``). They are found as vLLM makes them: its model class is called
once more, with its configuration. What `torch.empty` returns has no values yet and gets no memory this time; the rest,
such as tables that say which experts a rank has, is small and computed as before. Of the second model only its
parameters are kept, and the weight loaders among their attributes are tied to the live layers instead.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Forms = dict[str, dict[str, nn.Parameter]]


def forms_before_processing(model: nn.Module, config: Any, device: torch.device) -> Forms:
    """The parameters of all layers in the form that checkpoints are loaded into.

    Args:
        model: a live model, with its parameters processed; not touched.
        config: the ``VllmConfig`` that it was made with; not modified.
        device: of its weights.

    Returns:
        By layer and name, without data (meta).
    """
    second = _without_memory(config, device)
    live = dict(model.named_modules())
    now = {id(layer): live[name] for name, layer in second.named_modules() if name in live}
    return {
        name: {n: _tied(p, now) for n, p in layer._parameters.items() if p is not None}
        for name, layer in second.named_modules()
        if name in live
    }


def copied(form: Tensor) -> nn.Parameter:
    """Another object of the same class with the same attributes, without data (meta)."""
    data = torch.empty_strided(tuple(form.shape), tuple(form.stride()), dtype=form.dtype, device="meta")
    parameter: Any = nn.Parameter(data, requires_grad=False)
    parameter.__class__ = form.__class__
    parameter.__dict__.update(form.__dict__)
    made: nn.Parameter = parameter
    return made


class _NoMemory(TorchFunctionMode):
    """`torch.empty` makes tensors without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and not kwargs.get("pin_memory"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _without_memory(config: Any, device: torch.device) -> nn.Module:
    from vllm.config import CompilationMode
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = copy.copy(config)
    config.compilation_config = compilation = copy.copy(config.compilation_config)
    compilation.mode = CompilationMode.NONE
    # Layers enter themselves here by name; those of the live model must stay alone in theirs.
    compilation.static_forward_context = {}
    compilation.static_all_moe_layers = []
    with set_default_torch_dtype(config.model_config.dtype), device, _NoMemory():
        made: nn.Module = initialize_model(config)
    return made


def _tied(parameter: nn.Parameter, now: dict[int, nn.Module]) -> nn.Parameter:
    """A parameter whose bound methods are those of the live layers."""
    form: Any = copied(parameter)
    for name, value in form.__dict__.items():
        if isinstance(value, MethodType) and id(value.__self__) in now:
            form.__dict__[name] = value.__func__.__get__(now[id(value.__self__)])
    made: nn.Parameter = form
    return made
