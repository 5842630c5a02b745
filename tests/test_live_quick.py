"""Quick ways of processing are taken when they were proved, and never make anything but what the engine makes."""

from __future__ import annotations

import pytest
import torch
from helpers_live import Bare, One, Up, weight
from standin_engine import Model, checkpoint
from standin_layers import Method, fixed


class Factor(Method):
    """Looks at a number on the host, as kernels do that rescale."""

    def process_weights_after_loading(self, layer):
        factor = layer.weight.abs().max().log2().floor().exp2().item()
        layer.weight = fixed((layer.weight / factor).t().contiguous())
        layer.factor = torch.tensor(factor)


class Hidden(Method):
    """Computes where PyTorch's dispatcher does not see it."""

    def process_weights_after_loading(self, layer):
        layer.weight = fixed(torch.from_numpy(layer.weight.float().numpy()[::-1].copy()).to(layer.weight.dtype))


class Plain(Method):
    """Nothing that hangs on numbers."""

    def process_weights_after_loading(self, layer):
        layer.weight = fixed(layer.weight.t().contiguous() * 2)


class Layer(One):
    def __init__(self, method):
        super().__init__(method=method)
        self.factor = torch.tensor(0.0)

    def operands(self):
        return {"weight": self.weight, "factor": self.factor}


def up(method, first):
    return Up(lambda: Bare(one=Layer(method)), weight(first))


def numbers(seed, largest):
    values = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) * largest
    values[1, 2] = largest
    return values


def test_the_third_update_is_quick_and_all_are_exact():
    engine = Up(lambda: Model(), checkpoint(0))
    taken = []
    for seed in range(1, 6):
        engine.update(checkpoint(seed))
        engine.check(checkpoint(seed))
        taken.append(engine.live.quick.taken)
    proved = engine.live.quick.proved
    assert proved > 0
    assert engine.live.quick.refused == ["layers.1.experts"]  # it uses a table that may change between updates
    assert taken == [0, 0, proved, 2 * proved, 3 * proved]


def test_another_number_on_the_host_takes_the_engine_s_own_code():
    engine = up(Factor, numbers(0, 1.0))
    taken = []
    for i, largest in enumerate((1, 1, 1, 4, 4, 4, 1)):
        engine.update(weight(numbers(i, float(largest))))
        engine.check(weight(numbers(i, float(largest))))
        taken.append(engine.live.quick.taken)
    assert taken == [0, 0, 1, 1, 1, 2, 2]


def test_what_a_tape_misses_is_found_out():
    engine = up(Hidden, numbers(0, 1.0))
    for i in range(5):
        engine.update(weight(numbers(i, 1.0)))
        engine.check(weight(numbers(i, 1.0)))
    assert (engine.live.quick.taken, engine.live.quick.refused) == (0, ["one"])


def test_the_same_weights_again_prove_nothing():
    engine = up(Hidden, numbers(0, 1.0))
    for _ in range(4):
        engine.update(weight(numbers(1, 1.0)))
    engine.update(weight(numbers(2, 1.0)))
    engine.check(weight(numbers(2, 1.0)))
    assert (engine.live.quick.taken, engine.live.quick.refused) == (0, ["one"])


def test_the_same_weights_again_are_enough_where_all_is_seen():
    engine = up(Factor, numbers(0, 1.0))
    for i in (1, 1, 1, 2):
        engine.update(weight(numbers(i, 1.0)))
        engine.check(weight(numbers(i, 1.0)))
    assert engine.live.quick.taken == 2


def test_a_tensor_that_the_engine_has_replaced_is_found_where_it_is():
    engine = up(Plain, numbers(0, 1.0))
    for i in range(3):
        engine.update(weight(numbers(i, 1.0)))
    assert engine.live.quick.taken == 1
    layer = engine.model.one
    layer.weight = fixed(layer.weight.detach().clone())  # whoever does so records the graphs anew
    engine.update(weight(numbers(9, 1.0)))
    fresh = up(Plain, numbers(9, 1.0)).model.one
    assert torch.equal(layer.weight, fresh.weight) and engine.live.quick.taken == 1


@pytest.mark.parametrize(
    ("routine", "refused"),
    [
        (lambda own: {"weight": own["weight"].mT.contiguous() * 2}, []),
        (lambda own: {"weight": own["weight"].mT * 2}, []),  # other strides, the same numbers
        (lambda own: {"weight": own["weight"].mT.contiguous() * 3}, ["one"]),
        (lambda own: {"weight": own["weight"] * 2}, ["one"]),
        (lambda own: {"nothing": own["weight"]}, ["one"]),
        (lambda own: own["no such"], ["one"]),
    ],
)
def test_a_faster_routine_is_believed_only_where_it_is_right(routine, refused):
    engine = up(Plain, numbers(0, 1.0))
    engine.code.quicker = lambda layer: routine
    for i in range(1, 5):
        engine.update(weight(numbers(i, 1.0)))
        engine.check(weight(numbers(i, 1.0)))
    assert engine.live.quick.refused == refused
    assert engine.live.quick.taken == (0 if refused else 2)


def test_a_routine_that_is_right_at_first_only():
    engine = up(Plain, numbers(0, 1.0))

    def routine(own):
        return {"weight": own["weight"].mT.contiguous() * (2 if own["weight"].float().sum().item() < 20 else 3)}

    engine.code.quicker = lambda layer: routine
    for i, largest in enumerate((1.0, 1.0, 50.0, 50.0)):
        engine.update(weight(numbers(i, largest)))
        engine.check(weight(numbers(i, largest)))
    assert engine.live.quick.taken == 0
