"""What was computed with old weights is forgotten before an engine goes on: KV blocks, wherever they are held."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
from helpers_rollout import OF_SEED
from standin_async import AsyncLLM
from standin_server import Server
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, whole

from nvfp4_qat import vllm
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_async import AsyncEngine
from nvfp4_qat.live_engines import LocalEngine
from nvfp4_qat.live_http import HttpEngine
from nvfp4_qat.quantizer import packed_weights
from nvfp4_qat.rollout import Rollout


def answered(core):
    """Of which seed's weights an engine's answer is, context included."""
    (seed,) = set(whole(core.add("same").result(20), OF_SEED))
    return seed


@pytest.fixture(params=["LLM", "AsyncLLM", "server"])
def engine(request):
    """An engine with what is connected, by each of the ways there are."""
    if request.param == "AsyncLLM":
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        llm = AsyncLLM(packed(0))
        yield llm.core, AsyncEngine(llm, "the engine", 20.0, loop)
        loop.call_soon_threadsafe(loop.stop)
        return
    llm = LLM(packed(0))
    if request.param == "LLM":
        yield llm.core, LocalEngine(llm)
        return
    server = Server(llm, told=True)
    yield llm.core, HttpEngine(server.url, 20.0)
    server.close()


def test_kv_blocks_that_a_connector_holds_are_forgotten(engine):
    core, connected = engine
    core.connector = {}
    model, plan = trainer(1)
    engines = Rollout.connect(connected, plan)
    for seed in (1, 2):
        perturb(model, seed)
        engines.sync(model)
        assert answered(core) == seed and core.connector


def test_a_connector_is_not_reset_where_there_is_none(engine):
    core, connected = engine
    core.earlier = True
    model, plan = trainer(1)
    Rollout.connect(connected, plan).sync(model)
    assert answered(core) == 1


@pytest.mark.parametrize("version", ["0.20.2", "0.24.0", "0.33.0", None])
def test_a_connector_of_an_engine_that_does_not_tell_how_it_was_started(version, monkeypatch):
    known = vllm._version
    monkeypatch.setattr(vllm, "_version", lambda package: version if package == "vllm" else known(package))
    llm = LLM(packed(0))
    reset, asked = llm.core.reset, []
    llm.core.reset = lambda *arguments: asked.append(arguments) or reset(*arguments)
    core, methods = llm.core, ("collective_rpc", "sleep", "wake_up", "reset_prefix_cache")
    core.earlier = version == "0.20.2"
    silent = SimpleNamespace(**{method: getattr(llm, method) for method in methods})
    silent.llm_engine = SimpleNamespace(reset_encoder_cache=llm.llm_engine.reset_encoder_cache)
    model, plan = trainer(1)
    Rollout.connect(silent, plan).sync(model)
    assert answered(core) == 1 and asked == [(True, version != "0.20.2")]


def test_a_reset_that_was_refused_is_asked_for_again(engine):
    core, connected = engine
    model, plan = trainer(1)
    engines = Rollout.connect(connected, plan)
    answered(core)
    core.refused_resets = 3
    engines.sync(model)
    assert answered(core) == 1 and core.refused_resets == 0


def test_another_error_of_a_reset_is_raised_at_once(engine):
    core, connected = engine
    attempts = []

    def broken(*arguments):
        attempts.append(arguments)
        raise RuntimeError("no such block")

    core.reset = broken
    model, plan = trainer(1)
    with pytest.raises(MismatchError, match="no such block"):
        Rollout.connect(connected, plan).sync(model)
    assert len(attempts) == 1 and core.paused


# Going on after a refusal, and between updates of others


@pytest.mark.parametrize("restarted", [False, True])
def test_waking_up_resets_the_cache_that_a_sync_could_not(restarted, monkeypatch):
    monkeypatch.setattr("nvfp4_qat.live_engines.ATTEMPTS", 2)
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    assert answered(llm.core) == 0
    llm.core.refused_resets = 4
    with pytest.raises(MismatchError, match="did not reset its prefix cache"):
        engines.sync(model)
    engines = Rollout.connect(llm, plan) if restarted else engines
    assert engines.versions == [1]
    with pytest.raises(MismatchError, match="did not reset its prefix cache"):
        engines.wake_up()
    assert llm.core.paused and llm.core.refused_resets == 0
    engines.wake_up()
    assert answered(llm.core) == 1 and llm.core.encoder_resets == 1
    engines.wake_up()
    assert llm.core.encoder_resets == 1, "a cache that is right was reset"


def during(stream, index, do):
    """A stream of tensors, and something that is done in it."""
    for i, item in enumerate(stream):
        if i == index:
            do()
        yield item


@pytest.mark.parametrize("index", [0, 20])
def test_waking_up_in_the_middle_of_an_update_is_refused(index):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines, other = (Rollout.connect(llm, plan, bucket_bytes=1) for _ in range(2))
    engines.sync(model)
    perturb(model, 2)

    def wake_up():
        for one in (engines, other):
            with pytest.raises(UserError, match="would go on in the middle of an update: let it end, or sync"):
                one.wake_up()
        assert llm.core.paused

    assert engines.sync(model, during(packed_weights(model, layout="fused"), index, wake_up)).version == 2
    assert answered(llm.core) == 2


def test_an_engine_does_not_go_on_when_another_update_has_begun_since_the_commit(monkeypatch):
    first, plan = trainer(1)
    second, _ = trainer(2)
    llm = LLM(packed(0))
    stalled, other = Rollout.connect(llm, plan), Rollout.connect(llm, plan, bucket_bytes=1)
    (client,) = stalled._clients
    reset, began, tried = client.engine.reset_cache, threading.Event(), threading.Event()
    ready = threading.Event()

    def slow(connector):
        ready.set()
        assert began.wait(20)
        reset(connector)

    def go():
        with pytest.raises(MismatchError, match="another update began meanwhile"):
            stalled.sync(first)
        tried.set()

    def let_go():
        began.set()
        assert tried.wait(20) and llm.core.paused

    monkeypatch.setattr(client.engine, "reset_cache", slow)
    thread = threading.Thread(target=go)
    thread.start()
    assert ready.wait(20)
    other.sync(second, during(packed_weights(second, layout="fused"), 20, let_go))
    thread.join()
    assert answered(llm.core) == 2 and other.versions == [2]


def test_a_comparison_does_not_keep_an_engine_from_going_on(monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines, other = Rollout.connect(llm, plan), Rollout.connect(llm, plan)
    (client,) = engines._clients
    reset = client.engine.reset_cache

    def verified(connector):
        reset(connector)
        (other_client,) = other._clients
        other_client.refresh()
        other_client.call("nvfp4_compare", "x", other_client.version, other._announcement(model)[1])

    monkeypatch.setattr(client.engine, "reset_cache", verified)
    engines.sync(model)
    assert answered(llm.core) == 1
