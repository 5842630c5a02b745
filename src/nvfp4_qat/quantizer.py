"""From weights to the stream of named tensors that a rollout engine loads and a checkpoint stores.

Two ways in: `packed_weights` for a model that trains with QAT, `QATQuantizer` for any stream of full tensors. What is
4-bit becomes three tensors, ``weight_packed``, ``weight_scale`` and ``weight_global_scale``; everything else passes
through. No more than one fusion group is held at a time.

Names and shapes come in two layouts. "checkpoint" is what Hugging Face checkpoints and engines use: one tensor per
expert and projection. "fused" is the model's own, so ``…experts.gate_up_proj.weight_packed`` holds all experts.

``weight_global_scale`` is float32 and holds the *divisor* ``1/g``, ``[1]`` for one weight and ``[E]`` for fused
experts: the direction of compressed-tensors. ``1/(1/g)`` gives back ``g`` to the bit, for powers of two and for
reciprocals alike (tested over all mantissas).

Source of names and shapes: compressed-tensors 0.20 ``compressors/nvfp4``; vLLM 0.24 ``CompressedTensorsW4A4Fp4``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.distributed
from torch import Tensor, nn

from . import ops
from .adapters import check_adapters
from .classify import classify_tensor, fusion_siblings
from .config import QATConfig
from .core import pack_from_masters, qat_plan
from .entries import SkippedTensor
from .errors import MismatchError, UserError
from .model_tensors import ModelTensor, check_all_finite, check_finite, check_full, is_fully_sharded, model_tensors
from .naming import canonical_name, join
from .parameter import stepped
from .plan import CheckpointSlice, QuantizedTensor, QuantPlan

Layout = Literal["checkpoint", "fused"]


def packed_names(name: str) -> tuple[str, str, str]:
    """The names of the three tensors of a packed weight: codes, block scales, divisor.

    Args:
        name: of the weight. A last component ``weight`` is replaced; any other stays and gets one more.
    """
    stem = name.removesuffix("weight") if name == "weight" or name.endswith(".weight") else f"{name}."
    return f"{stem}weight_packed", f"{stem}weight_scale", f"{stem}weight_global_scale"


def output_slices(plan: QuantPlan, name: str, layout: Layout) -> tuple[CheckpointSlice, ...]:
    """The tensors that a layout makes of one tensor of a model, as parts of it.

    Args:
        plan: the model's plan.
        name: canonical name of a tensor that a checkpoint stores.
        layout: "checkpoint" or "fused".
    """
    return plan.checkpoint_slices[name] if layout == "checkpoint" else (CheckpointSlice(name),)


def packed_weights(
    model: nn.Module, layout: Layout = "checkpoint", ranks: Literal["all"] | int = "all"
) -> Iterator[tuple[str, Tensor]]:
    """Stream a model's weights as its rollout engine and its checkpoint hold them.

    Every 4-bit weight is packed again from its master, one fusion group at a time. A tied parameter comes once.
    Adapters (LoRA) are not part of the stream: it is the base, whose packed bytes do not change while adapters train.

    Of a model that FSDP2 shards each rank packs its rows, and packed bytes are gathered, one FSDP unit (gather mode) or
    one weight (module mode) at a time. Every rank has to call this and to iterate to the end, also one that receives
    nothing.

    Args:
        model: a model after `apply_qat`, bare or wrapped (DDP, FSDP2, PEFT, torch.compile).
        layout: "checkpoint", one tensor per expert and projection under checkpoint names, or "fused", the model's own
            names and shapes.
        ranks: which ranks receive the stream: "all", or one of them, the others getting an empty one. Unless the model
            is sharded there is no communication: every rank of DDP has all weights.

    Returns:
        Pairs of name and tensor, on the model's device: first what is not quantized, in the dtype a checkpoint stores
        (`nvfp4_qat.model_tensors`), then for every 4-bit tensor its codes (uint8), block scales (float8_e4m3fn) and
        divisor (float32). Tensors may share memory with the model: copy what is to outlive its next step.

    Raises:
        UserError: `apply_qat` was not called; unknown layout or rank; NaN or Inf, while iterating (in what is not
            quantized, before the first tensor).
        StaleWeightsError: while iterating; see `nvfp4_qat.core.pack_from_masters`. Of a sharded model every rank raises
            the same errors, before the first tensor.
        MismatchError: while iterating: weights that are yet to come were written since the iteration began.
    """
    _check_layout(layout)
    try:
        plan = qat_plan(model)
    except UserError:
        raise UserError(
            "the model has no quantization plan: call nvfp4_qat.apply_qat(model, config) first, or pass its state dict "
            "through QATQuantizer(config, plan).quantize"
        ) from None
    receives = _receives(ranks)
    if is_fully_sharded(model):
        from .sharded_stream import reshard  # needs torch.distributed

        reshard(model)
    tensors = model_tensors(model, plan, sharded=True)
    if any(entry.sharded for entry in tensors.values()):
        return _sharded_stream(model, plan, tensors, layout, None if ranks == "all" else int(ranks))
    return _stream(model, plan, tensors, layout) if receives else iter(())


def _sharded_stream(
    model: nn.Module, plan: QuantPlan, tensors: dict[str, ModelTensor], layout: Layout, rank: int | None
) -> Iterator[tuple[str, Tensor]]:
    from . import sharded_stream as sharded
    from .gather import gather_of

    plain = {name: entry for name, entry in tensors.items() if name not in plan}
    sharded.check_finite(plain)
    check_adapters(model)
    gather = gather_of(model)
    if gather is not None:
        gather.check_modules(model)
        packed = sharded.packed_from_gather(gather, rank)
    else:
        packed = sharded.packed_from_shards(model, plan, tensors, rank)
    written = {name: _written(entry) for name, entry in plain.items()}
    for name, tensor in sharded.whole_tensors(plain, rank):
        if _written(plain[name]) != written[name]:
            raise MismatchError.while_read()
        for part in output_slices(plan, name, layout):
            yield part.name, part.of(tensor).contiguous()
    for planned, value in packed:
        yield from _parts(value, output_slices(plan, planned.name, layout))


def _stream(
    model: nn.Module, plan: QuantPlan, tensors: dict[str, ModelTensor], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    packed = pack_from_masters(model)
    plain = {name: entry for name, entry in tensors.items() if name not in plan}
    written = {name: _written(entry) for name, entry in plain.items()}
    check_all_finite(plain)
    for name, entry in plain.items():
        if _written(entry) != written[name]:
            raise MismatchError.while_read()
        yield from _sliced(entry.stored(), output_slices(plan, name, layout))
    for planned, value in packed:
        yield from _parts(value, output_slices(plan, planned.name, layout))


def _written(entry: ModelTensor) -> tuple[int, int]:
    """Equal as long as a parameter is not known to have been written; buffers may be while a model computes."""
    tensor = entry.tensor
    if not isinstance(tensor, nn.Parameter) or tensor.is_inference():
        return 0, 0
    return tensor._version, stepped(tensor)


def _passed(name: str, tensor: Tensor, slices: Iterable[CheckpointSlice]) -> Iterator[tuple[str, Tensor]]:
    check_finite(name, tensor)
    yield from _sliced(tensor, slices)


def _sliced(tensor: Tensor, slices: Iterable[CheckpointSlice]) -> Iterator[tuple[str, Tensor]]:
    for part in slices:
        yield part.name, part.of(tensor.detach()).contiguous()


def _parts(packed: ops.PackedNVFP4, slices: Iterable[CheckpointSlice]) -> Iterator[tuple[str, Tensor]]:
    divisor = packed.global_scale.reciprocal()
    for part in slices:
        codes, scale, global_scale = packed_names(part.name)
        yield codes, part.of(packed.packed).contiguous()
        yield scale, part.of(packed.scale).contiguous()
        yield global_scale, (divisor if part.index is None else divisor[part.index]).reshape(-1)


class QATQuantizer:
    """Turns a stream of full tensors into the stream of packed ones, holding one fusion group at a time.

    Args:
        config: what stays unquantized, and the policy of the global scale.
        plan: the plan of the model the tensors come from. Without one each tensor is decided by its name and shape
            (`nvfp4_qat.classify`): possible for checkpoint names of known layers, else an error asks for the plan.
        layout: names and shapes of what comes out, as in `packed_weights`; "fused" needs a plan.
    """

    def __init__(self, config: QATConfig, plan: QuantPlan | None = None, layout: Layout = "checkpoint") -> None:
        QATConfig.check(config)
        _check_layout(layout)
        if layout == "fused" and plan is None:
            raise UserError('layout "fused" needs a plan: pass plan=QuantPlan.from_model(model, config)')
        if plan is not None and plan.config.global_scale != config.global_scale:
            raise UserError(
                f"the config says global_scale={config.global_scale!r}, the plan {plan.config.global_scale!r}: "
                "pass the config the plan was made with"
            )
        self.config, self.plan, self.layout = config, plan, layout

    def quantize(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pack what is 4-bit and pass everything else on.

        A weight that shares its global scale with siblings (q/k/v, gate/up) waits for the last of them. Adapters and
        second names of tied parameters are left out.

        Args:
            named_tensors: full tensors of any floating dtype, on any device, under names of the model (wrappers'
                components are removed) or, experts one by one, of its checkpoint. The stream need not hold the whole
                model.

        Yields:
            Name and tensor on the device of the input. What is not quantized keeps its dtype and may share memory with
            it.

        Raises:
            UserError: an unknown name; one that comes twice; another shape than planned; a sharded tensor; NaN or Inf;
                a tensor that was overwritten while it waited for its siblings; siblings that never came.
        """
        resolver = _PlannedNames(self.plan, self.layout) if self.plan is not None else _KnownNames(self.config)
        arrived: set[str] = set()
        waiting: dict[str, dict[str, _Waiting]] = {}
        for raw, tensor in named_tensors:
            name = canonical_name(raw)
            check_full(name, tensor)
            target = resolver.find(name, tuple(tensor.shape))
            if target is None:
                continue
            for part in target.slices:
                if part.name in arrived:
                    raise UserError(f"{name} came twice in the stream")
                arrived.add(part.name)
            if target.group is None:
                yield from _passed(name, tensor, target.slices)
                continue
            group = waiting.setdefault(target.group, {})
            group[target.member] = _Waiting(name, target, tensor)
            if len(group) == len(target.members):
                yield from self._pack(list(waiting.pop(target.group).values()))
        if waiting:
            raise UserError("the stream ended too early: " + "; ".join(_missing(group) for group in waiting.values()))

    def _pack(self, group: list["_Waiting"]) -> Iterator[tuple[str, Tensor]]:
        amaxes = []
        for member in group:
            member.check_unchanged()
            amaxes.append(ops.amax(member.tensor, member.target.batch_dims))
            ops.check_amax(amaxes[-1], member.name)
        together = torch.stack([amax.to(amaxes[0].device) for amax in amaxes]).amax(0)
        g = ops.global_scale(together, self.config.global_scale)
        for member in group:
            yield from _parts(ops.quantize(member.tensor, g), member.target.slices)


