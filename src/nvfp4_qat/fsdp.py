"""`ShardedMaster`: the tensor that FSDP2 shards, so that what it gathers is the packed form.

FSDP2 asks the local shard of a parameter for what to gather (``fsdp_pre_all_gather``) and gives it the gathered bytes
to make the full parameter from (``fsdp_post_all_gather``). `gather` answers both; this file is the tensor that carries
the two methods through everything FSDP2, DTensor, optimizers and loaders do with a shard.

It is a wrapper: the data is in ``plain``, an ordinary tensor, and every operation runs on that. Results are plain, so
gradients and optimizer states are; only operations that make, move or view a shard give a wrapper again.

- A write into a wrapper is noted (`GatheredWeight.note`). Version counters would not do: they stand still when
  optimizers write into DTensors.
- Products with a wrapper are refused: a weight that has not gone through the gather is the unquantized master.
- State dicts hold plain tensors, see `gather`; the wrapper itself cannot be copied or pickled.
- With CPU offload FSDP2 copies each master to the device before it asks what to gather. That copy is put off until
  something reads it, which the gather does not.

Source of the protocol: torch 2.11-2.13 ``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from .errors import MismatchError, UserError

aten: Any = torch.ops.aten

SHARD_TO_SHARD = {
    aten.empty_like.default, aten.new_zeros.default, aten.slice.Tensor, aten.copy_.default, aten.view.default,
    aten.as_strided.default, aten._to_copy.default, aten._pin_memory.default, aten.split.Tensor, aten.clone.default,
    aten.detach.default,
    aten.t.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.expand.default,
}  # fmt: skip
"""Operations with which FSDP2 and loaders make a shard from another, or a forward prepares a product with it."""

NEW_MEMORY = {
    aten.empty_like.default, aten.new_zeros.default, aten._to_copy.default, aten._pin_memory.default, aten.clone.default
}  # fmt: skip
"""Those of them whose result is not a view. Filling it is not a write into the master."""

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "dot", "linear", "matmul", "_grouped_mm", "_scaled_mm", "convolution",
    "embedding",
}  # fmt: skip
BEFORE_SHARDING = PRODUCTS | {"t", "transpose", "permute", "select", "index", "index_select", "unbind", "expand", "mul"}
"""Also refused while nothing is sharded: how a forward looks at a weight before it multiplies."""


class GatheredWeight(Protocol):
    """What a `ShardedMaster` needs to know of the weight it is a shard of."""

    name: str

    @property
    def model(self) -> object:
        """The same object for all weights that one `note` speaks for."""

    def sharded(self) -> bool: ...

    def note(self) -> None: ...

    def before_gather(self, shard: "ShardedMaster") -> tuple[Tensor, ...]: ...

    def after_gather(self, gathered: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None) -> Any: ...


class ShardedMaster(torch.Tensor):
    """A master weight, or a rank's shard of one, that FSDP2 gathers in 4 bits."""

    _inner: Tensor
    _weight: GatheredWeight
    _device: torch.device
    _fresh = False

    @staticmethod
    def __new__(
        cls, inner: Tensor, weight: GatheredWeight, device: torch.device | None = None, requires_grad: bool = False
    ) -> "ShardedMaster":
        wrapper: ShardedMaster = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device or inner.device,
            requires_grad=requires_grad or inner.requires_grad,
        )
        return wrapper

    def __init__(
        self, inner: Tensor, weight: GatheredWeight, device: torch.device | None = None, requires_grad: bool = False
    ) -> None:
        self._inner, self._weight, self._device = inner, weight, device or inner.device

    @property
    def weight(self) -> GatheredWeight:
        return self._weight

    def adopt(self) -> Tensor:
        """The data, of a shard that is the master from now on: writes into it count."""
        self._fresh = False
        return self._inner

    @property
    def origin(self) -> Tensor:
        """The data where it lies, also if this stands for a copy of it on another device."""
        return self._inner

    @property
    def plain(self) -> Tensor:
        """The data, on the device that this tensor claims to be on."""
        return self._inner.to(self._device)

    @property
    def fsdp_pre_all_gather(self) -> "Callable[[Any], tuple[tuple[Tensor, ...], None]]":
        return _PreGather(self)

    def fsdp_post_all_gather(
        self, gathered: Sequence[Tensor], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        return self._weight.after_gather(gathered, param_dtype, out)

    def __tensor_flatten__(self) -> tuple[list[str], GatheredWeight]:
        return ["plain"], self._weight

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: GatheredWeight, size: Any, stride: Any) -> "ShardedMaster":
        return ShardedMaster(inner["plain"], meta)

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any, kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is aten._to_copy.default and (put_off := _offload_copy(args[0], kwargs)) is not None:
            return put_off
        weight = next(_shards_in((*args, *kwargs.values())))._weight
        _check(func, weight, args)
        out = func(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in kwargs.items()})
        written = _written(func, args, kwargs)
        if written:
            _note_all(written)
        if func in SHARD_TO_SHARD and not written:
            fresh = func in NEW_MEMORY or args[0]._fresh
            with torch.inference_mode(False):  # a shard made while evaluating will be trained
                return tree_map_only(torch.Tensor, lambda x: _made(x, weight, fresh), out)
        return written[0] if len(written) == 1 and isinstance(out, torch.Tensor) else out

    def __deepcopy__(self, memo: Any) -> Any:
        raise UserError(
            f"{self._weight.name} is prepared for gathering in 4 bits and cannot be copied: copy the model before "
            'apply_qat(model, config, gather="nvfp4"), or build a second one and load this one\'s state_dict()'
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            f"{self._weight.name} is prepared for gathering in 4 bits and cannot be pickled: save model.state_dict(), "
            "which holds plain tensors"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedMaster({self._weight.name}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _made(plain: Tensor, weight: GatheredWeight, fresh: bool) -> ShardedMaster:
    shard = ShardedMaster(plain, weight)
    shard._fresh = fresh
    return shard


def _unwrapped(value: Any) -> Any:
    """An argument of an operation with plain tensors; optimizers pass lists of hundreds, so no general tree walk."""
    if type(value) is ShardedMaster:
        return value.plain
    if isinstance(value, (list, tuple)):
        return [x.plain if type(x) is ShardedMaster else x for x in value]
    return value


def _note_all(written: list[ShardedMaster]) -> None:
    noted: set[int] = set()
    for shard in written:  # an optimizer writes hundreds of the same model at once
        if not shard._fresh and id(shard._weight.model) not in noted:
            noted.add(id(shard._weight.model))
            shard._weight.note()


def _shards_in(values: Iterable[Any]) -> Iterator[ShardedMaster]:
    for value in values:
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if type(x) is ShardedMaster:
                yield x


class _PreGather:
    """``fsdp_pre_all_gather`` of a shard. FSDP2 inspects its signature at every gather; this one is ready-made.

    One parameter, the mesh: the longer form asserts that what is gathered has the shape of the padded shard, on the
    ranks that pad.
    """

    __signature__ = inspect.Signature([inspect.Parameter("mesh", inspect.Parameter.POSITIONAL_OR_KEYWORD)])

    def __init__(self, shard: ShardedMaster) -> None:
        self._shard = shard

    def __call__(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        return self._shard._weight.before_gather(self._shard), None


def _offload_copy(source: Any, kwargs: dict[str, Any]) -> ShardedMaster | None:
    """A copy to a GPU that is made when it is read, for the one FSDP2 makes under CPU offload."""
    device = kwargs.get("device")
    if device is None or not isinstance(source, ShardedMaster) or source.device.type != "cpu":
        return None
    moves = torch.device(device).type != "cpu" and bool(kwargs.get("non_blocking"))
    same = kwargs.get("dtype") in (None, source.dtype)
    return ShardedMaster(source._inner, source._weight, torch.device(device)) if moves and same else None


def _check(func: OpOverload, weight: GatheredWeight, args: Any) -> None:
    """Raise if an operation would use a master as if it were the 4-bit weight."""
    if func.namespace == "fsdp":
        raise MismatchError(
            f"{weight.name} would be gathered unquantized: compiled autograd is not supported in gather mode"
        )
    name = func._opname
    if name in PRODUCTS or (name in BEFORE_SHARDING and not weight.sharded()):
        raise UserError(
            f"{weight.name} is used without having been gathered in 4 bits: call fully_shard on its module or a parent "
            "of it, and use it inside that module's forward"
        )
    if name == "split" and not weight.sharded() and (args[2] if len(args) > 2 else 0) not in (0, -args[0].ndim):
        raise UserError(
            f"{weight.name} cannot be sharded on dim {args[2]}: blocks of 16 along the last dimension share a scale, "
            "and shards are packed where they lie. Shard on dim 0."
        )


def _written(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> list[ShardedMaster]:
    """The shards among an operation's arguments that it writes into."""
    positions, names = _write_arguments(func)
    values = [args[i] for i in positions if i < len(args)] + [kwargs[n] for n in names if n in kwargs]
    return list(_shards_in(values))


@cache
def _write_arguments(func: OpOverload) -> tuple[tuple[int, ...], tuple[str, ...]]:
    written = [
        (i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    return tuple(i for i, _ in written), tuple(n for _, n in written)
