"""`Rollout`: the trainer's side of live weights. It sends a model's packed weights to engines that are up.

A sync pauses the engine, announces what will come, sends it in buckets, and only when the engine has all of it lets it
go on. If anything fails in between, the engine stays paused, requests wait, and the next sync makes it whole.

Where the tensors go through depends on where the engine's workers are: in this process tensors are handed over as they
are; in another one on the same machine two buckets of CUDA memory are shared, of which one is filled while the other is
read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from .errors import MismatchError, UserError
from .live_buckets import Direct, Shared
from .live_manifest import manifest, to_wire
from .plan import QuantPlan
from .quantizer import packed_weights

EXTENSION = "nvfp4_qat.vllm.LiveWeights"


@dataclass(frozen=True)
class SyncReport:
    """What a sync did.

    Args:
        version: of the weights that the engines have now.
        tensors, bytes: how much was sent to each engine.
        seconds: from the pause to the resumption, the packing of the weights included.
    """

    version: int
    tensors: int
    bytes: int
    seconds: float


class Engine(Protocol):
    """An engine that takes weights."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `vllm.LiveWeights` on every worker."""

    def pause(self) -> None:
        """Stop answering; requests that come are queued."""

    def resume(self) -> None:
        """Go on answering, with nothing cached of older weights."""


class LocalEngine:
    """A `vllm.LLM`, in this process or with processes of its own.

    Args:
        llm: made with ``worker_extension_cls="nvfp4_qat.vllm.LiveWeights"``.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def call(self, method: str, *arguments: Any) -> list[Any]:
        found: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return found

    def pause(self) -> None:
        self._llm.sleep(level=0, mode="abort")

    def resume(self) -> None:
        self._llm.reset_prefix_cache()
        self._llm.wake_up(tags=["scheduling"])


class Rollout:
    """Engines that take a model's weights; made by `connect`.

    Args:
        engines: connected.
        plan: of the model.
    """

    def __init__(self, engines: Sequence[Engine], plan: QuantPlan) -> None:
        self.engines, self.plan = list(engines), plan
        self.version = 0
        self._workers = [_hello(engine) for engine in self.engines]
        self.audit()

    @classmethod
    def connect(cls, engine: Any, plan: QuantPlan) -> Rollout:
        """Connect with engines.

        Args:
            engine: a `vllm.LLM`, or a list of such.
            plan: of the model whose weights they are to get.

        Raises:
            UserError: an engine was not started with the worker extension.
            MismatchError: an engine quantizes other layers than the plan.
        """
        engines = engine if isinstance(engine, (list, tuple)) else [engine]
        return cls([e if hasattr(e, "call") else LocalEngine(e) for e in engines], plan)

    def audit(self) -> None:
        """Compare what the engines really hold in 4 bits with the plan.

        Raises:
            MismatchError: lists every layer that is quantized on one side only.
        """
        for workers in self._workers:
            self.plan.audit({name for worker in workers for name in worker["quantized"]})

    def sync(self, model: nn.Module) -> SyncReport:
        """Send a model's weights to all engines.

        Args:
            model: the one the plan was made for, on a GPU of the engines' machine.

        Raises:
            MismatchError: an engine did not take the weights. It stays paused; the next sync makes it whole.
        """
        start = time.perf_counter()
        version = self.version + 1
        wire = to_wire(manifest(model, self.plan))
        for engine in self.engines:
            engine.pause()
        for engine in self.engines:
            _checked(engine, "nvfp4_begin", version, wire)
        tensors = nbytes = 0
        with contextlib.ExitStack() as stack:
            senders = [stack.enter_context(contextlib.closing(self._sender(i))) for i in range(len(self.engines))]
            for name, tensor in packed_weights(model, layout="fused"):
                tensors, nbytes = tensors + 1, nbytes + tensor.nbytes
                for sender in senders:
                    sender.send(name, tensor)
            for sender in senders:
                sender.flush()
        for engine in self.engines:
            _checked(engine, "nvfp4_commit", version)
        for engine in self.engines:
            engine.resume()
        self.version = version
        return SyncReport(version, tensors, nbytes, time.perf_counter() - start)

    def _sender(self, index: int) -> Direct | Shared:
        here = f"{socket.gethostname()}:{os.getpid()}"
        call, workers = functools.partial(_checked, self.engines[index]), self._workers[index]
        if all(worker["process"] == here for worker in workers):
            return Direct(call)
        return Shared(call, sorted({worker["gpu"] for worker in workers}))


def _hello(engine: Engine) -> list[dict[str, Any]]:
    from .vllm import PROTOCOL

    try:
        workers = _checked(engine, "nvfp4_hello")
    except MismatchError:
        raise
    except Exception as error:
        raise UserError(
            f"the engine does not take live weights ({type(error).__name__}: {error}): start vLLM with "
            f'worker_extension_cls="{EXTENSION}", and install nvfp4-qat where its workers run'
        ) from error
    others = sorted({worker["package"] for worker in workers if worker["protocol"] != PROTOCOL})
    if others:
        raise MismatchError(
            f"the engine's workers have nvfp4-qat {', '.join(others)}, which cannot talk to this version: install the "
            "same version on both sides"
        )
    return workers


def _checked(engine: Engine, method: str, *arguments: Any) -> list[dict[str, Any]]:
    """Call every worker; raise what any of them reports."""
    answers = engine.call(method, *arguments)
    errors = {f"{a.get('kind')}: {a['error']}" for a in answers if "error" in a}
    if errors:
        raise MismatchError("; ".join(sorted(errors)))
    return [a["ok"] for a in answers]
