"""The form of layers before processing that is made anew is the one that vLLM recorded."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
from engine import CPU, Engine
from torch import nn

from nvfp4_qat.live_vllm import VllmCode
from nvfp4_qat.live_vllm_forms import constructed

NEVER_RECORDED = ("bias", "e_score_correction_bias")
"""Which of these, depends on vLLM's version; checkpoints bring them."""


def described(parameter: nn.Parameter) -> dict[str, Any]:
    attributes = {n: v for n, v in parameter.__dict__.items() if not isinstance(v, MethodType)}
    loaders = {n: (v.__func__, v.__self__) for n, v in parameter.__dict__.items() if isinstance(v, MethodType)}
    form = {"class": type(parameter), "shape": parameter.shape, "dtype": parameter.dtype, "stride": parameter.stride()}
    return {**form, **attributes, **loaders}


def recorded(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's parameters before processing, as vLLM remembers them for its own reloading."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    parameters, _ = get_layerwise_info(layer).restore_metadata
    return {name: restore_layer_refs(to_meta_tensor(form), layer) for name, form in parameters.items()}


def test_forms_are_those_recorded(engine: Engine) -> None:
    pytest.importorskip("vllm.model_executor.model_loader.reload", reason="this vLLM records nothing")
    model = engine.model(engine.family.checkpoint(1))
    code = VllmCode(model, engine.config, CPU)
    compared = 0
    for name, layer in model.named_modules():
        made, noted = code.checkpoint_form(layer), {} if code.derives(layer) else recorded(layer)
        assert {n: described(made[n]) for n in noted} == {n: described(p) for n, p in noted.items()}, name
        assert [n for n in made if n not in noted and n not in NEVER_RECORDED] == [], name
        compared += len(noted)
    assert compared > len(list(model.parameters())) // 2


def test_live_model_is_not_touched(engine: Engine) -> None:
    model = engine.model(engine.family.checkpoint(1))
    context = dict(engine.config.compilation_config.static_forward_context)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    constructed(model, engine.config, CPU)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert engine.config.compilation_config.static_forward_context == context
