"""Engines that sleep, whoever put them to sleep: what they have afterwards, and who may wake them."""

from __future__ import annotations

import pytest
from helpers_live import bits
from helpers_rollout import OF_SEED
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, Worker, whole

from nvfp4_qat import vllm
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_model import LiveModel
from nvfp4_qat.rollout import Rollout


def answered(llm):
    (seed,) = set(whole(llm.generate(["same"])[0], OF_SEED))
    return seed


def check(llm, seed):
    """Every tensor that kernels read is that of an engine which was started with these weights."""
    fresh, live = (w.graph.operands for w in (Worker(packed(seed)), llm.core.workers[0]))
    assert [name for name, tensor in live.items() if bits(tensor) != bits(fresh[name])] == []


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("own", [True, False], ids=["vLLM's", "ours"])
@pytest.mark.parametrize("changes", [True, False])
def test_sleeping_around_a_sync(level, own, changes):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, changes=changes)
    engines.sync(model)
    perturb(model, 2)
    sleeper = llm if own else engines
    sleeper.sleep(level)
    assert engines.versions == ([1] if level == 1 else [None])
    sleeper.wake_up(["weights"])
    engines.sync(model)
    assert llm.core.paused and llm.core.asleep == {"kv_cache"}
    sleeper.wake_up(["kv_cache"])
    assert answered(llm) == 2
    check(llm, 2)
    engines.verify(model)


def test_vllms_own_sleep_before_anything_else_was_asked():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    llm.sleep(2)
    engines = Rollout.connect(llm, plan)
    assert engines.versions == [None]
    with pytest.raises(UserError, match="would go on with incomplete weights"):
        engines.wake_up()
    engines.wake_up(["weights"])
    engines.sync(model)
    engines.wake_up()
    assert answered(llm) == 1
    check(llm, 1)


@pytest.mark.parametrize("level", [1, 2])
def test_a_trainer_that_was_started_anew_wakes_a_sleeping_engine(level):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    engines.sync(model)
    engines.sleep(level)
    perturb(model, 2)
    anew = Rollout.connect(llm, plan)
    for one in (engines, anew):
        for refused in (one.sync, one.verify):
            with pytest.raises(UserError, match="the engine sleeps, and its weights with it: call wake_up first, with"):
                refused(model)
        assert llm.core.asleep == {"weights", "kv_cache"} and llm.core.paused
    anew.wake_up(["weights"])
    assert anew.sync(model).version == 2
    assert llm.core.paused
    Rollout.connect(llm, plan).wake_up(["kv_cache"])
    assert answered(llm) == 2
    check(llm, 2)


def test_workers_refuse_what_comes_while_their_weights_sleep():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    engines.sync(model)
    wire = engines._announcement(model)[1]
    llm.sleep(1)
    for call in (("nvfp4_begin", "x", 2, wire), ("nvfp4_compare", "x", 1, wire), ("nvfp4_verify",)):
        (answer,) = llm.collective_rpc(call[0], args=call[1:])
        assert "this engine's weights sleep: call wake_up(['weights']) first" in answer["error"]


def test_an_update_ends_when_its_engine_goes_to_sleep():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, bucket_bytes=1)
    (client,) = engines._clients
    client.begin("x", 1, engines._announcement(model)[1])
    llm.sleep(1)
    with pytest.raises(MismatchError, match="no update goes on"):
        client.call("nvfp4_load", "x", [])
    engines.wake_up()
    assert answered(llm) == 0


def test_what_could_not_be_kept_is_told_of_later(monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=2)
    engines = Rollout.connect(llm, plan)
    engines.sync(model)

    def keep(self):
        raise MemoryError("no memory on the host")

    with monkeypatch.context() as patch:
        patch.setattr(LiveModel, "keep", keep)
        with pytest.raises(MismatchError, match="no memory on the host"):
            engines.sleep(2)
        assert not llm.core.asleep
        llm.sleep(2)
    assert not any(llm.core.unread)
    llm.wake_up(["weights"])
    with pytest.raises(MismatchError, match=r"not kept when .* to sleep \(no memory on the host\): start it anew"):
        engines.sync(model)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("rest", [["kv_cache"], None], ids=str)
def test_a_scheduler_that_would_go_on_early_rests_until_all_is_awake(level, rest, monkeypatch):
    known = vllm._version
    monkeypatch.setattr(vllm, "_version", lambda package: "0.20.2" if package == "vllm" else known(package))
    model, plan = trainer(1)
    llm = LLM(packed(0))
    llm.core.earlier = True
    engines = Rollout.connect(llm, plan, in_flight="keep")
    for seed in (1, 2):
        perturb(model, seed)
        engines.sync(model)
        engines.sleep(level)
        waiting = llm.core.add("waits")
        engines.wake_up(["weights"])
        engines.wake_up(["weights"])
        assert llm.core.paused and llm.core.workers[0].gone == {"kv_cache"}
        perturb(model, seed + 1)
        engines.sync(model)
        assert llm.core.paused and llm.core.workers[0].gone == {"kv_cache"} and not waiting.done()
        engines.wake_up(rest)
        assert not llm.core.workers[0].gone and not llm.core.asleep
        assert set(whole(waiting.result(20), OF_SEED)) == {seed + 1} and answered(llm) == seed + 1
