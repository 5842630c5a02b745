"""Start the Triton kernels: grids, dtypes, devices. `ops` validates and allocates; this does neither.

``w`` is floating point ``[..., K]``, K divisible by 16; ``g`` is float32, a scalar or of the shape of the leading
dimensions of ``w``; results are written into given contiguous tensors. CPU tensors work when Triton interprets.

The tile sizes are parameters because the interpreter's cost is per program, not per element: tests use large tiles.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import kernels
from .format import BLOCK


class Tile(NamedTuple):
    """How much a program works on: ``steps`` times ``blocks`` blocks of 16, by ``warps`` warps."""

    blocks: int
    warps: int
    steps: int = 1


# The fastest on an H200 of those that benchmarks/bench_kernels.py --tune tries.
QUANTIZE, DEQUANTIZE, FAKE_QUANTIZE = Tile(128, 2, 2), Tile(128, 2), Tile(64, 2, 2)
# The same for a weight of 4096 x 4096, tried by hand: 32 to 512 blocks, 1 to 8 warps, 1 to 4 steps.
SMALL_QUANTIZE, SMALL_FAKE_QUANTIZE = Tile(256, 4), Tile(64, 4, 2)

SMALL = 1 << 21
"""Blocks; what has no more is done after few programs on each multiprocessor, and wants other tiles."""

TILE, STEPS = 4096, 8
"""Elements a program of the amax kernel loads at once, and how often."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Fusing a product with the addition that rounds it would change results."""

MAX_ITEMS = 65535
"""Items go along the second dimension of the grid, which CUDA limits to this."""

ADDRESS = 16
"""Triton compiles a kernel anew for addresses that are multiples of this."""

DTYPES = {
    torch.bfloat16: (torch.int32, tl.bfloat16),
    torch.float16: (torch.int32, tl.float16),
    torch.float32: (torch.int64, tl.float32),
}
"""What the kernels read and write: the integer that holds two elements, and Triton's name. The rest go through bf16."""

VALUES = {torch.bfloat16: tl.int16, torch.float16: tl.float16, torch.float32: tl.float32}
"""What the amax kernels read of the same dtypes."""


