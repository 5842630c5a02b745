"""`GatherUnit`: how the packed weights of one FSDP unit (parameter group) are gathered.

From its second gather on a unit gathers all by itself (`gather_wire`), where nothing is out of the ordinary. Else its
packed weights go through FSDP2's all-gather, as follows.

FSDP2 copies what the parameters hand it into one buffer, gathers that, and copies the result into a buffer for each
parameter. For bytes that already lie in one buffer, and that a kernel reads anyway, both copies are a waste. So the
unit's all-gather is wrapped (`PackedAllGather`): where FSDP2 allocates its output, room for the packed bytes of all
ranks is added, and what FSDP2 has to gather besides (norms, biases) is put behind this rank's packed bytes, so that one
collective brings both. Streams, order, waiting and the life of the memory are those of FSDP2's own gather. The first
weight of the unit only hands FSDP2 a token, because it wants to gather something for every unit.

In small units the copies cost less than this, and an all-gather of another kind that somebody has given the unit
(symmetric memory, for instance) is left alone: the first weight then hands FSDP2 the packed buffer like any other
tensor.

Where bytes are to be kept, a unit's packed bytes travel only if its weights were packed since they did so last; else
FSDP2 gathers the rest alone, and the parameters are filled from the bytes that are there.

After the gather one kernel fills all parameters of the unit, when FSDP2 asks for the first of them (`fill_all`). They
then share one piece of memory for each dtype, allocated and freed at once. Where FSDP2 must go through them by itself
they are collected in order, and filled with the last one.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState, alloc_storage

from .errors import MismatchError
from .fsdp import ShardedMaster
from .gather_comm import PackedAllGather
from .gather_wire import Wire
from .multi_unpack import Unpacks
from .shards import Unit

TOKEN = 16
"""Bytes; a multiple of every element size, so that FSDP2's buffers stay aligned."""

WORTH = 1 << 24
"""Gathered bytes from which sparing the copies is worth the trouble."""

ROOM = 1 << 22
"""Bytes of a rank that may be put behind its packed bytes. More of them go in a collective of their own."""

APART = 512
"""Bytes; parameters that share memory begin at multiples of it, as if each had been allocated alone."""

_ASSIGNS: Any = nn.Module.__setattr__
"""Of modules whose parameters may be put where this would put them."""

WRAPPED = ("DefaultAllGather", "ProcessGroupAllocAllGather")
"""FSDP2's all-gathers that allocate plain memory."""


