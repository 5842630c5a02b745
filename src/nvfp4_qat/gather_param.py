"""`GatheredParam`, `GatheredGroup`: FSDP2's parameter and parameter group in gather mode, without the detours of its
extension protocol.

At every gather FSDP2 inspects signatures, looks for methods and unflattens results, for each parameter. For weights
that travel as one buffer a unit all that is beside the point, and with small batches the host's time is what a step
waits for. So a parameter that FSDP2 has made is told to be a `GatheredParam`, which asks the weight directly, and does
with its memory and its module what FSDP2 does, in fewer calls. Its group then goes through the first weight of the unit
only, and has the unit gather everything if it can. What is out of the ordinary (CPU offload, the first gather, compiled
autograd, a parameter that modules share) goes the general way; a replaced shard is an error.

Only in versions of torch whose code was compared with this; in others all weights go the general way.

Source of what is replaced: in torch 2.11 and 2.13 ``FSDPParam.all_gather_inputs``, ``init_all_gather_outputs``,
``init_unsharded_param``, ``to_sharded`` and ``to_unsharded`` in ``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``,
``FSDPParamGroup.unshard`` and ``wait_for_unshard`` in ``_fsdp_param_group.py`` there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import AllGatherState, FSDPParamGroup
from torch.profiler import record_function

from .fsdp import ShardedMaster

if TYPE_CHECKING:
    from .gather import GatherWeight
    from .gather_unit import GatherUnit

COMPARED = ("2.11.", "2.13.")
"""Versions of torch."""

_NOTHING: list[Tensor] = []
_P = ParamSpec("_P")


class GatheredParam(FSDPParam):
    """A parameter of FSDP2 whose shard is a `ShardedMaster`; made by `adopt`.

    What FSDP2 does with one parameter after the other, the first of a unit does for all of them (`GatherUnit`).
    """

    _weight: "GatherWeight"

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        weight, unit = self._weight, self._weight.unit
        assert unit is not None
        if unit.ready and weight.index:
            return _NOTHING
        if weight.index and not unit.asked:  # FSDP2 passes over a first weight whose shard is another tensor
            unit.first().shard()
        shard = weight.shard()  # an error if another tensor has taken its place, which FSDP2 would gather as it is
        if self.sharded_state is not ShardedState.SHARDED or self.offload_to_cpu or _compiled_autograd():
            general: list[Tensor] = FSDPParam.all_gather_inputs.fget(self)  # type: ignore[attr-defined]
            return general
        if unit.alone:
            unit.make_fresh()
            inputs = unit.contribution(0)
        else:
            inputs = shard._weight.before_gather(shard)
        self._extensions_data.all_gather_input_sizes = [t.size() for t in inputs]
        if not weight.index:
            unit.prepare()
        return list(inputs)

    def init_all_gather_outputs(self, all_gather_input_numels: list[int], *others: Any, **options: Any) -> None:
        if not all_gather_input_numels and not any(options.values()):
            return
        if type(self._sharded_local_tensor) is not ShardedMaster and not _compiled_autograd():
            self._refuse()
        super().init_all_gather_outputs(all_gather_input_numels, *others, **options)

    def init_unsharded_param(self) -> None:
        weight, unit = self._weight, self._weight.unit
        assert unit is not None
        if not _compiled_autograd() and (unit.filled if weight.index else weight.fill_unit()):
            return
        if type(self._sharded_local_tensor) is not ShardedMaster:
            self._refuse()
        super().init_unsharded_param()  # type: ignore[no-untyped-call]

    def _refuse(self) -> None:
        """Raise because another tensor is gathered in place of the shard, as it is: FSDP2 passes over its weight."""
        unit = self._weight.unit
        assert unit is not None
        unit.give_up()
        self._weight.shard()

    def to_unsharded(self) -> None:
        unit = self._weight.unit
        assert unit is not None
        if self._weight.index:
            if self.sharded_state is ShardedState.UNSHARDED:
                return
        elif unit.put(ShardedState.UNSHARDED):
            return
        super().to_unsharded()

    def to_sharded(self) -> None:
        unit = self._weight.unit
        assert unit is not None
        if self._weight.index:
            if self.sharded_state is ShardedState.SHARDED:
                return
        else:
            unit.begin()
            if unit.put(ShardedState.SHARDED):
                return
        super().to_sharded()


def _untransformed(function: Callable[_P, None]) -> Callable[_P, None]:
    """Outside of functorch, as FSDP2 has it since torch 2.13: what is sent must not depend on a rank's transforms."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if torch._C._are_functorch_transforms_active():
            with torch._C._DisableFuncTorch():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


