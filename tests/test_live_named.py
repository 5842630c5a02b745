"""What processing makes of weights and an update cannot renew is named: numbers, and parameters that come or go."""

from __future__ import annotations

import pytest
import torch
from helpers_live import Bare, One, Up, one, weight
from standin_layers import Method, fixed

from nvfp4_qat.errors import MismatchError


class Limited(Method):
    def process_weights_after_loading(self, layer):
        layer.limit = float(layer.weight.max())


def test_numbers_made_from_weights_are_renewed_or_named():
    engine, weights = Up(one(method=Limited), weight()), weight()
    try:
        engine.update(weights)
    except MismatchError as error:
        assert "limit" in str(error)
    else:
        assert engine.model.one.limit == float(weights["one.weight"].max())


class Growing(Method):
    """Gives a tensor more than the first time."""

    def process_weights_after_loading(self, layer):
        self.times = getattr(self, "times", 0) + 1
        layer.weight = fixed(layer.weight.data * 2)
        if layer.weight[0, 0] > 0:
            layer.extra = fixed(torch.ones(3))


def test_parameters_that_were_not_there_are_named():
    engine = Up(one(method=Growing), weight(-torch.ones(4, 6)))
    with pytest.raises(MismatchError, match="one does not come out as .*extra"):
        engine.update(weight(torch.ones(4, 6)))


def test_parameters_that_are_gone_are_named():
    engine = Up(one(method=Growing), weight(torch.ones(4, 6)))
    before = engine.everything()
    with pytest.raises(MismatchError, match="one does not come out as .*extra is gone"):
        engine.update(weight(-torch.ones(4, 6)))
    assert engine.everything() == before


class InputScaled(Method):
    """As vLLM's W4A4: what is loaded is replaced by something of another shape, from which it cannot be told."""

    def process_weights_after_loading(self, layer):
        layer.input_global_scale = fixed(1 / layer.input_global_scale.max())


class InputFolded(Method):
    """What is loaded is put into something else, and forgotten."""

    def process_weights_after_loading(self, layer):
        layer.alpha = fixed(1 / layer.input_global_scale.max())
        del layer.input_global_scale


class InputScaledLayer(One):
    def __init__(self, method):
        super().__init__(method=method)
        self.input_global_scale = fixed(torch.ones(3))


@pytest.mark.parametrize(
    "method",
    [
        InputScaled,
        InputFolded,
    ],
)
def test_optional_parameters_that_are_processed_stay_what_they_were_or_are_asked_for(method):
    old = weight() | {"one.input_global_scale": torch.full((3,), 4.0)}
    engine = Up(lambda: Bare(one=InputScaledLayer(method)), old)
    before = engine.everything()
    with pytest.raises(MismatchError, match="nothing was changed: one.input_global_scale"):
        engine.update(weight())
    assert engine.everything() == before
    new = weight() | {"one.input_global_scale": torch.full((3,), 8.0)}
    engine.update(new)
    engine.check(new)
