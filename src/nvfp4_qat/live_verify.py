"""Whether engines still have the weights that they were sent: asked of them all, compared with each other, and, layer
by layer and bit by bit, with a model's.

Checksums are of what kernels read, so engines are compared that run the same kernels on tensors of the same form, each
rank of one with the same rank of the other.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from .errors import MismatchError
from .live_buckets import Sender
from .live_client import Client
from .live_recipe import some
from .live_update import each

REPAIR = "the next sync sends it whole"


def altered(clients: Sequence[Client]) -> tuple[list[Exception], list[Client]]:
    """What is wrong with engines: those that were altered since their update, differ from each other, or fail.

    Returns:
        What is wrong, and the engines that could be asked.
    """
    found = each(clients, Client.verify)
    problems: list[Exception] = [answers for answers in found if isinstance(answers, Exception)]
    asked = [(c, answers) for c, answers in zip(clients, found, strict=True) if not isinstance(answers, Exception)]
    first: dict[Any, tuple[Client, dict[str, int], set[str]]] = {}
    for client, answers in asked:
        drifted = {layer for answer in answers for layer in answer["drifted"]}
        if drifted:
            problems.append(_wrong(client, f"was altered after it had been updated, in {some(sorted(drifted))}"))
        different: dict[Client, set[str]] = {}
        for worker, answer in zip(client.workers, answers, strict=True):
            place = (len(answers), worker["rank"], str(worker["experts"]))
            key = (answer["version"], place, worker["vllm"], answer["layout"])
            other, sums, told = first.setdefault(key, (client, answer["checksums"], drifted))
            layers = {name for name, number in answer["checksums"].items() if sums.get(name) != number}
            different.setdefault(other, set()).update(layers - drifted - told)
        for other, layers in different.items():
            if layers:
                problems.append(_wrong(client, f"differs from {other.engine.name} in {some(sorted(layers))}"))
                client.doubtful = other.doubtful = True
    return problems, [client for client, _ in asked]


def different(
    clients: Sequence[Client],
    wire: list[list[Any]],
    sender: Callable[[Client, str], Sender],
    stream: Iterable[tuple[str, Tensor]],
) -> list[Exception]:
    """Compare engines' weights with others; what is wrong.

    Args:
        clients: the engines.
        wire: what comes.
        sender: makes what sends to an engine.
        stream: all tensors; used up in any case, as other ranks wait for it.
    """
    name = uuid.uuid4().hex
    problems: dict[Client, Exception] = {}
    senders: dict[Client, Sender] = {}

    def attempt(step: Callable[..., Any], *arguments: Any) -> None:
        for client in clients:
            if client not in problems:
                try:
                    step(client, *arguments)
                except Exception as error:
                    problems[client] = error

    def begin(client: Client) -> None:
        client.call("nvfp4_compare", name, client.version, wire)
        senders[client] = sender(client, name)

    def end(client: Client) -> None:
        senders[client].flush()
        answers = client.call("nvfp4_compared", name)
        layers = sorted({layer for answer in answers for layer in answer["different"]})
        if layers:
            client.doubtful = True
            raise _wrong(client, f"is not this model's in {some(layers)}")

    attempt(begin)
    try:
        for tensor_name, tensor in stream:
            attempt(lambda client, *named: senders[client].send(*named), tensor_name, tensor)
        attempt(end)
    finally:
        for opened in senders.values():
            with contextlib.suppress(Exception):
                opened.close()
        each(clients, lambda client: client.abandon(name))
    return list(problems.values())


def _wrong(client: Client, what: str) -> MismatchError:
    return MismatchError(f"{client.engine.name}: version {client.version} {what}; {REPAIR}")
