"""What changed since the last sync, as few bytes: for engines that have the weights of before.

All tensors of a sync lie one after the other in one piece of memory (`Layout`); `live_snapshot` keeps that of the last
sync and compares it with a new stream, piece by piece. What a piece's `Changes` hold is the exclusive or of old and new
bytes at the places that differ, and how far these are apart. Applied to the old bytes they give the new ones.

A step of training with a small learning rate changes few of the packed bytes: a weight's code changes when the weight
crosses the border between two codes, and a block's scale when its largest magnitude crosses one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .live_recipe import Incoming

ALIGNMENT = 16
"""Bytes; tensors begin at multiples of it."""

AT_ONCE = 1 << 23
"""Changes that are taken apart together."""

FAR = {torch.uint8: 0xFF, torch.int16: 0xFFFF}
"""The largest distance between two places that is written down; in between are places where nothing changes."""


class Layout:
    """Where the tensors of a sync lie, one after the other; quickest if a stream has them in this order too.

    Args:
        incoming: the tensors, in an order that both sides know.
    """

    def __init__(self, incoming: Sequence[Incoming]) -> None:
        self.entries = list(incoming)
        self.starts: list[int] = []
        self.sizes: list[int] = []
        at = 0
        for entry in self.entries:
            size = math.prod(entry.shape) * entry.dtype.itemsize
            self.starts.append(at)
            self.sizes.append(size)
            at += -(-size // ALIGNMENT) * ALIGNMENT
        self.nbytes = at
        self.index = {entry.name: i for i, entry in enumerate(self.entries)}
        self._edges = torch.tensor([*self.starts, at])

    def view(self, memory: Tensor, name: str) -> Tensor:
        """A tensor in memory of ``nbytes`` bytes."""
        i = self.index[name]
        entry, data = self.entries[i], memory[self.starts[i] : self.starts[i] + self.sizes[i]]
        return data.view(entry.dtype).view(entry.shape)

    def split(self, places: Tensor) -> Iterator[tuple[str, slice, int]]:
        """Which tensors places lie in.

        Args:
            places: int64 ``[n]``, ascending.

        Yields:
            Name, which of the places are in it, and its first byte.
        """
        if not len(places):
            return
        self._edges = self._edges.to(places.device)
        cuts = torch.searchsorted(places, self._edges).tolist()
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            if end > begin:
                yield self.entries[i].name, slice(begin, end), self.starts[i]


@dataclass(frozen=True)
class Changes:
    """What changed in a piece.

    Args:
        start: its first byte.
        flips: uint8 ``[n]``, old byte xor new byte.
        gaps: uint8 or int16 ``[n]``, read without sign: how far a place is from the one before, the first from
            ``start``. None: ``flips`` are those of all bytes of the piece.
        count: of bytes that change.
    """

    start: int
    flips: Tensor
    gaps: Tensor | None
    count: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the way."""
        return self.flips.nbytes + (0 if self.gaps is None else self.gaps.nbytes)

    def places(self) -> tuple[Tensor, Tensor]:
        """Where bytes change, int64 ``[m]`` ascending, and their flips."""
        real = self.flips.nonzero()[:, 0]
        return real + self.start if self.gaps is None else self.stops()[real], self.flips[real]

    def stops(self) -> Tensor:
        """Where flips are that do not stand for all bytes, int64 ``[n]`` ascending; those between changes are zero."""
        assert self.gaps is not None
        return self.start + (self.gaps.to(torch.int64) & FAR[self.gaps.dtype]).cumsum(0)


def places(pieces: Sequence[Changes]) -> Iterator[tuple[Tensor, Tensor]]:
    """Where bytes change, int64 ``[n]`` ascending, and their flips, uint8 ``[n]``, several times.

    Args:
        pieces: in the order of their first bytes.
    """
    for several in _batches(pieces):
        yield from _at_once(several)


def _batches(pieces: Sequence[Changes]) -> Iterator[list[Changes]]:
    """Pieces for whose sizes one waits once; those that hold all bytes are for themselves."""
    several: list[Changes] = []
    for piece in pieces:
        full = sum(len(other.flips) for other in several) + len(piece.flips) > AT_ONCE
        if several and (full or piece.gaps is None or several[-1].gaps is None):
            yield several
            several = []
        several.append(piece)
    if several:
        yield several


def _at_once(pieces: Sequence[Changes]) -> Iterator[tuple[Tensor, Tensor]]:
    """`places` of a batch, as few times as possible."""
    if len(pieces) > 1:
        at, flips = torch.cat([piece.stops() for piece in pieces]), torch.cat([piece.flips for piece in pieces])
        real = flips.nonzero()[:, 0]
        at, flips = at[real], flips[real]
        if bool((at.diff() > 0).all()):
            yield at, flips
            return
    for piece in pieces:  # what one spans may hold another, if tensors came in another order
        yield piece.places()


def compressed(start: int, flips: Tensor) -> Changes | None:
    """Flips of all bytes of a piece as `Changes`; None if nothing changed."""
    at = flips.nonzero()[:, 0]
    if not len(at):
        return None
    found = encoded(start, at, flips[at], len(flips))
    return Changes(start, flips.clone(), None, len(at)) if found is None else found


def encoded(start: int, at: Tensor, values: Tensor, length: int) -> Changes | None:
    """Single changes of a piece as `Changes`; None if these would be larger than the piece.

    Args:
        start: its first byte.
        at: int64 ``[n]``, ascending, counted from there; at least one.
        values: uint8 ``[n]``, old byte xor new byte.
        length: bytes of the piece.
    """
    gaps = torch.diff(at, prepend=at.new_zeros(1))
    more = {kind: (gaps - 1).clamp(min=0) // far for kind, far in FAR.items()}
    counts = torch.stack([m.sum() for m in more.values()]).tolist()
    sizes = {kind: (1 + kind.itemsize) * (len(at) + n) for kind, n in zip(more, counts, strict=True)}
    kind = min(sizes, key=lambda kind: sizes[kind])
    if sizes[kind] >= length:
        return None
    stops = sizes[kind] // (1 + kind.itemsize) - len(at)
    if stops:  # in between, each as far as can be from the place before
        ends = torch.cumsum(more[kind] + 1, 0) - 1
        steps = at.new_full((len(at) + stops,), FAR[kind])
        steps[ends] = gaps - more[kind] * FAR[kind]
        gaps, values = steps, values.new_zeros(len(steps)).index_put((ends,), values)
    return Changes(start, values, gaps.to(kind), len(at))


PIECE_NAME = "changes:"
"""What the names of tensors begin with that hold `Changes` on their way."""


def to_pieces(changes: Changes, number: int) -> Iterator[tuple[str, Tensor]]:
    """`Changes` as named tensors.

    Args:
        number: of the piece in its update; several may have the same first byte.
    """
    name = f"{PIECE_NAME}{number}:{changes.start}"
    yield f"{name}:flips", changes.flips
    if changes.gaps is not None:
        yield f"{name}:gaps", changes.gaps.view(torch.uint8)


def from_pieces(named: Mapping[str, Tensor], device: torch.device) -> list[Changes]:
    """What `to_pieces` made, in the order of the places."""
    found = []
    for name, flips in named.items():
        if name.endswith(":flips"):
            gaps = named.get(name.removesuffix("flips") + "gaps")
            start = int(name.split(":")[2])
            if gaps is not None:
                gaps = gaps.to(device)
                gaps = gaps if len(gaps) == len(flips) else gaps.view(torch.int16)
            found.append(Changes(start, flips.to(device), gaps))
    return sorted(found, key=lambda changes: changes.start)