@dataclass(frozen=True)
class _Target:
    """What becomes of a tensor: its parts under the names they go out by; for a 4-bit one its group and all its
    members."""

    slices: tuple[CheckpointSlice, ...]
    group: str | None = None
    member: str = ""
    members: frozenset[str] = frozenset()
    batch_dims: int = 0


@dataclass(eq=False)
class _Waiting:
    """A tensor that waits for the rest of its fusion group."""

    name: str
    target: _Target
    tensor: Tensor
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        self._version = self._current()

    def _current(self) -> int:
        return -1 if self.tensor.is_inference() else self.tensor._version

    def check_unchanged(self) -> None:
        if self._current() != self._version:
            raise UserError(
                f"{self.name} was overwritten while it waited for the rest of its fusion group: pass copies of tensors "
                "whose memory is used again"
            )


def _missing(group: dict[str, _Waiting]) -> str:
    members = next(iter(group.values())).target.members
    return f"{', '.join(sorted(members - set(group)))} must come with {', '.join(group)}, whose global scale it shares"


class _KnownNames:
    """Targets by name and shape alone."""

    def __init__(self, config: QATConfig) -> None:
        self._config = config

    def find(self, name: str, shape: tuple[int, ...]) -> _Target | None:
        entry = classify_tensor(name, shape, self._config)
        if isinstance(entry, SkippedTensor):
            return None if entry.kind == "adapter" else _Target((CheckpointSlice(name),))
        members = frozenset(join(module, entry.param) for module in fusion_siblings(entry.module))
        return _Target(entry.checkpoint, entry.group, name, members)


class _PlannedNames:
    """Targets from a plan."""

    def __init__(self, plan: QuantPlan, layout: Layout) -> None:
        self._plan, self._layout = plan, layout
        self._groups = plan.groups()
        self._shapes = {e.name: e.shape for e in plan.quantized} | {e.name: e.shape for e in plan.skipped}
        self._left_out = {entry.name for entry in plan.skipped if entry.name not in plan.checkpoint_slices}

    @cached_property
    def _by_checkpoint_name(self) -> dict[str, tuple[str, CheckpointSlice]]:
        """Made when the first name comes that is not the model's own."""
        return {part.name: (name, part) for name, parts in self._plan.checkpoint_slices.items() for part in parts}

    def find(self, name: str, shape: tuple[int, ...]) -> _Target | None:
        if name in self._left_out:
            return None
        if name in self._plan.checkpoint_slices:
            return self._whole(name, shape, name)
        if name not in self._by_checkpoint_name:
            raise UserError(f"{name} is not in the plan: it is neither a tensor of the model nor one of its checkpoint")
        origin, part = self._by_checkpoint_name[name]
        if part.index is None and part.rows is None:
            return self._whole(origin, shape, name)
        if self._layout == "fused":
            raise UserError(f'{name} is a part of {origin}: layout "fused" needs the whole of it')
        if origin in self._shapes:
            _check_shape(name, shape, tuple(part.of(torch.empty(self._shapes[origin], device="meta")).shape))
        alone = (CheckpointSlice(name),)
        if origin not in self._plan:
            return _Target(alone)
        return self._expert(self._plan[origin], part, alone)

    def _whole(self, name: str, shape: tuple[int, ...], arrived_as: str) -> _Target:
        if name in self._shapes:
            _check_shape(arrived_as, shape, self._shapes[name])
        slices = output_slices(self._plan, name, self._layout)
        if name not in self._plan:
            return _Target(slices)
        entry = self._plan[name]
        members = frozenset(member.name for member in self._groups[entry.group])
        return _Target(slices, entry.group, name, members, entry.batch_dims)

    def _expert(self, entry: QuantizedTensor, part: CheckpointSlice, alone: tuple[CheckpointSlice, ...]) -> _Target:
        """One expert of a fused parameter: a 2-D weight whose siblings are the parts with the same global scale."""
        siblings = (other for member in self._groups[entry.group] for other in member.checkpoint)
        members = frozenset(other.name for other in siblings if other.index == part.index)
        return _Target(alone, f"{entry.group}[{part.index}]", part.name, members)


def _check_shape(name: str, shape: tuple[int, ...], planned: tuple[int, ...]) -> None:
    if shape != planned:
        raise UserError(f"{name} has shape {list(shape)}, the plan says {list(planned)}: pass the plan's model in full")


def _check_layout(layout: str) -> None:
    if layout not in ("checkpoint", "fused"):
        raise UserError(f'unknown layout {layout!r}: use "checkpoint" or "fused"')


def _receives(ranks: str | int) -> bool:
    """Whether this process is one of the receiving ranks."""
    if ranks == "all":
        return True
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 0 <= ranks < world:
        raise UserError(f'ranks must be "all" or one rank from 0 to {world - 1}, got {ranks!r}')
    return ranks == (torch.distributed.get_rank() if distributed else 0)
