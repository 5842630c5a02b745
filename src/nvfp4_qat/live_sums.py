"""Checksums of groups of tensors, over the position and the value of every word, in one pass over their memory.

A word is 8 bytes. Two 32-bit numbers that hang on its position are added to its halves, and the product of these, 64
bits, is what it adds to the sum (as in NH, the hash of UMAC: Black et al., 1999). Each word is mixed for itself, so
that no order of additions changes the sum; but words that change places do, and so does each bit: two groups that
differ have the same sum with a probability of about 2^-32. That is against accidents, not against attacks.

On a GPU all tensors are one launch (`live_sums_kernel`), with a table of where they lie that is made anew only when
they are others. Tensors of other sizes or addresses than multiples of 8 bytes are read byte by byte in a second launch,
each byte as a word of eight of it. Those with gaps between their elements are read together if they fill each other's,
as two halves of a matrix do, or else as contiguous copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WORD = 8
"""Bytes."""

CHUNK = 1 << 22
"""Words that are mixed at a time without the kernel."""

Units = Mapping[str, Sequence[Tensor]]
"""Tensors by the name of the group that they belong to."""


class Sums:
    """Sums of groups of tensors that stay where they are; those are not held.

    Args:
        device: theirs.
        kernel: whether the kernel does it also on a CPU, where Triton interprets it; for tests.
        tile: words a program has at once, how often, and programs that share a span of a tensor.
    """

    def __init__(self, device: torch.device, kernel: bool = False, tile: tuple[int, int, int] = (1024, 8, 16)) -> None:
        self._device, self._kernel, self.tile = device, kernel or device.type == "cuda", tile
        self._known: Any = None
        self._tables: dict[torch.dtype, Tensor] = {}
        self._alone: list[tuple[int, int, Tensor]] = []

    def of(self, units: Units) -> Tensor:
        """The sum of each group, int64 ``[groups]`` on the device; nothing is waited for."""
        tensors = [t for group in units.values() for t in group]
        places = [(t.data_ptr(), t.nbytes, None if t.is_contiguous() else (t.shape, t.stride())) for t in tensors]
        known = [len(group) for group in units.values()], places
        if known != self._known:
            self._lay_out(units)
            self._known = known
        out = torch.zeros(len(units), dtype=torch.int64, device=self._device)
        for dtype, table in self._tables.items():
            self._launch(dtype, table, out)
        for index, first, t in self._alone:
            out[index] += summed(words_of(t), first)
        return out

    def _lay_out(self, units: Units) -> None:
        rows: dict[torch.dtype, list[tuple[int, int, int, int]]] = {torch.int64: [], torch.uint8: []}
        self._alone = []
        span = self.tile[0] * self.tile[1] * self.tile[2]
        for index, tensors in enumerate(units.values()):
            first = 0
            for t in _pieces(tensors):
                address, kind = t.data_ptr(), torch.int64 if _has_words(t) else torch.uint8
                count = t.nbytes // kind.itemsize
                if self._kernel and _dense(t):
                    for start in range(0, count, span):
                        at = address + start * kind.itemsize
                        rows[kind].append((at, min(count - start, span), first + start, index))
                elif count:
                    self._alone.append((index, first, t))
                first += count
        self._tables = {kind: torch.tensor(found).to(self._device) for kind, found in rows.items() if found}

    def _launch(self, dtype: torch.dtype, table: Tensor, out: Tensor) -> None:
        import triton.language as tl

        from .launch import on_device
        from .live_sums_kernel import sums_kernel

        words, steps, programs = self.tile
        kind = tl.int64 if dtype == torch.int64 else tl.uint8
        with on_device(out):
            sums_kernel[(len(table) * programs,)](table, out, TYPE=kind, WORDS=words, STEPS=steps, PROGRAMS=programs)


def _pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, with as few gaps as can be."""
    gapped: dict[int, list[Tensor]] = {}
    found = []
    for t in tensors:
        if _dense(t):
            found.append(t)
        else:
            gapped.setdefault(t.untyped_storage().data_ptr(), []).append(t)
    for several in gapped.values():
        first = min(t.data_ptr() for t in several)
        nbytes = max(t.data_ptr() + _extent(t) for t in several) - first
        if nbytes == sum(t.nbytes for t in several):
            whole = torch.empty(0, dtype=torch.uint8, device=several[0].device)
            storage = several[0].untyped_storage()
            found.append(whole.set_(storage, first - storage.data_ptr(), (nbytes,), (1,)))
        else:
            found += several
    return found


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or line_of(t) is not None


def _has_words(t: Tensor) -> bool:
    """Whether a tensor can be read as such: a contiguous copy of one with gaps has another address."""
    return t.nbytes % WORD == 0 and (t.data_ptr() % WORD == 0 or not _dense(t))


def line_of(t: Tensor) -> Tensor | None:
    """All elements of a tensor in the order of memory, one dimension; None if there are gaps between them."""
    strides = t.stride()
    ordered = t.detach().permute(sorted(range(t.ndim), key=lambda dim: -strides[dim]))
    return ordered.as_strided((t.numel(),), (1,)) if ordered.is_contiguous() else None


def words_of(t: Tensor) -> Tensor:
    """A tensor as words, int64 ``[n]``; as single bytes, uint8 ``[n]``, where it cannot be read as such."""
    line = line_of(t)
    if line is None:
        line = t.detach().contiguous().view(-1)
    data = line.view(torch.uint8)
    return data.view(torch.int64) if _has_words(t) else data


def summed(words: Tensor, first: int) -> Tensor:
    """The sum of words, int64 ``[]``.

    Args:
        words: int64 or uint8 ``[n]``.
        first: position of the first one.
    """
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for at in range(0, len(words), CHUNK):
        part = words[at : at + CHUNK].to(torch.int64)
        part = part if words.dtype == torch.int64 else part * 0x01010101_01010101
        position = torch.arange(first + at, first + at + len(part), dtype=torch.int64, device=words.device)
        total += mixed(part, position).sum()
    return total


def mixed(words: Tensor, position: Tensor) -> Tensor:
    """What words at some positions add to a sum; all int64 ``[n]``. Numbers of 32 bits and products wrap around."""
    x = (position.to(torch.int32) + 0x3C6EF372) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    first = x ^ ((x >> 13) & 0x7FFFF)
    second = first * 0x297A2D39
    second = second ^ ((second >> 16) & 0xFFFF)
    low, high = words.to(torch.int32) + first, (words >> 32).to(torch.int32) + second
    return low.to(torch.int64) * high.to(torch.int64)
