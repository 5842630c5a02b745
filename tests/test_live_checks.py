"""A model's checksums follow its updates, and a comparison says which layers are others."""

from __future__ import annotations

import pytest
import torch
from helpers_live import NEW, OLD, Up, one, weight, without
from standin_engine import Model, Stage, announced, checkpoint
from standin_layers import Place

from nvfp4_qat.errors import MismatchError, UserError


def different(live, weights):
    comparison = live.comparison(announced(weights))
    comparison.load(weights.items())
    return comparison.different()


@pytest.mark.parametrize("place", [Place(0, 2), Place(1, 2), Place(0, 1, 1, 2)], ids=str)
def test_ranks_of_equal_engines_have_equal_checksums(place):
    engines = [Up(lambda: Model(place), checkpoint(seed)) for seed in (0, 5)]
    engines[0].update(OLD)
    for engine in engines:
        engine.update(NEW)
    (drifted, sums), (others, theirs) = (engine.live.checks.compared() for engine in engines)
    assert drifted == others == [] and sums == theirs and len(sums) > 10
    assert engines[0].live.checks.layout() == engines[1].live.checks.layout() != ""
    engines[1].update(OLD)
    theirs = engines[1].live.checks.compared()[1]
    assert all(sums[name] != theirs[name] for name in sums)


def test_ranks_have_checksums_and_layouts_of_their_own():
    halves = [Up(lambda rank=rank: Model(Place(rank, 2)), OLD) for rank in range(2)]
    whole = Up(Model, OLD)
    for engine in (*halves, whole):
        engine.update(NEW)
    a, b, both = (engine.live.checks.compared()[1] for engine in (*halves, whole))
    assert a["layers.0.o_proj"] != b["layers.0.o_proj"] and a["norm"] == b["norm"] == both["norm"]
    layouts = {engine.live.checks.layout() for engine in (*halves, whole)}
    assert len(layouts) == 2


def test_before_any_update_there_is_nothing_to_compare():
    live = Up(Model, OLD).live
    assert live.checks.drifted() == [] and live.checks.layout() == ""
    with pytest.raises(UserError, match="no checksums to compare with: sync first"):
        live.checks.compared()
    with pytest.raises(UserError, match="incomplete, or not of an update"):
        live.comparison(announced(NEW))


@pytest.mark.parametrize("number", [0, 1])
def test_a_stage_of_a_pipeline_is_compared(number):
    engine, weights = Up(lambda: Stage(number), checkpoint(1, tied=False)), checkpoint(2, tied=False)
    engine.update(weights)
    assert different(engine.live, weights) == engine.live.checks.drifted() == []
    other = different(engine.live, checkpoint(3, tied=False))
    assert {*other, f"layers.{number}.attn"} == set(engine.live.checks.compared()[1])


def test_a_comparison_takes_what_was_announced_once():
    engine = Up(Model, OLD)
    engine.update(NEW)
    comparison = engine.live.comparison(announced(NEW))
    name, t = next(iter(NEW.items()))
    comparison.load([(name, t)])
    for wrong in [(name, t), ("nothing", t), ("norm.weight", NEW["norm.weight"].float())]:
        with pytest.raises(MismatchError, match="was announced otherwise, or not, or has come before"):
            comparison.load([wrong])
    comparison.load(without(NEW, name, "norm.weight").items())
    with pytest.raises(MismatchError, match="1 tensors have not come: norm.weight"):
        comparison.different()
    with pytest.raises(UserError, match="of other tensors"):
        engine.live.comparison(announced(without(NEW, name)))
    engine.live.begin(announced(NEW))
    with pytest.raises(UserError, match="incomplete"):
        engine.live.comparison(announced(NEW))


def test_other_tensors_make_another_set_of_checksums():
    engine = Up(one(), weight())
    new = weight()
    engine.update(new)
    assert list(engine.live.checks.compared()[1]) == ["one"]
    engine.live.begin(announced({"one.weight": new["one.weight"].float()}))  # the loader converts it
    with pytest.raises(UserError, match="no checksums to compare with: sync first"):
        engine.live.checks.compared()
    engine.live.load([("one.weight", new["one.weight"].float())])
    engine.live.commit()
    with torch.no_grad():
        engine.model.one.weight[1, 2] += 1
    assert engine.live.checks.drifted() == ["one"] == different(engine.live, {"one.weight": new["one.weight"].float()})
