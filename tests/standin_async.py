"""The engine of `standin_vllm` as an event loop drives it.

`AsyncLLM` takes the calls of `vllm.AsyncLLM`, whose answers come through one event loop, and `EarlierAsyncLLM` those of
0.15, which holds requests back itself.
"""

from __future__ import annotations

import asyncio
import json

from standin_vllm import Core, Worker, places


class AsyncLLM:
    """Its calls are coroutines of one loop: the one in which it was made or first used."""

    def __init__(self, weights, tp=1, worker=Worker):
        self.core = Core([worker(weights, place) for place in places(tp)])
        self.calls, self.output_handler = [], None
        try:
            self._at_home()
        except RuntimeError:
            pass

    @property
    def vllm_config(self):
        return self.core.vllm_config

    def _at_home(self):
        running = asyncio.get_running_loop()
        if self.output_handler is None:
            self.output_handler = running.create_task(asyncio.Event().wait())
        assert self.output_handler.get_loop() is running, "attached to a different loop"
        return running

    async def _do(self, name, function, *arguments):
        """The answer comes through the loop, and never if that is blocked."""
        loop = self._at_home()
        self.calls.append((name, *arguments))
        return await loop.run_in_executor(None, self.core.do, function, *arguments)

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert timeout is None
        return await self._do("rpc", self.core.rpc, method, *json.loads(json.dumps([args, kwargs])))

    async def sleep(self, level=1, mode="abort"):
        await self._do("sleep", self.core.sleep, level, mode)

    async def wake_up(self, tags=None):
        await self._do("wake_up", self.core.wake_up, tags)

    async def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        return await self._do("reset", self.core.reset, reset_running_requests, reset_connector)

    async def reset_encoder_cache(self):
        await self._do("reset_encoder", self.core.reset_encoder)

    async def generate(self, prompt):
        self._at_home()
        return await asyncio.wrap_future(await self._do("add", self.core.add_now, prompt))


class EarlierAsyncLLM(AsyncLLM):
    """As in vLLM 0.15: its scheduler cannot be paused, so new requests wait here."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.open = asyncio.Event()
        self.open.set()

    async def pause_generation(self, *, wait_for_inflight_requests=False, clear_cache=True):
        assert not wait_for_inflight_requests
        self.open.clear()
        await self._do("abort", self.core.abort)
        if clear_cache:
            await self.reset_prefix_cache()

    async def resume_generation(self):
        self.open.set()

    reset_encoder_cache = None

    async def sleep(self, level=1):
        raise AssertionError("it would go on with requests")

    async def wake_up(self, tags=None):
        raise AssertionError("Executor is not sleeping.")

    async def generate(self, prompt):
        await self.open.wait()
        return await super().generate(prompt)
