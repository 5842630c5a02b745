"""The operations everything else uses: they validate, allocate, bound memory and pick a backend.

CPU tensors run `reference` in pieces of 65,536 elements, which fit a core's cache and bound what packing a layer of any
size needs beside its result. CUDA tensors run the Triton kernels. Both give the same bytes.

``nvfp4_qat::fake_quantize`` and ``nvfp4_qat::dequantize`` are registered as custom operators, so that `torch.compile`
sees one opaque call each.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .errors import UserError
from .format import BLOCK, GLOBAL_RANGE, MAX_EXPONENT, POLICIES

CHUNK = 1 << 16
"""Elements a CPU operation works on at a time."""


@dataclass(frozen=True, eq=False)
class PackedNVFP4:
    """A 4-bit tensor: two codes a byte, one block scale per 16 values, one global multiplier.

    Args:
        packed: uint8 ``[..., K/2]``.
        scale: float8_e4m3fn ``[..., K/16]``.
        global_scale: float32, a scalar or one per leading index (``[E]`` for fused experts); a multiplier.
    """

    packed: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight this stands for."""
        return torch.Size((*self.packed.shape[:-1], self.packed.shape[-1] * 2))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``packed``, ``scale`` and ``global_scale``."""
        return self.packed, self.scale, self.global_scale

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight: ``bf16(e2m1 · scale · global_scale)``, given as ``dtype``."""
        result: Tensor = dequantize(self.packed, self.scale.view(torch.uint8), self.global_scale, dtype)
        return result


def amax(w: Tensor, batch_dims: int = 0) -> Tensor:
    """Largest magnitude of a weight, what a global scale is made from.

    Args:
        w: a floating-point tensor; it is rounded to bf16 first.
        batch_dims: leading dimensions to keep: 1 gives one number per expert of ``[E, N, K]``.

    Returns:
        float32 of shape ``w.shape[:batch_dims]``. NaN if the tensor holds one.
    """
    if _on_gpu(w):
        from . import launch

        return launch.amax(w.detach(), batch_dims)
    out = torch.zeros(w.shape[:batch_dims], dtype=torch.float32, device=w.device)
    flat = out.view(-1)
    for batch, rows, (piece,) in _pieces(out, w.detach()):
        if rows.start == 0:
            flat[batch] = reference.amax(piece, 1)
        else:
            torch.maximum(flat[batch], reference.amax(piece, 1), out=flat[batch])
    return out


def global_scale(amax: Tensor, policy: str = "pow2", name: str = "the weight") -> Tensor:
    """The multiplier ``g`` that maps magnitudes up to ``amax`` into the range of code times block scale.

    Args:
        amax: float32, any shape; see `nvfp4_qat.ops.amax`. A fusion group uses the largest of its members.
        policy: ``"pow2"``, the smallest power of two that reaches (dequantized weights are then exact in bfloat16), or
            ``"amax"``, the inverse of the divisor 2688 / amax that llm-compressor and ModelOpt store.
        name: what to call the tensor in an error.

    Returns:
        float32 of the same shape. 1 where ``amax`` is 0.

    Raises:
        UserError: unknown policy; NaN or Inf; or a magnitude above 2688 · 2^8, which inference kernels cannot hold.
    """
    if policy not in POLICIES:
        raise UserError(f"unknown global scale policy {policy!r}: use one of {', '.join(map(repr, POLICIES))}")
    check_amax(amax, name)
    return reference.global_scale(amax, policy)


def check_amax(amax: Tensor, name: str) -> None:
    """Raise `UserError` if a magnitude is not finite or too large for NVFP4. Waits for the device."""
    largest = float(amax.max()) if amax.numel() else 0.0  # max propagates NaN
    if not math.isfinite(largest):
        raise UserError(f"{name} holds NaN or Inf: it cannot be quantized. Check the training step that produced it.")
    limit = largest_magnitude()
    if largest > limit:
        raise UserError(
            f"{name} holds a magnitude of {largest:g}; NVFP4 inference kernels reach {limit:g}. "
            "Add it to ignore_patterns."
        )


def largest_magnitude() -> float:
    """What NVFP4 can hold: 2688 · 2^8."""
    return GLOBAL_RANGE * 2.0**MAX_EXPONENT


