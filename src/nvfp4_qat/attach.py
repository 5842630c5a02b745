"""`attach`: prepare a model for gather mode before ``fully_shard``, and the hooks that keep it prepared.

Hooks on each quantized module see to it that state dicts hold plain tensors (a checkpoint loads without this package)
and that loaded ones are gathered in 4 bits again, also after ``load_state_dict(assign=True)``. One hook on the model
refuses a forward in which some weight would be used unquantized, and those on all `torch.optim` optimizers tell that
weights changed. What packing left to be looked at (`Gather.settle`) is, at the latest, at a forward's end and before a
step.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .adapters import mark_gathered
from .fsdp import ShardedMaster, plain_tensor
from .gather import Gather, GatherWeight
from .naming import canonical_name
from .plan import QuantPlan


def attach(model: nn.Module, plan: QuantPlan, keep: bool = False) -> Gather:
    """Put a `ShardedMaster` in the place of every planned parameter.

    Args:
        model: not sharded yet. Its planned parameters become new objects: make the optimizer after ``fully_shard``.
        plan: what is 4-bit.
        keep: whether gathered bytes are kept until the optimizer's step.
    """
    gather = Gather(model, plan, keep)
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    replaced: dict[int, nn.Parameter] = {}
    for weight in gather.weights.values():
        module = modules[weight.entry.module]
        old = module._parameters[weight.entry.param]
        assert old is not None
        replaced[id(old)] = _wrap(old, weight)
        _register_hooks(module, weight)
        mark_gathered(module)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in replaced:  # wherever it is tied to
                module._parameters[name] = replaced[id(parameter)]
    model.register_forward_pre_hook(_before_forward)
    model.register_forward_hook(_after_forward)
    model._nvfp4_gather = gather  # type: ignore[assignment]
    _attached.add(gather)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_optimizer_step))
        _hooks.append(register_optimizer_step_post_hook(_after_optimizer_step))
    return gather


def _wrap(parameter: Tensor, weight: GatherWeight) -> nn.Parameter:
    new = nn.Parameter(ShardedMaster(parameter.detach(), weight), requires_grad=parameter.requires_grad)
    new.__dict__.update({k: v for k, v in parameter.__dict__.items() if not k.startswith("_")})
    return new


def _register_hooks(module: nn.Module, weight: GatherWeight) -> None:
    name = weight.entry.param

    def plain(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # else keep_vars: the parameter itself
            current = module._parameters[name]
            # Of the parameter itself: what was made of it for the state dict has a version counter of its own.
            state[prefix + name] = given = plain_tensor(current if current is not None else value)
            weight.gather.hand_out(weight, given)

    def loaded(module: nn.Module, incompatible: Any) -> None:
        current: Any = module._parameters[name]
        if isinstance(current, DTensor):
            if not isinstance(current._local_tensor, ShardedMaster):  # load_state_dict(assign=True)
                current._local_tensor = ShardedMaster(current._local_tensor, weight)
        elif current is not None and not isinstance(current, ShardedMaster):
            module._parameters[name] = _wrap(current, weight)
        weight.note()

    module.register_state_dict_post_hook(plain)
    module.register_load_state_dict_post_hook(loaded)


def _before_forward(module: nn.Module, args: Any) -> None:
    gather = module.__dict__.get("_nvfp4_gather")
    if isinstance(gather, Gather) and not torch.compiler.is_compiling():
        gather.check_sharded()


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    gather = module.__dict__.get("_nvfp4_gather")
    if isinstance(gather, Gather) and not torch.compiler.is_compiling():
        gather.settle()


def _before_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not all(gather.settled for gather in _attached):
        for gather in {weight.gather for weight in _trained(optimizer)}:
            gather.settle()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for gather in GatherWeight.note_all(_trained(optimizer)):
        gather.after_step()


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[GatherWeight]:
    """The gathered weights that an optimizer changes: not the base of LoRA, given to it with all the rest."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shard = getattr(parameter, "_local_tensor", None) if parameter.requires_grad else None
            if isinstance(shard, ShardedMaster) and isinstance(shard.weight, GatherWeight):
                yield shard.weight


_hooks: list[Any] = []
_attached: "weakref.WeakSet[Gather]" = weakref.WeakSet()
