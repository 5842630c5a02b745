"""An engine whose weights somebody altered is found out, layer by layer, and the next sync repairs it."""

from __future__ import annotations

import re

import pytest
import torch
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, digests
from test_rollout_changes import assert_fresh, step

import nvfp4_qat as nq
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.rollout import Rollout

NOT_COVERED = re.compile("cache_scale|input_(global_)?scale")
"""Operands of the engine's own."""

TABLE = "layers.1.experts:expert_map"


class Up:
    """Engines after some syncs of a model."""

    def __init__(self, syncs=3, engines=1, tp=1, **options):
        self.model, plan = trainer(1)
        self.llms = [LLM(packed(0), tp=tp) for _ in range(engines)]
        self.rollout = Rollout.connect(self.llms if engines > 1 else self.llms[0], plan, **options)
        for seed in range(syncs):
            step(self.model, seed)
            self.rollout.sync(self.model)

    def worker(self, engine=0, rank=0):
        return self.llms[engine].core.workers[rank]

    def bytes(self, name, engine=0, rank=0):
        """Those of an operand of an engine."""
        return self.worker(engine, rank).graph.operands[name].view(-1).view(torch.uint8)

    def flip(self, name):
        """A bit of an operand, wherever it lies in memory."""
        t = self.worker().graph.operands[name]
        t[tuple(n // 3 for n in t.shape)].reshape(1).view(torch.uint8)[0] ^= 1

    def names(self, engine=0):
        return sorted(self.worker(engine).graph.operands)

    def verify(self, model=None):
        """What is said, without the names of engines."""
        with pytest.raises(MismatchError) as error:
            self.rollout.verify(model)
        return str(error.value)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("changes", [False, True])
def test_weights_that_nobody_altered_are_verified(changes, tp):
    up = Up(4, 2, tp, changes=changes)
    up.rollout.verify()
    up.rollout.verify(up.model)
    perturb(up.model, 7)
    up.rollout.sync(up.model)
    up.rollout.verify(up.model)


@pytest.mark.parametrize("changes", [False, True])
def test_a_flipped_bit_of_any_operand_is_found_and_repaired(changes):
    up = Up(changes=changes)
    for operand in up.names():
        if NOT_COVERED.search(operand) or operand == TABLE:
            continue
        up.flip(operand)
        layer = operand.partition(":")[0]
        layer = "embed" if layer == "lm_head" else layer  # which share their weight
        told = f"the engine: version {up.rollout.versions[0]} was altered after it had been updated, in"
        assert up.verify() == f"{told} {layer}; the next sync sends it whole"
        report = up.rollout.sync(up.model)  # nothing has changed
        up.rollout.verify()
        assert_fresh(up.llms[0], up.model)
        if changes:
            assert report.repaired == (f"the engine: {layer}",) and report.fraction_changed == 0
            assert up.rollout.sync(up.model).repaired == ()


def test_a_table_that_no_tensor_brings_is_noticed_and_not_repaired():
    up = Up()
    up.flip(TABLE)
    assert "in layers.1.experts;" in up.verify()
    up.rollout.sync(up.model)
    with pytest.raises(AssertionError):
        assert_fresh(up.llms[0], up.model)
    up.flip(TABLE)
    assert "in layers.1.experts;" in up.verify()
    up.rollout.sync(up.model)
    assert_fresh(up.llms[0], up.model)


def test_changes_and_everything_leave_the_same_checksums():
    up = Up(4, 2, changes=True)
    for seed in (7, 8):
        up.llms[1].core = LLM(packed(0)).core  # started anew, so it gets everything
        step(up.model, seed)
        assert up.rollout.sync(up.model).restarted == ("engine 1",)
        up.rollout.verify(up.model)


def test_only_what_drifted_is_sent_whole():
    up = Up(5, changes=True)
    full = sum(t.nbytes for _, t in nq.packed_weights(up.model))
    weights = dict(nq.packed_weights(up.model))
    up.bytes("layers.0.o_proj:weight")[:2] ^= 9
    report = up.rollout.sync(up.model)
    assert report.bytes == sum(t.nbytes for n, t in weights.items() if n.startswith("layers.0.o_proj.")) < full / 10
    up.bytes("norm:weight")[0] ^= 1
    step(up.model, 9)
    report = up.rollout.sync(up.model)
    assert report.repaired == ("the engine: norm",) and 0 < report.fraction_changed < 0.1
    assert_fresh(up.llms[0], up.model)
    up.rollout.verify(up.model)


def test_numbers_that_change_places_are_found():
    up = Up()
    data = up.bytes("layers.0.o_proj:weight").view(torch.int32)
    a, b = 0, next(i for i in range(len(data)) if data[i] != data[0])
    data[[a, b]] = data[[b, a]]
    assert "in layers.0.o_proj;" in up.verify()
    data[[a, b]] = data[[b, a]]
    up.rollout.verify()


def test_what_is_kept_for_later_changes_is_checked_too():
    up = Up(5, changes=True)
    (state,) = [w.__dict__["_nvfp4_state"] for w in up.llms[0].core.workers]
    kept = state.live.patcher.kept["layers.0.o_proj"]["weight_scale"]
    kept.view(-1).view(torch.uint8)[3] ^= 1
    assert "layers.0.o_proj" in up.verify()
    step(up.model, 9)
    assert up.rollout.sync(up.model).repaired == ("the engine: layers.0.o_proj",)
    assert_fresh(up.llms[0], up.model)
    up.rollout.verify(up.model)


def test_a_rank_that_drifted_is_repaired_by_tensors_for_all():
    up = Up(4, tp=2, changes=True)
    up.bytes("layers.0.down_proj:weight", rank=1)[7] ^= 128
    assert "layers.0.down_proj" in up.verify()
    assert up.rollout.sync(up.model).repaired == ("the engine: layers.0.down_proj",)
    assert_fresh(up.llms[0], up.model, 2)
    up.rollout.verify(up.model)


def test_engines_that_differ_although_none_has_drifted():
    up = Up(4, 2, changes=True)
    up.bytes("layers.0.o_proj:weight", engine=1)[7] ^= 128
    (state,) = [w.__dict__["_nvfp4_state"] for w in up.llms[1].core.workers]
    state.live.checks.note()  # as if the update had left it
    told = up.verify()
    assert told == "engine 1: version 4 differs from engine 0 in layers.0.o_proj; the next sync sends it whole"
    assert "engine 1: version 4 is not this model's in layers.0.o_proj" in up.verify(up.model)
    report = up.rollout.sync(up.model)
    assert report.bytes > 10_000  # who is right is not asked: both get everything
    up.rollout.verify(up.model)
    assert up.rollout.sync(up.model).bytes == 0


def test_one_engine_that_drifted_does_not_put_the_blame_on_others():
    up = Up(3, 3)
    up.bytes("layers.0.o_proj:weight", engine=0)[7] ^= 128
    told = up.verify()
    assert told.startswith("engine 0: version 3 was altered") and "\n" not in told


def test_weights_of_another_model_are_found_layer_by_layer():
    up = Up(4)
    with torch.no_grad():
        up.model.layers[0].norm.weight[3] += 1
        up.model.layers[1].experts[2].down_proj.weight[5, 5] = 9
        up.model.layers[1].kv_b_proj.weight[0, 0] = -9
    nq.refresh(up.model)
    up.rollout.verify()
    told = up.verify(up.model)
    assert "is not this model's in layers.0.norm, layers.1.experts, layers.1.kv_b_proj;" in told, told
    up.rollout.sync(up.model)
    up.rollout.verify(up.model)


def test_a_comparison_writes_nothing():
    up = Up(3)
    before, address = up.worker().digest(), {n: t.data_ptr() for n, t in up.worker().graph.operands.items()}
    perturb(up.model, 5)
    with pytest.raises(MismatchError, match="is not this model's in"):
        up.rollout.verify(up.model)
    assert up.worker().digest() == before and not up.llms[0].core.paused and up.rollout.versions == [3]
    operands = up.worker().model_runner.get_model().operands()
    assert {n: t.data_ptr() for n, t in operands.items()} == address


@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_a_comparison_takes_every_way(transport):
    up = Up(3, 2, transport=transport, timeout=20, bucket_bytes=5000)
    up.rollout.verify(up.model)
    up.bytes("layers.0.norm:weight", engine=1)[0] ^= 1
    assert "engine 1: version 3 is not this model's in layers.0.norm;" in up.verify(up.model)
    up.rollout.sync(up.model)
    up.rollout.verify(up.model)
    up.rollout.close()


def test_what_cannot_be_verified_says_why():
    model, plan = trainer(1)
    llms = [LLM(packed(0)), LLM(packed(0))]
    rollout = Rollout.connect(llms, plan)
    with pytest.raises(UserError, match="(?s)engine 0 has the weights that it was started with: sync.*engine 1"):
        rollout.verify(model)
    rollout.sync(model)
    rollout.sleep(1)
    with pytest.raises(UserError, match="engine 0 sleeps, and its weights with it: call wake_up first"):
        rollout.verify(model)
    rollout.wake_up(["weights"])
    rollout.verify(model)
    rollout.wake_up()
    rollout.verify()
    rollout.sleep(2)
    rollout.wake_up(["weights"])
    with pytest.raises(UserError, match="engine 0 has incomplete weights: sync before you verify"):
        rollout.verify(model)
    rollout.sync(model)
    rollout.wake_up()
    rollout.verify(model)
    llms[1].core = LLM(packed(0)).core  # started anew
    with pytest.raises(UserError, match="^engine 1 has the weights that it was started with"):
        rollout.verify(model)
    rollout.sync(model)
    rollout.verify(model)


def test_an_update_that_broke_off_is_not_verified():
    up = Up(3)
    weights = dict(nq.packed_weights(up.model))
    with pytest.raises(MismatchError, match="did not reach 1 of 1 engines"):
        up.rollout.sync(up.model, list(weights.items())[:-1] + [("nothing", torch.zeros(1))])
    with pytest.raises(UserError, match="incomplete weights: sync before you verify"):
        up.rollout.verify(up.model)
    up.rollout.sync(up.model)
    up.rollout.verify(up.model)


def test_a_stream_that_breaks_off_ends_the_comparison():
    up = Up(3)

    def broken():
        yield from list(nq.packed_weights(up.model))[:5]
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        up.rollout.verify(up.model, broken())
    fewer = list(nq.packed_weights(up.model))[:-1]
    with pytest.raises(MismatchError, match="1 tensors have not come"):
        up.rollout.verify(up.model, fewer)
    up.rollout.verify(up.model)
    up.rollout.sync(up.model)


def test_an_update_ends_a_comparison_and_not_the_other_way_round():
    up = Up(3)
    call = up.rollout._clients[0].call
    from nvfp4_qat.live_manifest import manifest, to_wire

    wire = to_wire(manifest(up.model, up.rollout.plan))
    call("nvfp4_compare", "one", 3, wire)
    with pytest.raises(MismatchError, match="an update goes on"):
        call("nvfp4_compare", "two", 3, wire)
    up.rollout.sync(up.model)
    with pytest.raises(MismatchError, match="no update goes on"):
        call("nvfp4_compared", "one")
    call("nvfp4_begin", "three", 5, wire)
    with pytest.raises(MismatchError, match="this is an update, not a comparison"):
        call("nvfp4_compared", "three")
    call("nvfp4_abandon", "three")
    with pytest.raises(MismatchError, match="version 3 is to be compared, and this worker has 4"):
        call("nvfp4_compare", "four", 3, wire)
    with pytest.raises(MismatchError, match="of other tensors"):
        call("nvfp4_compare", "four", 4, wire[1:])
    assert digests(dict(nq.packed_weights(up.model))) == [up.worker().digest()]
