"""`Rollout`: the trainer's side of live weights. It sends a model's packed weights to engines that are up.

A sync announces what will come, which each engine may still refuse as a whole; pauses the engines; sends the tensors in
buckets; and lets an engine go on when it has all of them. If anything fails in between, that engine stays paused and
requests to it wait: it never answers from a mixture, and the next sync makes it whole.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .errors import UserError
from .live_async import AsyncEngine, in_thread, is_async
from .live_broadcast import Broadcast, Group, joined
from .live_buckets import BUCKET, Direct, Sender, SharedMemory
from .live_changes import Layout, Snapshot
from .live_client import EXTENSION as EXTENSION
from .live_client import Client
from .live_engines import TIMEOUT, Engine, InFlight, LocalEngine
from .live_http import HttpEngine
from .live_manifest import manifest, to_wire
from .live_memory import device_name, machine, process
from .live_recipe import Incoming
from .live_update import Update, each, raise_all
from .plan import QuantPlan
from .quantizer import packed_weights

Transport = Literal["auto", "direct", "shared", "broadcast"]


@dataclass(frozen=True)
class SyncReport:
    """What a sync did.

    Args:
        version: of the weights that all engines have now.
        tensors, bytes: how much was sent to each engine.
        seconds: from the first question to the last resumption, the packing of the weights included.
        extra_bytes: of GPU memory that a worker needed for it at its peak; on a GPU shared with the trainer's process,
            what the trainer allocated meanwhile is in it.
        restarted: engines that had been started anew since the last sync.
        fraction_changed: of the bytes since the last sync; None if they were not compared.
    """

    version: int
    tensors: int
    bytes: int
    seconds: float
    extra_bytes: int = 0
    restarted: tuple[str, ...] = ()
    fraction_changed: float | None = None


class Rollout:
    """Engines that take a model's weights; made by `connect`.

    Args:
        engines: connected.
        plan: of the model.
        in_flight, transport, bucket_bytes, timeout, address: see `connect`.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        plan: QuantPlan,
        *,
        in_flight: InFlight = "abort",
        transport: Transport = "auto",
        bucket_bytes: int = BUCKET,
        timeout: float = TIMEOUT,
        address: str | None = None,
        changes: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("in_flight", in_flight, get_args(InFlight)),
            ("transport", transport, get_args(Transport)),
        ):
            if value not in allowed:
                raise UserError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
        if bucket_bytes <= 0 or timeout <= 0:
            raise UserError(f"bucket_bytes={bucket_bytes} and timeout={timeout} must both be positive")
        self.plan, self._in_flight, self._transport = plan, in_flight, transport
        self._limit, self._timeout, self._address = bucket_bytes, timeout, address
        self._changes = changes
        self._snapshot: Snapshot | None = None
        self._clients: list[Client] = []
        found = each(engines, lambda engine: Client(engine, plan, in_flight))
        raise_all([error for error in found if isinstance(error, Exception)])
        self._clients = [client for client in found if isinstance(client, Client)]
        self._groups: dict[Client, tuple[str, Group]] = {}

    @classmethod
    def connect(
        cls,
        engine: Any,
        plan: QuantPlan,
        *,
        in_flight: InFlight = "abort",
        transport: Transport = "auto",
        bucket_bytes: int = BUCKET,
        timeout: float = TIMEOUT,
        address: str | None = None,
        changes: bool = False,
    ) -> Rollout:
        """Connect with engines.

        Args:
            engine: a `vllm.LLM` or `vllm.AsyncLLM`, the URL of a ``vllm serve`` (``http://host:port``), or a list of
                such; each started with the worker extension. An empty list is for ranks of a sharded model that only
                take part in packing.
            plan: of the model whose weights they are to get.
            in_flight: what a sync does with requests that are being answered: "abort" ends them, "keep" lets them go on
                with the new weights, their context computed anew.
            transport: how tensors travel: "direct" to workers of this process, "shared" to those of this machine,
                "broadcast" to any, by NCCL. "auto" takes the first that works.
            bucket_bytes: tensors are sent in buckets of this size, of which there are two.
            timeout: seconds that an engine may take for one step.
            address: of this machine, as the workers reach it, for "broadcast"; by default found out.
            changes: send only what changed since the last sync to engines that have that. The trainer keeps a copy of
                the packed weights for it, and engines about a ninth of theirs.

        Raises:
            UserError: an engine cannot be reached, or was not started with the worker extension; a bad argument; this
                thread has the event loop of an `AsyncLLM`.
            MismatchError: an engine quantizes other layers than the plan, or has another version of this package.
        """
        return cls(
            _engines(engine, timeout), plan, in_flight=in_flight, transport=transport, bucket_bytes=bucket_bytes,
            timeout=timeout, address=address, changes=changes,
        )  # fmt: skip

    @classmethod
    async def connect_async(cls, engine: Any, plan: QuantPlan, **options: Any) -> Rollout:
        """`connect` within an event loop, as one has with a `vllm.AsyncLLM`.

        Args:
            engine, plan, options: see `connect`. An engine that has not been used yet is used in this loop.
        """
        loop = asyncio.get_running_loop()
        engines = _engines(engine, options.get("timeout", TIMEOUT), loop)
        return await in_thread(functools.partial(cls.connect, engines, plan, **options))

    @property
    def versions(self) -> list[int | None]:
        """Each engine's version, asked for now; None: its own weights, those of an incomplete update, or no answer."""

        def version(client: Client) -> int | None:
            client.refresh()
            return client.version

        return [v if isinstance(v, int) else None for v in each(self._clients, version)]

    def audit(self) -> None:
        """Compare what the engines really hold in 4 bits with the plan.

        Raises:
            MismatchError: lists every layer that is quantized on one side only.
        """
        raise_all([e for e in each(self._clients, Client.greet) if isinstance(e, Exception)])

    def sync(self, model: nn.Module, weights: Iterable[tuple[str, Tensor]] | None = None) -> SyncReport:
        """Send a model's weights to all engines.

        Of a sharded model every rank calls this (those without engines are connected with an empty list).

        Args:
            model: the one the plan was made for.
            weights: what to send, where that is not what a model after `apply_qat` trains with: as
                ``QATQuantizer(plan.config, plan, layout="fused").quantize(...)`` gives it, or, for an engine that holds
                no 4-bit weights (`QuantPlan.unquantized`), the model's own tensors by name. None: the packed weights.

        Raises:
            MismatchError: an engine refused the weights, and nothing was changed; or the update of some engines broke
                off. Those stay paused, with requests waiting, while the others have the new version; the next sync
                makes them whole.
            UserError: an engine cannot be reached; the model cannot be packed.
        """
        start = time.perf_counter()
        entries = manifest(model, self.plan)
        wire = to_wire(entries)
        raise_all([e for e in each(self._clients, Client.refresh) if isinstance(e, Exception)])
        for client in self._clients:  # what cannot work is said before any engine is paused
            self._way(_device(model), client)
        restarted = tuple(client.engine.name for client in self._clients if client.restarted)
        version = 1 + max((client.newest for client in self._clients), default=0)
        snapshot = self._kept(entries, model)
        compared = snapshot is not None and snapshot.version is not None
        update = Update(self._clients, version, functools.partial(self._sender, _device(model)), snapshot)
        update.begin(wire)
        with update:
            update.pause(self._in_flight)
            update.send(packed_weights(model, layout="fused") if weights is None else weights)
            update.commit()
        extra = max((w.get("extra_bytes", 0) for client in self._clients for w in client.workers), default=0)
        fraction = update.changed / max(update.whole_bytes, 1) if compared else None
        seconds = time.perf_counter() - start
        return SyncReport(version, update.tensors, update.bytes, seconds, extra, restarted, fraction)

    async def sync_async(self, model: nn.Module) -> SyncReport:
        """`sync` within an event loop, which goes on meanwhile.

        It runs in a thread of its own on this one's GPU and CUDA stream, after what is queued there. Until it returns
        nothing else may change or shard the model. A task that is cancelled ends when the sync has ended.

        Args:
            model: see `sync`.
        """
        return await in_thread(self.sync, model)

    def _kept(self, entries: Sequence[Incoming], model: nn.Module) -> Snapshot | None:
        """The packed weights of the last sync, where changes are wanted; on ranks with engines."""
        if not self._changes or not self._clients:
            return None
        if self._snapshot is None or self._snapshot.layout.entries != list(entries):
            self._snapshot = Snapshot(Layout(entries), _device(model))
        return self._snapshot

    def sleep(self, level: int = 1) -> None:
        """Free the engines' GPU memory.

        Args:
            level: 1 keeps their weights in CPU memory; 2 drops them, and only a sync brings them back.
        """
        if level not in (1, 2):
            raise UserError(f"sleep has the levels 1 and 2, not {level!r}")
        raise_all([e for e in each(self._clients, lambda c: c.sleep(level)) if isinstance(e, Exception)])

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Give the engines their memory again; with the last of it they go on answering.

        Args:
            tags: ["weights"] before a sync and ["kv_cache"] after it need less memory at a time; None: all.

        Raises:
            UserError: an engine would go on with incomplete weights.
        """
        raise_all([e for e in each(self._clients, lambda c: c.wake_up(tags)) if isinstance(e, Exception)])

    def close(self) -> None:
        """Leave the groups that broadcasts go through."""
        for _, group in self._groups.values():
            group.close()
        self._groups.clear()

    def _way(self, device: torch.device, client: Client) -> str:
        """How tensors travel to an engine."""
        workers, transport = client.workers, self._transport
        here = all(w["machine"] == machine() for w in workers)
        same = client.engine.by_reference and all(w["process"] == process() for w in workers)
        if transport == "auto":
            return "direct" if same else "shared" if here else "broadcast"
        if transport == "direct" and not same or transport == "shared" and not here:
            raise UserError(
                f'transport="{transport}" does not reach workers of another '
                f'{"process" if here else "machine"}: leave it at "auto"'
            )
        if transport == "broadcast" and device.type == "cuda":
            names = [*(w["device"] for w in workers), device_name(device)]
            if len(set(names)) < len(names):
                raise UserError(
                    f"{client.engine.name} has a worker on the trainer's GPU or two on one, which NCCL does not take: "
                    'leave transport at "auto", or give each a GPU of its own'
                )
        return transport

    def _sender(self, device: torch.device, client: Client, update: str) -> Sender:
        way = self._way(device, client)
        if way == "direct":
            return Direct(client.call, update, self._limit)
        if way == "shared":
            devices = sorted({w["device"] for w in client.workers})
            return SharedMemory(client.call, update, devices, self._limit, self._timeout)
        return Broadcast(client.call, update, *self._group(client, device), self._limit)

    def _group(self, client: Client, device: torch.device) -> tuple[Group, str]:
        """The group with an engine's workers, and its name: that of the last sync, if they are still in it."""
        if client in self._groups:
            name, group = self._groups[client]
            if group.usable and group.device == device and all(w["group"] == name for w in client.workers):
                return group, name
            group.close()
        name = uuid.uuid4().hex
        ranks = {worker["instance"]: i + 1 for i, worker in enumerate(client.workers)}
        group = joined(client.call, name, ranks, self._address or client.engine.address(), device, self._timeout)
        self._groups[client] = name, group
        for worker in client.workers:
            worker["group"] = name
        return group, name


def _engines(engine: Any, timeout: float, loop: asyncio.AbstractEventLoop | None = None) -> list[Engine]:
    engines = list(engine) if isinstance(engine, (list, tuple)) else [engine]
    names = [f"engine {i}" for i in range(len(engines))] if len(engines) > 1 else ["the engine"]
    return [_engine(e, name, timeout, loop) for e, name in zip(engines, names, strict=False)]


def _engine(engine: Any, name: str, timeout: float, loop: asyncio.AbstractEventLoop | None) -> Engine:
    if isinstance(engine, str):
        return HttpEngine(engine, timeout)
    if is_async(engine):
        return AsyncEngine(engine, name, timeout, loop)
    if hasattr(engine, "collective_rpc"):
        return LocalEngine(engine, name)
    if all(hasattr(engine, name) for name in ("call", "pause", "resume")):
        found: Engine = engine
        return found
    raise UserError(f"{type(engine).__name__} is no engine: connect a vllm.LLM or AsyncLLM, a URL, or a list of them")


def _device(model: nn.Module) -> torch.device:
    """Where buckets are filled: where the weights are."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))
