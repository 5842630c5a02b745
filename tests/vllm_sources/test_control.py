"""What trainers call to control engines is there in this release: its own classes and routes take the calls.

`create_autospec` makes objects that refuse calls which do not fit the signatures of the classes. Routes are served by
the server that vLLM uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call, create_autospec

import pytest
from engine import Engine
from families import some

from nvfp4_qat.errors import UserError
from nvfp4_qat.live_async import AsyncEngine, is_async
from nvfp4_qat.live_engines import LocalEngine, older
from nvfp4_qat.live_http import HttpEngine
from nvfp4_qat.live_started import Started

VLLM = os.environ["VLLM_SOURCES"]
EARLIER = older(VLLM)
ROUTERS = (
    "serve.dev.rpc", "serve.dev.sleep", "serve.dev.cache", "serve.dev.rlhf", "rl.online",
    "serve.rpc", "serve.sleep", "serve.cache", "serve.rlhf", "serve.dev.server_info",
)  # fmt: skip
"""Where the routes are in some releases, within `vllm.entrypoints`."""


@contextlib.contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def async_llm() -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = create_autospec(AsyncLLM, instance=True)
    llm.output_handler = None
    llm.reset_prefix_cache.return_value = True
    llm.collective_rpc.return_value = [{"ok": 1}]
    llm.wake_up.return_value = True
    return llm


def controlled(engine: Any) -> None:
    """An update, and sleeping where it can be."""
    engine.suits(VLLM, "abort")
    assert engine.call("nvfp4_status", "a", 1) == [{"ok": 1}]
    engine.pause("abort")
    engine.reset_cache(connector=True)
    engine.resume()
    if EARLIER:
        for refused in (lambda: engine.suits(VLLM, "keep"), lambda: engine.sleep(1), lambda: engine.wake_up(None)):
            with pytest.raises(UserError, match="or later"):
                refused()
        return
    engine.pause("keep")
    engine.sleep(2)
    engine.wake_up(["weights"])
    engine.wake_up()


def assert_controlled(llm: Any, by_position: bool) -> None:
    """What an engine was asked for by `controlled`."""
    mode = [call(0, "abort"), call(0, "keep"), call(2, "abort")]
    if not by_position:
        mode = [call(level=level, mode=mode) for level, mode in ((0, "abort"), (0, "keep"), (2, "abort"))]
    if EARLIER:
        assert llm.pause_generation.mock_calls and llm.pause_generation.mock_calls[0].kwargs["clear_cache"] is False
        llm.resume_generation.assert_called_once()
        llm.sleep.assert_not_called()
        llm.wake_up.assert_not_called()
        return
    assert llm.sleep.mock_calls == mode
    tags = [c.args[0] if c.args else c.kwargs["tags"] for c in llm.wake_up.mock_calls]
    assert tags == [["scheduling"], ["weights"], None]
    llm.pause_generation.assert_not_called()


def test_async_engines() -> None:
    with running_loop() as loop:
        llm = async_llm()
        controlled(AsyncEngine(llm, "the engine", 10.0, loop))
        assert_controlled(llm, by_position=False)
        llm.reset_prefix_cache.assert_awaited_once_with(reset_running_requests=True, reset_connector=True)
        llm.collective_rpc.assert_awaited_once_with("nvfp4_status", args=("a", 1))


def test_async_engines_are_known_and_know_their_loop_by_a_task() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert is_async(AsyncLLM)
    assert "self.output_handler = asyncio.create_task(" in inspect.getsource(AsyncLLM._run_output_handler)


def test_engines_of_this_process() -> None:
    from vllm import LLM
    from vllm.v1.engine.llm_engine import LLMEngine

    llm = create_autospec(LLM, instance=True)
    llm.llm_engine = create_autospec(LLMEngine, instance=True)
    llm.reset_prefix_cache.return_value = True
    llm.collective_rpc.return_value = [{"ok": 1}]
    assert not is_async(LLM)
    engine = LocalEngine(llm)
    if EARLIER:
        with pytest.raises(UserError, match="cannot be paused"):
            engine.suits(VLLM, "abort")
        return
    controlled(engine)
    assert llm.sleep.mock_calls == [
        call(level=0, mode="abort"),
        call(level=0, mode="keep"),
        call(level=2, mode="abort"),
    ]
    llm.llm_engine.reset_encoder_cache.assert_called_once_with()


@contextlib.contextmanager
def served(llm: Any, config: Any = None) -> Iterator[str]:
    """The routes of this release around an engine that was started with a configuration; the URL."""
    import uvicorn
    from fastapi import FastAPI

    app, found = FastAPI(), []
    app.state.engine_client, app.state.vllm_config = llm, config
    for name in ROUTERS:
        with contextlib.suppress(ModuleNotFoundError):
            found.append(importlib.import_module(f"vllm.entrypoints.{name}.api_router"))
    with contextlib.suppress(ModuleNotFoundError):
        found.append(importlib.import_module("vllm.entrypoints.serve.instrumentator.server_info"))
    for module in found:
        app.include_router(module.router)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_servers() -> None:
    llm = async_llm()
    with served(llm) as url:
        controlled(HttpEngine(url, 10.0))
    assert_controlled(llm, by_position=True)
    assert llm.reset_prefix_cache.mock_calls == [call(True, True)]
    assert llm.collective_rpc.await_count == 1
    sent = llm.collective_rpc.mock_calls[0].kwargs
    assert (sent["method"], sent["args"]) == ("nvfp4_status", ("a", 1))


@pytest.mark.parametrize("family", some("qwen3"))
@pytest.mark.parametrize("place", ["alone"])
def test_engines_tell_how_they_were_started(engine: Engine) -> None:
    from vllm.config import KVTransferConfig, ParallelConfig

    llm = async_llm()
    llm.vllm_config = config = engine.config
    local: Any = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    with served(llm, config) as url, running_loop() as loop:
        engines = AsyncEngine(llm, "the engine", 10.0, loop), LocalEngine(local), HttpEngine(url, 1.0)
        for parallel, found in (
            ({}, Started("", None, 1)),
            ({"worker_extension_cls": "a.B"}, Started("a.B", None, 1)),
            ({"data_parallel_size": 4, "data_parallel_size_local": 2}, Started("", None, 4)),
            (
                {"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True},
                Started("", None, 2),
            ),
            (
                {"data_parallel_size": 4, "data_parallel_size_local": 1, "data_parallel_external_lb": True},
                Started("", None, 1),
            ),
            ({"data_parallel_size": 4, "data_parallel_rank": 1, "data_parallel_rank_local": 1}, Started("", None, 1)),
        ):
            config.parallel_config = ParallelConfig(**parallel)
            assert [one.started() for one in engines] == [found] * 3
        config.kv_transfer_config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
        config.model_config.enable_sleep_mode = True
        assert [one.started() for one in engines] == [Started("", None, 1, connector=True, sleeps=True)] * 3
        assert HttpEngine(f"{url}/elsewhere", 1.0).started() is None


def test_an_error_of_a_worker_leaves_the_answers_of_the_others_unread() -> None:
    """Why nothing is tried with workers (`live_started`)."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

    status = WorkerProc.ResponseStatus
    failing = deque([(status.FAILURE, "no such method"), (status.SUCCESS, "second of the one")])
    other = deque([(status.SUCCESS, "first of the other"), (status.SUCCESS, "second of the other")])
    executor: Any = MultiprocExecutor.__new__(MultiprocExecutor)
    executor.is_failed, executor.rpc_broadcast_mq, executor.futures_queue = False, MagicMock(), deque()
    executor.response_mqs = [
        SimpleNamespace(dequeue=lambda timeout, own=own, **_: own.popleft()) for own in (failing, other)
    ]
    executor.vllm_config = executor.shutdown_event = MagicMock()
    executor.vllm_config.parallel_config.enable_fault_tolerance = False
    with pytest.raises(RuntimeError, match="no such method"):
        executor.collective_rpc("nvfp4_hello")
    assert executor.collective_rpc("nvfp4_hello") == ["second of the one", "first of the other"]
