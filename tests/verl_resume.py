"""A killed verl run goes on from its checkpoint: ``python tests/verl_resume.py ARM MODEL OUT [KEY=VALUE ...]``.

The run saves a checkpoint every other step. When one has been written, and a further step has been made, all of its
processes are killed. Then it is started again and must go on behind the checkpoint: the steps that run twice have the
same questions, the engine answers held-out questions without sampling as it did after the step that was saved, and
trainer and engine agree as well as before. Answers are drawn anew, as vLLM's random state is in no checkpoint: what
depends on them agrees roughly.

Arguments, options and files are those of `verl_grpo`; STEPS is 5. FIRST is the arm that runs until it is killed, if it
is another one, such as bf16: its checkpoint goes on with ARM, and what it had is not compared. LIMIT (500) are the
seconds that there are for all of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_grpo import Run, ends_when_told, private_folder
from verl_processes import Started
from verl_rows import circumstances, entries, four_bit, said, steps, told, write
from verl_task import HELD_OUT, prepare, starting_weights

EVERY = 2
"""Steps from one checkpoint to the next."""

K3 = "rollout_corr/k3_kl"
JUMP = 4.0
"""So many times the largest K3 until then it may be afterwards. With QAT a step has 1.2·10⁻⁴ to 2.5·10⁻⁴ (H200)."""

MOST = 1e-3
"""It may be where nothing is known from before: less than without QAT."""

EXACTLY = ("prompt_length/mean", "actor/lr", "qat/coverage", "qat/sync_bytes")
"""What a step has again, as far as it is there."""

ROUGHLY = {"critic/score/mean": 0.15, "actor/entropy": 0.1, "response_length/mean": 0.3}
"""What a step has again but for the random numbers: how far it may be off. 512 answers are drawn for 64 questions."""

OTHER_ANSWERS = 4 / HELD_OUT
"""Of the held-out questions; requests meet in other batches, which round otherwise."""


@dataclass(frozen=True)
class Attempt:
    """A start of a run, and what it logs.

    Args:
        run: what runs.
        name: "first" or "second".
        overrides: for verl's command line.
    """

    run: Run
    name: str
    overrides: Sequence[str]

    @property
    def metrics(self) -> Path:
        return self.run.folder / f"metrics-{self.name}.jsonl"

    @property
    def log(self) -> Path:
        return self.run.folder / f"log-{self.name}.txt"

    def start(self, private: Path) -> Started:
        self.metrics.unlink(missing_ok=True)
        return self.run.start(private, self.metrics, self.log, *self.overrides)


def saved(run: Run) -> int:
    """The last step that has a complete checkpoint; 0: none has."""
    tracker = run.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text() or 0) if tracker.exists() else 0


def made(attempt: Attempt) -> int:
    """The last step that was logged; 0: none was."""
    return max((int(entry["step"]) for entry in steps(attempt.metrics)), default=0)


def until(started: Started, reached: Callable[[], bool], end: float) -> str | None:
    """Wait until something is reached.

    Returns:
        Why it was not; None: it was.
    """
    while not reached():
        code = started.code
        if code is not None:
            return None if reached() else f"verl ended with {code}"
        if time.monotonic() > end:
            return "there was no time left"
        time.sleep(0.2)
    return None


def held_out(attempt: Attempt, step: int) -> float | None:
    """The share of held-out questions that the engine answered rightly after a step, without sampling."""
    for entry in entries(attempt.metrics):
        for name, value in entry.items():
            if entry["step"] == step and re.fullmatch(r"val-core/.*/mean@1", name):
                return float(value)
    return None


def compared(first: Attempt, second: Attempt, checkpoint: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """What both attempts logged, and what of it is as it must be.

    Args:
        checkpoint: the step behind which the second went on.
    """
    before, after = steps(first.metrics), steps(second.metrics)
    again = {int(entry["step"]): entry for entry in after}
    twice = {int(a["step"]): (a, again[int(a["step"])]) for a in before if int(a["step"]) in again}
    k3 = [[entry[K3] for entry in found if K3 in entry] for found in (before, after)]
    answers = held_out(first, checkpoint), held_out(second, checkpoint)
    same_arm = first.run.arm == second.run.arm

    def near(name: str, tolerance: float) -> bool:
        pairs = [(a[name], b[name]) for a, b in twice.values() if name in a and name in b]
        return all(math.isclose(a, b, abs_tol=tolerance) for a, b in pairs)

    resumed = f"global_step_{checkpoint}, setting global step to {checkpoint}"
    checks = {
        "resumed": resumed in second.log.read_text(errors="replace"),
        "steps": list(again) == list(range(checkpoint + 1, second.run.steps + 1)),
        "twice": bool(twice),
        "k3": bool(k3[1]) and max(k3[1]) <= (JUMP * max(k3[0]) if same_arm and k3[0] else MOST),
        **{name: near(name, 1e-9) for name in EXACTLY if same_arm or not name.startswith("qat/")},
    }
    if same_arm:
        checks |= {name: near(name, tolerance) for name, tolerance in ROUGHLY.items()}
        checks["held_out"] = None not in answers and abs(answers[0] - answers[1]) <= OTHER_ANSWERS
    shown = (K3, *EXACTLY, *ROUGHLY, "actor/grad_norm")
    numbers = {
        "steps_before": [int(entry["step"]) for entry in before], "steps_after": list(again), "k3_before": k3[0],
        "k3_after": k3[1], "held_out": answers,
        "twice": {s: {n: [a[n], b[n]] for n in shown if n in a and n in b} for s, (a, b) in twice.items()},
    }  # fmt: skip
    return numbers, checks


def main(arm: str, model: str, out: Path, *overrides: str) -> dict[str, Any]:
    began = time.monotonic()
    end = began + float(os.environ.get("LIMIT", 500))
    first_arm = os.environ.get("FIRST", arm)
    name = "resume" if first_arm == arm else f"resume-from-{first_arm}"
    run = Run.asked(arm, model, out, steps=5, name=name)
    run = replace(run, place=run.label)
    prepare(out, model)
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir()
    always = [f"trainer.save_freq={EVERY}", f"trainer.test_freq={EVERY}", "trainer.resume_mode=auto", *overrides]
    first = Attempt(replace(run, arm=first_arm), "first", always)
    second = Attempt(run, "second", [*always, "trainer.val_before_train=True"])
    row: dict[str, Any] = {**run.about(), "resumed_from": first.run.arm, "exit": 1}

    with private_folder() as private, first.start(Path(private)) as started:
        problem = until(started, lambda: 0 < saved(run) < made(first), end)
        row["killed"] = started.kill()
    row |= {"checkpoint": saved(run), "seconds_before": round(time.monotonic() - began, 1)}
    if problem is None:
        with private_folder() as private, second.start(Path(private)) as started:
            problem = until(started, lambda: started.code == 0, end)
        numbers, checks = compared(first, second, row["checkpoint"])
        row |= {**numbers, "checks": checks, "exit": int(problem is not None or not all(checks.values()))}
    row |= {"problem": problem, "seconds": round(time.monotonic() - began, 1), **told(steps(second.metrics))}
    lines = said(second.log)
    row |= {"starting_weights": starting_weights(out), "said": lines, **four_bit(lines), **circumstances()}
    write(out, run.label, row, [{"attempt": a.name, **entry} for a in (first, second) for entry in steps(a.metrics)])
    return row


if __name__ == "__main__":
    ends_when_told()
    result = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve(), *sys.argv[4:])
    print("RESULT " + json.dumps(result), flush=True)
    sys.exit(result["exit"])
