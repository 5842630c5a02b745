"""What `live_model` has to know about vLLM: how its layers looked before processing, and how it processes them.

Written against vLLM 0.15.0 to 0.33.0; docs/results/vllm-sources.md says with which of them it was tried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import live_vllm_experts
from .live_dummy import SCALE
from .live_vllm_forms import Constructed, constructed, copied, own_names

NO_LAYERS = ("config", "compilation")
"""Packages within vLLM whose objects know layers, or tensors that code was compiled with, and hold no weights."""

CACHE_SCALES = re.compile(rf"{SCALE.pattern}|[qkv]_range")
"""Attributes of attention layers: how the KV cache is quantized, measured on the first tokens or loaded once."""


class VllmCode:
    """`live_recipe.EngineCode` of vLLM.

    Args:
        model: a live one.
        config: vLLM's, of the engine that the model belongs to.
        device: of its weights.
    """

    def __init__(self, model: nn.Module, config: Any, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
        self._absent: tuple[str, ...] | None = None
        """What the names of layers of other pipeline stages begin with."""

    def checkpoint_form(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        if self.derives(layer):
            return {}
        known = self._constructed.get(layer)
        return {} if known is None else {name: copied(form) for name, form in known.parameters.items()}

    def constructed(self, layer: nn.Module) -> frozenset[str]:
        known = self._constructed.get(layer)
        return own_names(layer) if known is None else known.names

    def processes(self, layer: nn.Module) -> bool:
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        return isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase)

    def process(self, layer: nn.Module) -> None:
        method: Any = layer.quant_method
        method = getattr(method, "old_quant_method", method)  # LoRA puts one of its own in front of experts'
        with self._loading():
            method.process_weights_after_loading(layer)

    def derives(self, layer: nn.Module) -> bool:
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        return isinstance(layer, AttentionLayerBase) and callable(getattr(layer, "process_weights_after_loading", None))

    def derive(self, layer: nn.Module) -> None:
        attention: Any = layer
        with self._loading():
            attention.process_weights_after_loading(self._config.model_config.dtype)

    def elsewhere(self, model: nn.Module, name: str) -> bool:
        from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer

        if self._absent is None:
            missing = (PPMissingLayer, StageMissingLayer)
            self._absent = tuple(f"{n}." for n, layer in model.named_modules() if isinstance(layer, missing))
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        names = [name] if mapper is None else mapper.apply_list([name])
        return any(n.startswith(self._absent) for n in names)

    def kept(self, layer: nn.Module, name: str) -> bool:
        return self.derives(layer) and CACHE_SCALES.fullmatch(name) is not None

    def outlives(self, layer: nn.Module, name: str) -> bool:
        return name in layer._buffers or name == "kv_cache"  # Worker.sleep saves named_buffers

    def optional(self, layer: nn.Module, name: str) -> bool:
        return "input_global_scale" in name

    def quicker(self, layer: nn.Module) -> Callable[[Mapping[str, nn.Parameter]], dict[str, Tensor]] | None:
        return live_vllm_experts.quicker(layer)

    def ours(self, cls: type) -> bool:
        package, _, rest = cls.__module__.partition(".")
        if package == "vllm":
            return rest.partition(".")[0] not in NO_LAYERS
        return package != "torch" and dataclasses.is_dataclass(cls)

    def quantized(self, model: nn.Module) -> list[str]:
        """The layers of a model that hold 4-bit weights, by their names in vLLM."""
        return [
            name
            for name, layer in model.named_modules()
            if any(parameter.endswith("weight_packed") for parameter in self.checkpoint_form(layer))
        ]

    @functools.cached_property
    def _constructed(self) -> dict[nn.Module, Constructed]:
        return constructed(self._model, self._config, self._device)

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """What vLLM's code for loading finds around it."""
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        dtype = self._config.model_config.dtype
        with set_current_vllm_config(self._config), set_default_torch_dtype(dtype), self._device:
            yield
