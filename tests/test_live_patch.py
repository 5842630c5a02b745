"""Changes of single bytes give what a fresh model has; what cannot be changed like that is asked for whole."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from helpers_live import Bare, Up, bits
from standin_engine import Model, announced, checkpoint
from standin_layers import ALONE, Linear, Packed, Place, fixed, repacked
from test_live_graphs import Fake

from nvfp4_qat import live_model
from nvfp4_qat.errors import UserError
from nvfp4_qat.live_changes import Layout, places
from nvfp4_qat.live_graphs import Graphs
from nvfp4_qat.live_patch import Patcher
from nvfp4_qat.live_snapshot import Snapshot


def moved(weights, fraction, seed, kinds=("weight_packed", "weight_scale", "weight", "bias")):
    """Some bytes of some kinds of tensors are others; scales stay positive numbers."""
    g = torch.Generator().manual_seed(seed)
    new = {}
    for name, t in weights.items():
        data = t.clone().contiguous().view(-1).view(torch.uint8)
        if name.rpartition(".")[2] in kinds:
            chosen = torch.rand(data.shape, generator=g) < fraction
            flip = (
                1 if not name.endswith("packed") else torch.randint(1, 256, data.shape, generator=g, dtype=torch.uint8)
            )
            data = torch.where(chosen, data ^ flip, data)
        new[name] = data.view(t.dtype).view(t.shape)
    return new


class Sync:
    """An engine that has remembered updates, and what it was sent last."""

    def __init__(self, place=ALONE, fused=False):
        self.engine = Up(lambda: Model(place), checkpoint(0))
        self.fused = fused
        for seed in (1, 2, 3):
            self.full(checkpoint(seed))

    def full(self, weights):
        live = self.engine.live
        live.begin(announced(weights), remember=True)
        live.load(weights.items())
        live.commit()
        self.layout = Layout(announced(weights))
        self.snapshot = Snapshot(self.layout, torch.device("cpu"))
        for name, t in weights.items():
            self.snapshot.keep(name, t)

    def changed(self, weights):
        """Names of the tensors that were sent whole."""
        live = self.engine.live
        changes = list(self.snapshot.changes(weights.items()))
        live.begin_changes(announced(weights))
        needed = sorted(live.change(self.layout, places(changes)))
        random.Random(0).shuffle(needed)
        live.load((name, self.snapshot.view(name)) for name in needed)
        live.commit()
        self.engine.check(weights)
        return needed


@pytest.fixture(params=[False, True], ids=["by operations", "by a kernel"])
def way(request, monkeypatch):
    """How bytes are changed; a GPU has the kernel."""
    monkeypatch.setattr(live_model, "Patcher", functools.partial(Patcher, kernel=request.param))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("place", [ALONE, Place(0, 2), Place(1, 2), Place(0, 1, 1, 2)], ids=str)
def test_changed_bytes_give_what_a_fresh_model_has(place):
    sync = Sync(place)
    weights = checkpoint(3)
    for seed, fraction in enumerate((0.0, 0.001, 0.05, 0.5)):
        weights = moved(weights, fraction, seed)
        needed = sync.changed(weights)
        assert all(".experts." in name for name in needed)  # whose processing here uses a table that may change
        assert not needed or fraction > 0
    patcher = sync.engine.live.patcher
    assert patcher.nbytes > 0
    if patcher._kernel:
        routes = patcher._routes[2]
        assert routes._count > 20 and any(codes for keys in routes.keys.values() for _, codes in keys)
        assert {name.rpartition(".")[2] for name in routes.keys} >= {"weight_packed", "weight_scale", "weight", "bias"}
    sync.full(checkpoint(7))
    sync.engine.check(checkpoint(7))
    assert all(".experts." in name for name in sync.changed(moved(checkpoint(7), 0.01, 9)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["weight_packed", "weight_scale", "weight_global_scale", "weight", "bias"])
def test_changes_of_one_kind(kind):
    sync = Sync()
    weights = checkpoint(3)
    if kind == "weight_global_scale":
        weights = {n: t * 2 if n.endswith(kind) else t for n, t in weights.items()}
    else:
        weights = moved(weights, 0.1, 5, (kind,))
    sync.changed(weights)


class Scaled(Packed):
    """Codes are transposed; scales are multiplied by a factor that the host looks at."""

    def process_weights_after_loading(self, layer):
        layer.weight = fixed(repacked(layer.weight_packed))
        del layer.weight_packed
        wide = layer.weight_scale.float()
        factor = (448 / wide[wide > 0].max()).log2().floor().exp2().item()
        layer.weight_scale = fixed((wide * factor).half().mT.contiguous())
        layer.weight_global_scale = fixed(layer.weight_global_scale / factor)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("graphs", [False, True])
def test_layers_with_another_factor_are_sent_whole_and_no_others(graphs):
    def weights(seed, *largest):
        g = torch.Generator().manual_seed(seed)
        made = {}
        for name, value in zip("abc", largest, strict=True):
            scale = torch.rand(64, 4, generator=g) * value
            scale[0, 0] = value
            made[f"{name}.weight_packed"] = torch.randint(256, (64, 32), dtype=torch.uint8, generator=g)
            made[f"{name}.weight_scale"] = scale.to(torch.float8_e4m3fn)
            made[f"{name}.weight_global_scale"] = torch.rand(1, generator=g)
        return made

    sync = Sync.__new__(Sync)
    build = lambda: Bare(**{n: Linear(64, (64,), method=Scaled) for n in "abc"})  # noqa: E731
    sync.engine = Up(build, weights(0, 8.0, 8.0, 8.0))
    for seed in (1, 2, 3):
        sync.full(weights(seed, 8.0, 8.0, 8.0))
        if graphs:
            sync.engine.live.quick.graphs = Graphs(torch.device("cpu"), Fake())
    assert sync.engine.live.quick.proved == 3
    assert sync.changed(weights(4, 8.0, 8.0, 8.0)) == []
    assert {name[0] for name in sync.changed(weights(5, 8.0, 2.0, 8.0))} == {"b"}
    assert {name[0] for name in sync.changed(weights(6, 8.0, 2.0, 2.0))} == {"b", "c"}  # nothing is known of b now
    sync.full(weights(7, 8.0, 2.0, 2.0))
    sync.full(weights(8, 8.0, 2.0, 2.0))
    assert sync.changed(weights(9, 8.0, 2.0, 2.0)) == []
    assert (sync.engine.live.quick.graphs.count > 0) == graphs


def test_an_engine_that_remembers_nothing_takes_no_changes():
    engine = Up(Model, checkpoint(0))
    with pytest.raises(UserError, match="has remembered a complete update"):
        engine.live.begin_changes(announced(checkpoint(1)))
    engine.update(checkpoint(1))
    with pytest.raises(UserError, match="has remembered a complete update"):
        engine.live.begin_changes(announced(checkpoint(1)))
    sync = Sync()
    fewer = dict(list(checkpoint(1).items())[1:])
    with pytest.raises(UserError, match="the tensors of the last complete update"):
        sync.engine.live.begin_changes(announced(fewer))


def test_an_update_of_changes_that_breaks_off_is_healed_by_a_full_one():
    sync = Sync()
    live, new = sync.engine.live, moved(checkpoint(3), 0.1, 1)
    name = next(n for n in new if n.endswith("o_proj.weight_packed"))
    at = (bits_of(new[name]) ^ bits_of(checkpoint(3)[name])).nonzero()[:, 0]
    live.begin_changes(announced(new))
    first = sync.layout.starts[sync.layout.index[name]]
    live.change(sync.layout, [(at + first, (bits_of(new[name]) ^ bits_of(checkpoint(3)[name]))[at])])
    assert not live.whole
    live.abandon()
    with pytest.raises(UserError, match="has remembered a complete update"):
        live.begin_changes(announced(new))
    sync.full(new)
    sync.engine.check(new)


def bits_of(t):
    return torch.tensor(bits(t), dtype=torch.uint8)


def test_what_is_sent_whole_brings_all_layers_that_it_writes_into():
    live = Sync().engine.live
    live.begin_changes(announced(checkpoint(3)))
    recipe = live._recipe
    first, second = (recipe.groups_of[f"layers.{i}.o_proj.weight_packed"][0] for i in range(2))
    recipe.groups_of["layers.0.o_proj.weight_packed"] = [first, second]  # one tensor for two layers
    second.awaited.add("layers.0.o_proj.weight_packed")
    live.expect_whole(["layers.0.o_proj.weight_scale"])
    assert live._missing == first.awaited | second.awaited
    assert "layers.1.o_proj.weight_scale" in live._missing


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["norm.weight", "layers.0.o_proj.weight", "layers.0.o_proj.weight_scale"])
def test_a_layer_that_was_given_another_parameter_is_sent_whole(name):
    sync = Sync()
    weights = moved(checkpoint(3), 0.05, 0)
    sync.changed(weights)
    layer, _, parameter = name.rpartition(".")
    owner = sync.engine.model.get_submodule(layer)
    owner._parameters[parameter] = torch.nn.Parameter(
        owner._parameters[parameter].detach().clone(), requires_grad=False
    )
    sync.engine.graph = type(sync.engine.graph)(sync.engine.model)
    whole = []
    for seed in (1, 2):
        weights = moved(weights, 0.05, seed)
        whole.append(any(n.startswith(f"{layer}.") for n in sync.changed(weights)))
    assert whole[0] == (layer != "norm")  # a plain parameter is changed where it is now
