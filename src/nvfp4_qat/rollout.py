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
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .live_async import AsyncEngine, in_thread, is_async
from .live_broadcast import Broadcast, Group, joined
from .live_buckets import Direct, Sender, SharedMemory
from .live_changes import Layout
from .live_client import EXTENSION as EXTENSION
from .live_client import Client
from .live_engines import Engine, LocalEngine
from .live_http import HttpEngine
from .live_manifest import Known, manifest, to_wire
from .live_memory import device_name, machine, process
from .live_options import RolloutOptions
from .live_recipe import Incoming
from .live_snapshot import Snapshot
from .live_tokens import UNKNOWN, response
from .live_update import Update, each, raise_all
from .live_verify import altered, different
from .plan import QuantPlan
from .quantizer import packed_weights


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
        repaired: layers that somebody had altered since the last sync, each behind its engine's name; found where only
            changes are sent.
    """

    version: int
    tensors: int
    bytes: int
    seconds: float
    extra_bytes: int = 0
    restarted: tuple[str, ...] = ()
    fraction_changed: float | None = None
    repaired: tuple[str, ...] = ()


class Rollout:
    """Engines that take a model's weights; made by `connect`.

    Args:
        engines: connected.
        plan: of the model.
        options: how to connect and update them.
    """

    def __init__(self, engines: Sequence[Engine], plan: QuantPlan, options: RolloutOptions) -> None:
        self.plan, self._options = plan, options
        self._snapshot: Snapshot | None = None
        self._known: Known = {}
        self._announced: tuple[list[Incoming], list[list[Any]]] = [], []
        self._clients: list[Client] = []
        found = each(engines, lambda engine: Client(engine, plan, options.in_flight, options.address))
        raise_all([error for error in found if isinstance(error, Exception)])
        self._clients = [client for client in found if isinstance(client, Client)]
        self._groups: dict[Client, tuple[str, Group]] = {}

    @classmethod
    def connect(cls, engine: Any, plan: QuantPlan, **options: Any) -> Rollout:
        """Connect with engines.

        Args:
            engine: a `vllm.LLM` or `vllm.AsyncLLM`, the URL of a ``vllm serve`` (``http://host:port``), or a list of
                such; each started for live weights. An empty list is for ranks of a sharded model that only take part
                in packing.
            plan: of the model whose weights they are to get.
            options: those of `RolloutOptions`: in_flight, transport, bucket_bytes, timeout, address, changes.

        Raises:
            UserError: an engine cannot be reached, or was not started for live weights; a bad option; this thread has
                the event loop of an `AsyncLLM`.
            MismatchError: an engine quantizes other layers than the plan, or has another version of this package.
        """
        chosen = RolloutOptions(**options)
        return cls(_engines(engine, chosen.timeout), plan, chosen)

    @classmethod
    async def connect_async(cls, engine: Any, plan: QuantPlan, **options: Any) -> Rollout:
        """`connect` within an event loop, as one has with a `vllm.AsyncLLM`.

        Args:
            engine, plan, options: see `connect`. An engine that has not been used yet is used in this loop.
        """
        chosen = RolloutOptions(**options)
        engines = _engines(engine, chosen.timeout, asyncio.get_running_loop())
        return await in_thread(cls, engines, plan, chosen)

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

    def verify(self, model: nn.Module | None = None, weights: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """See whether the engines still have what the last sync left; they go on answering.

        Every layer's checksum is compared with that of the end of the sync, and with that of engines that have the same
        version and kernels. The next sync sends the layers that are found here whole.

        Args:
            model: unchanged since the last sync: what the engines' own code makes of its weights is compared too, bit
                by bit. That sends everything and takes as long as a first sync. Of a sharded model every rank calls
                this.
            weights: as in `sync`, where the last one had them.

        Raises:
            MismatchError: names the layers of each engine that are not what they must be.
            UserError: an engine cannot be reached, sleeps, has incomplete weights, or none of a sync.
        """
        problems, clients = altered(self._clients)
        if model is not None:
            (_, wire), sender = self._announcement(model), functools.partial(self._sender, _device(model))
            stream = packed_weights(model, layout="fused") if weights is None else weights
            problems += different(clients, wire, sender, stream)
        raise_all(problems)

    def sync(self, model: nn.Module, weights: Iterable[tuple[str, Tensor]] | None = None) -> SyncReport:
        """Send a model's weights to all engines.

        Of a sharded model every rank calls this (those without engines are connected with an empty list).

        Args:
            model: the one the plan was made for.
            weights: what to send, where that is not what a model after `apply_qat` trains with: as
                ``QATQuantizer(plan.config, plan, layout="fused").quantize(...)`` gives it, or, for an engine that holds
                no 4-bit weights (`QuantPlan.unquantized`), the model's own tensors by name. Their memory stays as it is
                until this returns. None: the packed weights.

        Raises:
            MismatchError: an engine refused the weights, and nothing was changed; or the update of some engines broke
                off. Those stay paused, with requests waiting, while the others have the new version; the next sync
                makes them whole.
            UserError: an engine cannot be reached; the model cannot be packed.
        """
        start = time.perf_counter()
        entries, wire = self._announcement(model)
        raise_all([e for e in each(self._clients, Client.refresh) if isinstance(e, Exception)])
        for client in self._clients:  # what cannot work is said before any engine is paused
            self._way(_device(model), client)
        restarted = tuple(client.engine.name for client in self._clients if client.restarted)
        version = 1 + max((client.newest for client in self._clients), default=0)
        snapshot = self._kept(entries, model)
        compared = snapshot is not None and snapshot.update is not None
        update = Update(self._clients, version, functools.partial(self._sender, _device(model)), snapshot)
        update.begin(wire)
        with update:
            update.pause(self._options.in_flight)
            update.send(packed_weights(model, layout="fused") if weights is None else weights)
            update.commit()
        extra = max((w.get("extra_bytes", 0) for client in self._clients for w in client.workers), default=0)
        fraction = update.changed / max(update.whole_bytes, 1) if compared else None
        seconds = time.perf_counter() - start
        repaired = tuple(f"{client.engine.name}: {layer}" for client in self._clients for layer in client.drifted)
        return SyncReport(version, update.tensors, update.bytes, seconds, extra, restarted, fraction, repaired)

    async def sync_async(self, model: nn.Module, weights: Iterable[tuple[str, Tensor]] | None = None) -> SyncReport:
        """`sync` within an event loop, which goes on meanwhile.

        It runs in a thread of its own on this one's GPU and CUDA stream, after what is queued there. Until it returns
        nothing else may change or shard the model. A task that is cancelled ends when the sync has ended.

        Args:
            model, weights: see `sync`; the weights are taken in that thread.
        """
        return await in_thread(self.sync, model, weights)

    def token_versions(
        self,
        request: Any,
        count: int | None = None,
        *,
        choice: int = 0,
        engine: int = 0,
        ended: int | None | EllipsisType = UNKNOWN,
    ) -> list[int | None]:
        """The version of the weights that made each token of a response; asks no engine, so an event loop may call it.

        Responses have tokens of several versions with ``in_flight="keep"``. What was in flight at an update is known
        until it was at none of the 16 updates that follow (`live_in_flight.UPDATES`).

        Args:
            request: a `vllm.RequestOutput`; or the request's id, which no other request has: the one that was given to
                ``AsyncLLM.generate`` or is in a server's response.
            count: of the tokens so far; needed for an id, and for an output that has only those that are new.
            choice: which of the request's responses (``n=``), its ``index``.
            engine: that answered, by its place in the list that was connected.
            ended: the engine's version when the response ended. Needed for a request that was in flight at no update
                while others were known, where the output has no metrics (a server's response, or ``LLM`` without
                ``disable_log_stats=False``).

        Returns:
            As many as tokens; None: the weights that the engine was started with.

        Raises:
            UserError: it cannot be told; the message says why.
        """
        times = None
        if not isinstance(request, str):
            request, tokens, times = response(request, choice)
            count = tokens if count is None else count
        if count is None:
            raise UserError(f"how many tokens came of {request!r}? Give count=, or vLLM's RequestOutput")
        if not 0 <= engine < len(self._clients):
            raise UserError(f"there is no engine {engine}: {len(self._clients)} were connected")
        return self._clients[engine].tokens.of(request, count, choice, times, ended)

    def _announcement(self, model: nn.Module) -> tuple[list[Incoming], list[list[Any]]]:
        """The manifest, and what is sent of it."""
        entries = manifest(model, self.plan, self._known)
        if entries != self._announced[0]:
            self._announced = entries, to_wire(entries)
        return self._announced

    def _kept(self, entries: Sequence[Incoming], model: nn.Module) -> Snapshot | None:
        """The packed weights of the last sync, where changes are wanted; on ranks with engines."""
        if not self._options.changes or not self._clients:
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
        """Leave the groups that broadcasts go through, and listen to no engine any more."""
        for client in self._clients:
            client.close()
        for _, group in self._groups.values():
            group.close()
        self._groups.clear()

    def _way(self, device: torch.device, client: Client) -> str:
        """How tensors travel to an engine."""
        workers, transport = client.workers, self._options.transport
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
            return Direct(client.call, update, self._options.bucket_bytes)
        if way == "shared":
            devices = sorted({w["device"] for w in client.workers})
            return SharedMemory(client.call, update, devices, self._options.bucket_bytes, self._options.timeout)
        return Broadcast(client.call, update, *self._group(client, device), self._options.bucket_bytes)

    def _group(self, client: Client, device: torch.device) -> tuple[Group, str]:
        """The group with an engine's workers, and its name: that of the last sync, if they are still in it."""
        if client in self._groups:
            name, group = self._groups[client]
            if group.usable and group.device == device and all(w["group"] == name for w in client.workers):
                return group, name
            group.close()
        name = uuid.uuid4().hex
        ranks = {worker["instance"]: i + 1 for i, worker in enumerate(client.workers)}
        address = self._options.address or client.engine.address()
        group = joined(client.call, name, ranks, address, device, self._options.timeout)
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
