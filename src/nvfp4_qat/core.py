"""`apply_qat`: from a model and a config to a model that trains through 4-bit weights, and the plan of what is 4-bit.

The plan is made first and everything else follows it: which modules change, which weights share a global scale, what
the exporter writes. It stays on the model (`qat_plan`), so that nothing downstream decides for itself what is
quantized.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator

from torch import nn

from .adapters import check_adapters
from .config import QATConfig
from .errors import MismatchError, StaleWeightsError, UserError
from .experts import to_qat_experts
from .linear import to_qat_linear
from .ops import PackedNVFP4
from .parameter import check_adoptable
from .plan import QuantizedTensor, QuantPlan, canonical_name
from .state import FusionGroup, PackedWeight, Packing, QATModule, packed_weights_of


def apply_qat(model: nn.Module, config: QATConfig, gather: str | None = None) -> QuantPlan:
    """Make a model train through NVFP4 weights, in place.

    Each planned `nn.Linear` becomes a `QATLinear` and each fused experts module a `QATExperts`. Parameters keep their
    identity, names, dtype and device, so an optimizer made before or after works and the state dict does not change.
    Call it after PEFT adapters are attached (or before) and before DDP wraps the model.

    Args:
        model: a model on any device; on ``meta`` the weights may be loaded later.
        config: what to quantize and how. With ``enable=False`` the model is left as it is, with a warning.
        gather: only None so far: module mode.

    Returns:
        The plan: every 4-bit tensor with its fusion group, every other one with the reason.

    Raises:
        UserError: QAT was applied already, the config does not fit the model, or nothing is left to quantize. The model
            is unchanged then.
    """
    if gather is not None:
        raise UserError(f"gather={gather!r} is not there yet: leave it out for module mode (one GPU or DDP)")
    if any(isinstance(m, QATModule) for m in model.modules()):
        raise UserError("apply_qat was called on this model before: apply it once, to the model as it was loaded")
    plan = QuantPlan.from_model(model, config)
    if not config.enable:
        warnings.warn("QATConfig.enable is False: the model trains without quantization", stacklevel=2)
        return plan
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    for entry in plan.quantized:
        _check_module(entry, modules[entry.module])
    by_module: dict[str, dict[str, PackedWeight]] = defaultdict(dict)
    for group_name, members in plan.groups().items():
        group = FusionGroup(group_name, config.global_scale)
        for entry in members:
            by_module[entry.module][entry.param] = PackedWeight(entry.name, group, entry.batch_dims)
    for name, weights in by_module.items():
        module = modules[name]
        if isinstance(module, nn.Linear):
            to_qat_linear(module, weights["weight"])
        else:
            to_qat_experts(module, weights)
    check_adapters(model)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_no_fast_path)
    model._nvfp4_plan = plan  # type: ignore[assignment]
    return plan


def _check_module(entry: QuantizedTensor, module: nn.Module) -> None:
    """Everything that could stop a conversion, before the first module is converted."""
    if entry.kind == "linear" and type(module) is not nn.Linear:
        raise UserError(f"{entry.module} is a {type(module).__name__}: apply_qat comes before sharding")
    if "forward" in vars(module):
        raise UserError(
            f"{entry.module} has a forward of its own (accelerate's device_map, or a patch), which would bypass QAT: "
            "call apply_qat first, or remove_hook_from_submodules(model) before it"
        )
    check_adoptable(module._parameters.get(entry.param), entry.name)


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
    """Pack every quantized weight now, whether or not a change was noticed.

    Needed only after weights were written in a way PyTorch cannot see (an optimizer outside `torch.optim` that writes
    to raw memory); otherwise the next forward, sync or export does it by itself.
    """
    qat_plan(model)
    for group in _groups(model):
        group.commit(group.pack(), certain=False)


def pack_from_masters(model: nn.Module) -> Iterator[tuple[QuantizedTensor, PackedNVFP4]]:
    """Pack every quantized weight again from its master, one fusion group at a time.

    What sync, save and export send. It never trusts the copy that training reads: where no change was noticed since
    that copy was made and the bytes differ all the same, training has computed with stale weights, and that is an
    error.

    Args:
        model: a model after `apply_qat`.

    Yields:
        The plan's entries, in its order up to regrouping, each with newly allocated packed tensors.

    Raises:
        StaleWeightsError: names every weight that changed unnoticed. Raised before the first of them is yielded.
        MismatchError: quantized modules were replaced or doubled since `apply_qat`.
    """
    plan = qat_plan(model)
    check_adapters(model)
    _check_coverage(plan, [weight.name for weight in packed_weights_of(model)])
    groups = list(_groups(model))
    for i, group in enumerate(groups):
        packed, stale = _pack_checked(group)
        if stale:
            stale += [name for later in groups[i + 1 :] for name in _pack_checked(later)[1]]
            raise StaleWeightsError(
                f"{len(stale)} weights changed without notice, so training used old 4-bit copies of them: "
                f"{', '.join(stale)}. Call nvfp4_qat.refresh(model) after every write that bypasses torch.optim and "
                "load_state_dict."
            )
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


def _pack_checked(group: FusionGroup) -> tuple[list[Packing], list[str]]:
    """The group packed anew, and the names of members that changed unnoticed."""
    noticed = group.stale()
    packed = group.pack()
    stale = [] if noticed else [member.name for member, new, _ in packed if not member.holds(new)]
    if noticed and all(member.fits(new) for member, new, _ in packed):
        group.commit(
            packed, certain=False
        )  # copies into the storages training reads, so the next forward need not pack
    return packed, stale


def _groups(model: nn.Module) -> Iterator[FusionGroup]:
    seen: set[int] = set()
    for weight in packed_weights_of(model):
        if id(weight.group) not in seen:
            seen.add(id(weight.group))
            yield weight.group