class Prepared:
    """A kernel that is started over and over, but for the first time without Triton's search for the compiled one.

    Triton looks at every argument of every call for what a kernel may have been compiled for, which takes the host
    longer than many of our kernels take the device.

    Args:
        kernel: a ``triton.jit`` function of tensors, then numbers, then compile-time constants.
        grid: its programs, up to three numbers.
        numbers: the same at every call.
        options: the constants, and options of the compiler.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], options: dict[str, Any]) -> None:
        self._kernel, self._grid, self._numbers, self._options = kernel, grid, numbers, options
        self._compiled: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        """Start it on the current stream. Devices and dtypes are the same at every call."""
        known = not any(t.data_ptr() % ADDRESS for t in tensors)
        if known and self._compiled is not None:
            self._compiled(*tensors, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._options)
        if known and compiled is not None:  # Triton's interpreter compiles nothing
            constants = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._rest = (*self._numbers, *(self._options[name] for name in constants))
            self._compiled = compiled[(*self._grid, 1, 1)[:3]]


def amax_bits(
    w: Tensor, batch_dims: int = 0, out: Tensor | None = None, tile: int = TILE, steps: int = STEPS
) -> Tensor:
    """Bit pattern of ``max |bf16(w)|`` over all but the first ``batch_dims`` dimensions.

    Args:
        w: floating point, any shape.
        batch_dims: leading dimensions to keep.
        out: contiguous int32 with an element for each of ``w.shape[:batch_dims]``, to take the maximum with: members
            of a fusion group can share one. None: a new one.
        tile: elements a program loads at once, a power of two.
        steps: tiles a program reduces.

    Returns:
        int32 bit patterns of float32 magnitudes. As integers they order like the numbers, with NaN on top, so they can
        be reduced further (a MAX all-reduce of floats may lose a NaN); ``.view(torch.float32)`` gives the magnitudes.
    """
    if out is None:
        out = torch.zeros(w.shape[:batch_dims], dtype=torch.int32, device=w.device)
    assert out.is_contiguous() and out.dtype == torch.int32
    if w.numel() == 0:
        return out
    w = _readable(w)
    w = w.view(torch.int16) if w.dtype == torch.bfloat16 else w
    size = w.numel() // out.numel()
    with on_device(w):
        for items, tensors in _parts(out.numel(), w, out):
            grid = (triton.cdiv(size, tile * steps), items)
            kernels.amax_kernel[grid](*tensors, size, TILE=tile, STEPS=steps, num_warps=4, **OPTIONS)
    return out


def amax(w: Tensor, batch_dims: int = 0) -> Tensor:
    """`amax_bits` as float32 magnitudes; NaN where the tensor holds one."""
    return amax_bits(w, batch_dims).view(torch.float32)


def quantize(w: Tensor, g: Tensor, packed: Tensor, scale: Tensor, tile: Tile | None = None) -> None:
    """Write codes, uint8 ``[..., K/2]``, and block scales, E4M3 as uint8 ``[..., K/16]``."""
    assert packed.is_contiguous() and scale.is_contiguous()
    w, g = _readable(w), g.contiguous()
    tile = tile or (SMALL_QUANTIZE if scale.numel() <= SMALL else QUANTIZE)
    _launch(kernels.quantize_kernel, scale.numel(), w.dtype, tile, g, _words(w), g, packed, scale, STEPS=tile.steps)


def dequantize(packed: Tensor, scale: Tensor, g: Tensor, out: Tensor, tile: Tile = DEQUANTIZE) -> None:
    """Write ``bf16((e2m1 · scale) · g)`` into ``out`` ``[..., K]`` in its dtype; ``scale`` is E4M3 as uint8."""
    packed, scale, g = packed.contiguous(), scale.contiguous(), g.contiguous()
    codes = packed if _aligned(packed, torch.int32) else packed.clone()
    with _written(out) as target:
        tensors = codes.view(torch.int32), scale, g, _words(target)
        _launch(kernels.dequantize_kernel, scale.numel(), target.dtype, tile, g, *tensors)


def prepare_dequantize(
    packed: Tensor, scale: Tensor, g: Tensor, tile: Tile = DEQUANTIZE
) -> Callable[[Tensor], bool] | None:
    """`dequantize` from given tensors into a given one, with little work at each call.

    Returns:
        A function that takes the output and returns whether it could; None if that would be never.
    """
    if not (packed.is_contiguous() and scale.is_contiguous() and g.is_contiguous() and _aligned(packed, torch.int32)):
        return None
    if not 0 < g.numel() <= MAX_ITEMS or scale.numel() == 0:
        return None
    codes, size = packed.view(torch.int32), scale.numel() // g.numel()
    grid, device = (triton.cdiv(size, tile.blocks), g.numel()), g.get_device()
    options = {"BLOCKS": tile.blocks, "num_warps": tile.warps, **OPTIONS}
    runs = {
        dtype: Prepared(kernels.dequantize_kernel, grid, (size,), {"DTYPE": words[1], **options})
        for dtype, words in DTYPES.items()
    }

    def fill(out: Tensor) -> bool:
        words = DTYPES.get(out.dtype)
        elsewhere = device >= 0 and torch.cuda.current_device() != device
        if words is None or elsewhere or not _aligned(out, words[0]):
            return False
        assert out.numel() == scale.numel() * BLOCK and out.is_contiguous()
        runs[out.dtype](codes, scale, g, out.view(words[0]))
        return True

    return fill


def fake_quantize(w: Tensor, g: Tensor, out: Tensor, tile: Tile | None = None) -> None:
    """Write the quantized and dequantized ``w`` into ``out``, of the same shape and dtype."""
    w, g = _readable(w), g.contiguous()
    tile = tile or (SMALL_FAKE_QUANTIZE if w.numel() <= SMALL * BLOCK else FAKE_QUANTIZE)
    with _written(out) as target:
        tensors = _words(w), g, _words(target)
        _launch(kernels.fake_quantize_kernel, w.numel() // BLOCK, w.dtype, tile, g, *tensors, STEPS=tile.steps)


def _launch(kernel: Any, total: int, dtype: torch.dtype, tile: Tile, g: Tensor, *tensors: Tensor, **sizes: int) -> None:
    """Run ``kernel`` over ``total`` blocks of ``tensors``; each element of ``g`` has an equal part of them."""
    if total == 0:
        return
    size = total // g.numel()
    with on_device(g):
        for items, part in _parts(g.numel(), *tensors):
            grid = (triton.cdiv(size, tile.blocks * tile.steps), items)
            sizes["BLOCKS"] = tile.blocks
            kernel[grid](*part, size, DTYPE=DTYPES[dtype][1], num_warps=tile.warps, **sizes, **OPTIONS)


def _parts(items: int, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """As many items as one grid takes, and the tensors' parts that belong to them."""
    if items <= MAX_ITEMS:
        yield items, tensors
        return
    for start in range(0, items, MAX_ITEMS):
        count = min(MAX_ITEMS, items - start)
        yield count, tuple(t.view(items, -1)[start : start + count] for t in tensors)


def _readable(w: Tensor) -> Tensor:
    """``w`` contiguous, in a dtype that the kernels read, at an address where they can read words."""
    w = w.detach().contiguous()
    if w.dtype not in DTYPES:
        return w.to(torch.bfloat16)
    return w if _aligned(w, DTYPES[w.dtype][0]) else w.clone()


@contextlib.contextmanager
def _written(out: Tensor) -> Iterator[Tensor]:
    """``out``, or where the kernels cannot write that, a stand-in that is copied to it."""
    assert out.is_contiguous()
    if out.dtype not in DTYPES:
        target = torch.empty_like(out, dtype=torch.bfloat16)
    elif not _aligned(out, DTYPES[out.dtype][0]):
        target = torch.empty_like(out)
    else:
        target = out
    yield target
    if target is not out:
        out.copy_(target)


def _aligned(t: Tensor, word: torch.dtype) -> bool:
    return t.storage_offset() * t.element_size() % word.itemsize == 0


def _words(t: Tensor) -> Tensor:
    return t.view(DTYPES[t.dtype][0])


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, wherever its tensors are."""
    if t.is_cuda and t.get_device() != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()
