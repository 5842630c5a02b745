"""`Snapshot`: the packed weights of the last sync, and what a new stream of them changes.

Tensors of a stream that follow each other share a *piece*, for whose number of changes the device is waited for once.
On a GPU two launches compare it (`live_changes_kernel`): one counts, one writes down the places and updates the old
bytes. A piece with more than `FEW` changes, and any on a CPU, is compared by PyTorch's operations, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .errors import MismatchError
from .live_changes import Changes, Layout, compressed, encoded

PIECE = 1 << 28
"""Bytes that are compared before the device is waited for; as many of a stream's tensors are held."""

FEW = 1 << 23
"""Changed bytes of which the places are found at a time; more are found in smaller steps, or sent as they are."""

STEP = 1 << 25
"""Bytes of these steps."""

WORD = 8
"""Bytes that are compared together, where a tensor's size and address allow it."""

TILE = 1024
"""Words that a program compares."""

SEARCH = 13
"""Steps in which a program finds its tensor, of fewer than two to the power of that many in a piece."""


class Snapshot:
    """The packed weights of the last sync.

    Args:
        layout: of them.
        device: where they are kept: that of the weights.
        kernels: whether the kernels compare also on a CPU, where Triton interprets them; for tests.
    """

    def __init__(self, layout: Layout, device: torch.device, kernels: bool = False) -> None:
        self.layout = layout
        self.memory = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        self._kernels = kernels or device.type == "cuda"
        self._flips: Tensor | None = None
        self._waiting: list[tuple[int, Tensor]] = []
        """First bytes, and the new bytes from there, of the piece that goes on."""
        self._first = self._end = 0
        self.update: str | None = None
        """The name of the update whose weights it holds; None: of none, or of several."""

    def view(self, name: str) -> Tensor:
        """A tensor of the last sync; valid until the next one."""
        return self.layout.view(self.memory, name)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Take a tensor as it is."""
        self.view(name).copy_(tensor)

    def changes(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[Changes]:
        """Compare with a new stream, and keep that.

        Args:
            stream: all tensors, in the order of the layout or another; their memory stays as it is until the end.

        Yields:
            What changed, for each piece in which something did.

        Raises:
            MismatchError: the stream does not have the tensors of the layout.
        """
        self.begin()
        for name, tensor in stream:
            yield from self.take(name, tensor)
        yield from self.end()

    def begin(self) -> None:
        """A new stream comes: `take` each tensor of it, and `end` it."""
        self.update = None
        self._first = self._end = 0
        self._waiting = []
        self._seen: set[str] = set()

    def take(self, name: str, tensor: Tensor) -> Iterator[Changes]:
        """Compare a tensor of the stream, and keep it. Yields and raises as `changes`."""
        i = self.layout.index.get(name)
        entry = None if i is None else self.layout.entries[i]
        if entry is None or (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype) or name in self._seen:
            raise MismatchError(f"{name} was announced otherwise, or not, or has come before")
        self._seen.add(name)
        yield from self._pieces(self.layout.starts[self.layout.index[name]], tensor)

    def end(self) -> Iterator[Changes]:
        """The stream is over. Yields and raises as `changes`."""
        yield from self._finished()
        if len(self._seen) != len(self.layout.entries):
            missing = sorted(self.layout.index.keys() - self._seen)
            raise MismatchError(f"{len(missing)} tensors have not come: {', '.join(missing[:20])}")

    def _pieces(self, start: int, tensor: Tensor) -> Iterator[Changes]:
        """Add a tensor to the piece that goes on, or begin new ones."""
        new = tensor.detach().to(self.memory.device).contiguous().view(-1).view(torch.uint8)
        done, size = 0, new.numel()
        while done < size:
            at = start + done
            full = len(self._waiting) + 1 == 1 << SEARCH
            fits = self._first <= at < self._first + PIECE and at >= self._end and not full
            if not self._waiting or not fits:
                yield from self._finished()
                self._first = self._end = at
            count = min(size - done, self._first + PIECE - at)
            self._waiting.append((at, new if count == size else new[done : done + count]))
            self._end, done = at + count, done + count
        if size > PIECE:  # all of its memory would be held for its last bytes
            yield from self._finished()

    def _finished(self) -> Iterator[Changes]:
        waiting, first, length = self._waiting, self._first, self._end - self._first
        self._waiting, self._end = [], first
        if not waiting:
            return
        found = self._few(waiting, first) if self._kernels else None
        if found is None:
            yield from self._many(waiting, first, length)
        elif len(found[0]):
            changes = encoded(first, *found, length)
            yield changes if changes is not None else self._whole(first, *found, length)

    def _few(self, waiting: list[tuple[int, Tensor]], first: int) -> tuple[Tensor, Tensor] | None:
        """Where a piece's bytes change, from its first one on, and their flips; the new bytes are kept.

        Returns:
            None: too many do, and nothing has been done.
        """
        import triton.language as tl

        from . import live_changes_kernel as kernels
        from .launch import on_device

        device, (tables, tiles) = self.memory.device, self._tables(waiting, first)
        counts = torch.empty(tiles, dtype=torch.int32, device=device)
        kinds = {torch.int64: tl.int64, torch.uint8: tl.uint8}
        with on_device(counts):
            for dtype, (grid, table) in tables.items():
                sizes = {"TYPE": kinds[dtype], "WORDS": TILE, "SEARCH": SEARCH}
                kernels.count_kernel[(grid,)](table, len(table), counts, **sizes)
            ends = counts.cumsum(0)
            total = int(ends[-1])
            if total > FEW:
                return None
            at = torch.empty(total, dtype=torch.int64, device=device)
            flips = torch.empty(total, dtype=torch.uint8, device=device)
            if total:
                for dtype, (grid, table) in tables.items():
                    sizes = {"TYPE": kinds[dtype], "WORDS": TILE, "SEARCH": SEARCH}
                    kernels.take_kernel[(grid,)](table, len(table), counts, ends, at, flips, **sizes)
        return at, flips

    def _tables(
        self, waiting: list[tuple[int, Tensor]], first: int
    ) -> tuple[dict[torch.dtype, tuple[int, Tensor]], int]:
        """What the kernels are to compare, by the dtype of words: tiles and table; and how many tiles there are."""
        memory, tiles = self.memory.data_ptr(), 0
        rows: dict[torch.dtype, list[tuple[int, ...]]] = {torch.int64: [], torch.uint8: []}
        grids = dict.fromkeys(rows, 0)
        for start, new in waiting:
            address, count, kind = new.data_ptr(), new.numel(), torch.int64
            if (address | memory + start | count) % WORD:
                kind = torch.uint8
            else:
                count //= WORD
            rows[kind].append((grids[kind], address, memory + start, count, start - first, tiles))
            grids[kind] += -(-count // TILE)
            tiles += -(-count // TILE)
        device = self.memory.device
        tables = {kind: torch.tensor(several).to(device) for kind, several in rows.items() if several}
        return {kind: (grids[kind], table) for kind, table in tables.items()}, tiles

    def _many(self, waiting: list[tuple[int, Tensor]], first: int, length: int) -> Iterator[Changes]:
        """What changes in a piece; the new bytes are kept."""
        if self._flips is None or len(self._flips) < length:
            self._flips = torch.empty(length, dtype=torch.uint8, device=self.memory.device)
        flips, end = self._flips[:length], first
        for at, new in waiting:
            old = self.memory[at : at + len(new)]
            flips[end - first : at - first] = 0
            torch.bitwise_xor(old, new, out=flips[at - first : at - first + len(new)])
            old.copy_(new)
            end = at + len(new)
        count = int(torch.count_nonzero(flips))
        step = length if count <= FEW else STEP
        for at in range(0, length if count else 0, step):
            found = compressed(first + at, flips[at : at + step])
            if found is not None:
                yield found

    def _whole(self, first: int, at: Tensor, values: Tensor, length: int) -> Changes:
        """Changes that are fewer bytes as the flips of all bytes of the piece."""
        flips = torch.zeros(length, dtype=torch.uint8, device=self.memory.device)
        flips[at] = values
        return Changes(first, flips, None, len(at))
