"""Many tensors in few launches: a model's amaxes and the packing of its shards.

A step of training touches each weight three times outside the layers: its amax, its packing, and its dequantization
after a gather. Tensor by tensor that is thousands of launches, which a small batch cannot hide. The classes here and in
`multi_unpack` are built once for given tensors and called every step:

=========  ===========================================================  ==================================
class      does                                                         launches
=========  ===========================================================  ==================================
`Amaxes`   the largest magnitude of each item                           one a dtype
`Packs`    codes and block scales; at will the amaxes in the same pass  one a dtype
`Unpacks`  the gathered bytes of all ranks to full weights              one for eight weights of one dtype
=========  ===========================================================  ==================================

An *item* is a part of a tensor with one global scale: all of it, or one expert. On a GPU the work lies in a table on
the device (`multi_kernels` explains it), so that a call costs the host one launch. Tables hold addresses: `Amaxes` and
`Packs` keep their tensors alive, and ``fits`` tells whether these are still where the caller's are. CPU tensors go one
by one through `ops`, with the same results bit for bit.

So does what the kernels cannot read in place: another dtype (float64), an address that is not a multiple of 16 bytes,
items that are not whole blocks. Shards of FSDP2 are none of these.

Deliberately absent: checks on values, and waiting for the device, but for building a table.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import ops
from .format import BLOCK
from .multi_table import ALIGNMENT, CODES, Int64, Table, Tiles

NAN_BITS = 0x7FC00000
"""What the kernels give as the bits of an amax that is NaN."""


AMAX = Tiles(blocks=256, steps=8, share=2)
PACK = Tiles(blocks=256, steps=4, share=4)


class _Tensors:
    """What `Amaxes` and `Packs` share: the tensors, their tables, and those that go alone."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        items: Sequence[int],
        first: Sequence[int],
        results: Sequence[Sequence[Tensor]],
        tiles: Tiles,
        kernels: bool,
    ) -> None:
        self._places = _places(tensors)
        self._tensors: list[Tensor] = [t.detach() for t in tensors]
        self._items, self._first = list(items), list(first)
        self._results, self._tiles, self._kernels = [list(r) for r in results], tiles, kernels
        assert {len(self._items), len(self._first), *map(len, self._results)} <= {len(self._tensors)}
        self._alone = [i for i, t in enumerate(self._tensors) if t.numel()]
        for i in self._alone:
            w, n = self._tensors[i], self._items[i]
            assert w.is_contiguous() and n > 0 and w.numel() % n == 0
            for result, size in zip(self._results, (CODES, 1), strict=False):
                assert w.numel() // n % BLOCK == 0 and result[i].is_contiguous()
                assert result[i].dtype == torch.uint8 and result[i].numel() == w.numel() // BLOCK * size
        self._tables: list[Table] = []
        if kernels or any(t.is_cuda for t in self._tensors):
            self._make_tables()

    def _make_tables(self) -> None:
        """Move the tensors that the kernels can read in place from ``_alone`` to tables, one for each dtype."""
        from . import launch

        together = [i for i in self._alone if self._in_place(i)]
        self._alone = sorted(set(self._alone) - set(together))
        for dtype, (_, name) in launch.DTYPES.items():
            runs = [self._runs(i) for i in together if self._tensors[i].dtype == dtype]
            if runs:
                if not self._results:
                    name = launch.VALUES[dtype]
                strides = BLOCK * dtype.itemsize, CODES, 1
                device = self._tensors[together[0]].device
                self._tables.append(Table(np.concatenate(runs), strides, name, self._tiles, device))

    def _in_place(self, i: int) -> bool:
        from . import launch

        w = self._tensors[i]
        whole = w.dtype in launch.DTYPES and w.numel() // self._items[i] % BLOCK == 0
        aligned = w.data_ptr() % ALIGNMENT == 0 and all(r[i].data_ptr() % CODES == 0 for r in self._results[:1])
        return whole and aligned

    def _runs(self, i: int) -> Int64:
        """The items of tensor i as rows for `Table`."""
        w, n = self._tensors[i], self._items[i]
        blocks, item = w.numel() // BLOCK // n, np.arange(n, dtype=np.int64)
        codes, scale = (r[i].data_ptr() for r in self._results) if self._results else (0, 0)
        return np.stack(
            [
                w.data_ptr() + item * (blocks * BLOCK * w.element_size()),
                codes + item * (blocks * CODES),
                scale + item * blocks,
                np.full(n, blocks),
                self._first[i] + item,
            ],
            axis=1,
        )

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these have the addresses, shapes and dtypes of the tensors that this was built for."""
        return self._places == _places(tensors)

    def release(self) -> bool:
        """Let go of the tensors, whose addresses are in the tables; False if some are needed.

        The caller then sees to it that the memory is still there (`fits`) at each call.
        """
        if self._alone:
            return False
        self._tensors = []
        return True

    def _part(self, i: int) -> slice:
        return slice(self._first[i], self._first[i] + self._items[i])


class Amaxes(_Tensors):
    """The largest magnitudes of many tensors.

    Args:
        tensors: contiguous, floating point, on one device; may be empty.
        items: into how many equal leading parts each is split that get a number each (for an empty tensor: any).
        first: index in ``out`` of each one's first part. Tensors may share indices: a fusion group does.
        tiles: see `Tiles`.
        kernels: run the kernels for CPU tensors too: Triton's interpreter, in tests.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        items: Sequence[int],
        first: Sequence[int],
        *,
        tiles: Tiles = AMAX,
        kernels: bool = False,
    ) -> None:
        super().__init__(tensors, items, first, (), tiles, kernels)

    def __call__(self, out: Tensor) -> None:
        """Set ``out = max(out, bits of max |bf16(w)|)``.

        Args:
            out: contiguous int32, bit patterns of float32 magnitudes. They order like the numbers, with NaN on top.
        """
        assert out.is_contiguous() and out.dtype == torch.int32
        for i in self._alone:
            _join_amax(self._tensors[i], out[self._part(i)])
        if self._tables:
            from . import launch, multi_kernels

            with launch.on_device(out):
                for table in self._tables:
                    multi_kernels.multi_amax_kernel[table.grid](table.rows, out, **table.options)


