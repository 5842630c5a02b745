"""An engine that began with random weights has, after one update, what one has that loaded the checkpoint."""

from __future__ import annotations

import torch
from comparing import different, kernel_tensors, reachable_tensors
from engine import CPU, Engine
from test_updates import named, update
from torch import nn

from nvfp4_qat.live_dummy import reset_scales


def random_start(engine: Engine) -> nn.Module:
    """As `vllm` starts with ``load_format="dummy"``."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model = engine.unloaded()
    torch.manual_seed(0)
    DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, engine.config.model_config)
    process_weights_after_loading(model, engine.config.model_config, CPU)
    return model


def plain_numbers(model: nn.Module) -> dict[str, float]:
    """Scales that attention layers hold as numbers."""
    return {
        f"{name}.{attribute}": value
        for name, layer in model.named_modules()
        for attribute, value in vars(layer).items()
        if attribute.endswith("_scale_float") and value is not None
    }


def test_nothing_of_random_weights_survives_an_update(engine: Engine) -> None:
    checkpoint = engine.family.checkpoint(1)
    model, fresh = random_start(engine), engine.model(checkpoint)
    reset_scales(model)
    live = engine.live(model)
    update(live, named(checkpoint, "fused-experts"), 1)
    assert live.whole
    assert different(kernel_tensors(model), kernel_tensors(fresh)) == []
    assert different(reachable_tensors(model), reachable_tensors(fresh)) == []
    assert plain_numbers(model) == plain_numbers(fresh)


def test_scales_of_attention_would_survive(engine: Engine) -> None:
    """Which is why they are set back. MLA has none that random weights reach."""
    model = random_start(engine)
    assert (reset_scales(model) > 0) == (not engine.family.name.startswith("deepseek"))
    assert reset_scales(model) == 0
    assert all(value == 1.0 for value in plain_numbers(model).values())
