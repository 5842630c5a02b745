"""Strided regions of memory, and copies between them: merged into few, and checked for gaps and overlaps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """Elements of a tensor's memory.

    Args:
        start: bytes from the tensor's first element.
        size, stride: as of a tensor, in elements.
        dtype: what they are read as.
    """

    start: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def of(self, tensor: Tensor) -> Tensor:
        """The region as a view of a tensor's memory."""
        at = tensor.storage_offset() * tensor.element_size() + self.start
        if at % self.dtype.itemsize:
            raise ValueError(f"{self.dtype} values cannot begin at byte {at}: align tensors to 16 bytes")
        if tensor.dtype is self.dtype:
            if self.size == tensor.shape and self.stride == tensor.stride() and not self.start:
                return tensor
            return tensor.as_strided(self.size, self.stride, at // self.dtype.itemsize)
        view = torch.empty(0, dtype=self.dtype, device=tensor.device)
        with torch.no_grad():
            return view.set_(tensor.untyped_storage(), at // self.dtype.itemsize, self.size, self.stride)


@dataclass(frozen=True)
class Copy:
    """``destination.copy_(source)``.

    Args:
        key: of the parameter that is written.
        destination: in it. source: in the tensor that is loaded, of the same size.
    """

    key: str
    destination: Region
    source: Region


def clipped(copy: Copy, first: int, last: int) -> list[Copy]:
    """What a copy takes out of some bytes of its source.

    Args:
        first, last: the bytes from ``first`` to ``last - 1`` of the tensor that is loaded.

    Returns:
        Copies whose sources count from ``first``.

    Raises:
        ValueError: an element lies on both sides of a border.
    """
    d, s = copy.destination, copy.source
    item, end = s.dtype.itemsize, s.start + _extent(s)
    if not s.numel or end <= first or s.start >= last:
        return []
    if first <= s.start and end <= last:
        return [Copy(copy.key, d, replace(s, start=s.start - first))]
    if not any(s.stride):
        raise ValueError(f"{s.dtype} values cannot be cut at bytes {first} or {last}")
    dim = max(range(len(s.size)), key=lambda i: s.stride[i])
    count, step = s.size[dim], s.stride[dim] * item
    one = _extent(_narrowed(s, dim, 0, 1))
    touched = range(max(0, (first - s.start - one) // step + 1), min(count, -((s.start - last) // step)))
    whole = range(
        max(touched.start, -((s.start - first) // step)), min(touched.stop, (last - one - s.start) // step + 1)
    )
    found = []
    if whole:
        found += clipped(Copy(copy.key, *(_narrowed(r, dim, whole.start, len(whole)) for r in (d, s))), first, last)
    for i in touched:
        if i not in whole:
            found += clipped(Copy(copy.key, *(_without(_narrowed(r, dim, i, 1), dim) for r in (d, s))), first, last)
    return found


def _extent(region: Region) -> int:
    """Bytes from the first element of a region to the end of the last one."""
    return (1 + sum((n - 1) * s for n, s in zip(region.size, region.stride, strict=True))) * region.dtype.itemsize


def _narrowed(r: Region, dim: int, start: int, count: int) -> Region:
    at = r.start + start * r.stride[dim] * r.dtype.itemsize
    return replace(r, start=at, size=(*r.size[:dim], count, *r.size[dim + 1 :]))


def _without(r: Region, dim: int) -> Region:
    return replace(r, size=r.size[:dim] + r.size[dim + 1 :], stride=r.stride[:dim] + r.stride[dim + 1 :])


def region_of(tensor: Tensor) -> Region:
    """A tensor as a region of its own memory."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    return Region(start, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def merged(copies: Iterable[Copy]) -> list[Copy]:
    """The same copies with fewer of them: those of equal shape at equal distances become one."""
    runs: list[list[Copy]] = []
    last: dict[Any, list[Copy]] = {}
    for copy in map(_squeezed, copies):
        if not copy.source.numel:
            continue
        d, s = copy.destination, copy.source
        kind = (copy.key, d.size, d.stride, s.stride, d.dtype, s.dtype)
        run = last.get(kind)
        if run is not None and _continues(run, copy):
            run.append(copy)
        else:
            last[kind] = [copy]
            runs.append(last[kind])
    return [_joined(run) for run in runs]


def _squeezed(copy: Copy) -> Copy:
    """Without dimensions of size 1, those with the longest steps first, and those joined that then follow each other.

    So a transposed tensor that is copied to a transposed one is copied like any other.
    """
    d, s = copy.destination, copy.source
    dims: list[list[int]] = []
    given = [dim for dim in zip(d.size, d.stride, s.stride, strict=True) if dim[0] != 1]
    for size, to, of in sorted(given, key=lambda dim: (dim[1] == 0, dim[1], dim[2]), reverse=True):
        if dims and dims[-1][1] == to * size and dims[-1][2] == of * size:
            dims[-1] = [dims[-1][0] * size, to, of]
        else:
            dims.append([size, to, of])
    sizes, to_strides, of_strides = (tuple(dim[i] for dim in dims) for i in range(3))
    return Copy(copy.key, Region(d.start, sizes, to_strides, d.dtype), Region(s.start, sizes, of_strides, s.dtype))


def _step(a: Copy, b: Copy) -> tuple[int, int]:
    return b.destination.start - a.destination.start, b.source.start - a.source.start


def _continues(run: Sequence[Copy], copy: Copy) -> bool:
    to, of = _step(run[-1], copy)
    if to <= 0 or of < 0 or to % copy.destination.dtype.itemsize or of % copy.source.dtype.itemsize:
        return False
    return len(run) == 1 or (to, of) == _step(run[0], run[1])


def _joined(run: Sequence[Copy]) -> Copy:
    first = run[0]
    if len(run) == 1:
        return first
    to, of = _step(run[0], run[1])

    def region(old: Region, step: int) -> Region:
        return Region(old.start, (len(run), *old.size), (step // old.dtype.itemsize, *old.stride), old.dtype)

    return _squeezed(Copy(first.key, region(first.destination, to), region(first.source, of)))


def coverage(parameter: Tensor, regions: Iterable[Region]) -> tuple[int, int]:
    """How many elements of a contiguous parameter the regions leave out, and how many they write once too often."""
    starts, lengths = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for region in regions:
        found, nbytes = _runs(region)
        starts.append(found)
        lengths.append(np.full(len(found), nbytes, dtype=np.int64))
    start = np.concatenate(starts)
    order = np.argsort(start, kind="stable")
    start, end = start[order], (start + np.concatenate(lengths))[order]
    reached = np.maximum.accumulate(np.concatenate(([0], end)))[:-1]  # how far the runs before each one go
    left_out = int(np.maximum(start - reached, 0).sum())
    left_out += max(0, parameter.nbytes - int(end.max(initial=0)))
    twice = int(np.maximum(np.minimum(reached, end) - start, 0).sum())
    size = parameter.element_size()
    return -(-left_out // size), -(-twice // size)


def union(regions: Iterable[Region]) -> list[Region]:
    """The bytes that lie in any of the regions, each once."""
    spans: list[tuple[int, int]] = []
    for region in regions:
        starts, length = _runs(region)
        spans += [(int(at), int(at) + length) for at in starts]
    joined: list[list[int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return [Region(start, (end - start,), (1,), torch.uint8) for start, end in joined]


def overlap(a: Iterable[Region], b: Iterable[Region]) -> bool:
    """Whether any byte lies in a region of both."""
    spans = sorted((r.start, r.start + r.size[0], i) for i, side in enumerate((union(a), union(b))) for r in side)
    reached = [-1, -1]
    for start, end, side in spans:
        if start < reached[1 - side]:
            return True
        reached[side] = max(reached[side], end)
    return False


def _runs(region: Region) -> tuple[Any, int]:
    """A region as runs of bytes: where they start, and their length."""
    plain = Copy("", region, region)
    region = _squeezed(plain).destination
    sizes, strides, item = list(region.size), list(region.stride), region.dtype.itemsize
    length = item
    if sizes and strides[-1] == 1:
        length *= sizes.pop()
        strides.pop()
    at: Any = np.array([region.start], dtype=np.int64)
    for size, stride in zip(sizes, strides, strict=True):
        at = (at[:, None] + np.arange(size, dtype=np.int64) * (stride * item)).reshape(-1)
    return at, length


def moved(copy: Copy, at: Tensor, nbytes: int | None = None) -> tuple[Tensor | slice, Tensor]:
    """Where a copy puts single bytes.

    Args:
        copy: between equal dtypes.
        at: int64 ``[n]``, bytes from the source tensor's first.
        nbytes: of the source tensor, if known: a copy of all of it in one piece is found without looking at ``at``.

    Returns:
        Which of them it takes, bool ``[n]`` or a slice of all, and where each of these goes: bytes from the
        destination's first.

    Raises:
        ValueError: it converts, or elements of its source lie over one another.
    """
    item = copy.source.dtype.itemsize
    if copy.source.dtype != copy.destination.dtype:
        raise ValueError(f"it converts {copy.source.dtype} to {copy.destination.dtype}")
    nested = _joined_dims(copy)
    if nbytes is not None and copy.source.start == 0 and nested == [(nbytes // item, 1, 1)] and nbytes > item:
        return slice(None), at + copy.destination.start
    rest = at - copy.source.start
    taken, to = rest >= 0, torch.full_like(at, copy.destination.start)
    reach = [sum((size - 1) * stride for size, stride, _ in nested[i + 1 :]) for i in range(len(nested))]
    for (size, stride, there), inner in zip(nested, reach, strict=True):
        if stride <= inner:
            raise ValueError("elements of its source lie over one another")
        index = torch.div(rest, stride * item, rounding_mode="floor")
        taken &= index < size
        to += index * (there * item)
        rest = rest - index * (stride * item)
    taken &= rest < item
    return taken, (to + rest)[taken]


def run_of(copy: Copy) -> tuple[int, int, int] | None:
    """A copy of bytes that follow each other on both sides: the first in the source, in the destination, how many.

    Returns:
        None: they do not, or the copy converts them.
    """
    item, count = copy.source.dtype.itemsize, copy.source.numel
    if copy.source.dtype != copy.destination.dtype or _joined_dims(copy) not in ([], [(count, 1, 1)]):
        return None
    return copy.source.start, copy.destination.start, count * item


def _joined_dims(copy: Copy) -> list[tuple[int, int, int]]:
    """Sizes, source and destination strides, the largest source stride first; what runs on in both is one."""
    dims = zip(copy.source.size, copy.source.stride, copy.destination.stride, strict=True)
    joined: list[tuple[int, int, int]] = []
    for size, stride, there in sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: -dim[1]):
        if joined and joined[-1][1:] == (size * stride, size * there):
            joined[-1] = (joined[-1][0] * size, stride, there)
        else:
            joined.append((size, stride, there))
    return joined
