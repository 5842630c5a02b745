"""`Rollout` with engines driven by coroutines: from the loop's thread, from another one, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch
from helpers_rollout import OF_SEED
from standin_async import AsyncLLM, EarlierAsyncLLM
from standin_server import Server
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, Worker, whole

import nvfp4_qat as nq
from nvfp4_qat import rollout, vllm
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_async import in_thread
from nvfp4_qat.rollout import Rollout

BLOCKED = r"engine( \d)? answers through the event loop of this thread.*await rollout.sync_async\(model\)"


async def answered(llm):
    """Of which seed's weights an answer is."""
    (seed,) = set(whole(await asyncio.wait_for(llm.generate("a"), 20), OF_SEED))
    return seed


@contextlib.contextmanager
def a_loop():
    """An event loop in a thread of its own, and a way to run coroutines in it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def ended():
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others)

    yield run, loop
    with contextlib.suppress(ValueError):
        run(ended())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def made(cls=AsyncLLM, count=1):
    llms = [cls(packed(0)) for _ in range(count)]
    return llms if count > 1 else llms[0]


@pytest.mark.parametrize("in_flight", ["abort", "keep"])
def test_a_coroutine_syncs_while_the_loop_goes_on_and_requests_wait(in_flight, monkeypatch):
    model, plan = trainer(1)

    async def main():
        llm = AsyncLLM(packed(0))
        engines = await Rollout.connect_async(llm, plan, in_flight=in_flight, timeout=20)
        assert await answered(llm) == 0
        asked, loop = [], asyncio.get_running_loop()

        def stream(*args, **options):
            for i, pair in enumerate(nq.packed_weights(*args, **options)):
                if i in (5, 40):  # in the thread of the sync; the loop takes a request meanwhile
                    asked.append(asyncio.run_coroutine_threadsafe(llm.generate(f"{i}"), loop))
                    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result(10)
                yield pair

        monkeypatch.setattr(rollout, "packed_weights", stream)
        for version, seed in enumerate((2, 3), 1):
            perturb(model, seed)
            report = await engines.sync_async(model)
            assert report.version == version and await answered(llm) == seed
            for request in asked:
                assert set(whole(await asyncio.wrap_future(request), OF_SEED)) == {seed}
            assert len(asked) == 2
            asked.clear()
        paused = [arguments for name, *arguments in llm.calls if name == "sleep"]
        assert paused == [[0, in_flight]] * 2 and llm.core.encoder_resets == 2

    asyncio.run(main())


def test_a_coroutine_syncs_other_weights_than_the_model_has():
    """They are taken in the thread of the sync, so that the loop goes on."""
    (model, plan), (other, _) = trainer(1), trainer(2)
    threads = set()

    def weights():
        for pair in nq.packed_weights(other, layout="fused"):
            threads.add(threading.current_thread())
            yield pair

    async def main():
        llm = AsyncLLM(packed(0))
        engines = await Rollout.connect_async(llm, plan)
        await engines.sync_async(model, weights=weights())
        assert await answered(llm) == 2
        await engines.sync_async(model)
        assert await answered(llm) == 1

    asyncio.run(main())
    assert len(threads) == 1 and threading.current_thread() not in threads


@pytest.mark.parametrize("option", [{"transport": "ipc"}, {"timeout": -1}])
def test_options_are_the_same_within_a_loop(option):
    async def main():
        await Rollout.connect_async(AsyncLLM(packed(0)), trainer(1)[1], **option)

    with pytest.raises(UserError, match="is none of 'auto'|must both be positive"):
        asyncio.run(main())


def test_a_sync_in_another_thread_than_the_loop_s(monkeypatch):
    model, plan = trainer(1)
    with a_loop() as (run, _):
        llm = run(made())
        engines = Rollout.connect(llm, plan, timeout=20)
        for seed in (1, 2):
            perturb(model, seed)
            engines.sync(model)
            assert run(answered(llm)) == seed
        engines.audit()
        assert engines.versions == [2]
        engines.sleep(2)
        engines.wake_up(["weights"])
        engines.sync(model)
        engines.wake_up(["kv_cache"])
        assert run(answered(llm)) == 2 and engines.versions == [3]


@pytest.mark.parametrize("count", [1, 2])
def test_whoever_would_block_the_loop_is_told_at_once(count):
    model, plan = trainer(1)

    async def main():
        llms = await made(count=count)
        with pytest.raises(UserError, match=BLOCKED):
            Rollout.connect(llms, plan, timeout=20)
        engines = await Rollout.connect_async(llms, plan, timeout=20)
        for call in (
            lambda: engines.sync(model), engines.audit, lambda: engines.versions, engines.sleep, engines.wake_up,
        ):  # fmt: skip
            with pytest.raises(UserError, match=BLOCKED):
                call()
        await asyncio.to_thread(engines.audit)
        assert (await engines.sync_async(model)).version == 1
        return time() - start

    time = asyncio.new_event_loop().time
    start = time()
    assert asyncio.run(main()) < 15, "something waited for a timeout"


def test_an_engine_that_was_made_outside_of_a_loop_gets_the_one_that_connects():
    model, plan = trainer(1)
    llm = AsyncLLM(packed(0))
    with pytest.raises(UserError, match=r"belongs to none yet: .*await Rollout.connect_async"):
        Rollout.connect(llm, plan)

    async def main():
        engines = await Rollout.connect_async(llm, plan)
        await engines.sync_async(model)
        assert await answered(llm) == 1

    asyncio.run(main())
    with pytest.raises(UserError, match="the engine cannot be reached: its event loop does not run"):
        Rollout.connect(llm, plan)


def test_a_sync_that_is_cancelled_ends_before_its_model_may_change(monkeypatch):
    model, plan = trainer(1)

    async def main():
        llm = AsyncLLM(packed(0))
        engines = await Rollout.connect_async(llm, plan)
        sending, go_on = asyncio.Event(), threading.Event()
        loop, taken = asyncio.get_running_loop(), []

        def stream(*args, **options):
            for pair in nq.packed_weights(*args, **options):
                loop.call_soon_threadsafe(sending.set)
                go_on.wait(20)
                taken.append(pair)
                yield pair

        monkeypatch.setattr(rollout, "packed_weights", stream)
        task = asyncio.create_task(engines.sync_async(model))
        await sending.wait()
        ended = []
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.05)
            ended.append(task.done())
        go_on.set()
        assert ended == [False, False]
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(taken) == len(dict(nq.packed_weights(model, layout="fused")))
        assert await answered(llm) == 1

    asyncio.run(main())


def test_an_engine_that_does_not_answer():
    class Slow(Worker):
        def nvfp4_commit(self, update):
            go_on.wait(20)
            return super().nvfp4_commit(update)

    go_on = threading.Event()
    model, plan = trainer(1)
    with a_loop() as (run, _):

        async def slow():
            return AsyncLLM(packed(0), worker=Slow)

        llm = run(slow())
        engines = Rollout.connect(llm, plan, timeout=1.0)
        with pytest.raises(MismatchError, match="version 1 did not reach 1 of 1 engines:\n.*did not answer within 1 s"):
            engines.sync(model)
        go_on.set()
        assert llm.core.paused
        engines.sync(model)
        assert run(answered(llm)) == 1


def test_the_thread_has_the_gpu_and_the_stream_of_the_coroutine(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def entered(what):
        seen.append((threading.get_ident(), what))
        yield

    for name, value in {
        "is_available": lambda: True, "is_initialized": lambda: True, "current_device": lambda: 3,
        "current_stream": lambda: "its stream", "device": entered, "stream": entered,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    there = asyncio.run(in_thread(threading.get_ident))
    assert there != threading.get_ident()
    assert seen == [(there, 3), (there, "its stream")]


# vLLM 0.15 and 0.16, whose scheduler cannot be paused


@pytest.fixture
def earlier(monkeypatch):
    known = vllm._version
    monkeypatch.setattr(vllm, "_version", lambda package: "0.15.0" if package == "vllm" else known(package))


def refused(engines):
    for call in (engines.sleep, engines.wake_up):
        with pytest.raises(UserError, match=r"has vLLM 0.15.0, which cannot .*: install vLLM 0.17 or later"):
            call()


def test_an_earlier_engine_holds_requests_back_itself(earlier, monkeypatch):
    model, plan = trainer(1)
    with a_loop() as (run, loop):
        llm = run(made(EarlierAsyncLLM))
        engines = Rollout.connect(llm, plan, timeout=20)
        asked = []

        def stream(*args, **options):
            asked.append(asyncio.run_coroutine_threadsafe(llm.generate("x"), loop))
            yield from nq.packed_weights(*args, **options)
            assert not asked[0].done() and not llm.open.is_set()

        monkeypatch.setattr(rollout, "packed_weights", stream)
        engines.sync(model)
        assert set(whole(asked[0].result(20), OF_SEED)) == {1} and run(answered(llm)) == 1
        refused(engines)
        with pytest.raises(UserError, match="has vLLM 0.15.0, which cannot keep requests over an update"):
            Rollout.connect(llm, plan, in_flight="keep")


def test_an_earlier_server_holds_requests_back_itself(earlier):
    model, plan = trainer(1)
    server = Server(LLM(packed(0)), earlier=True)
    engines = Rollout.connect(server.url, plan, timeout=20)
    engines.sync(model)
    paths = [path for path, _, _ in server.log]
    assert paths.index("/pause") < paths.index("/reset_prefix_cache") < paths.index("/resume")
    assert server.open.is_set() and set(whole(server.answer("/generate", {}, {"prompt": "a"})[1], OF_SEED)) == {1}
    refused(engines)
    with pytest.raises(UserError, match="cannot keep requests"):
        Rollout.connect(server.url, plan, in_flight="keep")
    server.close()


@pytest.mark.usefixtures("earlier")
def test_an_earlier_llm_is_refused_because_it_cannot_be_paused():
    with pytest.raises(UserError, match=r"an LLM of vLLM 0.15.0, which cannot be paused: install vLLM 0.17 or later"):
        Rollout.connect(LLM(packed(0)), trainer(1)[1])
