"""`apply_qat`: from a model and a config to a model that trains through 4-bit weights, and the plan of what is 4-bit.

The plan is made first and everything else follows it: which modules change, which weights share a global scale, what
the exporter writes. It stays on the model (`qat_plan`), so that nothing downstream decides for itself what is
quantized.
"""

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters import check_adapters, check_methods
from .batch import Family
from .config import QATConfig
from .errors import MismatchError, StaleWeightsError, UserError
from .experts import to_qat_experts
from .fusion import FusionGroup, Packing
from .linear import to_qat_linear
from .ops import PackedNVFP4
from .parameter import check_adoptable, is_dtensor
from .plan import QuantizedTensor, QuantPlan, canonical_name
from .qat_module import QATModule, fusion_groups, packed_weights_of
from .state import PackedWeight

if TYPE_CHECKING:
    from .gather import Gather


def apply_qat(model: nn.Module, config: QATConfig, gather: str | None = None, keep_gathered: bool = False) -> QuantPlan:
    """Make a model train through NVFP4 weights, in place.

    Module mode (``gather=None``): each planned `nn.Linear` becomes a `QATLinear` and each fused experts module a
    `QATExperts`. Parameters keep their identity, names, dtype and device, so an optimizer made before or after works
    and the state dict does not change. Call it after PEFT adapters are attached (or before) and before DDP or FSDP
    wraps the model.

    Gather mode (``gather="nvfp4"``): modules stay as they are, and FSDP2 gathers the planned weights in 4 bits
    (`nvfp4_qat.gather`). Call it before ``fully_shard``, and make the optimizer after that.

    Args:
        model: a model on any device; on ``meta`` the weights may be loaded later.
        config: what to quantize and how. With ``enable=False`` the model is left as it is, with a warning.
        gather: None or "nvfp4".
        keep_gathered: in gather mode, gather packed weights once per optimizer step, and keep them on every rank until
            then: 4.5 bits for each weight of the model. For slow links and gradient accumulation.

    Returns:
        The plan: every 4-bit tensor with its fusion group, every other one with the reason.

    Raises:
        UserError: QAT was applied already, the config does not fit the model, parameters are in fp16, an adapter
            computes with a weight that would be 4-bit, or nothing is left to quantize. The model is unchanged then.
    """
    if gather not in (None, "nvfp4"):
        raise UserError(f'unknown gather={gather!r}: use "nvfp4" (FSDP2 gathers packed weights) or leave it out')
    if keep_gathered and gather is None:
        raise UserError(
            'keep_gathered is for gather mode: apply_qat(model, config, gather="nvfp4", keep_gathered=True)'
        )
    if any(isinstance(m, QATModule) or "_nvfp4_plan" in m.__dict__ for m in model.modules()):
        raise UserError("apply_qat was called on this model before: apply it once, to the model as it was loaded")
    plan = QuantPlan.from_model(model, config)
    if not config.enable:
        warnings.warn("QATConfig.enable is False: the model trains without quantization", stacklevel=2)
        return plan
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    for entry in plan.quantized:
        _check_module(entry, modules[entry.module])
    _check_dtypes(model)
    check_methods(model, (modules[entry.module] for entry in plan.quantized))
    if gather is not None:
        from .attach import attach  # needs torch.distributed

        attach(model, plan, keep_gathered)
    else:
        _convert_modules(plan, modules)
    check_adapters(model)
    model._nvfp4_plan = plan  # type: ignore[assignment]
    return plan


def _convert_modules(plan: QuantPlan, modules: dict[str, nn.Module]) -> None:
    by_module: dict[str, dict[str, PackedWeight]] = defaultdict(dict)
    family = Family()
    for group_name, members in plan.groups().items():
        group = FusionGroup(group_name, plan.config.global_scale, family)
        for entry in members:
            by_module[entry.module][entry.param] = PackedWeight(entry.name, group, entry.batch_dims)
    for name, weights in by_module.items():
        module = modules[name]
        if isinstance(module, nn.Linear):
            to_qat_linear(module, weights["weight"])
        else:
            to_qat_experts(module, weights)
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_no_fast_path)


def _check_module(entry: QuantizedTensor, module: nn.Module) -> None:
    """Everything that could stop a conversion, before the first module is converted."""
    if entry.kind == "linear" and type(module) is not nn.Linear:
        raise UserError(f"{entry.module} is a {type(module).__name__}: apply_qat comes before sharding")
    if "forward" in vars(module):
        raise UserError(
            f"{entry.module} has a forward of its own (accelerate's device_map, or a patch), which would bypass QAT: "
            "call apply_qat first, or remove_hook_from_submodules(model) before it"
        )
    parameter = module._parameters.get(entry.param)
    if parameter is not None and is_dtensor(parameter):
        raise UserError(
            f"{entry.name} is sharded already (a DTensor): call apply_qat before fully_shard. Tensor and expert "
            "parallelism are not supported yet: they may split the dimension along which blocks of 16 share a scale."
        )
    check_adoptable(parameter, entry.name)


