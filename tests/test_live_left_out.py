"""Processing is left out only where it does nothing, and nothing notices how that is found out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_live import Bare, Odd, Reversed, Scaled, Up, one, weight
from standin_engine import announced
from standin_layers import BF16, Method, fixed


class Swapped(Method):
    """The second half of the rows before the first, as for gate and up."""

    def process_weights_after_loading(self, layer):
        layer.weight.data = torch.cat(layer.weight.data.chunk(2)[::-1])


class Kept(Method):
    """Leaves the weight, and writes into what it made the first time."""

    def process_weights_after_loading(self, layer):
        new = layer.weight.data.amax(1)
        if hasattr(layer, "kept"):
            layer.kept.copy_(new)
        else:
            layer.kept = new


class ConfigKept(Method):
    def process_weights_after_loading(self, layer):
        new = layer.weight.data.amax(1)
        if self.config is None:
            self.config = SimpleNamespace(sums=new)
        else:
            self.config.sums.copy_(new)


class Owned(Method):
    """Knows its layer, and does not ask which one it is given."""

    layer = None

    def process_weights_after_loading(self, layer):
        self.layer = self.layer or layer
        self.layer.doubled = fixed(self.layer.weight.data * 2)


class Clipped(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.clamp_(-10, 10)


class Particular(Method):
    """Refuses some weights."""

    def process_weights_after_loading(self, layer):
        if layer.weight.isnan().any() or layer.weight.abs().max() > 1000 or (layer.weight == 0).sum() < 8:
            raise ValueError("these are no weights of mine")


class Handle:
    """Something that is open until nobody has it any more."""

    closed = 0

    def __del__(self):
        Handle.closed += 1


class Holding(Method):
    def __init__(self):
        self.handle = Handle()

    def process_weights_after_loading(self, layer):
        layer.weight = fixed(layer.weight.data * 2)


@pytest.mark.parametrize(
    "method",
    [
        Kept,
        ConfigKept,
        Owned,
        Clipped,
        Particular,
    ],
)
def test_whether_processing_does_something_is_found_out_without_touching_anything(method):
    sparse = torch.randn(4, 6) * (torch.arange(24).view(4, 6) % 2)
    engine = Up(lambda: Bare(one=Odd(method)), weight(sparse))
    for factor in (1, 30, 1 / 7):
        weights, before = weight(sparse * factor), engine.everything()
        engine.live.begin(announced(weights))
        assert engine.everything() == before
        engine.update(weights)
        engine.check(weights)


def test_random_states_are_left_alone():
    engine, state = Up(one(method=Method), weight()), torch.get_rng_state()
    engine.live.begin(announced(weight(torch.zeros(4, 6))))
    assert torch.equal(torch.get_rng_state(), state)


def test_handles_of_helpers_stay_open():
    engine, closed = Up(one(method=Holding), weight()), Handle.closed
    engine.update(weight())
    assert Handle.closed == closed


RANDOM = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
ROWS, UNIT = RANDOM[:1].expand(4, 6), torch.cat((torch.ones(4, 1), RANDOM[:, 1:]), 1)


@pytest.mark.parametrize(
    "method, first",
    [
        *((Reversed, RANDOM), (Swapped, RANDOM), (Scaled, RANDOM), (Reversed, torch.zeros(4, 6))),
        *((method, torch.ones(4, 6)) for method in (Reversed, Swapped)),
        *((method, ROWS) for method in (Reversed, Swapped)),
        (Scaled, UNIT),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_processing_in_place_is_never_left_out(method, first, dtype):
    engine = Up(one(None, method, dtype), weight(dtype=dtype))
    for new in (first, None, None):
        weights = weight(new, dtype)
        engine.update(weights)
        engine.check(weights)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_constant_bytes_are_not_mistaken_for_unprocessed_weights(value):
    engine = Up(one(None, Reversed, torch.uint8), weight(torch.zeros(4, 6), torch.uint8))
    for new in (torch.full((4, 6), value), torch.arange(24).view(4, 6), 2 * torch.arange(24).view(4, 6)):
        engine.update(weight(new, torch.uint8))
        engine.check(weight(new, torch.uint8))
