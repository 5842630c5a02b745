"""What `begin` finds out: what cannot become a complete set of weights, by name and as one error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers_live import NEW, OLD, Bare, One, Up, one, weight, without
from standin_engine import Model, announced, fused
from standin_layers import BF16, EXPERTS, FP8, HIDDEN, VOCAB, Embedding, Norm

from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_recipe import Incoming, Part


def new(name, *shape, dtype=BF16, parts=None):
    return Incoming(name, shape, dtype, (Part(name),) if parts is None else parts)


def refused(entries, *expected):
    """The error of `begin`, which has left everything as it was."""
    engine = Up(Model, OLD)
    before, dicts = engine.everything(), [layer._parameters for layer in engine.model.modules()]
    with pytest.raises(MismatchError) as caught:
        engine.live.begin(entries)
    assert engine.everything() == before
    assert all(a is b._parameters for a, b in zip(dicts, engine.model.modules(), strict=True))
    assert not engine.live.updating and engine.live.whole
    for text in (*expected, "nothing was changed"):
        assert text in str(caught.value)
    engine.update(NEW)
    engine.check(NEW)
    return str(caught.value)


def test_what_is_missing_is_named_and_counted():
    found = {
        "layers.0.q_proj.weight_scale": "layers.0.qkv_proj.weight_scale: 64 of 192 elements are missing",
        "layers.0.o_proj.bias": "layers.0.o_proj.bias: nothing brings it",
        "layers.1.experts.2.down_proj.weight_packed": "experts.w2_weight_packed: 512 of 2048 elements are missing",
        "layers.1.experts.0.up_proj.weight_global_scale": "w13_weight_global_scale: 1 of 8 elements are missing",
        "norm.weight": "norm.weight: nothing brings it",
        "embed.weight": "embed.weight: nothing brings it",
    }
    assert refused(announced(without(NEW, *found)), *found.values()).count(";") == len(found)


@pytest.mark.parametrize("at", ["layers.7.q_proj", "layers.0.rotary", "layers.1.experts.0.up_proj", "lm_head", "x"])
def test_what_is_unexpected_is_named_whether_loaders_raise_or_pass_over_it(at):
    assert (
        refused([*announced(NEW), new(f"{at}.zeros", 3)], f"{at}.zeros: the engine has no such weight").count(";") == 1
    )


def test_names_that_are_like_an_unknown_one_are_offered():
    entries = [new("layers.0.qkv_proj.weight_packd", 3), new("layers.1.experts.0.gate.weight", 3), new("?", 3)]
    refused(
        [*announced(NEW), *entries, new("nothing", 3, parts=())],
        "layers.0.qkv_proj.weight_packd: the engine has no such weight (it has layers.0.qkv_proj.weight_packed, ",
        "?: the engine has no such weight",
        "nothing: the engine has no such weight",
    )


def test_what_has_another_shape_is_named():
    narrow = {"layers.0.down_proj.weight_packed": (HIDDEN, 8), "embed.weight": (VOCAB + 1, HIDDEN), "norm.weight": (3,)}
    entries = [replace(e, shape=narrow.get(e.name, e.shape)) for e in announced(NEW)]
    refused(entries, *narrow, "norm.weight of shape [3] does not fit")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_what_has_another_dtype_is_named(dtype):
    name = "layers.0.o_proj.weight_scale"
    refused([replace(e, dtype=dtype) if e.name == name else e for e in announced(NEW)], name)


@pytest.mark.parametrize("of", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("to", [BF16, torch.float16, torch.float32])
def test_floats_are_converted_but_not_where_fp16_would_change_them(of, to):
    engine = Up(one(dtype=to), weight(dtype=to))
    if of == to or to == torch.float32 or (of, to) == (torch.float32, BF16):
        engine.update(weight(dtype=of))
        return
    with pytest.raises(MismatchError, match=f"one.weight is {of}, but one.weight is {to}"):
        engine.live.begin(announced(weight(dtype=of)))
    assert engine.live.whole


def test_what_comes_twice_is_named():
    entries = announced(NEW)
    twice = [entries[3], entries[3], entries[5]]
    refused([*entries, *twice], *(f"{entry.name} is listed twice" for entry in twice))
    again = new("more", HIDDEN, HIDDEN // 2, dtype=torch.uint8, parts=(Part("layers.0.k_proj.weight_packed"),))
    refused([*entries, again], "layers.0.qkv_proj.weight_packed: 512 elements are written twice")
    experts = (Part("layers.1.experts.{}.down_proj.weight_packed", 1, 2),)
    again = new("more", EXPERTS, HIDDEN, HIDDEN // 2, dtype=torch.uint8, parts=experts)
    refused([*fused(NEW)[1], again], "layers.1.experts.w2_weight_packed: 1024 elements are written twice")


def test_all_that_is_wrong_is_one_error():
    entries = announced(without(NEW, "norm.weight", "layers.1.kv_b_proj.weight_scale"))
    entries = [replace(e, shape=(5, 5)) if e.name == "layers.0.gate_proj.weight_packed" else e for e in entries]
    names = ("norm.weight", "layers.1.kv_b_proj.weight_scale", "layers.0.gate_proj.weight_packed", "layers.9.bias")
    refused([*entries, entries[0], new("layers.9.bias", 3)], *names, "embed.weight is listed twice")


def test_a_long_list_of_problems_ends_with_how_many_more():
    error = refused([*announced(NEW), *(new(f"x.{i}", 1) for i in range(60))], "x.0:", "x.49:", "and 10 more")
    assert "x.50" not in error


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda e: replace(e, parts=tuple(replace(p, count=3) for p in e.parts)), "1024 of 4096 elements are missing"),
        (lambda e: replace(e, parts=e.parts[:1]), "2048 of 4096 elements are missing"),
        (lambda e: replace(e, shape=(2, 64, 16)), "does not fit"),
        (lambda e: replace(e, shape=(4,)), "does not fit"),
    ],
)
def test_parts_that_are_not_the_whole_are_refused(change, expected):
    name = "layers.1.experts.gate_up_proj_weight_packed"
    refused([change(e) if e.name == name else e for e in fused(NEW)[1]], expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_has_its_own_parameters_after_a_loader_raised(error, monkeypatch):
    engine = Up(Model, OLD)
    before, dicts = engine.everything(), [layer._parameters for layer in engine.model.modules()]

    def broken(self, param, loaded_weight):
        raise error("no")

    monkeypatch.setattr(Embedding, "weight_loader", broken)
    for form in engine.code.forms[engine.model.embed].values():
        form.weight_loader = engine.model.embed.weight_loader
    with pytest.raises(MismatchError if error is ValueError else error, match="no"):
        engine.live.begin(announced(NEW))
    assert engine.everything() == before
    assert all(a is b._parameters for a, b in zip(dicts, engine.model.modules(), strict=True))


class Counting(One):
    """Its loader notes something beside the parameter."""

    def __init__(self):
        super().__init__(self.weight_loader)
        self.register_buffer("seen", torch.zeros(2))

    def weight_loader(self, param, loaded_weight):
        self.seen.fill_(3.0)
        param.data.copy_(loaded_weight)


def test_a_refused_update_has_not_run_loaders_on_live_buffers():
    engine = Up(lambda: Bare(one=Counting(), norm=Norm()), weight() | {"norm.weight": torch.ones(HIDDEN)})
    engine.model.one.seen.zero_()
    with pytest.raises(MismatchError):
        engine.live.begin(announced(weight()))
    assert not engine.model.one.seen.any()


def test_experts_in_one_tensor_are_one_copy_for_each_parameter_and_half():
    engine = Up(Model, OLD)
    engine.live.begin(fused(NEW)[1])
    loads = {name: load for name, load in engine.live._recipe.loads.items() if ".experts." in name}
    assert {name.partition("experts.")[2]: len(load.copies) for name, load in loads.items()} == {
        **{f"gate_up_proj_{s}": 2 for s in ("weight_packed", "weight_scale", "weight_global_scale")},
        **{f"down_proj_{s}": 1 for s in ("weight_packed", "weight_scale", "weight_global_scale")},
    }
    scales = [c for load in loads.values() for c in load.copies if c.key.endswith("weight_scale")]
    assert {(c.source.dtype, c.destination.dtype) for c in scales} == {(FP8, FP8)}
