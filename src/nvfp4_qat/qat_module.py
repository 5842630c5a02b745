"""`QATModule`: what quantized modules have in common, and the hooks that tell their weights of writes."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .adapters import guard
from .fusion import FusionGroup
from .parameter import around_optimizer_step
from .state import PackedWeight


class QATModule(nn.Module):
    """What quantized modules have in common: their packed weights, found again after copying and unpickling."""

    _qat_weights: dict[str, PackedWeight]
    _qat_handles: dict[str, Tensor]

    def _bind_qat(self, weights: dict[str, PackedWeight]) -> None:
        _install_hooks()
        self._qat_weights = weights
        self._qat_handles = {name: weight.bind(self, name) for name, weight in weights.items()}
        for weight in weights.values():
            weight.master()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # New objects: those in `state` may be the ones of a module that is still in use (copy.copy).
        self._bind_qat({n: PackedWeight(w.name, w.group, w.batch_dims) for n, w in self._qat_weights.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        weight = self.__dict__.get("_qat_weights", {}).get(name)
        if weight is not None and (value is None or isinstance(value, Tensor)):
            weight.assigned(self, value)
            if isinstance(value, nn.Parameter) and name in self._parameters and name not in self.__dict__:
                self._parameters[name] = value  # FSDP2 does this twice in every window
                return
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight in self._qat_weights.values():
            weight.moved()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._note(certain=True)

    def _save_to_state_dict(self, *args: Any) -> None:
        super()._save_to_state_dict(*args)
        self._note(certain=False)

    def _note(self, certain: bool) -> None:
        for weight in self._qat_weights.values():
            weight.note(certain)


def packed_weights_of(model: nn.Module) -> Iterator[PackedWeight]:
    """Every packed weight of a model, in module order."""
    for module in model.modules():
        if isinstance(module, QATModule):
            yield from module._qat_weights.values()


def fusion_groups(model: nn.Module) -> list[FusionGroup]:
    """The groups of a model's packed weights, in module order."""
    return list(dict.fromkeys(weight.group for weight in packed_weights_of(model)))


_hooks: list[Any] = []


def _install_hooks() -> None:
    """Once a process, when its first quantized module is made or unpickled."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(around_optimizer_step))
        _hooks.append(register_optimizer_step_post_hook(around_optimizer_step))
        _hooks.append(register_module_module_registration_hook(guard))
