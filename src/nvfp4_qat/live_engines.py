"""Engines as a trainer sees them: a way to call the workers, and control of the scheduler.

`LocalEngine` drives a `vllm.LLM` that this program made, `live_async.AsyncEngine` a `vllm.AsyncLLM`, and
`live_http.HttpEngine` a server. What is said to the workers and in which order is `live_client`'s matter.

An engine is paused by sleeping at level 0, which vLLM knows since 0.17: the scheduler rests, and requests are queued.
In 0.15 and 0.16 `AsyncLLM` and a server hold requests back in front of the scheduler, and an `LLM` cannot be paused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from .errors import MismatchError, UserError
from .live_in_flight import scheduled
from .live_started import Started, started

InFlight = Literal["abort", "keep"]
"""What becomes of requests that are being answered when an update comes."""

ATTEMPTS = 20
"""How often the prefix cache is asked to be reset; it may have to wait for blocks that are being moved."""

REFUSED = "Failed to reset KV cache"
"""How vLLM's message begins when it cannot reset the prefix cache; also over HTTP, with status 500."""


TIMEOUT = 300.0
"""Seconds that an engine may take for one step."""

PAUSING_SCHEDULER = (0, 17)
"""The first minor release of vLLM whose scheduler can be paused."""


class Engine(Protocol):
    """An engine that takes weights."""

    name: str
    """In messages."""

    by_reference: bool
    """Whether tensors may be arguments of calls to workers of this process."""

    def suits(self, vllm: str | None, in_flight: InFlight) -> None:
        """Get to know which vLLM there is, before anything else but `call`.

        Args:
            vllm: its version.
            in_flight: what will be done with requests that are being answered.

        Raises:
            UserError: this version cannot be paused like that.
        """

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `vllm.LiveWeights` on every worker.

        Returns:
            Each worker's answer.

        Raises:
            OSError: the engine cannot be reached or does not answer.
            UserError: it is set up in a way in which workers cannot be called.
        """

    def started(self) -> Started | None:
        """How it was started; None: it does not tell.

        Raises:
            OSError: the engine cannot be reached or does not answer.
        """

    def transfer(self, info: dict[str, Any]) -> None:
        """Call ``init_weight_transfer_engine`` of every worker, which brings no answers; see `live_replies`."""

    def pause(self, in_flight: InFlight) -> None:
        """Answer nothing from now on; requests that come are queued.

        Args:
            in_flight: "abort" ends requests that are being answered; "keep" lets them wait with the others.
        """

    def reset_cache(self, connector: bool) -> None:
        """Forget what was computed with the weights of before, outputs of vision encoders too.

        Kept requests compute their context anew.

        Args:
            connector: whether a KV connector is to forget its blocks too, as those offloaded to the CPU.

        Raises:
            MismatchError: the engine did not do it.
        """

    def resume(self) -> None:
        """Go on answering."""

    def sleep(self, level: int) -> None:
        """Free the GPU's memory: level 1 keeps the weights in CPU memory, level 2 drops them."""

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again: "weights", "kv_cache" or, with None, all of it."""

    def address(self) -> str:
        """This machine's address, as the engine's workers reach it."""

    def scheduled(self) -> dict[str, int] | None:
        """While it is paused, how many tokens each request has, where the scheduler can be asked; None: it cannot be,
        and need not be, as it took all that workers sampled (`live_in_flight`)."""


class LocalEngine:
    """A `vllm.LLM`, with its workers in this process or in processes of its own.

    Args:
        llm: made with ``worker_extension_cls="nvfp4_qat.vllm.LiveWeights"`` or the backend of `live_transfer`.
        name: in messages.
    """

    by_reference = True

    def __init__(self, llm: Any, name: str = "the engine") -> None:
        self._llm, self.name = llm, name

    def suits(self, vllm: str | None, in_flight: InFlight) -> None:
        if older(vllm):
            raise UserError(
                f"{self.name} is an LLM of vLLM {vllm}, which cannot be paused: install vLLM "
                f"{'.'.join(map(str, PAUSING_SCHEDULER))} or later, or use an AsyncLLM or `vllm serve`"
            )

    def call(self, method: str, *arguments: Any) -> list[Any]:
        # Without vLLM's timeout: after it, later calls would get the answers to earlier ones (vLLM 0.24).
        found: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return found

    def started(self) -> Started | None:
        return started(getattr(getattr(self._llm, "llm_engine", None), "vllm_config", None))

    def transfer(self, info: dict[str, Any]) -> None:
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def pause(self, in_flight: InFlight) -> None:
        self._llm.sleep(level=0, mode=in_flight)

    def reset_cache(self, connector: bool) -> None:
        until_reset(lambda: self._llm.reset_prefix_cache(reset_running_requests=True, reset_connector=connector))
        self._llm.llm_engine.reset_encoder_cache()

    def resume(self) -> None:
        self._llm.wake_up(tags=["scheduling"])

    def sleep(self, level: int) -> None:
        self._llm.sleep(level=level, mode="abort")

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self._llm.wake_up(tags=None if tags is None else list(tags))

    def address(self) -> str:
        return "127.0.0.1"

    def scheduled(self) -> dict[str, int] | None:
        """See `live_in_flight.scheduled`."""
        return scheduled(self._llm)


def release(version: str | None) -> tuple[int, int] | None:
    """Major and minor number of a version of vLLM; None if it says none, as one that was built from source."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def older(vllm: str | None) -> bool:
    """Whether the scheduler of this version cannot be paused."""
    return (release(vllm) or PAUSING_SCHEDULER) < PAUSING_SCHEDULER


class PausedBefore:
    """Whether an engine holds requests back in front of its scheduler; true for vLLM 0.15 and 0.16.

    Args:
        name: of the engine, in messages.
    """

    def __init__(self, name: str) -> None:
        self._name, self._vllm = name, ""

    def __bool__(self) -> bool:
        return bool(self._vllm)

    def check(self, vllm: str | None, in_flight: InFlight) -> None:
        """Take note of the version.

        Raises:
            UserError: it cannot keep requests over an update.
        """
        self._vllm = vllm if vllm is not None and older(vllm) else ""
        if in_flight == "keep":
            self.refuse("keep requests over an update")

    def refuse(self, what: str) -> None:
        """Raise for what such an engine cannot do while it holds requests back."""
        if self:
            raise UserError(
                f"{self._name} has vLLM {self._vllm}, which cannot {what} and hold new requests back: install vLLM "
                f"{'.'.join(map(str, PAUSING_SCHEDULER))} or later"
            )


def until_reset(reset: Callable[[], Any]) -> None:
    """Try to reset a prefix cache, a few times; blocks may be held a moment longer.

    Raises:
        MismatchError: it was refused every time.
    """
    for attempt in range(ATTEMPTS):
        try:
            if reset():
                return
        except Exception as error:  # what other processes raise has vLLM's text and no type
            if REFUSED not in str(error):
                raise
        time.sleep(0.01 * attempt)
    raise MismatchError(
        "the engine did not reset its prefix cache, which holds results of the old weights: blocks are still in use, "
        "as by a transfer of KV blocks; end that and sync again"
    )
