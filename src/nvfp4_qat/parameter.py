"""`QATParameter`: a master weight that notes every write PyTorch's version counter does not see.

Notes are ticks of one clock for the whole process. Counters that start at zero in every parameter would not do: an
object, its address and its version number may all recur when a parameter is replaced by another one.

Optimizer steps are also noted for the process as a whole (`last_step`) and on what FSDP gives an optimizer instead of a
parameter (`stepped`): flat parameters (FSDP1) and DTensors (FSDP2).
"""

import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

_clock = itertools.count(1)
_last_step = 0


def tick() -> int:
    """A number larger than all before."""
    return next(_clock)


class QATParameter(nn.Parameter):
    """A parameter with two notes: when it was last written, and when it was last handed out so that it may have been.

    A plain parameter becomes one by `adopt`, in place.
    """

    _written: int
    _maybe_written = 0

    @property
    def data(self) -> Tensor:
        if torch.compiler.is_compiling():
            return self.detach()
        self._maybe_written = tick()  # the caller may write into the alias it gets
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        self._written = tick()
        for forget in _when_data_moves:
            forget()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def note(self, certain: bool) -> None:
        """Record that the weight was written, or that it may have been."""
        if certain:
            self._written = tick()
        else:
            self._maybe_written = tick()

    def notes(self) -> tuple[int, int]:
        """When it may have been written, and when it was. A new object, a copy for instance, counts as written."""
        if "_written" not in self.__dict__:
            self._written = tick()
        return self._maybe_written, self._written


# Optimizers choose their foreach implementation by the parameters' exact types.
_foreach = getattr(importlib.import_module("torch.optim.optimizer"), "_foreach_supported_types", None)
if isinstance(_foreach, list) and QATParameter not in _foreach:
    _foreach.append(QATParameter)


def check_adoptable(parameter: Tensor | None, name: str) -> None:
    """Raise `UserError` if module mode cannot quantize a parameter of this type."""
    if type(parameter) not in (nn.Parameter, QATParameter):
        found = "no longer a parameter" if parameter is None else f"a {type(parameter).__name__}"
        raise UserError(
            f"{name} is {found}: module mode needs plain parameters, or ones that FSDP sharded after apply_qat. "
            "Parametrized or otherwise wrapped ones are not supported."
        )


def adopt(parameter: nn.Parameter | None, name: str) -> QATParameter:
    """Turn a plain parameter into a `QATParameter` without changing its identity (optimizers may hold it already)."""
    check_adoptable(parameter, name)
    if type(parameter) is nn.Parameter:
        parameter.__class__ = QATParameter
        parameter.note(certain=True)  # type: ignore[attr-defined]
    assert isinstance(parameter, QATParameter)
    return parameter


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether a tensor is distributed, without importing what would tell if nobody else has."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def around_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Hook before and after an optimizer's step: what it owns changes, unless it has no gradient.

    Before as well, for who reads a weight before the hook after it has run: another hook, or anybody once a step has
    raised with some of its weights written.

    An optimizer that keeps its gradients elsewhere (fp32 masters) still writes, so weights without a gradient are
    looked at again too, but not frozen ones.
    """
    global _last_step
    _last_step = tick()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, QATParameter):
                if parameter.requires_grad or parameter.grad is not None:
                    parameter.note(certain=parameter.grad is not None)
            elif not (getattr(parameter, "_is_flat_param", False) or is_dtensor(parameter)):
                continue
            parameter.__dict__["_nvfp4_stepped"] = _last_step


def last_step() -> int:
    """When any optimizer last took a step."""
    return _last_step


def stepped(parameter: Tensor) -> int:
    """When an optimizer last took a step that owns a `QATParameter`, flat parameter or DTensor."""
    when: int = parameter.__dict__.get("_nvfp4_stepped", 0)
    return when


def when_data_moves(forget: Callable[[], None]) -> None:
    """Have a function called before any `QATParameter` gets other storage: drop references to the old one."""
    _when_data_moves.append(forget)


_when_data_moves: list[Callable[[], None]] = []
