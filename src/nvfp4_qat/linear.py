"""`QATLinear`: an `nn.Linear` that computes with the 4-bit value of its weight.

The module keeps its class family, parameters, hooks and state dict keys; only ``forward`` differs. It computes
``F.linear(x, ŵ, bias)`` with ``ŵ`` dequantized from the packed copy, and its gradient for the weight is that of ``ŵ``,
unchanged (straight-through estimator). For backward it saves the input and a reference to the master weight, no bf16
copy: ``ŵ`` is dequantized again when the input's gradient needs it. (If FSDP shards the weight there is no packed copy:
``ŵ`` comes from what FSDP gathered, in forward and again in backward, see `window`.)

Compiled code reaches the packed copy through two custom operators whose result depends on the master weight alone, so
that caching is invisible to the compiler: freshness is checked when the compiled code runs, not when it is traced. The
operator used in backward also takes the incoming gradient: without that the partitioner would merge it with the one in
forward and keep the bf16 weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .qat_module import QATModule
from .state import PackedWeight

_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
"""How many dispatch modes are active."""


def _cudagraph_unsafe() -> tuple[Any, ...]:
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)  # the check for freshness runs on the host
    return (tag,) if tag is not None else ()


@torch.library.custom_op("nvfp4_qat::read", mutates_args=(), tags=_cudagraph_unsafe())
def _read(master: Tensor, handle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w, generation = PackedWeight.lookup(handle).read_generation(master, dtype)
    return w, generation.clone()  # compiled code takes it for its own


@_read.register_fake
def _(master: Tensor, handle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return master.new_empty(master.shape, dtype=dtype), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("nvfp4_qat::read_again", mutates_args=(), tags=_cudagraph_unsafe())
def _read_again(master: Tensor, handle: Tensor, generation: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    return PackedWeight.lookup(handle).read_again(master, dtype, int(generation))


@_read_again.register_fake
def _(master: Tensor, handle: Tensor, generation: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    return master.new_empty(master.shape, dtype=dtype)


def read(master: Tensor, handle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The dequantized weight and its generation, int64 ``[]``; skips the dispatcher where nothing is traced."""
    if torch.compiler.is_compiling():
        result: tuple[Tensor, Tensor] = _read(master, handle, dtype)
        return result
    return PackedWeight.lookup(handle).read_generation(master, dtype)


def read_again(master: Tensor, handle: Tensor, generation: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    """The same weight once more, in the backward of the forward that saw ``generation``."""
    if torch.compiler.is_compiling():
        result: Tensor = _read_again(master, handle, generation, dtype, after)
        return result
    return PackedWeight.lookup(handle).read_again(master, dtype, int(generation))


class _StraightThrough(torch.autograd.Function):
    """The dequantized weight as a function of the master whose derivative is the identity."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, w: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _Linear(torch.autograd.Function):
    """``F.linear`` with a dequantized weight; the derivative of dequantization is the identity. For compiled code."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor, bias: Tensor | None, handle: Tensor) -> Tensor:
        w, generation = read(master, handle, x.dtype)
        ctx.dtype, ctx.shape = x.dtype, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, master, handle, generation)
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, master, handle, generation = ctx.saved_tensors
        w = read_again(master, handle, generation, ctx.dtype, grad) if ctx.needs_input_grad[0] else None
        return *_gradients(ctx, grad, x, master, w), None


class _EagerLinear(torch.autograd.Function):
    """`_Linear` in two steps, the product being the second (`_linear`): this only records what backward needs.

    Activation checkpointing stops a recomputation at the last tensor that is saved. What a function saves counts when
    its forward has returned: with the product inside, a block's last linear layer would be computed once more for
    nothing, where autograd's own linear, which saves before it multiplies, is not.

    In one step (``whole``) where the result must be what the function returns: for a dispatch mode, which may keep it
    (selective activation checkpointing), and for subclasses of tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor, bias: Tensor | None, weight: PackedWeight, whole: bool) -> Tensor:
        ctx.keep_alive, ctx.dtype, ctx.shape = weight, x.dtype, x.shape  # the model may be dropped before backward
        generation = weight.ensure(master)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, master, weight.handle, generation)
        if whole:
            return F.linear(x, weight.current(master, x.dtype), bias)
        shape = *x.shape[:-1], master.shape[0]
        return torch.empty_strided(shape, (0,) * len(shape), dtype=x.dtype, device=x.device)  # one element

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, master, handle, generation = ctx.saved_tensors
        w = read_again(master, handle, generation, ctx.dtype, grad) if ctx.needs_input_grad[0] else None
        return *_gradients(ctx, grad, x, master, w), None, None


def _gradients(
    ctx: Any, grad: Tensor, x: Tensor, master: Tensor, w: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of input, master and bias; ``w`` is the dequantized weight, if the first is needed."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_master = grad_bias = None
    if w is not None:
        if torch.is_grad_enabled():  # create_graph=True: this product depends on the weight as well
            w = _StraightThrough.apply(master, w)  # type: ignore[no-untyped-call]
        grad_x = (rows @ w).view(ctx.shape)
    if ctx.needs_input_grad[1]:
        grad_master = (rows.t() @ x.reshape(-1, x.shape[-1])).to(master.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_master, grad_bias


def _linear(x: Tensor, master: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
    """The layer in eager mode."""
    if not torch.is_grad_enabled():
        weight.ensure(master)
        return F.linear(x, weight.current(master, x.dtype), bias)
    whole = _dispatch_modes() > 0 or type(x) not in (Tensor, nn.Parameter)
    result: Tensor = _EagerLinear.apply(x, master, bias, weight, whole)  # type: ignore[no-untyped-call]
    if whole:
        return result
    with torch.no_grad():
        product = F.linear(x, weight.current(master, x.dtype), bias)
    result.data = product
    return result


class QATLinear(QATModule, nn.Linear):
    """An `nn.Linear` whose forward sees its weight through NVFP4. Made by `nvfp4_qat.apply_qat`, not constructed."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in_features]`` → ``[..., out_features]``, as `nn.Linear` (autocast included)."""
        bias: Tensor | None = self.bias
        device = input.device.type
        if device == "meta":  # which has no autocast, and shapes only
            return super().forward(input)
        dtype = self.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            if input.is_floating_point() and input.dtype != torch.float64:  # what autocast casts
                input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        if input.dtype != dtype:
            raise RuntimeError(f"expected an input of dtype {dtype}, but got {input.dtype}")
        if torch.compiler.is_compiling():
            result: Tensor = _Linear.apply(input, self.weight, bias, self._qat_handle)  # type: ignore[no-untyped-call]
            return result
        return _linear(input, self.weight, bias, self._qat_weights["weight"])

    @property
    def _qat_handle(self) -> Tensor:
        return self._qat_handles["weight"]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight=nvfp4"


def to_qat_linear(module: nn.Linear, weight: PackedWeight) -> QATLinear:
    """Turn an `nn.Linear` into a `QATLinear` in place; parameters, hooks and training state stay."""
    assert type(module) is nn.Linear
    module.__class__ = QATLinear
    assert isinstance(module, QATLinear)
    module._bind_qat({"weight": weight})
    return module