def quantize(w: Tensor, g: Tensor) -> PackedNVFP4:
    """Pack a weight into NVFP4.

    Args:
        w: floating point ``[..., K]``, K divisible by 16, any strides; rounded to bf16 first.
        g: float32 multiplier, a scalar or of the shape of the leading dimensions of ``w`` (``[E]`` for experts).

    Returns:
        The packed tensor on the same device.

    Raises:
        UserError: wrong dtype or shape; on a CPU also NaN or Inf in ``w`` (on a GPU `global_scale` has seen the amax).
    """
    w, g = w.detach(), _checked(w, g)
    out = (
        torch.empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8, device=w.device),
        torch.empty((*w.shape[:-1], w.shape[-1] // BLOCK), dtype=torch.uint8, device=w.device),
    )
    if not _on_gpu(w) and not bool(torch.isfinite(amax(w))):
        check_amax(amax(w), "the weight")
    quantize_into(w, g, *out)
    return PackedNVFP4(out[0], out[1].view(torch.float8_e4m3fn), g)


def quantize_into(w: Tensor, g: Tensor, packed: Tensor, scale: Tensor) -> None:
    """`quantize` into given contiguous uint8 tensors; for callers that have validated and keep their storages."""
    if _on_gpu(w):
        from . import launch

        return launch.quantize(w.detach(), g, packed, scale)
    flat = g.reshape(-1)
    for batch, _, (piece, p, s) in _pieces(g, w.detach(), packed, scale):
        codes, scales = reference.quantize(piece, flat[batch])
        p.copy_(codes)
        s.copy_(scales)


@torch.library.custom_op("nvfp4_qat::dequantize", mutates_args=())
def dequantize(packed: Tensor, scale: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that codes, block scales (E4M3 as uint8) and multiplier stand for, as ``dtype``."""
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=packed.device)
    dequantize_into(packed, scale, g, out)
    return out


@dequantize.register_fake
def _(packed: Tensor, scale: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype)


def dequantize_into(packed: Tensor, scale: Tensor, g: Tensor, out: Tensor) -> None:
    """`dequantize` into a given contiguous tensor ``[..., K]``."""
    if _on_gpu(packed):
        from . import launch

        return launch.dequantize(packed, scale, g, out)
    flat = g.reshape(-1)
    for batch, _, (piece, p, s) in _pieces(g, out, packed, scale):
        piece.copy_(reference.dequantize(p, s, flat[batch], out.dtype))


class Dequantize:
    """`dequantize_into` from the same packed tensors time and again: what can be prepared for that is.

    Args:
        packed, scale, g: as for `dequantize`, contiguous. Their storages are read at every call.
    """

    def __init__(self, packed: Tensor, scale: Tensor, g: Tensor) -> None:
        self._tensors = packed, scale, g
        self._launch: Callable[[Tensor], bool] | None = None
        if _on_gpu(packed):
            from . import launch

            self._launch = launch.prepare_dequantize(packed, scale, g)

    def __call__(self, out: Tensor) -> None:
        """Fill a contiguous tensor ``[..., K]``."""
        if self._launch is None or not self._launch(out):
            dequantize_into(*self._tensors, out)


@torch.library.custom_op("nvfp4_qat::fake_quantize", mutates_args=())
def _fake_quantize(w: Tensor, g: Tensor) -> Tensor:
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if _on_gpu(w):
        from . import launch

        launch.fake_quantize(w.detach(), g, out)
        return out
    flat = g.reshape(-1)
    for batch, _, (piece, result) in _pieces(g, w.detach(), out):
        result.copy_(reference.fake_quantize(piece, flat[batch]))
    return out


@_fake_quantize.register_fake
def _(w: Tensor, g: Tensor) -> Tensor:
    return w.new_empty(w.shape)


_fake_quantize.register_autograd(lambda ctx, grad: (grad, None))


def fake_quantize(w: Tensor, g: Tensor) -> Tensor:
    """Round a weight to what its NVFP4 form holds; the gradient passes straight through.

    Args:
        w: floating point ``[..., K]``, K divisible by 16.
        g: float32 multiplier, a scalar or of the shape of the leading dimensions of ``w``; gets no gradient.

    Returns:
        ``quantize(w, g).dequantize(w.dtype)``, with the identity as its derivative (straight-through estimator,
        Bengio et al. 2013, arXiv 1308.3432).

    Raises:
        UserError: wrong dtype or shape.
    """
    result: Tensor = _fake_quantize(w, _checked(w, g))
    return result


def _checked(w: Tensor, g: Tensor) -> Tensor:
    if not w.is_floating_point():
        raise UserError(f"only floating-point weights can be quantized, not {w.dtype}")
    if w.ndim == 0 or w.shape[-1] == 0 or w.shape[-1] % BLOCK:
        raise UserError(
            f"the last dimension of {tuple(w.shape)} must be a positive multiple of {BLOCK}: one block scale serves "
            f"{BLOCK} values. Add the layer to ignore_patterns."
        )
    g = g.detach().to(device=w.device, dtype=torch.float32)
    if g.shape != w.shape[: g.ndim] or g.ndim >= w.ndim:
        raise UserError(
            f"a global scale of shape {tuple(g.shape)} does not fit the leading dimensions of {tuple(w.shape)}"
        )
    return g


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _pieces(g: Tensor, *tensors: Tensor) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """Corresponding pieces ``[b, r, *]`` of tensors that agree in all but the last dimension.

    Yields the slice of ``g``'s flattened elements and the slice of rows that a piece covers, and the pieces. Pieces are
    views, so results can be written into them; only inputs of three or more dimensions with unusual strides are copied.
    """
    batch = math.prod(g.shape)
    flat = [
        t.reshape(batch, t.shape[g.ndim : -1].numel(), t.shape[-1]) if t.ndim > 1 else t.view(1, 1, -1) for t in tensors
    ]
    if any(t.numel() == 0 for t in flat):
        return
    width = max(t.shape[-1] for t in flat)
    rows = flat[0].shape[1]
    step = max(1, min(rows, CHUNK // width))
    group = max(1, CHUNK // (rows * width))
    for b in range(0, batch, group):
        for r in range(0, rows, step):
            batches, part = slice(b, min(b + group, batch)), slice(r, min(r + step, rows))
            yield batches, part, tuple(t[batches, part] for t in flat)
