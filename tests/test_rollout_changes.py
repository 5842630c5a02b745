"""Syncs that send only what changed: the engine has the same weights as after a full one, for fewer bytes."""

from __future__ import annotations

import pytest
import torch
from standin_trainer import packed, trainer
from standin_vllm import LLM, digests

import nvfp4_qat as nq
from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_client import Client
from nvfp4_qat.rollout import Rollout


def step(model, seed, share=0.01):
    """As a step of training does: some weights move a little."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            moved = torch.rand(parameter.shape, generator=rng) < share
            parameter.add_(moved * torch.randn(parameter.shape, generator=rng) * 0.05)
    nq.refresh(model)


def assert_fresh(llm, model, tp=1):
    """All workers compute with what those of an engine have that loads the trainer's checkpoint."""
    assert [w.digest() for w in llm.core.workers] == digests(dict(nq.packed_weights(model)), tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("transport", ["direct", "shared", "broadcast"])
def test_changes_give_what_a_fresh_engine_has(transport, tp):
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=tp)
    engines = Rollout.connect(llm, plan, transport=transport, timeout=20, changes=True, bucket_bytes=5000)
    reports = []
    for seed in range(6):
        step(model, seed)
        reports.append(engines.sync(model))
        assert_fresh(llm, model, tp)
    full = reports[0].bytes
    assert [r.version for r in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[0].fraction_changed is None
    assert all(0 < r.fraction_changed < 0.1 for r in reports[1:])
    assert all(r.bytes < 0.7 * full for r in reports[3:])  # experts are sent whole to this engine
    engines.close()


def test_nothing_changed_sends_nothing():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, changes=True)
    for _ in range(3):
        engines.sync(model)
    report = engines.sync(model)
    assert (report.bytes, report.fraction_changed, report.version) == (0, 0.0, 4)
    assert_fresh(llm, model)


def test_engines_with_other_versions_get_everything():
    model, plan = trainer(1)
    llms = [LLM(packed(0)), LLM(packed(0))]
    engines = Rollout.connect(llms, plan, changes=True)
    for seed in range(3):
        step(model, seed)
        engines.sync(model)
    llms[1].core = LLM(packed(0)).core  # started anew
    step(model, 5)
    report = engines.sync(model)
    assert report.restarted == ("engine 1",)
    for llm in llms:
        assert_fresh(llm, model)
    step(model, 6)
    assert engines.sync(model).fraction_changed < 0.1
    for llm in llms:
        assert_fresh(llm, model)


def test_changes_that_break_off_are_healed_by_everything(monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, changes=True)
    for seed in range(3):
        step(model, seed)
        engines.sync(model)
    (worker,) = llm.core.workers
    patcher = type(worker.__dict__["_nvfp4_state"].live.patcher)
    done = patcher._done
    calls = []

    def failing(self, work, asked):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return done(self, work, asked)

    monkeypatch.setattr(patcher, "_done", failing)
    step(model, 7)
    with pytest.raises(MismatchError, match="(?s)did not reach 1 of 1 engines:.*out of memory"):
        engines.sync(model)
    assert llm.core.paused and engines.versions == [None]
    monkeypatch.undo()
    full = engines.sync(model)
    assert full.bytes > 10_000 and not llm.core.paused
    assert_fresh(llm, model)


def test_a_trainer_that_begins_anew_sends_everything_first():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    for first in (0, 10):
        engines = Rollout.connect(llm, plan, changes=True)
        reports = []
        for seed in range(first, first + 3):
            step(model, seed)
            reports.append(engines.sync(model))
            assert_fresh(llm, model)
        assert reports[0].fraction_changed is None and reports[0].bytes > 10_000


def test_changes_are_for_the_weights_of_an_update_not_for_a_number():
    """Two trainers may give the same version to different weights: after a restart, or where an update broke off."""
    (a, plan), (b, other) = trainer(1), trainer(2)
    llm = LLM(packed(0))
    first = Rollout.connect(llm, plan, changes=True)
    first.sync(a)
    llm.core = LLM(packed(0)).core  # started anew
    second = Rollout.connect(llm, other, changes=True)
    assert second.sync(b).version == 1
    step(a, 5)
    first.sync(a)
    assert_fresh(llm, a)

    commit = Client.commit
    with pytest.MonkeyPatch.context() as patch:

        def broken(*_):
            raise RuntimeError("the network")

        patch.setattr(Client, "commit", broken)
        step(a, 6)
        with pytest.raises(MismatchError, match="the network"):
            first.sync(a)
    assert Client.commit is commit
    version = second.sync(b).version
    step(a, 7)
    assert first.sync(a).version == version + 1
    assert_fresh(llm, a)


def test_changes_may_come_in_another_order():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, changes=True)
    for seed in range(4):
        step(model, seed)
        weights = list(nq.packed_weights(model, layout="fused"))
        engines.sync(model, weights[1:] + weights[:1])
        assert_fresh(llm, model)
