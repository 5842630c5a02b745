"""What a warm-up that is under way leaves on disk, beside the file that it will end in: ``<name>.partial``.

It holds the number of finished steps and the optimizer, whose masters the model's weights follow from; it is written
now and then and on Ctrl-C, and is gone at the end. What cannot be read, or belongs to another warm-up, is not used.
"""

import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .damaged import read_saved
from .errors import UserError
from .masters import MasterAdamW
from .runlog import save_file
from .tensor_digest import digest


class Partial:
    """The file of a warm-up that is under way.

    Args:
        path: of the finished warm-up; its name says what the weights follow from.
        optimizer: with the first weights. It is given those of the file if there is one.
        seconds: least time between two writes.
    """

    def __init__(self, path: Path, optimizer: MasterAdamW, seconds: float) -> None:
        self._path, self._of = partial_file(path), path.name
        self._optimizer, self._seconds = optimizer, seconds
        self._torn = False
        self.done = self._load()
        """Steps that are finished."""
        self._saved = time.monotonic()

    def _load(self) -> int:
        if not self._path.is_file():
            return 0
        state: dict[str, Any] | None = None
        with suppress(UserError):
            state = read_saved(self._path, {"of", "step", "optimizer", "digest"}, "")
        # torch.load does not look at checksums: without one of our own a damaged block would become weights.
        if state is None or state["of"] != self._of or state["digest"] != _digest(state["step"], state["optimizer"]):
            warnings.warn(f"{self._path} is damaged or another warm-up's: beginning anew", stacklevel=2)
            return 0
        self._optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Around the optimizer's step; writes the file afterwards if the last time is long ago."""
        self._torn = True
        yield
        self.done = step + 1
        self._torn = False
        if time.monotonic() - self._saved >= self._seconds:
            self._save()

    @contextmanager
    def saved_on_interrupt(self) -> Iterator[None]:
        """Write the file on Ctrl-C. Within an update there is nothing whole to write: the last file stays."""
        try:
            yield
        except KeyboardInterrupt:
            if self.done and not self._torn:
                self._save()
            raise

    def _save(self) -> None:
        state = self._optimizer.state_dict()
        about = {"of": self._of, "step": self.done, "digest": _digest(self.done, state)}
        save_file(self._path, {**about, "optimizer": state})
        self._saved = time.monotonic()


def partial_file(path: Path) -> Path:
    """Where a warm-up keeps what it has, until it is in ``path``."""
    return path.with_name(f"{path.name}.partial")


def _digest(step: int, optimizer: Mapping[str, Any]) -> str:
    """Of all that a warm-up continues from: the number of steps and the state of a `MasterAdamW`."""
    adamw = optimizer["adamw"]
    tensors = {f"{i}/{name}": tensor for i, state in adamw["state"].items() for name, tensor in state.items()}
    tensors |= {str(i): master for i, master in enumerate(optimizer["masters"])}
    return hashlib.sha256(f"{step} {adamw['param_groups']} {digest(tensors)}".encode()).hexdigest()
