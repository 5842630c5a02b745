"""`AsyncEngine`: a `vllm.AsyncLLM`, whose calls are coroutines that belong to one event loop.

A sync blocks its thread for as long as it takes. So it runs in another thread than the loop, to which it hands every
call. In the loop's own thread it would wait for an answer that only this thread could fetch: `refuse_own_loop` says so
instead, and `in_thread` is how a coroutine syncs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from .errors import UserError
from .live_engines import InFlight, PausedBefore, until_reset
from .live_started import Started, started

Result = TypeVar("Result")


class AsyncEngine:
    """A `vllm.AsyncLLM`, whose workers are in processes of their own.

    Args:
        llm: made with ``worker_extension_cls="nvfp4_qat.vllm.LiveWeights"`` or the backend of `live_transfer`.
        name: in messages.
        timeout: seconds that a call may take.
        loop: where the engine is at home, if it has not been used yet; else it knows.

    Raises:
        UserError: it has no event loop yet.
    """

    by_reference = False

    def __init__(self, llm: Any, name: str, timeout: float, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._llm, self.name, self._timeout = llm, name, timeout
        # The task that fetches answers; there is one since the engine was made or used within a loop.
        task = getattr(llm, "output_handler", None)
        found = loop if task is None else task.get_loop()
        if found is None:
            raise UserError(
                f"{name} was made outside of an event loop and belongs to none yet: make it in the coroutine that uses "
                "it, or connect there with `await Rollout.connect_async(…)`"
            )
        self.loop: asyncio.AbstractEventLoop = found
        self._before = PausedBefore(name)

    def suits(self, vllm: str | None, in_flight: InFlight) -> None:
        self._before.check(vllm, in_flight)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        found: list[Any] = self._do(self._llm.collective_rpc, method, args=arguments)
        return found

    def started(self) -> Started | None:
        return started(getattr(self._llm, "vllm_config", None))

    def transfer(self, info: dict[str, Any]) -> None:
        self._do(self._llm.collective_rpc, "init_weight_transfer_engine", kwargs={"init_info": info})

    def pause(self, in_flight: InFlight) -> None:
        if self._before:
            self._do(self._llm.pause_generation, clear_cache=False)
        else:
            self._do(self._llm.sleep, level=0, mode=in_flight)  # pause_generation would refuse requests (0.33)

    def reset_cache(self, connector: bool) -> None:
        options = {"reset_running_requests": True, "reset_connector": connector}
        until_reset(lambda: self._do(self._llm.reset_prefix_cache, **options))
        if not self._before:
            self._do(self._llm.reset_encoder_cache)

    def resume(self) -> None:
        if self._before:
            self._do(self._llm.resume_generation)
        else:
            self._do(self._llm.wake_up, tags=["scheduling"])

    def sleep(self, level: int) -> None:
        self._before.refuse("sleep")
        self._do(self._llm.sleep, level=level, mode="abort")

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._before.refuse("wake up")
        self._do(self._llm.wake_up, tags=None if tags is None else list(tags))

    def address(self) -> str:
        return "127.0.0.1"

    def scheduled(self) -> dict[str, int] | None:
        return None

    def _do(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if not self.loop.is_running():
            raise ConnectionError(f"{self.name} cannot be reached: its event loop does not run")
        # After a timeout the call goes on: vLLM would have an answer for a caller that it cannot find.
        answer = asyncio.run_coroutine_threadsafe(method(*arguments, **options), self.loop)
        try:
            return answer.result(self._timeout)
        except concurrent.futures.TimeoutError:
            if answer.done():  # it was raised by the call
                raise
            raise TimeoutError(f"{self.name} did not answer within {self._timeout:g} s") from None


def is_async(engine: Any) -> bool:
    """Whether an engine of vLLM is driven by coroutines."""
    return inspect.iscoroutinefunction(getattr(engine, "collective_rpc", None))


def refuse_own_loop(engines: Iterable[Any]) -> None:
    """Refuse to block the thread of an event loop that one of the engines needs to answer.

    Raises:
        UserError: it would wait for ever.
    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return
    for engine in engines:
        if getattr(engine, "loop", None) is running:
            raise UserError(
                f"{engine.name} answers through the event loop of this thread, which this call would block: use "
                "`await Rollout.connect_async(…)`, `await rollout.sync_async(model)`, and for the rest "
                "`await asyncio.to_thread(rollout.sleep, 1)` and the like"
            )


async def in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Do something in another thread on this one's GPU and CUDA stream, while the event loop goes on.

    Who gives up waiting still waits until it has ended: what it uses is not free before.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    device, stream = (torch.cuda.current_device(), torch.cuda.current_stream()) if cuda else (None, None)

    def there() -> Result:
        if not cuda:
            return function(*arguments)
        with torch.cuda.device(device), torch.cuda.stream(stream):  # so it comes after what was queued here
            return function(*arguments)

    task = asyncio.ensure_future(asyncio.to_thread(there))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise
