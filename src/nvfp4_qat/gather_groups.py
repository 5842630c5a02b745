"""The parameter groups that FSDP2 makes of a model, and which of them gather mode can serve."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .errors import UserError
from .gather_unit import ROOM, TOKEN
from .shards import aligned


def param_groups(model: nn.Module) -> Iterator[Any]:
    """The FSDP2 parameter groups of a model, each once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 and later
            for group in [state._fsdp_param_group] if groups is None else groups:
                if group is not None and id(group) not in seen:
                    seen.add(id(group))
                    yield group


def room(group: Any, found: Iterable[tuple[Any, Any]]) -> int:
    """Bytes of this rank that FSDP2 gathers for a unit besides the packed ones; 0 if they are too many."""
    quantized = {id(fsdp_param) for fsdp_param, _ in found}
    others = [p for p in group.fsdp_params if id(p) not in quantized]
    sizes = [p.padded_sharded_param_size.numel() * (p.param_dtype or p.orig_dtype).itemsize for p in others]
    room = aligned(TOKEN + sum(sizes))
    return room if room <= ROOM else 0


def check_group(group: Any, found: Iterable[tuple[Any, Any]]) -> None:
    for fsdp_param, weight in found:
        if group.post_forward_mesh_info is not None and group.post_forward_mesh_info != group.mesh_info:
            raise UserError(
                f"{weight.name} is sharded with reshard_after_forward=<int>, which FSDP2 does not implement for "
                "tensors that are gathered in another form: use True or False"
            )
        if fsdp_param.fsdp_placement.dim != 0:
            raise UserError(
                f"{weight.name} is sharded on dim {fsdp_param.fsdp_placement.dim}: blocks of 16 along the last "
                "dimension share a scale, and shards are packed where they lie. Shard on dim 0."
            )
        if fsdp_param.is_dtensor:
            raise UserError(f"{weight.name} is also sharded by tensor or expert parallelism, which is not supported")
