"""How the layers of a running vLLM model looked before processing, also where vLLM does not record it.

vLLM 0.15 keeps no note of the parameters that its loaders filled, and later versions leave some out (0.20 to 0.33 the
routers' ``e_score_correction_bias``, 0.33 every ``bias``). They are found as vLLM makes them: its model class is called
once more, with its configuration. What `torch.empty` returns has no values yet and gets no memory this time; the rest,
such as tables that say which experts a rank has, is small and computed as before. Of the second model only its
parameters and the names of attributes are kept; the weight loaders among the parameters' attributes are tied to the
live layers instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import UserError


@dataclass(frozen=True)
class Constructed:
    """What is known of a layer before anything was loaded into it.

    Args:
        parameters: in the form that checkpoints are loaded into, without data (meta), by name.
        names: of these, of its buffers and of its plain attributes.
    """

    parameters: dict[str, nn.Parameter]
    names: frozenset[str]


def constructed(model: nn.Module, config: Any, device: torch.device) -> dict[nn.Module, Constructed]:
    """How all layers were before they were loaded and processed.

    Args:
        model: a live model, with its parameters processed; not touched.
        config: the ``VllmConfig`` that it was made with; not modified.
        device: of its weights.

    Raises:
        UserError: a layer with parameters is not made by the model's class alone, as with adapters.
    """
    second = dict(without_memory(config, device).named_modules())
    live = dict(model.named_modules())
    unknown = [name for name in live if name not in second and own_parameters(live[name])]
    if unknown:
        raise UserError(
            f"the engine's {type(model).__name__} has layers that its configuration does not make: "
            f"{', '.join(sorted(unknown)[:5])}; live updates need a model without replaced layers"
        )
    now = {id(layer): live[name] for name, layer in second.items() if name in live}
    return {
        live[name]: Constructed({n: _tied(p, now) for n, p in own_parameters(layer).items()}, own_names(layer))
        for name, layer in second.items()
        if name in live
    }


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's parameters without those of its children."""
    return {name: p for name, p in layer._parameters.items() if p is not None}


def own_names(layer: nn.Module) -> frozenset[str]:
    """Of a layer's parameters, buffers and plain attributes."""
    return frozenset((*layer._parameters, *layer._buffers, *layer.__dict__))


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


def without_memory(config: Any, device: torch.device) -> nn.Module:
    """A model as vLLM constructs it, its parameters without data (meta); its layers are not entered into the config."""
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
