"""Mistakes while an update goes on: it goes on without them, or is given up, and then the next one heals the model."""

from __future__ import annotations

import pytest
import torch
from helpers_live import NEW, up, without
from standin_engine import announced, checkpoint
from standin_layers import fixed

from nvfp4_qat.errors import MismatchError, UserError


def test_rows_that_do_not_fit_or_come_again_are_refused_and_the_update_goes_on():
    engine, name = up(), "layers.0.down_proj.weight_packed"
    packed = NEW[name]
    engine.live.begin(announced(NEW))
    for first, rows in ((-1, packed[:2]), (31, packed[:2]), (0, packed[:, 1:]), (0, packed[:0]), (0, packed.int())):
        with pytest.raises(MismatchError, match=rf"{name} was announced as torch.uint8 \[32, 16\]; its rows from"):
            engine.live.load_rows(name, first, rows)
    engine.live.load_rows(name, 8, packed[8:20])
    for first, stop in ((0, 9), (19, 32), (10, 12), (8, 20)):
        with pytest.raises(MismatchError, match=f"some rows of {name} from {first} to {stop - 1} have come before"):
            engine.live.load_rows(name, first, packed[first:stop])
    with pytest.raises(MismatchError, match=f"some rows of {name} have come before"):
        engine.live.load([(name, packed)])
    engine.live.load(without(NEW, name).items())
    with pytest.raises(MismatchError, match=rf"1 tensors have not come: {name} \(not all of it\)"):
        engine.live.commit()
    engine.live.load_rows(name, 20, packed[20:])
    engine.live.load_rows(name, 0, packed[:8])
    with pytest.raises(MismatchError, match=f"{name} has come before"):
        engine.live.load_rows(name, 0, packed[:8])
    engine.live.commit()
    engine.check(NEW)


def test_nothing_is_taken_before_an_update_begins():
    engine = up()
    for call in (lambda: engine.live.load([]), engine.live.commit):
        with pytest.raises(UserError, match="begin first"):
            call()
    engine.update(NEW)
    with pytest.raises(UserError, match="begin first"):
        engine.live.load(NEW.items())
    engine.check(NEW)


def test_tensors_that_are_not_those_announced_are_refused_and_the_update_goes_on():
    engine, first = up(), "layers.0.q_proj.weight_scale"
    scale, before = NEW[first], engine.everything()
    engine.live.begin(announced(NEW))
    for wrong, message in [
        ({"layers.0.new.weight": scale}, "layers.0.new.weight was not announced"),
        ({first: scale[:-1]}, rf"{first} was announced as torch.float8_e4m3fn \[32, 2\] and is .* \[31, 2\]"),
        ({first: scale.view(torch.uint8)}, f"{first} was announced as .* and is torch.uint8"),
        ({first: scale.float()}, f"{first} was announced as .* and is torch.float32"),
    ]:
        with pytest.raises(MismatchError, match=message):
            engine.live.load(wrong.items())
    assert engine.everything() == before and engine.live.updating
    engine.live.load([(first, scale)])
    with pytest.raises(MismatchError, match=f"{first} has come before"):
        engine.live.load([(first, scale)])
    with pytest.raises(MismatchError, match=f"{len(NEW) - 1} tensors have not come: .* and {len(NEW) - 21} more"):
        engine.live.commit()
    engine.live.load(without(NEW, first, "norm.weight").items())
    with pytest.raises(MismatchError, match="1 tensors have not come: norm.weight$"):
        engine.live.commit()
    assert not engine.live.whole and engine.live.updating
    engine.live.load([("norm.weight", NEW["norm.weight"])])
    engine.live.commit()
    engine.check(NEW)


@pytest.mark.parametrize("how", ["begin", "abandon", "refused"])
def test_an_update_that_is_given_up_leaves_a_mixture_and_the_next_one_heals(how):
    engine, names, third = up(), list(NEW), checkpoint(3)
    engine.live.begin(announced(NEW))
    assert engine.live.whole
    engine.live.load([(name, NEW[name]) for name in names[::2]])
    assert not engine.live.whole and engine.live.updating
    if how == "abandon":
        engine.live.abandon()
    elif how == "refused":
        with pytest.raises(MismatchError):
            engine.live.begin(announced(without(NEW, "norm.weight")))
    assert engine.live.updating == (how == "begin")
    if how != "begin":
        with pytest.raises(UserError):
            engine.live.commit()
    engine.live.begin(announced(third))
    engine.live.load([(name, third[name]) for name in names[1::2]])
    with pytest.raises(MismatchError, match="have not come"):
        engine.live.commit()
    assert not engine.live.whole
    engine.live.load([(name, third[name]) for name in names[::2]])
    engine.live.commit()
    engine.check(third)


def test_processing_that_gives_another_form_names_the_layer_and_ends_the_update():
    engine, name = up(), "layers.0.gate_up_proj"
    before, process = engine.everything(), engine.code.process
    widths = engine.model.get_submodule(name).widths

    def longer(twin):
        process(twin)
        if twin.widths is widths:
            twin.weight = fixed(torch.cat((twin.weight, twin.weight)))

    engine.code.process = longer
    parts = {n: t for n, t in NEW.items() if n.startswith(("layers.0.gate_proj", "layers.0.up_proj"))}
    engine.live.begin(announced(NEW))
    with pytest.raises(
        MismatchError, match=rf"{name} does not come out as .*weight was int32\[4, 80\] and is int32\[8"
    ):
        engine.live.load(parts.items())
    assert engine.everything() == before
    assert not engine.live.whole and not engine.live.updating
    with pytest.raises(UserError):
        engine.live.commit()
    engine.code.process = process
    engine.update(NEW)
    engine.check(NEW)


def test_attention_that_gives_another_form_is_named():
    engine = up()
    derive = engine.code.derive
    engine.code.derive = lambda layer: derive(layer) or setattr(layer, "w_uv", layer.w_uv[:, 1:])
    with pytest.raises(MismatchError, match="layers.0.attn does not come out .*w_uv was"):
        engine.update(NEW)
    assert not engine.live.whole and not engine.live.updating
    engine.code.derive = derive
    engine.update(NEW)
    engine.check(NEW)


def test_an_update_in_which_processing_raised_is_given_up():
    engine, failed = up(), []
    process = engine.code.process

    def out_of_memory(twin):
        if not failed and twin.quant_method.config is not None:
            failed.append(twin)
            raise torch.OutOfMemoryError("CUDA out of memory")
        process(twin)

    engine.code.process = out_of_memory
    engine.live.begin(announced(NEW))
    with pytest.raises(torch.OutOfMemoryError):
        engine.live.load(NEW.items())
    assert failed and not engine.live.whole and not engine.live.updating
    engine.update(NEW)
    engine.check(NEW)
