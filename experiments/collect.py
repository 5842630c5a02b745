"""Bring what an experiment left in its directory into the few small files that are committed.

``experiments/results/<name>/`` gets

=================  =================================================================================================
``runs.jsonl``     a line a run: its settings, seconds, the circumstances of each piece of it, and how many runs
                   could be on its GPU at a time, itself counted (``runs_on_gpu``; null: unknown, or pieces differ)
``metrics.jsonl``  a line a step of each run, the columns that pages are made of, to six digits
``measured.jsonl`` the rows of `measure`
=================  =================================================================================================

Runs that are there already are replaced, others stay: an experiment can be collected in pieces. So are measured rows,
each kind, step, variant and precision of a run by itself; of rows measured again the newest is taken. Those of a run
that has been made again go with it, as they are about weights that nobody has any more.

Commit, GPU, versions and date are those that runs and measurements recorded themselves, not those of the collection.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import Experiment, Run
from rows import read

from nvfp4_qat.runlog import replace_file

COLUMNS = (
    "step", "reward", "accuracy", "entropy", "response_length", "groups_trained", "batches_drawn", "grad_norm",
    "clipped_high", "clipped_low", "rollout_corr/kl", "rollout_corr/k3_kl", "rollout_corr/logprob_abs_diff",
    "rollout_corr/rollout_is_eff_sample_size", "eval/accuracy", "eval/accuracy_se", "eval_end/accuracy",
    "eval_end/accuracy_se", "eval_end/problems", "flips/codes", "flips/bytes", "sync_bytes", "sync_seconds",
    "time/rollout", "time/update", "time/step",
)  # fmt: skip
"""Of a step's row."""

MEASURED = ("run", "kind", "step", "variant", "precision")
"""What tells a measured row from the others."""


def collect(experiment: Experiment, out: Path, results: Path, others: Sequence[Run] = ()) -> None:
    """Write the files.

    Args:
        experiment: whose.
        out: its directory.
        results: where the files go.
        others: runs that need not be among the file's, as they have other seeds.
    """
    runs, metrics = [], []
    for run in dict.fromkeys([*experiment.chosen(None, None), *others]):
        folder = out / run.key
        rows = read(folder / f"metrics-{experiment.arm(run.name)}.jsonl")
        if not rows or not (folder / "summary.json").exists():
            continue
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        about = {name: summary.get(name) for name in ("config", "engine", "circumstances", "note", "seconds")}
        if (start := summary.get("starting_weights")) is not None:
            about["starting_weights"] = start["sha256"]
        about["runs_on_gpu"] = _sharing(out, run.key)
        arm = experiment.arm(run.name)
        runs.append({"run": run.key, "name": run.name, "arm": arm, "seed": run.seed, "steps": len(rows), **about})
        metrics += [{"run": run.key, **{c: _short(row[c]) for c in COLUMNS if c in row}} for row in rows]
    _forget(results / "measured.jsonl", _made_again(read(results / "metrics.jsonl"), metrics))
    _merge(results / "runs.jsonl", runs)
    _merge(results / "metrics.jsonl", metrics)
    measured = [row for path in sorted(out.glob("measured-*.jsonl")) for row in read(path)]
    newest = {_identity(row, MEASURED): row for row in measured}  # a file's later rows are newer
    _merge(results / "measured.jsonl", newest.values(), MEASURED)


def sharing_file(out: Path, key: str) -> Path:
    """Where a run writes at each start how many share its GPU."""
    return out / "logs" / f"{key}.gpu.jsonl"


def _sharing(out: Path, key: str) -> int | None:
    found = {row["runs_on_gpu"] for row in read(sharing_file(out, key))}
    return found.pop() if len(found) == 1 else None


def _made_again(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> set[str]:
    """Runs whose first step is another than it was: of one that is continued it stays, down to its seconds."""
    first, again = ({row["run"]: row for row in rows if row["step"] == 0} for rows in (before, now))
    both = first.keys() & again.keys()
    return {run for run in both if any(first[run][c] != again[run][c] for c in first[run].keys() & again[run].keys())}


def _forget(path: Path, runs: Collection[str]) -> None:
    rows = read(path)
    if kept := [row for row in rows if row["run"] not in runs]:
        _write(path, kept)
    elif rows:
        path.unlink()


def _identity(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(column) for column in columns)


def _merge(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ("run",)) -> None:
    """Put rows in the place of those that are the same in some columns."""
    rows = list(rows)
    new = {_identity(row, columns) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = [row for row in read(path) if _identity(row, columns) not in new] + rows
    merged.sort(key=lambda row: str(row["run"]))  # stable: a run's rows keep their order
    if merged:
        _write(path, merged)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
