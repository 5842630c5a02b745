"""What a training run leaves on disk, so that a kill at any moment loses nothing but time.

A step's numbers are appended to ``metrics-<arm>.jsonl`` as soon as they are known, and after some of the steps the
trainer's state is written to ``checkpoint-<arm>.pt``, always in this order. A checkpoint therefore never knows a step
whose numbers are lost. A resumed run cuts the metrics back to the checkpoint and computes the steps after it again;
they come out the same, because a step depends on the weights, the optimizer and its own number, and on nothing else
(but the machine and its number of threads, on which sums round differently).

Weights that a run keeps lie in ``weights-<arm>/step-<N>.safetensors``: those after N steps, by name.

Whole files are replaced atomically: written under another name, flushed to the disk, renamed. Ctrl-C waits until a step
is recorded.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .damaged import read_saved
from .errors import MismatchError
from .interrupts import held_back
from .jsonl import Row, append_rows, read_rows

__all__ = ["ArmLog", "Row", "kept_weights", "load_kept", "replace_file", "save_file"]


class ArmLog:
    """The files of one arm: metrics, TensorBoard events and the checkpoint.

    Args:
        out: the run's directory.
        arm: the arm's name.
        checkpoint_seconds: least time between two checkpoints; 0 writes one after every step.

    Raises:
        UserError: the metrics hold a line that is no row; a last one that was torn is computed again.
    """

    def __init__(self, out: Path, arm: str, checkpoint_seconds: float) -> None:
        self._metrics = out / f"metrics-{arm}.jsonl"
        self._checkpoint = out / f"checkpoint-{arm}.pt"
        self._events = out / "tensorboard" / arm
        self._weights = out / f"weights-{arm}"
        self._checkpoint_seconds = checkpoint_seconds
        self._checkpointed = time.monotonic()
        self._writer: Any = None
        self.rows = read_rows(self._metrics)

    def resume(self, steps: int) -> Mapping[str, Any] | None:
        """Return the state to continue from, and forget the metrics of later steps.

        Args:
            steps: the steps the arm is to have in the end.

        Returns:
            What `step` saved, with the number of finished steps under ``"step"``; None to start from the beginning, or
            if the arm is finished.

        Raises:
            UserError: the checkpoint is damaged. Nothing has been forgotten then.
        """
        for leftover in self._checkpoint.parent.glob(f".{self._checkpoint.name}.*.part"):
            leftover.unlink()
        state = None
        if len(self.rows) < steps:
            if self._checkpoint.exists():
                state = read_saved(self._checkpoint, {"step", "optimizer"}, "delete it; the arm begins anew")
            if state is not None and state["step"] > len(self.rows):  # someone removed lines
                state = None
            start = int(state["step"]) if state is not None else 0
            self.rows = self.rows[:start]
            replace_file(self._metrics, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return state

    def step(self, row: Row, state: Mapping[str, Any]) -> None:
        """Record a finished step.

        Args:
            row: its metrics; ``"step"`` counts from 0.
            state: what to continue from, tensors and plain containers; saved if the last checkpoint is old enough.
        """
        with held_back():
            self.rows.append(row)
            append_rows(self._metrics, [row])
            self._write_events(row)
            if time.monotonic() - self._checkpointed >= self._checkpoint_seconds:
                save_file(self._checkpoint, {**state, "step": len(self.rows)})
                self._checkpointed = time.monotonic()

    def keep(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Keep a copy of the weights after so many steps, where `kept_weights` finds it."""
        self._weights.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        replace_file(self._weights / f"step-{step}.safetensors", safetensors.torch.save(tensors))

    def finish(self) -> None:
        """Close the files of an arm that has all its steps; its checkpoint is of no more use."""
        self.close()
        self._checkpoint.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_events(self, row: Row) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events of steps that are computed again after a kill are hidden by purge_step.
            self._writer = SummaryWriter(str(self._events), purge_step=row["step"])
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()


def kept_weights(out: Path, arm: str) -> dict[int, Path]:
    """The weights that an arm has kept: files by the number of steps they were trained for, in this order."""
    found = {int(path.stem.removeprefix("step-")): path for path in (out / f"weights-{arm}").glob("step-*.safetensors")}
    return dict(sorted(found.items()))


def load_kept(model: nn.Module, weights: Path | Mapping[str, Tensor]) -> None:
    """Give a model the weights that a run has kept.

    Args:
        model: of the architecture that was trained, after `apply_qat` or not; changed in place.
        weights: a file of `kept_weights`, or what is in one.

    Raises:
        MismatchError: they are another model's. What they share with it has been loaded.
    """
    tensors = safetensors.torch.load_file(weights) if isinstance(weights, Path) else weights
    found = model.load_state_dict(dict(tensors), strict=False)
    state = model.state_dict(keep_vars=True)
    held = {tensor.data_ptr() for name, tensor in state.items() if name in tensors}
    # A tied weight is kept under one of its names.
    missing = [name for name in found.missing_keys if state[name].data_ptr() not in held]
    if missing or found.unexpected_keys:
        listing = ", ".join([*missing, *found.unexpected_keys])
        raise MismatchError(f"the weights are another model's; missing or unknown: {listing}")


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file so that a reader, or a run after a kill, sees either the old one or the new one."""
    with _replacing(path) as file:
        file.write(data)


def save_file(path: Path, state: Mapping[str, Any]) -> None:
    """`torch.save` with the guarantee of `replace_file`; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        torch.save(dict(state), file)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    # The process's number keeps two runs apart that warm up the same model in the same cache.
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with held_back():
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