def _check_dtypes(model: nn.Module) -> None:
    """Raise `UserError` for fp16 parameters: engines and checkpoints hold bf16, which would round them."""
    names = [canonical_name(name) for name, p in model.named_parameters() if p.dtype == torch.float16]
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise UserError(
            f"{len(names)} parameters are in fp16 ({some}); checkpoints and engines hold bf16, which would round what "
            "is not quantized. Load the model in bf16 or fp32."
        )


def _no_fast_path(*_: object) -> None:
    """Does nothing. With a hook, nn.TransformerEncoderLayer calls its layers instead of reading their weights."""


def qat_plan(model: nn.Module) -> QuantPlan:
    """The plan `apply_qat` left on a model; wrappers around the model (DDP, PEFT, compile) are looked through.

    Raises:
        UserError: `apply_qat` was not called on it.
    """
    for module in model.modules():
        plan = module.__dict__.get("_nvfp4_plan")
        if isinstance(plan, QuantPlan):
            return plan
    raise UserError("this model has no quantization plan: call nvfp4_qat.apply_qat(model, config) first")


def refresh(model: nn.Module) -> None:
    """Pack every quantized weight now, whether or not a change was noticed. Collective in gather mode.

    Needed only after weights were written in a way PyTorch cannot see (an optimizer outside `torch.optim` that writes
    to raw memory); otherwise the next forward, sync or export does it by itself.
    """
    qat_plan(model)
    if (gather := _gather_of(model)) is not None:
        gather.check_modules(model)
        return gather.refresh()
    for group in fusion_groups(model):
        if group.window is not None:
            group.note(certain=False)  # the next forward sees the weights in full
        else:
            group.commit(group.pack(), certain=False)


def _gather_of(model: nn.Module) -> "Gather | None":
    """What runs gather mode; looked for only where it has been used, because it needs torch.distributed."""
    module = sys.modules.get("nvfp4_qat.gather")
    return module.gather_of(model) if module is not None else None


def pack_from_masters(model: nn.Module) -> Iterator[tuple[QuantizedTensor, PackedNVFP4]]:
    """Pack every quantized weight again from its master, one fusion group at a time, as it is at the time of this call.

    What sync, save and export send. It never trusts the copy that training reads: where no change was noticed since
    that copy was made and the bytes differ all the same, training has computed with stale weights, and that is an
    error.

    Args:
        model: a model after `apply_qat`.

    Yields:
        The plan's entries, in its order up to regrouping, each with newly allocated packed tensors.

    Raises:
        StaleWeightsError: names every weight that changed unnoticed. Raised before the first of them is yielded.
        MismatchError: quantized modules were replaced or doubled since `apply_qat`; while iterating, a weight that is
            yet to come was written since this call.
    """
    plan = qat_plan(model)
    check_adapters(model)
    _check_coverage(plan, [weight.name for weight in packed_weights_of(model)])
    return _packed(plan, [(group, group.stale(), group.written()) for group in fusion_groups(model)])


def _packed(
    plan: QuantPlan, groups: Sequence[tuple[FusionGroup, bool, list[Any]]]
) -> Iterator[tuple[QuantizedTensor, PackedNVFP4]]:
    """The groups packed anew; of each whether a change had been noticed, and what told of writes, at the beginning."""
    for i, (group, noticed, written) in enumerate(groups):
        packed, stale = _pack_checked(group, noticed)
        if group.written() != written:
            raise MismatchError.while_read()
        if stale:
            stale += [name for later, known, _ in groups[i + 1 :] for name in _pack_checked(later, known)[1]]
            raise StaleWeightsError.of(stale)
        for member, value, _ in packed:
            yield plan[member.name], value


def _check_coverage(plan: QuantPlan, live: list[str]) -> None:
    """Raise if the model does not quantize exactly what the plan says, each weight once."""
    count = Counter(live)
    wrong = [f"{e.name}: its module was replaced after apply_qat" for e in plan.quantized if e.name not in count]
    wrong += [f"{name}: exists {n} times (an adapter's modules_to_save?)" for name, n in count.items() if n > 1]
    wrong += [f"{name}: not in the plan" for name in count if name not in plan]
    if wrong:
        raise MismatchError(
            "the model no longer quantizes what its plan says: "
            + "; ".join(wrong)
            + ". Change modules before apply_qat, or "
            "add them to ignore_patterns."
        )


def _pack_checked(group: FusionGroup, noticed: bool) -> tuple[list[Packing], list[str]]:
    """The group packed anew, and the names of members that changed unnoticed.

    Where a change was noticed the copy that training reads had to be made again anyway: it is, with all others that
    changed, and copied.
    """
    if noticed and (copies := group.copies()) is not None:
        return copies, []
    packed = group.pack()
    return packed, [] if noticed else [member.name for member, new, _ in packed if not member.agrees(new)]
