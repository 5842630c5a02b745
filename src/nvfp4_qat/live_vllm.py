"""What `live_model` has to know about vLLM: how its layers looked before processing, and how it processes them.

Written against vLLM 0.24.0 and 0.26.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class VllmCode:
    """`live_recipe.EngineCode` of vLLM.

    Args:
        config: vLLM's, of the engine that the model belongs to.
        device: of its weights.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        self._config, self._device, self._quantizes = config, device, QuantizeMethodBase

    def checkpoint_form(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
        from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

        if _is_attention(layer):
            return {}
        recorded, _ = get_layerwise_info(layer).restore_metadata
        return {name: restore_layer_refs(to_meta_tensor(form), layer) for name, form in recorded.items()}

    def processes(self, layer: nn.Module) -> bool:
        return isinstance(getattr(layer, "quant_method", None), self._quantizes)

    def process(self, layer: nn.Module) -> None:
        layer.__dict__.pop("_already_called_process_weights_after_loading", None)
        method: Any = layer.quant_method
        with self._loading():
            method.process_weights_after_loading(layer)

    def derives(self, layer: nn.Module) -> bool:
        return _is_attention(layer)

    def derive(self, layer: nn.Module) -> None:
        attention: Any = layer
        with self._loading():
            attention.process_weights_after_loading(self._config.model_config.dtype)

    def optional(self, layer: nn.Module, name: str) -> bool:
        return "input_global_scale" in name

    def ours(self, cls: type) -> bool:
        return cls.__module__.partition(".")[0] == "vllm"

    def quantized(self, model: nn.Module) -> list[str]:
        """The layers of a model that hold 4-bit weights, by their names in vLLM."""
        return [
            name
            for name, layer in model.named_modules()
            if any(parameter.endswith("weight_packed") for parameter in self.checkpoint_form(layer))
        ]

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """What vLLM's code for loading finds around it."""
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        dtype = self._config.model_config.dtype
        with set_current_vllm_config(self._config), set_default_torch_dtype(dtype), self._device:
            yield


def _is_attention(layer: nn.Module) -> bool:
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    return isinstance(layer, (Attention, MLAAttention))
