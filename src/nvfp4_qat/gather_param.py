"""`GatheredParam`: FSDP2's parameter, for a weight in gather mode, without the detours of its extension protocol.

At every gather FSDP2 inspects signatures, looks for methods and unflattens results, for each parameter. For weights
that travel as one buffer a unit all that is beside the point, and with small batches the host's time is what a step
waits for. So a parameter that FSDP2 has made is told to be a `GatheredParam`, which asks the weight directly, and does
with its memory and its module what FSDP2 does, in fewer calls. What is out of the ordinary (CPU offload, the first
gather, compiled autograd, a parameter that modules share) goes the general way; a replaced shard is an error.

Only in versions of torch whose parameter was compared with this; in others all weights go the general way.

Source of what is replaced: ``FSDPParam.all_gather_inputs``, ``init_all_gather_outputs``, ``init_unsharded_param``,
``to_sharded`` and ``to_unsharded`` in torch 2.11 and 2.13 ``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from .fsdp import ShardedMaster

if TYPE_CHECKING:
    from .gather import GatherWeight
    from .gather_unit import GatherUnit

COMPARED = ("2.11.", "2.13.")
"""Versions of torch."""

_NOTHING: list[Tensor] = []


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


class GatheredGroup(FSDPParamGroup):
    """A parameter group of FSDP2 that goes through the first weight of its unit only, where that one stands for all.

    FSDP2 asks every parameter five times between two uses of a module, and does nothing else with most weights.
    """

    _unit: "GatherUnit"

    def unshard(self, async_op: bool = False) -> None:
        if self._all_gather_result is None and not self.is_unsharded:
            self._unit.alone = self._unit.one_for_all() and not _compiled_autograd()
        everyone = self._show_few()
        try:
            super().unshard(async_op)
        finally:
            self.fsdp_params = everyone

    def wait_for_unshard(self) -> None:
        everyone = self._show_few()
        try:
            super().wait_for_unshard()
        finally:
            self.fsdp_params = everyone

    def _to_sharded(self) -> None:
        everyone = self._show_few()
        try:
            super()._to_sharded()  # type: ignore[no-untyped-call]
        finally:
            self.fsdp_params = everyone

    def _show_few(self) -> list[FSDPParam]:
        """Have FSDP2 see the parameters that it must ask; returns what it saw."""
        everyone = self.fsdp_params
        if self._unit.alone:
            self.fsdp_params = self._unit.few
        return everyone


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
        group._unit = unit  # type: ignore[attr-defined]


_compiled_autograd: Any = getattr(_fsdp_common, "compiled_autograd_enabled", lambda: False)
