"""`ShardedMaster`: the tensor that FSDP2 shards, so that what it gathers is the packed form.

FSDP2 asks the local shard of a parameter for what to gather (``fsdp_pre_all_gather``) and gives it the gathered bytes
to make the full parameter from (``fsdp_post_all_gather``). `gather` answers both; this file is the tensor that carries
the two methods through everything FSDP2, DTensor, optimizers and loaders do with a shard.

It is a wrapper: the data is in ``plain``, an ordinary tensor, and every operation runs on that. Results are plain, so
gradients and optimizer states are; only views of a shard, and what FSDP2 and loaders make a shard of, are wrappers
again.

- A write into a wrapper is noted (`GatheredWeight.note`), through whichever view. Version counters would not do: they
  stand still when optimizers write into DTensors. Wrappers of one memory share a `Memory`; until that is adopted as the
  master, writes into it are not the master's, and it remembers whether there were any but a copy of the same weight:
  FSDP2 pads shards anew, on some ranks only, and that must not look like a change.
- Products with a wrapper are refused: a weight that has not gone through the gather is the unquantized master.
- State dicts hold plain tensors, see `attach`. The wrapper has no address of its own (``data_ptr()`` is 0): kernels
  from elsewhere take the memory from ``parameter.to_local().plain``.
- With CPU offload FSDP2 copies each master to the device before it asks what to gather. That copy is not made.

Source of the protocol: torch 2.11-2.13 ``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from .errors import MismatchError, UserError

aten: Any = torch.ops.aten

NEW_SHARDS = {aten.empty_like.default, aten.new_zeros.default, aten._to_copy.default, aten._pin_memory.default}
"""Operations with which FSDP2, ``Module.to`` and ``Module.to_empty`` make a shard in new memory."""

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "dot", "linear", "matmul", "_grouped_mm", "_scaled_mm", "convolution",
    "embedding",
}  # fmt: skip
BEFORE_SHARDING = PRODUCTS | {"index", "index_select", "mul"}
"""Also refused while nothing is sharded: how else a forward computes with a weight, or with copies of its parts."""


class GatheredWeight(Protocol):
    """What a `ShardedMaster` needs to know of the weight it is a shard of."""

    name: str
    memory: "Memory | None"
    generation: int
    """Counts the writes into the master."""

    def sharded(self) -> bool: ...

    @staticmethod
    def note_all(weights: Any) -> Any: ...

    def before_gather(self, shard: "ShardedMaster") -> tuple[Tensor, ...]: ...

    def after_gather(self, gathered: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None) -> Any: ...


class Memory:
    """What the wrappers of one storage share.

    Args:
        adopted: whether it is the master's: then writes into it are noted.
        written: whether it holds something else than the weight did, as far as is known.
        padded: whether FSDP2 may have made it, to pad a shard. It may make another one on some ranks, so an alias of it
            may still be the master's on others: writes into it are noted on all.
        generation: of the master that it is a copy of; an older one is other weights, such as a snapshot's.
    """

    def __init__(self, adopted: bool = False, written: bool = False, padded: bool = False, generation: int = 0) -> None:
        self.adopted, self.written, self.padded, self.generation = adopted, written, padded, generation


class ShardedMaster(torch.Tensor):
    """A master weight, or a rank's shard of one, that FSDP2 gathers in 4 bits."""

    _plain: Tensor
    _weight: GatheredWeight
    _memory: Memory
    _device: torch.device

    @staticmethod
    def __new__(
        cls, plain: Tensor, weight: GatheredWeight, memory: Memory | None = None, device: torch.device | None = None
    ) -> "ShardedMaster":
        wrapper: ShardedMaster = torch.Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            layout=plain.layout,
            device=device or plain.device,
            requires_grad=plain.requires_grad,
        )
        return wrapper

    def __init__(
        self, plain: Tensor, weight: GatheredWeight, memory: Memory | None = None, device: torch.device | None = None
    ) -> None:
        self._plain, self._weight, self._device = plain, weight, device or plain.device
        self._memory = memory or Memory()

    @property
    def weight(self) -> GatheredWeight:
        return self._weight

    @property
    def memory(self) -> Memory:
        return self._memory

    @property
    def plain(self) -> Tensor:
        """The data."""
        return self._plain

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
        if func is aten._to_copy.default and _for_offloaded_gather(args[0], kwargs):
            source = args[0]
            return ShardedMaster(source._plain, source._weight, source._memory, torch.device(kwargs["device"]))
        shard = next(_shards_in((*args, *kwargs.values())))
        _check(func, shard._weight, args)
        out = func(*map(_unwrapped, args), **{k: _unwrapped(v) for k, v in kwargs.items()})
        written = _written(func, args, kwargs)
        if written:
            _note_writes(func, args, written)
            return written[0] if len(written) == 1 and isinstance(out, torch.Tensor) else out
        memory = _memory_of_result(func, args)
        if memory is None:
            return out
        with torch.inference_mode(False):  # a shard made while evaluating will be trained
            return tree_map_only(torch.Tensor, lambda x: cls(x, shard._weight, memory), out)

    def __deepcopy__(self, memo: Any) -> Any:
        if not self._memory.adopted and self._weight.sharded():
            return self._plain.clone()
        raise UserError(
            f"{self._weight.name} is prepared for gathering in 4 bits and cannot be copied: copy the model before "
            'apply_qat(model, config, gather="nvfp4"), or build a second one and load this one\'s state_dict()'
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self._memory.adopted and self._weight.sharded():
            return self._plain.__reduce_ex__(protocol)
        raise UserError(
            f"{self._weight.name} is prepared for gathering in 4 bits and cannot be pickled: save model.state_dict(), "
            "which holds plain tensors"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedMaster({self._weight.name}, shape={tuple(self.shape)}, dtype={self.dtype})"


def plain_tensor(t: Tensor) -> Tensor:
    """The same data without the wrapper: a plain tensor, or a DTensor of one."""
    if isinstance(t, ShardedMaster):
        return t.plain.detach()
    if isinstance(t, DTensor) and isinstance(t._local_tensor, ShardedMaster):
        # No detach() of the result: its local tensor would get a version counter of its own (`Gather.hand_out`).
        with torch.no_grad():
            local = t._local_tensor.plain.detach()
            return DTensor.from_local(
                local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
            )
    return t


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


def _for_offloaded_gather(source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is the copy to the device that FSDP2 makes of an offloaded master to gather it."""
    device = kwargs.get("device")
    if device is None or not kwargs.get("non_blocking") or not isinstance(source, ShardedMaster):
        return False
    away = source.device.type == "cpu" and torch.device(device).type != "cpu"
    return away and sys._getframe(2).f_code.co_name == "all_gather_inputs"


def _unwrapped(value: Any) -> Any:
    """An argument of an operation with plain tensors; optimizers pass lists of hundreds, so no general tree walk."""
    if type(value) is ShardedMaster:
        return value._plain
    if isinstance(value, (list, tuple)):
        return [x._plain if type(x) is ShardedMaster else x for x in value]
    return value


def _shards_in(values: Iterable[Any]) -> Iterator[ShardedMaster]:
    for value in values:
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if type(x) is ShardedMaster:
                yield x


def _check(func: OpOverload, weight: GatheredWeight, args: Any) -> None:
    """Raise if an operation would use a master as if it were the 4-bit weight."""
    if func.namespace == "fsdp":
        raise MismatchError(
            f"{weight.name} would be gathered unquantized: compiled autograd is not supported in gather mode"
        )
    name = func._opname
    if name in PRODUCTS or (name in BEFORE_SHARDING and not weight.sharded()):
        raise UserError(
            f"{weight.name} is used without having been gathered in 4 bits: call fully_shard on its module, or on one "
            "around it in the model, and use it inside that module's forward"
        )
    if name == "split" and not weight.sharded() and (args[2] if len(args) > 2 else 0) not in (0, -args[0].ndim):
        raise UserError(
            f"{weight.name} cannot be sharded on dim {args[2]}: blocks of 16 along the last dimension share a scale, "
            "and shards are packed where they lie. Shard on dim 0."
        )


def _note_writes(func: OpOverload, args: Any, written: list[ShardedMaster]) -> None:
    """Tell the weights, unless it is other memory that was written."""
    source = args[1] if func is aten.copy_.default else None
    noted = []
    for shard in written:
        if isinstance(source, ShardedMaster) and source._weight is shard._weight and not shard._memory.adopted:
            shard._memory.written, shard._memory.generation = source._memory.written, _generation(source)
        else:
            shard._memory.written = True
            if shard._memory.adopted or shard._memory.padded:
                noted.append(shard._weight)
    if noted:
        noted[0].note_all(noted)


def _generation(shard: ShardedMaster) -> int:
    """Of the master whose values a shard has, if it was not written since."""
    current = shard._weight.memory is None or shard._memory is shard._weight.memory
    return shard._weight.generation if current else shard._memory.generation


def _memory_of_result(func: OpOverload, args: Any) -> Memory | None:
    """What the results share if they are shards; None: they are plain."""
    if func in NEW_SHARDS:
        changed = func is aten.empty_like.default or args[0]._memory.written
        return Memory(written=changed, padded=func is aten.new_zeros.default, generation=_generation(args[0]))
    alias = _aliased_argument(func)
    if alias is not None and alias < len(args) and isinstance(args[alias], ShardedMaster):
        memory: Memory = args[alias]._memory
        return memory
    return None


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


@cache
def _aliased_argument(func: OpOverload) -> int | None:
    """The argument that an operation's results are views of."""
    if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        return None
    views = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and not a.alias_info.is_write]
    return views[0] if views else None
