"""`QATParameter`: a master weight that notes every write PyTorch's version counter does not see.

Notes are ticks of one clock for the whole process. Counters that start at zero in every parameter would not do: an
object, its address and its version number may all recur when a parameter is replaced by another one.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

_clock = itertools.count(1)


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
        self._maybe_written = next(_clock)  # the caller may write into the alias it gets
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        self._written = next(_clock)
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def note(self, certain: bool) -> None:
        """Record that the weight was written, or that it may have been."""
        if certain:
            self._written = next(_clock)
        else:
            self._maybe_written = next(_clock)

    def notes(self) -> tuple[int, int]:
        """When it may have been written, and when it was. A new object, a copy for instance, counts as written."""
        if "_written" not in self.__dict__:
            self._written = next(_clock)
        return self._maybe_written, self._written


def check_adoptable(parameter: nn.Parameter | None, name: str) -> None:
    """Raise `UserError` if module mode cannot quantize a parameter of this type."""
    if type(parameter) not in (nn.Parameter, QATParameter):
        found = "no longer a parameter" if parameter is None else f"a {type(parameter).__name__}"
        raise UserError(
            f"{name} is {found}: module mode needs plain parameters (one GPU, or DDP around the model). Sharded, "
            "parametrized or otherwise wrapped ones are not supported."
        )


def adopt(parameter: nn.Parameter | None, name: str) -> QATParameter:
    """Turn a plain parameter into a `QATParameter` without changing its identity (optimizers may hold it already)."""
    check_adoptable(parameter, name)
    if type(parameter) is nn.Parameter:
        parameter.__class__ = QATParameter
        parameter.note(certain=True)  # type: ignore[attr-defined]
    assert isinstance(parameter, QATParameter)
    return parameter


def after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Optimizer post-step hook: what the optimizer owns has changed, unless it had no gradient.

    An optimizer that keeps its gradients elsewhere (fp32 masters) still writes, so those are looked at again too.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, QATParameter):
                parameter.note(certain=parameter.grad is not None)