class GatheredGroup(FSDPParamGroup):
    """A parameter group of FSDP2 that goes through the first weight of its unit only, where that one stands for all.

    FSDP2 asks every parameter five times between two uses of a module, and does nothing else with most weights.
    """

    _unit: "GatherUnit"
    _own: bool
    """Whether the gather under way is the unit's own."""

    @_untransformed
    def unshard(self, async_op: bool = False) -> None:
        unit, comm = self._unit, None
        if self._all_gather_result is None and not self.is_unsharded:
            unit.alone = unit.one_for_all() and not _compiled_autograd()
            comm = unit.own_gather() if unit.alone else None
            self._own = comm is not None
        if comm is None:
            self._by_fsdp2(super().unshard, async_op)
        elif self.unshard_in_backward or self._training_state != TrainingState.PRE_BACKWARD:
            with record_function(self._with_fqn("FSDP::all_gather")):
                streams = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)
                self._all_gather_result = unit.send(comm, async_op, *streams)

    @_untransformed
    def wait_for_unshard(self) -> None:
        result = self._all_gather_result
        if result is None or not self._own:
            self._by_fsdp2(super().wait_for_unshard)
            return
        in_forward, context = self._training_state == TrainingState.FORWARD, self.comm_ctx
        if in_forward and context.all_gather_state is not None:
            self._wait_all_gather_streams_on_event(context.all_gather_state.event)
            context.all_gather_state = None
        if result.all_gather_event is not None:
            self.device_handle.current_stream().wait_event(result.all_gather_event)
        if isinstance(result.all_gather_work, dist.Work):
            result.all_gather_work.wait()
        with record_function(self._with_fqn("FSDP::all_gather_copy_out")):
            self._unit.receive(result)
        self._by_fsdp2(self._to_unsharded)
        filled = self.device_handle.Event()
        filled.record()
        if in_forward and result.all_gather_work is None:
            context.all_gather_state = AllGatherState(result, filled)
        else:
            self._wait_all_gather_streams_on_event(filled)
        self._all_gather_result = None

    def _to_sharded(self) -> None:
        self._by_fsdp2(super()._to_sharded)

    def _by_fsdp2(self, method: Callable[..., None], *arguments: Any) -> None:
        """Let FSDP2 do it, with the parameters that it must ask."""
        if not self._unit.alone:
            return method(*arguments)
        everyone, self.fsdp_params = self.fsdp_params, self._unit.few
        try:
            method(*arguments)
        finally:
            self.fsdp_params = everyone


def adopt(unit: "GatherUnit", group: FSDPParamGroup, weights: "Sequence[GatherWeight]") -> None:
    """Have FSDP2 treat the weights of a unit as `GatheredParam`, where it is plain FSDP2 of a known version."""
    if not torch.__version__.startswith(COMPARED):
        return
    for weight in weights:
        if type(weight.fsdp_param) is FSDPParam:
            weight.fsdp_param.__class__ = GatheredParam
            weight.fsdp_param._weight = weight  # type: ignore[attr-defined]
    if type(group) is FSDPParamGroup and all(type(w.fsdp_param) is GatheredParam for w in weights):
        group.__class__ = GatheredGroup
        group._unit, group._own = unit, False  # type: ignore[attr-defined]


_compiled_autograd: Any = getattr(_fsdp_common, "compiled_autograd_enabled", lambda: False)
