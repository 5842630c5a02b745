"""`Routes`: where each byte of an update's tensors is in an engine; by this table a kernel changes many at once.

A tensor has a route if everything that becomes of it is a copy of bytes that follow each other, to a parameter that is
kept as it was loaded, or whose codes are found by a map (`live_maps`). What has none, `live_patch` changes tensor by
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .live_changes import Layout
from .live_copies import Loads
from .live_maps import CodeMap
from .live_regions import run_of

PLACES = 1024
"""Changes that a program of the kernel makes."""


@dataclass(frozen=True)
class Target:
    """Where the bytes of a parameter are.

    Args:
        tensors: a dense one with these bytes, or those in which their codes are; none: no kernel reads them.
        codes: where a code is in them; None: they are plain bytes.
    """

    tensors: Sequence[Tensor]
    codes: CodeMap | None = None

    def reachable(self, device: torch.device) -> bool:
        """Whether a kernel on a device can change it: codes are flipped in whole words."""
        if not all(t.is_contiguous() and t.device == device for t in self.tensors):
            return False
        return self.codes is None or all(t.data_ptr() % 4 == 0 and t.nbytes % 4 == 0 for t in self.tensors)


class Routes:
    """Routes of the tensors of a layout.

    Args:
        layout: of the tensors that changes are of.
        loads: what loading each of them does.
        target: where a parameter's bytes are, by its key; None: the kernel cannot change them.
        device: of the weights.
    """

    def __init__(
        self, layout: Layout, loads: Mapping[str, Loads], target: Callable[[str], Target | None], device: torch.device
    ) -> None:
        self.keys: dict[str, list[tuple[str, bool]]] = {}
        """The parameters that each tensor with a route has bytes of, and whether these are codes."""
        self._held: list[Tensor] = []
        rows: list[list[int]] = []
        addresses: list[int] = []
        for name, load in loads.items():
            runs = [] if load.calls else [run_of(copy) for copy in load.copies]
            if load.calls or not all(runs) or _overlap([run for run in runs if run is not None]):
                continue
            targets = [target(copy.key) for copy in load.copies]
            if not all(t is not None and t.reachable(device) for t in targets):
                continue
            self.keys[name] = []
            first = layout.starts[layout.index[name]]
            for copy, run, to in zip(load.copies, runs, targets, strict=True):
                assert run is not None and to is not None
                self.keys[name].append((copy.key, to.codes is not None))
                if to.tensors and run[2]:
                    rows.append(self._row(first, run, to, len(addresses)))
                    addresses += [t.data_ptr() for t in to.tensors]
        rows.sort()
        self._count = len(rows)
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)
        self._addresses = torch.tensor(addresses, dtype=torch.int64).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that it takes, without the maps."""
        return self._table.nbytes + self._addresses.nbytes

    def flip(self, at: Tensor, flips: Tensor) -> None:
        """Change bytes of tensors that have a route; nothing is waited for.

        Args:
            at: int64 ``[n]``, places in the layout, ascending or not, each once; others are left alone.
            flips: uint8 ``[n]``, old byte xor new byte.
        """
        if not self._count or not len(at):
            return
        from .launch import on_device
        from .live_changes_kernel import flip_kernel

        with on_device(at):
            flip_kernel[(-(-len(at) // PLACES),)](
                at, flips, len(at), self._table, self._count, self._addresses,
                SEARCH=self._count.bit_length(), PLACES=PLACES,
            )  # fmt: skip

    def _row(self, first: int, run: tuple[int, int, int], to: Target, address: int) -> list[int]:
        start, there, count = run
        row = [first + start, first + start + count, address << 32, there - start - first]
        if to.codes is None:
            row[2] |= 1
            return [*row, 0, 0, 0, 0, 0, 0]
        row[2] |= 2
        tables = [t.contiguous() for t in (to.codes.output, to.codes.first, to.codes.within)]
        self._held += tables
        return [*row, to.codes.columns, *to.codes.tile, *(t.data_ptr() for t in tables)]


def _overlap(runs: Sequence[tuple[int, int, int]]) -> bool:
    """Whether a byte is in two of them."""
    return any(a[0] + a[2] > b[0] for a, b in pairwise(sorted(runs)))
