"""One update of several engines, from the announcement to the commit.

Nothing is changed before all engines have agreed to what will come. From then on each is on its own: one that fails is
left out of what comes next, stays paused, and is told of at the end.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from .errors import MismatchError, UserError
from .live_async import refuse_own_loop
from .live_buckets import Sender
from .live_changes import Changes, to_pieces
from .live_client import Client
from .live_engines import InFlight
from .live_snapshot import Snapshot

STATE = "An engine that lacks it stays paused and its requests wait; the next complete sync makes it whole."


class Update:
    """An update; what comes between `begin` and the end is to be done in a ``with`` block, which raises for engines
    that failed.

    Args:
        clients: the engines.
        version: of the weights.
        sender: makes what sends to an engine; called when the engine is paused.
        snapshot: of the last sync; engines that have its weights get only what changed. It takes the new weights.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        version: int,
        sender: Callable[[Client, str], Sender],
        snapshot: Snapshot | None = None,
    ) -> None:
        self.name, self.version = uuid.uuid4().hex, version
        self.tensors = self.bytes = self.whole_bytes = self.changed = self._pieces = 0
        self._snapshot = snapshot
        base = None if snapshot is None else snapshot.update
        self._by_changes = {client: base for client in clients if client.has(base)}
        self._clients, self._sender = list(clients), sender
        self._failed: dict[Client, Exception] = {}
        self._senders: dict[Client, Sender] = {}

    def begin(self, wire: list[list[Any]]) -> None:
        """Announce it to all engines; if one refuses, no engine is changed."""
        remember = self._snapshot is not None
        found = each(
            self._clients,
            lambda c: c.begin(self.name, self.version, wire, remember, self._by_changes.get(c)),
        )
        errors = [
            _named(client, error)
            for client, error in zip(self._clients, found, strict=True)
            if isinstance(error, Exception)
        ]
        if errors:
            self._abandon(self._clients)
            raise_all(errors)

    def pause(self, in_flight: InFlight) -> None:
        self._do(lambda client: client.pause(in_flight))

    def send(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Send the tensors; the stream is used up also when every engine has failed, as other ranks wait for it."""

        def open_sender(client: Client) -> None:
            self._senders[client] = self._sender(client, self.name)

        self._do(open_sender)
        for name, tensor in self._compared(stream):
            self.tensors, self.whole_bytes = self.tensors + 1, self.whole_bytes + tensor.nbytes
            for client in self._left():
                if client not in self._by_changes:
                    self._try(client, self._senders[client].send, name, tensor)
        if any(client not in self._by_changes for client in self._clients):
            self.bytes = self.whole_bytes
        for client in self._left():  # in this thread, whose CUDA stream the tensors are on
            self._try(client, self._senders[client].flush)
        for client in [client for client in self._left() if client in self._by_changes]:
            self._try(client, self._complete, client)

    def _compared(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass a stream on, and send what changed since the snapshot to the engines that have that."""
        if self._snapshot is None:
            yield from stream
            return
        self._snapshot.begin()
        for name, tensor in stream:
            self._pass_on(self._snapshot.take(name, tensor))
            yield name, tensor
        self._pass_on(self._snapshot.end())
        self._snapshot.update = self.name

    def _pass_on(self, pieces: Iterable[Changes]) -> None:
        for piece in pieces:
            self.changed += piece.count
            self.bytes += piece.nbytes
            self._pieces += 1
            for name, tensor in to_pieces(piece, self._pieces):
                for client in self._left():
                    if client in self._by_changes:
                        self._try(client, self._senders[client].send, name, tensor)

    def _complete(self, client: Client) -> None:
        """Send whole what an engine cannot change in parts."""
        assert self._snapshot is not None
        needed = client.change(self.name)
        for name in needed:
            tensor = self._snapshot.view(name)
            self._senders[client].send(name, tensor)
            self.bytes += tensor.nbytes
        self._senders[client].flush()

    def commit(self) -> None:
        self._do(lambda client: client.commit(self.name, self.version))

    def __enter__(self) -> Update:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for sender in self._senders.values():
            with contextlib.suppress(Exception):
                sender.close()
        broken = self._failed if error is None else dict.fromkeys(self._clients)
        self._abandon([client for client, why in broken.items() if not isinstance(why, OSError)])
        if isinstance(error, (MismatchError, UserError)):
            kind_of = MismatchError if isinstance(error, MismatchError) else UserError
            raise kind_of(f"version {self.version} was not sent completely: {error}\n{STATE}") from error
        if error is None and self._failed:
            count = f"{len(self._failed)} of {len(self._clients)} engines"
            told = "".join(f"\n  {_named(client, why)}" for client, why in self._failed.items())
            raise MismatchError(f"version {self.version} did not reach {count}:{told}\n{STATE}") from next(
                iter(self._failed.values())
            )

    def _left(self) -> list[Client]:
        return [client for client in self._clients if client not in self._failed]

    def _try(self, client: Client, step: Callable[..., Any], *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception as error:
            self._failed[client] = error

    def _do(self, step: Callable[[Client], Any]) -> None:
        left = self._left()
        for client, error in zip(left, each(left, step), strict=True):
            if isinstance(error, Exception):
                self._failed[client] = error

    def _abandon(self, clients: Sequence[Client]) -> None:
        each(clients, lambda client: client.abandon(self.name))


def each(items: Iterable[Any], step: Callable[[Any], Any]) -> list[Any]:
    """Do something with each engine at once; what came out, an exception included, in their order.

    Raises:
        UserError: this thread must not be blocked; see `live_async`.
    """

    def safely(item: Any) -> Any:
        try:
            return step(item)
        except Exception as error:
            return error

    items = list(items)
    refuse_own_loop(getattr(item, "engine", item) for item in items)  # what is done with engines, or their clients
    if len(items) < 2:
        return [safely(item) for item in items]
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(safely, items))


def raise_all(errors: Sequence[Exception]) -> None:
    """Raise one error for several."""
    if not errors:
        return
    if len(errors) == 1 and isinstance(errors[0], (MismatchError, UserError)):
        raise errors[0]
    kind = MismatchError if any(isinstance(error, MismatchError) for error in errors) else UserError
    raise kind("\n".join(str(error) or type(error).__name__ for error in errors)) from errors[0]


def _named(client: Client, error: Exception) -> Exception:
    text = str(error) or type(error).__name__
    if client.engine.name in text:
        return error
    return (UserError if isinstance(error, (UserError, OSError)) else MismatchError)(f"{client.engine.name}: {text}")
