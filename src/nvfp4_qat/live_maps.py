"""Where the 4-bit codes of a parameter lie after an engine has repacked them, found out by asking its own code.

A kernel's layout is a permutation of codes that nobody here wants to know. It is found by sending numbers through the
engine's processing in place of codes: digit by digit, 4 bits at a time, every code carries the number of its own
place, and what comes out says where it went. Kernels work in tiles, so the permutation is the same within each tile but
for an offset; found and checked like that it needs a few bytes for a thousand codes (`CodeMap`). With it single codes
of a live tensor can be changed (`CodeMap.change`) or read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILES = ((64, 16), (16, 64), (64, 64), (16, 16), (128, 64), (256, 64), (8, 64), (8, 16), (4, 16))
"""Rows and columns of codes that are tried, in this order."""

CHUNK = 1 << 23
"""Codes whose places are found at a time."""

Process = Callable[[Tensor], Sequence[Tensor]]
"""From packed codes to processed tensors; uint8 ``[..., columns / 2]``, the first code in the low bits."""


class NoMapError(Exception):
    """Processing does more with codes than to put them elsewhere, or in no regular way."""


@dataclass(frozen=True)
class CodeMap:
    """Places of codes: that of code ``(row, column)`` is that of its tile, and within it the same for all tiles.

    Args:
        shape: of the packed parameter.
        tile: rows and columns of it.
        output: int64 ``[rows / tile rows, columns / tile columns]``: in which tensor a tile lies.
        first: int64 of the same shape: place of the tile's first code there.
        within: int64 ``[tile rows, tile columns]``, counted from there.

    A place is counted in codes from a tensor's first byte, the low bits of a byte first.
    """

    shape: tuple[int, ...]
    tile: tuple[int, int]
    output: Tensor
    first: Tensor
    within: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.output.nbytes + self.first.nbytes + self.within.nbytes

    @property
    def columns(self) -> int:
        return int(self.first.shape[1]) * self.tile[1]

    def places(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Where codes are.

        Args:
            codes: int64 ``[n]``, their numbers in the parameter, row after row.

        Returns:
            In which tensor, and the place in it; int64 ``[n]``.
        """
        row, column = codes // self.columns, codes % self.columns
        a, b = self.tile
        at = row // a, column // b
        return self.output[at], self.first[at] + self.within[row % a, column % b]

    def change(self, tensors: Sequence[Tensor], codes: Tensor, flips: Tensor) -> None:
        """Change codes of processed tensors in place.

        Args:
            tensors: contiguous, those that `found` was asked about, or live ones of the same form.
            codes: int64 ``[n]``, each at most once.
            flips: uint8 ``[n]``: old code xor new code.
        """
        output, place = self.places(codes)
        at, shift = place // 2, (4 * (place % 2)).to(torch.uint8)
        for i, tensor in enumerate(tensors):
            data = _bytes(tensor)
            mine = output == i
            mine_at = at * mine
            # Two codes of a byte may change. What each adds to the byte, modulo 256, is added up atomically.
            old = data[mine_at] >> shift & 15
            data.scatter_add_(0, mine_at, ((old ^ flips) - old << shift) * mine)

    def read(self, tensors: Sequence[Tensor], codes: Tensor) -> Tensor:
        """Codes of processed tensors, uint8 ``[n]``."""
        output, place = self.places(codes)
        found = torch.zeros(len(codes), dtype=torch.uint8, device=codes.device)
        for i, tensor in enumerate(tensors):
            mine = output == i
            at = place[mine]
            found[mine] = (_bytes(tensor)[at // 2] >> (4 * (at % 2)).to(torch.uint8)) & 15
        return found


def found(shape: Sequence[int], process: Process, device: torch.device) -> CodeMap:
    """Find out where processing puts codes.

    Args:
        shape: of the packed parameter, two codes a byte along its last dimension.
        process: does it.
        device: where the parameter is.

    Raises:
        NoMapError: they are not only put elsewhere, or not tile by tile.
    """
    rows, columns = int(torch.Size(shape[:-1]).numel()), 2 * int(shape[-1])
    reason = "no tile size divides its shape"
    for a, b in TILES:
        if rows % a or columns % b:
            continue
        try:
            made = _tiled(shape, rows, columns, a, b, process, device)
        except _OtherTilesError as error:
            reason = str(error)
            continue
        if not proved(made, process, device):
            raise NoMapError("other codes go other ways")
        return made
    raise NoMapError(f"codes of a parameter {list(shape)} are moved in a way that is not regular: {reason}")


class _OtherTilesError(Exception):
    pass


def _tiled(
    shape: Sequence[int], rows: int, columns: int, a: int, b: int, process: Process, device: torch.device
) -> CodeMap:
    outputs, firsts, within = [], [], None
    step = max(1, CHUNK // (a * columns)) * a
    for start in range(0, rows, step):
        count = min(step, rows - start)
        output, place = _places(shape, columns, start, count, process, device)
        tiles = (place.view(count // a, a, columns // b, b), output.view(count // a, a, columns // b, b))
        first, one = tiles[0][:, 0, :, 0], tiles[1][:, 0, :, 0]
        offsets = tiles[0] - first[:, None, :, None]
        within = offsets[0, :, 0, :].clone() if within is None else within
        if not bool((offsets == within[None, :, None, :]).all()) or not bool((tiles[1] == one[:, None, :, None]).all()):
            raise _OtherTilesError(f"tiles of {a} × {b} differ")
        outputs.append(one.clone())
        firsts.append(first.clone())
    assert within is not None
    return CodeMap(tuple(shape), (a, b), torch.cat(outputs), torch.cat(firsts), within)


def _places(
    shape: Sequence[int], columns: int, start: int, count: int, process: Process, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tensors and places of the codes of some rows, int64 ``[count, columns]``."""
    numbers = torch.arange(count * columns, dtype=torch.int64, device=device)

    def sent(values: Tensor) -> Sequence[Tensor]:
        packed = torch.zeros(shape, dtype=torch.uint8, device=device)
        pairs = values.to(torch.uint8).view(count, columns // 2, 2)
        packed.view(-1, columns // 2)[start : start + count] = pairs[..., 0] | pairs[..., 1] << 4
        return process(packed)

    there = [list(_nonzero(_bytes(t))) for t in sent(torch.ones_like(numbers))]
    if sum(len(at) for both in there for at in both) != len(numbers):
        raise NoMapError("codes are lost, doubled or changed")
    carried = [[torch.zeros_like(at) for at in both] for both in there]
    for digit in range((max(count * columns - 1, 1).bit_length() + 3) // 4):
        for t, both, numbers_of in zip(sent(numbers >> 4 * digit & 15), there, carried, strict=True):
            data = _bytes(t)
            for half, (at, number) in enumerate(zip(both, numbers_of, strict=True)):
                number |= (data[at].to(torch.int64) >> 4 * half & 15) << 4 * digit
    place, output = torch.full_like(numbers, -1), torch.zeros_like(numbers)
    for i, (both, numbers_of) in enumerate(zip(there, carried, strict=True)):
        for half, (at, number) in enumerate(zip(both, numbers_of, strict=True)):
            if bool((number >= len(numbers)).any()):
                raise NoMapError("codes are changed")
            place[number], output[number] = 2 * at + half, i
    if bool((place < 0).any()):
        raise NoMapError("codes are lost or changed")
    return output.view(count, columns), place.view(count, columns)


def _nonzero(data: Tensor) -> Iterator[Tensor]:
    """Bytes whose low code is not zero, and those whose high code is not."""
    for mask in (15, 240):
        yield (data & mask).nonzero()[:, 0]


def proved(code_map: CodeMap, process: Process, device: torch.device) -> bool:
    """Whether codes at random are all found where a map says."""
    count = 2 * int(torch.Size(code_map.shape).numel())
    generator = torch.Generator(device).manual_seed(count)
    packed = torch.randint(256, code_map.shape, dtype=torch.uint8, device=device, generator=generator)
    processed, flat = process(packed), packed.view(-1)
    for start in range(0, count, CHUNK):
        codes = torch.arange(start, min(start + CHUNK, count), dtype=torch.int64, device=device)
        expected = flat[codes // 2] >> (4 * (codes % 2)).to(torch.uint8) & 15
        if not torch.equal(code_map.read(processed, codes), expected):
            return False
    return True


def _bytes(t: Tensor) -> Tensor:
    """All of a contiguous tensor."""
    return t.detach().view(-1).view(torch.uint8)
