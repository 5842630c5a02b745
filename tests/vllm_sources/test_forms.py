"""The form of layers before processing that is made anew is the one that vLLM recorded."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
from engine import CPU, Engine
from torch import nn

from nvfp4_qat.live_vllm import VllmCode
from nvfp4_qat.live_vllm_forms import forms_before_processing

NEVER_RECORDED = ("bias", "e_score_correction_bias")
"""Which of these, depends on vLLM's version; checkpoints bring them."""


def described(parameter: nn.Parameter) -> dict[str, Any]:
    attributes = {n: v for n, v in parameter.__dict__.items() if not isinstance(v, MethodType)}
    loaders = {n: (v.__func__, v.__self__) for n, v in parameter.__dict__.items() if isinstance(v, MethodType)}
    form = {"class": type(parameter), "shape": parameter.shape, "dtype": parameter.dtype, "stride": parameter.stride()}
    return {**form, **attributes, **loaders}


def test_forms_are_those_recorded(engine: Engine) -> None:
    pytest.importorskip("vllm.model_executor.model_loader.reload", reason="this vLLM records nothing")
    model = engine.model(engine.family.checkpoint(1))
    code = VllmCode(engine.config, CPU)
    rebuilt = forms_before_processing(model, engine.config, CPU)
    for name, layer in model.named_modules():
        recorded = code.checkpoint_form(layer)
        made = {} if code.derives(layer) else rebuilt.get(name, {})
        assert {n: described(made[n]) for n in recorded} == {n: described(p) for n, p in recorded.items()}, name
        assert [n for n in made if n not in recorded and n not in NEVER_RECORDED] == [], name


def test_live_model_is_not_touched(engine: Engine) -> None:
    model = engine.model(engine.family.checkpoint(1))
    context = dict(engine.config.compilation_config.static_forward_context)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    forms_before_processing(model, engine.config, CPU)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert engine.config.compilation_config.static_forward_context == context
