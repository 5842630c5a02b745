"""`GatheredParam`: FSDP2's parameter, for a weight in gather mode, without the detours of its extension protocol.

At every gather FSDP2 inspects signatures, looks for methods and unflattens results, for each parameter. For weights
that travel as one buffer a unit all that is beside the point, and with small batches the host's time is what a step
waits for. So a parameter that FSDP2 has made is told to be a `GatheredParam`, which asks the weight directly. What is
out of the ordinary (CPU offload, the first gather, a replaced shard, compiled autograd) goes the general way.

Only in versions of torch whose parameter was compared with this; in others all weights go the general way.

Source of what is replaced: ``FSDPParam.all_gather_inputs`` and ``init_unsharded_param`` in torch 2.11-2.13
``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState, alloc_storage

from .fsdp import ShardedMaster

COMPARED = ("2.11.", "2.12.", "2.13.")
"""Versions of torch."""


class GatheredParam(FSDPParam):
    """A parameter of FSDP2 whose shard is a `ShardedMaster`; made by `adopt`."""

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        shard = self._sharded_local_tensor
        if (
            type(shard) is not ShardedMaster
            or self.sharded_state is not ShardedState.SHARDED
            or self.offload_to_cpu
            or _compiled_autograd()
        ):
            general: list[Tensor] = FSDPParam.all_gather_inputs.fget(self)  # type: ignore[attr-defined]
            return general
        inputs = shard._weight.before_gather(shard)
        self._extensions_data.all_gather_input_sizes = [t.size() for t in inputs]
        return list(inputs)

    def init_unsharded_param(self) -> None:
        shard = self._sharded_local_tensor
        unsharded: Any = self.__dict__.get("_unsharded_param")
        if unsharded is None or type(shard) is not ShardedMaster or _compiled_autograd():
            super().init_unsharded_param()  # type: ignore[no-untyped-call]
            return
        for tensor in self._unsharded_inner_tensors:
            alloc_storage(tensor)
        shard._weight.after_gather(self.all_gather_outputs, unsharded.dtype, unsharded)


def adopt(fsdp_param: FSDPParam) -> None:
    """Make FSDP2's parameter a `GatheredParam`, where it is a plain one of a known version."""
    if type(fsdp_param) is FSDPParam and torch.__version__.startswith(COMPARED):
        fsdp_param.__class__ = GatheredParam


_compiled_autograd: Any = getattr(_fsdp_common, "compiled_autograd_enabled", lambda: False)