class GatherUnit:
    """The quantized weights of one FSDP parameter group.

    Args:
        packed: their packed shards.
        group: FSDP2's parameter group.
        params: FSDP2's parameters of them.
        keep: whether gathered bytes are kept until `release`.
    """

    def __init__(self, packed: Unit, group: Any, params: Sequence[Any], keep: bool = False) -> None:
        self.packed, self.stale, self.version = packed, True, 0
        """``stale``: whether a master changed since it was packed; ``version`` counts packings."""
        self.asked, self.ready, self.filled = 0, False, False
        """Weights that the gather under way has asked for; whether the others need not be asked; whether all of its
        parameters are filled."""
        self.alone = False
        """Whether FSDP2 is shown `few`, at the gather under way and until the next."""
        self._params, self._gathered_version, self._token_sent = list(params), -1, False
        own = {id(p) for p in self._params[1:]}
        self.few = [p for p in group.fsdp_params if id(p) not in own]
        self._memories: list[Tensor] = []
        self._places: list[tuple[Any, nn.Module, str]] | None = None
        self._token = torch.zeros(TOKEN, dtype=torch.uint8, device=packed.device).view(self._dtype_of_others(group))
        self._outs: list[Tensor] = []
        self._bytes: Tensor | None = None
        self._unpacks: Unpacks | None = None
        self._group, self._keep = group, keep
        self._comm: PackedAllGather | None = None
        self._wire: Wire | None = None

    def _dtype_of_others(self, group: Any) -> torch.dtype:
        """In which FSDP2 gathers what is not packed, uint8 if in several: it would make bytes of all if one differs."""
        own = {id(p) for p in self._params}
        dtypes = {p.param_dtype or p.orig_dtype for p in group.fsdp_params if id(p) not in own}
        return dtypes.pop() if len(dtypes) == 1 else torch.uint8

    def begin(self) -> None:
        """No weight is asked for yet."""
        self.asked, self.ready, self.filled = 0, False, False

    def first(self) -> Any:
        """The first weight, a `GatherWeight`."""
        return self._params[0]._weight

    def contribution(self, index: int) -> tuple[Tensor, ...]:
        """What a weight hands to FSDP2's all-gather, which has begun."""
        if index == 0:
            self.begin()
        self.asked += 1
        if self.packed.world == 1:  # gathers nothing, but FSDP2 wants one tensor for every parameter
            self._gathered_version = self.version
            return (self._token,)
        if index > 0:
            return ()
        self._gathered_version = self.version
        by_comm = self._by_comm()
        if self._comm is not None:
            self._comm.wanted = self.version
        if by_comm != self._token_sent:  # of another size than FSDP2 has made room for
            sent = self._token if by_comm else self.packed.buffer
            with torch.inference_mode(False):  # training may follow
                self._params[0].all_gather_outputs = [sent.new_empty(self.packed.world * sent.numel())]
            self._token_sent = by_comm
        if not by_comm:
            self._wrap_the_next()
        return (self._token,) if by_comm else (self.packed.buffer,)

    def prepare(self) -> None:
        """After `contribution` of the first weight: whether it stands for all of them."""
        if self.alone or (self.packed.world > 1 and all(map(_in_place, self._params))):
            self.asked, self.ready = len(self._params), True

    def one_for_all(self) -> bool:
        """Whether the first weight can stand for all of them, in whatever FSDP2 does until the next gather.

        The same on every rank: what is sent depends on it.
        """
        return bool(self._memories and self._places) and not self._params[0].offload_to_cpu

    def make_fresh(self) -> None:
        """Pack if that is due, after a look at every shard: FSDP2 may have put one in other memory, on some ranks only.

        Raises:
            MismatchError: one was replaced by another tensor, which FSDP2 would gather as it is.
        """
        first = self.first()
        for p in self._params:
            if p._weight is first or not _in_place(p):
                first.gather.ensure_fresh(p._weight, p._weight.shard())

    def own_gather(self) -> Any:
        """FSDP2's ``AllGather`` if `send` may use it, after `one_for_all`."""
        comm = self._group._all_gather_comm
        if isinstance(comm, PackedAllGather):
            comm = comm.inner
        if self.packed.world == 1 or type(comm).__name__ not in WRAPPED:
            if self._wire is not None:
                self._wire.passed_over()
            return None
        if self._wire is None:
            passengers = [p for p in self.few if p is not self._params[0]]
            if not Wire.carries(self.packed, passengers):
                return None
            with torch.inference_mode(False):  # training may follow
                self._wire = Wire(self.packed, self._group, passengers, self._keep)
        return comm

    def send(self, comm: Any, async_op: bool, copies: Any, gathers: Any) -> Any:
        """Begin an all-gather of everything in the unit, packed before if that is due; see `Wire.gather`."""
        assert self._wire is not None
        self.begin()
        with self._group.device_handle.stream(copies):
            self.make_fresh()
        self._gathered_version = self.version
        if self._comm is not None:
            self._comm.release()
        return self._wire.gather(self.version, comm, async_op, copies, gathers)

    def receive(self, result: Any) -> None:
        """Fill all parameters from what `send` gathered, on the current stream, which has waited for it.

        Raises:
            MismatchError: as `fill`.
        """
        assert self._wire is not None
        gather = self.first().gather
        gather.streams.reads()
        for memory in self._memories:
            alloc_storage(memory)
        self._fill(self._wire.packed_bytes(result), gather.packer.g, [p._unsharded_param for p in self._params])
        self._wire.deliver(result)

    def put(self, state: ShardedState) -> bool:
        """Give the modules their sharded or unsharded parameters, and free the latter's memory with the former.

        Returns:
            False if FSDP2 must do that by itself.
        """
        if not self._memories:
            return False
        if self._places is None:
            infos = [p._module_info for p in self._params]
            plain = all(_ASSIGNS == type(i.module).__setattr__ and not i.shared_modules for i in infos)
            self._places = [(p, p._module_info.module, p._module_info.param_name) for p in self._params if plain]
        if not self._places:
            return False
        if state is ShardedState.UNSHARDED:
            for p, module, name in self._places:
                weight = p._unsharded_param
                if weight.requires_grad != p.sharded_param.requires_grad:
                    weight.requires_grad_(p.sharded_param.requires_grad)
                module._parameters[name] = weight
                p.sharded_state = state
            return True
        for p, module, name in self._places:
            module._parameters[name] = p.sharded_param
            p.sharded_state = state
        self._params[0].free_unsharded_param()
        return True

    def fill_all(self, g: Tensor) -> bool:
        """Fill all parameters now, before FSDP2 goes through them; False if it must do that by itself.

        Args:
            g: all global scales.

        Raises:
            MismatchError: as `fill`.
        """
        if self.asked != len(self._params):
            return False
        if not self._memories:
            if any("_unsharded_param" in p.__dict__ for p in self._params):
                return False
            self._make()
        for memory in self._memories:
            alloc_storage(memory)
        self._outs = [p._unsharded_param for p in self._params]
        self._bytes = None if self.packed.world == 1 or self._token_sent else self._params[0].all_gather_outputs[0]
        self.fill(g)
        self.filled = True
        return True

    def _make(self) -> None:
        """Give FSDP2 its unsharded parameters, those of a dtype in one piece of memory, which the first one frees."""
        dtypes = [p.param_dtype or p.orig_dtype for p in self._params]
        shapes = [torch.Size(shard.shape) for shard in self.packed.shards]
        made: list[nn.Parameter | None] = [None] * len(dtypes)
        memories = []
        with torch.inference_mode(False):  # they may be trained, though they are evaluated first
            for dtype in dict.fromkeys(dtypes):
                own = [i for i, d in enumerate(dtypes) if d == dtype]
                sizes = (-(-shapes[i].numel() * dtype.itemsize // APART) * APART for i in own)
                starts = list(accumulate(sizes, initial=0))
                memory = torch.empty(starts[-1], dtype=torch.uint8, device=self.packed.device)
                for i, start in zip(own, starts, strict=False):
                    # Not a view: each has a version counter of its own.
                    w = torch.empty(0, dtype=dtype, device=memory.device)
                    w.set_(memory.untyped_storage(), start // dtype.itemsize, shapes[i])  # type: ignore[call-overload]
                    made[i] = nn.Parameter(w, requires_grad=self._params[i].sharded_param.requires_grad)
                memories.append(memory)
        self._memories = memories
        for p, parameter in zip(self._params, made, strict=True):
            p._unsharded_param, p._unsharded_inner_tensors = parameter, []
        self._params[0]._unsharded_inner_tensors = memories

    def collect(self, index: int, gathered: Sequence[Tensor], out: Tensor) -> bool:
        """Take the parameter to be filled for a weight; True with the last one."""
        if index == 0:
            self._outs, self._bytes = [], None
        if index != len(self._outs):
            name = self.packed.shards[index].name
            raise MismatchError(f"{name} came out of order: FSDP2 unshards in another way than expected")
        self._outs.append(out)
        if index == 0 and self.packed.world > 1 and not self._token_sent:
            self._bytes = gathered[0]
        return len(self._outs) == len(self.packed.shards)

    def fill(self, g: Tensor) -> None:
        """Dequantize the gathered bytes into the collected parameters.

        Args:
            g: all global scales.

        Raises:
            MismatchError: the weights were packed again between the gather and this; the next forward gathers anew.
        """
        source = self.packed.buffer if self.packed.world == 1 else self._bytes
        if self._token_sent and self._comm is not None:
            source = self._comm.take()
        self._fill(source, g, self._outs)
        if self._bytes is not None:
            self._bytes.untyped_storage().resize_(0)  # FSDP2 would keep them until it reshards
        self._outs, self._bytes = [], None

    def _fill(self, source: Tensor | None, g: Tensor, outs: Sequence[Tensor]) -> None:
        if self._gathered_version != self.version:
            self.give_up()
            raise MismatchError(
                f"{self.packed.shards[0].name} was gathered before the weights changed and unsharded after it: wait "
                "for the handle of unshard(async_op=True) before the optimizer step"
            )
        if source is None or source.nbytes < self.packed.world * self.packed.nbytes:
            self.give_up()  # FSDP2 would come back with the same bytes
            raise MismatchError(f"the packed bytes of {self.packed.shards[0].name} were not gathered as a whole")
        if self._unpacks is None:
            self._unpacks = self.packed.unpacks()
        with torch.no_grad():
            self._unpacks(source, g, outs)

    def give_up(self) -> None:
        """Forget the gather under way, and room for other tensors than it brings: the next unshard begins another."""
        self._group._all_gather_result = None
        self.begin()
        for p in self._params:
            p.all_gather_outputs = []
        if self._comm is not None:
            self._comm.take()

    def release(self) -> None:
        """Free gathered bytes that are kept: they are not those of the next forward."""
        if self._comm is not None:
            self._comm.release()
        if self._wire is not None:
            self._wire.release()

    def _wrap_the_next(self) -> None:
        """Have the next gather done by `PackedAllGather`, where that is of use."""
        worth = self._keep or self.packed.world * self.packed.nbytes >= WORTH
        if worth and type(self._group._all_gather_comm).__name__ in WRAPPED:
            self._comm = PackedAllGather(self._group._all_gather_comm, self.packed, self._keep)
            self._group._all_gather_comm = self._comm

    def _by_comm(self) -> bool:
        return self._comm is not None and self._group._all_gather_comm is self._comm


def _in_place(fsdp_param: Any) -> bool:
    """Whether FSDP2's parameter still has its weight's master for its shard."""
    shard = fsdp_param.sharded_param._local_tensor
    return type(shard) is ShardedMaster and shard._memory is fsdp_param._weight.memory
