"""`Checks`: what packing finds, looked at when that costs nothing. Not in use yet (`deferring`).

Packing has to tell that a weight holds NaN. A host that waits for the GPU to know has no lead when the forward goes on,
and small batches then wait for Python. So the numbers could travel while training goes on, and be looked at before the
next optimizer step. Missing for that: checks before the next forward too (a loop may skip steps whose loss is not
finite, and `torch.optim` steps with a closure run the forward themselves), one order of checks on all ranks whatever
optimizer steps, weak references, and errors that stay until a packing passes.
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import UserError

MANY = 1000
"""Checks of a model that wait at most: an optimizer that is not of `torch.optim` announces no step."""


class ToHost:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> Tensor:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def deferring(device: torch.device) -> bool:
    """Whether what is packed on this device is looked at later."""
    return False


class Checks:
    """The checks of one model that are still to be made."""

    _all: ClassVar["weakref.WeakSet[Checks]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self._waiting: list[tuple[ToHost, Callable[[Tensor], None]]] = []
        self._failed = False

    def may_wait(self, device: torch.device) -> bool:
        """Whether a check may be made later. Asked for before gradients are switched off to pack."""
        return deferring(device) and torch.is_grad_enabled() and not self._failed

    def later(self, values: Tensor, check: Callable[[Tensor], None]) -> None:
        """Have ``check`` called with the values on the host; it raises `UserError`."""
        if len(self._waiting) >= MANY:
            self.now()
        self._waiting.append((ToHost(values), check))
        self._all.add(self)

    def passed(self) -> None:
        """A check made right away has passed."""
        self._failed = False

    def now(self) -> None:
        """Make all checks; raise the first error."""
        waiting, self._waiting = self._waiting, []
        self._all.discard(self)
        errors: list[UserError] = []
        for values, check in waiting:
            try:
                check(values.wait())
            except UserError as error:
                errors.append(error)
        if errors:
            self._failed = True
            raise errors[0]

    @classmethod
    def before_optimizer_step(cls, *_: Any) -> None:
        """Optimizer pre-step hook: an error keeps the optimizer from stepping."""
        for checks in list(cls._all):
            checks.now()