class Packs(_Tensors):
    """Codes and block scales of many tensors.

    Args:
        tensors, items, first, tiles, kernels: as for `Amaxes`; each part is a multiple of 16 elements.
        packed: for each a contiguous uint8 tensor for its codes, two a byte.
        scale: for each a contiguous uint8 tensor for its E4M3 bytes, one for 16 elements.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        items: Sequence[int],
        first: Sequence[int],
        packed: Sequence[Tensor],
        scale: Sequence[Tensor],
        *,
        tiles: Tiles = PACK,
        kernels: bool = False,
    ) -> None:
        super().__init__(tensors, items, first, (packed, scale), tiles, kernels)

    def only(self, indices: Sequence[int]) -> "Packs":
        """The same for some of the tensors, given by their places in the list."""
        some = [[values[i] for i in indices] for values in (self._tensors, *self._results)]
        items, first = [self._items[i] for i in indices], [self._first[i] for i in indices]
        return Packs(some[0], items, first, some[1], some[2], tiles=self._tiles, kernels=self._kernels)

    def __call__(self, g: Tensor, amax: Tensor | None = None, moved: Tensor | None = None) -> None:
        """Pack part j of tensor i with ``g[first[i] + j]``.

        Args:
            g: contiguous float32 multipliers.
            amax: None, or contiguous int32 as for `Amaxes`, to take the maximum with from the same reading. A
                power-of-two g rarely moves, so packing with the last step's is nearly always right; the caller packs
                again those whose g moved.
            moved: None, or contiguous int32, one for each number in g: parts where it is 0 may be left as they are.
                The kernels read it on the device; only tensors that go alone wait for it.
        """
        assert g.is_contiguous() and g.dtype == torch.float32
        assert amax is None or (amax.is_contiguous() and amax.dtype == torch.int32)
        assert moved is None or (moved.is_contiguous() and moved.dtype == torch.int32)
        for i in self._alone:
            w, n, part = self._tensors[i], self._items[i], self._part(i)
            if moved is not None and not moved[part].any():
                continue
            codes, scale = (r[i].view(n, -1, size) for r, size in zip(self._results, (CODES, 1), strict=True))
            if amax is not None:
                _join_amax(w, amax[part])
            ops.quantize_into(w.view(n, -1, BLOCK), g[part], codes, scale)
        if self._tables:
            from . import launch, multi_kernels

            with launch.on_device(g):
                for table in self._tables:
                    multi_kernels.multi_quantize_kernel[table.grid](
                        table.rows, g, g if amax is None else amax, g if moved is None else moved,
                        AMAX=amax is not None, MOVED=moved is not None, **table.options,
                    )  # fmt: skip

    def compare(self, g: Tensor, differs: Tensor) -> None:
        """Find out what a call would change, without changing it.

        Args:
            g: as for a call.
            differs: contiguous int32; 1 is written at ``first[i] + j`` if part j of tensor i has other bytes.
        """
        assert g.is_contiguous() and g.dtype == torch.float32
        assert differs.is_contiguous() and differs.dtype == torch.int32
        for i in self._alone:
            w, n, part = self._tensors[i], self._items[i], self._part(i)
            kept = [r[i].view(n, -1, size) for r, size in zip(self._results, (CODES, 1), strict=True)]
            fresh = [torch.empty_like(t) for t in kept]
            ops.quantize_into(w.view(n, -1, BLOCK), g[part], *fresh)
            for old, new in zip(kept, fresh, strict=True):
                differs[part] |= (old != new).flatten(1).any(1)
        if self._tables:
            from . import launch, multi_kernels

            with launch.on_device(g):
                for table in self._tables:
                    multi_kernels.multi_compare_kernel[table.grid](table.rows, g, differs, **table.options)


def _places(tensors: Sequence[Tensor]) -> list[tuple[int, torch.Size, torch.dtype]]:
    return [(t.data_ptr(), t.shape, t.dtype) for t in tensors]


def _join_amax(w: Tensor, out: Tensor) -> None:
    """``out = max(out, bits)`` for the equal leading parts of one tensor, as many as ``out`` has elements."""
    size = w.numel() // out.numel()
    width = w.shape[-1] if w.ndim and size % w.shape[-1] == 0 else size
    largest = ops.amax(w.view(out.numel(), -1, width), 1)
    bits = largest.view(torch.int32).masked_fill(largest.isnan(), NAN_BITS)
    torch.maximum(out, bits, out=out)
