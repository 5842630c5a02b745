"""Whatever an engine's processing does to a layer, an update gives what a fresh model has, where it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_live import Bare, One, Reversed, Up, one, weight
from standin_engine import announced, checkpoint
from standin_layers import BF16, HIDDEN, Attention, KernelConfig, Linear, Method, fixed
from torch import nn

from nvfp4_qat.errors import MismatchError

# Layers of which one weight is processed


class Swapped(Method):
    """The second half of the rows before the first, as for gate and up."""

    def process_weights_after_loading(self, layer):
        layer.weight.data = torch.cat(layer.weight.data.chunk(2)[::-1])


class Scaled(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.mul_(layer.weight[0, 0].clone())


class Renamed(Method):
    def process_weights_after_loading(self, layer):
        layer.kernel_weight = fixed(layer.weight.data)
        del layer.weight


class Replaced(Method):
    def process_weights_after_loading(self, layer):
        layer.weight = fixed(layer.weight.data.mT.contiguous().mT.half())


class Padded(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.data = nn.functional.pad(layer.weight.data, (0, 2))


class Views(Method):
    """Two tensors at one address, the smaller one first."""

    def process_weights_after_loading(self, layer):
        whole = layer.weight.data * 2
        layer.head, layer.table = whole[:2], whole


class Expanded(Method):
    """As vLLM's scale of all experts' inputs: one number that looks like several."""

    def process_weights_after_loading(self, layer):
        layer.input_scale = layer.weight.data.max().expand(4)


class BlockScale(Method):
    def process_weights_after_loading(self, layer):
        layer.block_scale = layer.weight.data.amax(1)


class Buffered(Method):
    """Leaves the weight, and writes into a buffer that was there."""

    def process_weights_after_loading(self, layer):
        if not hasattr(layer, "amax"):
            layer.register_buffer("amax", torch.zeros((), dtype=BF16))
        layer.amax.copy_(layer.weight.abs().max())


class Optional(Method):
    """Asks for a bias that is None."""

    def process_weights_after_loading(self, layer):
        if layer.bias is None:
            layer.weight = fixed(layer.weight.data * 2)


class Ordered(Method):
    """Reads a tensor that the layer was made with."""

    def process_weights_after_loading(self, layer):
        layer.weight = fixed(layer.weight.data[layer.order])


class ConfigMade(Method):
    def process_weights_after_loading(self, layer):
        self.config = KernelConfig(layer.weight.data, layer.weight.data.sum(0))


class ConfigFilled(Method):
    """Writes into a configuration that it was made with."""

    def __init__(self):
        self.config = SimpleNamespace()

    def process_weights_after_loading(self, layer):
        self.config.sums = layer.weight.data.sum(0)


class ConfigInDict(Method):
    def __init__(self):
        self.held = {}

    def process_weights_after_loading(self, layer):
        self.held["sums"] = layer.weight.data.sum(0)

    config = property(lambda self: SimpleNamespace(**self.held))


class AsModule(nn.Module, Method):
    """As vLLM's method for experts that are not quantized: a module itself, and so a child of its layer."""

    def process_weights_after_loading(self, layer):
        self.config = KernelConfig(layer.weight.data, layer.weight.data.sum(0))


class WithScheme(Method):
    """The layer knows by two ways the object that processes it."""

    def __init__(self):
        self.scheme = ConfigMade()

    def process_weights_after_loading(self, layer):
        layer.scheme.process_weights_after_loading(layer)

    config = property(lambda self: self.scheme.config)


class Kept(Method):
    """Leaves the weight, and writes into what it made the first time."""

    def process_weights_after_loading(self, layer):
        new = layer.weight.data.amax(1)
        if hasattr(layer, "kept"):
            layer.kept.copy_(new)
        else:
            layer.kept = new


class KeptOnce(Method):
    """As layers that make something the first time only."""

    def process_weights_after_loading(self, layer):
        if not hasattr(layer, "sums"):
            layer.sums = layer.weight.data.sum(0)
        if "rows" not in layer._buffers:
            layer.register_buffer("rows", layer.weight.data.sum(1))
        if not getattr(layer, "done", False):
            layer.weight = fixed(layer.weight.data * 2)
            layer.done = True


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


class Odd(One):
    """A layer with what these methods ask for."""

    def __init__(self, method):
        super().__init__(method=method)
        self.register_parameter("bias", None)
        self.order = torch.tensor([2, 0, 3, 1])
        self.scheme = getattr(self.quant_method, "scheme", None)


@pytest.mark.parametrize(
    "method",
    [
        *(Method, Renamed, Replaced, Padded, ConfigMade),
        Views,
        Expanded,
        BlockScale,
        Buffered,
        Optional,
        Ordered,
        KeptOnce,
        ConfigFilled,
        ConfigInDict,
        AsModule,
        WithScheme,
    ],
)
def test_whatever_processing_does_is_done_again(method):
    engine = Up(lambda: Bare(one=Odd(method)), weight())
    for _ in range(5):  # the last ones by quick ways
        weights = weight()
        engine.update(weights)
        engine.check(weights)


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


class Counted(One):
    def __init__(self):
        super().__init__(method=Method)
        self.count = fixed(torch.tensor(3))


def test_single_integers_are_weights_too():
    engine = Up(lambda: Bare(one=Counted()), weight() | {"one.count": torch.tensor(5)})
    weights = weight() | {"one.count": torch.tensor(7)}
    engine.update(weights)
    engine.check(weights)


class Shared(Bare):
    """Two layers of one parameter."""

    def __init__(self, method):
        super().__init__(one=Odd(method), two=Odd(method))
        self.two.weight = self.one.weight


@pytest.mark.parametrize("method", [Method, ConfigMade, Reversed, Scaled])
def test_layers_that_share_a_parameter_are_processed_in_their_order(method):
    engine = Up(lambda: Shared(method), weight())
    for _ in range(5):
        weights = weight()
        engine.update(weights)
        engine.check(weights)


def test_layers_that_shared_a_parameter_before_processing_are_refused():
    engine = Up(lambda: Shared(Replaced), weight())
    before = engine.everything()
    with pytest.raises(MismatchError, match="nothing was changed: two.weight: nothing brings it"):
        engine.update(weight())
    assert engine.everything() == before


class KeptAttention(Attention):
    """Keeps what it makes as a parameter, like vLLM's MLA: each time, the first time only, or by copies into it."""

    def __init__(self, kv_b_proj, again):
        super().__init__(kv_b_proj)
        self.again = again

    def process_weights_after_loading(self, dtype):
        super().process_weights_after_loading(dtype)
        new = self.__dict__.pop("w_uv").mT
        if "kept" not in self._parameters:
            self.kept = fixed(new)
        else:
            self.again(self, new)


@pytest.mark.parametrize(
    "again",
    [
        lambda layer, new: None,
        lambda layer, new: layer.kept.data.copy_(new),
        lambda layer, new: setattr(layer, "kept", fixed(new)),
        lambda layer, new: setattr(layer.kept, "data", new),
    ],
)
def test_whatever_attention_makes_of_other_layers_weights_is_made_again(again):
    def build():
        projection = Linear(HIDDEN, [2 * HIDDEN])
        return Bare(kv_b_proj=projection, attn=KeptAttention(projection, again))

    def weights(seed):
        found = {name.removeprefix("layers.0."): t for name, t in checkpoint(seed).items()}
        return {name: t for name, t in found.items() if name.startswith("kv_b_proj")}

    engine = Up(build, weights(1))
    for seed in (2, 3):
        engine.update(weights(seed))
        engine.check(weights(seed))


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


# Layers whose processing is left out because it does nothing


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
