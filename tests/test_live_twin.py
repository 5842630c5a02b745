"""Whatever an engine's processing does to a layer, an update gives what a fresh model has, where it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_live import Bare, Odd, One, Reversed, Scaled, Up, weight
from standin_engine import checkpoint
from standin_layers import BF16, HIDDEN, Attention, KernelConfig, Linear, Method, fixed
from torch import nn

from nvfp4_qat.errors import MismatchError


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
