"""A run's files, read back: ``summary.json`` and ``metrics-<arm>.jsonl`` (one object a step), from `nvfp4_qat.rl`.

Either may be incomplete. A run that was interrupted, or killed inside a line, still has something to say: a missing
value is NaN here and not an error; only a directory without any run is one.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .jsonl import read_rows

K3_KL = "rollout_corr/k3_kl"
ABS_DIFF = "rollout_corr/logprob_abs_diff"
REWARD = "reward"
SYNC_BYTES = "sync_bytes"
SYNC_SECONDS = "sync_seconds"
SYNC_VERSION = "sync_version"
FLIPPED_CODES = "flips/codes"

ARMS = {
    "bf16": "Trained in bf16, sampled in bf16. Nothing is quantized. The KL that is left comes from two programs that "
    "compute with the same weights in different ways: the floor. A ratio a little below 1 is chance, as the arms' "
    "policies drift apart.",
    "noqat": "Trained in bf16, sampled from NVFP4 weights. The sampler rounds to 4 bits and the trainer does not know.",
    "qat": "NVFP4 on both sides: the trainer's forward uses the values of the very bytes it sends to the sampler, and "
    "the gradient goes straight through to the master weights.",
    "qat-ffn": "As qat, with the attention layers left in bf16 on both sides.",
}
"""What each arm is, in the order in which they are shown."""


@dataclass(frozen=True)
class Arm:
    """One arm's steps, and its entry in the summary (empty where the run did not get that far)."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]

    def column(self, key: str) -> list[float]:
        """One value per step, NaN where it is missing."""
        return [number(row.get(key)) for row in self.rows]

    def mean(self, key: str, summary_key: str) -> float:
        """The summary's value, or the mean over the steps there are."""
        value = number(self.summary.get(summary_key))
        return value if known(value) else mean_of(self.column(key))

    @property
    def k3_kl(self) -> float:
        return self.mean(K3_KL, "k3_kl_mean")

    @property
    def sync_bytes(self) -> float:
        return self.mean(SYNC_BYTES, "sync_bytes")

    @property
    def sync_seconds(self) -> float:
        """Median; NaN of an engine that does not tell."""
        told = [value for value in self.column(SYNC_SECONDS) if known(value)]
        return statistics.median(told) if told else math.nan

    @property
    def sync_version(self) -> float:
        """The last one; NaN of an engine that does not count."""
        return self.column(SYNC_VERSION)[-1] if self.rows else math.nan

    @property
    def flipped_codes(self) -> float:
        return mean_of(self.column(FLIPPED_CODES))

    def reward(self, quarter: str) -> float:
        """Mean reward of the ``"first"`` or ``"last"`` quarter of the steps."""
        value = number(self.summary.get(f"reward_{quarter}"))
        if known(value):
            return value
        rewards = self.column(REWARD)
        length = max(len(rewards) // 4, 1)
        return mean_of(rewards[:length] if quarter == "first" else rewards[-length:])


@dataclass(frozen=True)
class Run:
    """Everything the report shows."""

    arms: Sequence[Arm]
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def k3_ratio(self, above: str, below: str) -> float:
        """Mean k3 KL of one arm over another's; NaN if either is not there."""
        a, b = self[above], self[below]
        return a.k3_kl / b.k3_kl if a and b and b.k3_kl > 0 else math.nan

    @property
    def note(self) -> str:
        """What the run says must be known about its model; may be empty."""
        note = self.summary.get("note")
        return note if isinstance(note, str) else ""

    @property
    def warning(self) -> str:
        """What a reader must know before comparing numbers of an incomplete run; empty if it is complete."""
        steps = {arm.name: len(arm.rows) for arm in self.arms}
        planned = number(self.summary.get("steps"))
        complete = len(set(steps.values())) == 1 and not any(n < planned for n in steps.values())
        if complete and not self.summary.get("interrupted"):
            return ""
        done = ", ".join(f"{name} {n}" for name, n in steps.items())
        goal = f" of {planned:.0f}" if known(planned) else ""
        return f"This run is not complete. Steps finished{goal}: {done}. Means are over the steps of each arm."


def load_run(folder: Path) -> Run:
    """Read a run's files; see `nvfp4_qat.report.write_report` for what raises."""
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}; give the --out of a run of nvfp4-qat demo")
    files = {p.name.removeprefix("metrics-").removesuffix(".jsonl"): p for p in folder.glob("metrics-*.jsonl")}
    rows = {name: [{"step": i, **row} for i, row in enumerate(read_rows(path))] for name, path in files.items()}
    summary = read_summary(folder)
    entries = summary.get("arms", {})
    names = {name for name, r in rows.items() if r} | set(entries)
    if not names:
        raise UserError(f"{folder} holds no finished step (no metrics-<arm>.jsonl); run nvfp4-qat demo --out {folder}")
    order = {name: i for i, name in enumerate(ARMS)}
    ordered = sorted(names, key=lambda name: (order.get(name, len(order)), name))
    return Run([Arm(n, rows.get(n, []), entries.get(n) or {}) for n in ordered], summary)


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``summary.json`` of the run in a directory holds; nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        summary: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path} is not JSON ({error}): delete it; the metrics alone will do") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("arms", {}), dict):
        raise UserError(f"{path} is not the summary of a run: delete it; the metrics alone will do")
    return summary


def number(value: Any) -> float:
    """A number out of a file; NaN if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def known(value: float) -> bool:
    """Whether a number is there; infinity is one, an overflow must show."""
    return not math.isnan(value)


def mean_of(values: Sequence[float]) -> float:
    """Mean of the values that are there, NaN without any."""
    there = [v for v in values if known(v)]
    return sum(there) / len(there) if there else math.nan
