"""The committed rows of an experiment, read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from intervals import BySeed, Estimate, ratio_of_means, ratio_of_sums

from nvfp4_qat.demo_config import ARMS
from nvfp4_qat.jsonl import Row
from nvfp4_qat.jsonl import read_rows as read

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Results:
    """What ``experiments/results/<name>/`` holds; everything is empty where it is not there."""

    name: str
    folder: Path = RESULTS

    def _file(self, name: str) -> list[Row]:
        return read(self.folder / self.name / f"{name}.jsonl")

    @cached_property
    def runs(self) -> list[Row]:
        """A row a run and seed."""
        return self._file("runs")

    @cached_property
    def measured(self) -> list[Row]:
        return self._file("measured")

    @cached_property
    def _metrics(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self._file("metrics"):
            found.setdefault(row["run"], []).append(row)
        return found

    def names(self) -> list[str]:
        """Runs without their seeds, in the order of the experiments' files: arm by arm, then those with a suffix."""
        arms = {run["name"]: str(run["arm"]) for run in self.runs}
        return sorted(arms, key=lambda name: (name.removeprefix(arms[name]), ARMS.index(arms[name])))

    def keys(self, name: str) -> dict[int, str]:
        """The runs of a name, by seed."""
        return {run["seed"]: run["run"] for run in self.runs if run["name"] == name}

    def arm(self, name: str) -> str:
        """The arm of a run."""
        return next(str(run["arm"]) for run in self.runs if run["name"] == name)

    def unfinished(self, names: Iterable[str]) -> str:
        """``qat-s1: 120 of 200 steps``: runs of these names that ended early; empty if none did."""
        wanted = set(names)
        early = [
            f"{run['run']}: {run['steps']} of {planned} steps"
            for run in self.runs
            if run["name"] in wanted and run["steps"] < (planned := (run.get("config") or {}).get("steps", 0))
        ]
        return ", ".join(early)

    def points(self, name: str, column: str) -> dict[int, dict[int, float]]:
        """A column of the runs of a name: by seed and step, steps without it left out."""
        return {
            seed: {row["step"]: row[column] for row in self._metrics.get(key, []) if column in row}
            for seed, key in self.keys(name).items()
        }

    def common(self, names: Sequence[str], column: str) -> dict[str, dict[int, list[float]]]:
        """A column of runs that are compared, by name and seed, over the steps that all of them with this seed have."""
        points = {name: self.points(name, column) for name in names}
        found: dict[str, dict[int, list[float]]] = {name: {} for name in names}
        for seed in sorted({seed for runs in points.values() for seed in runs}):
            there = {name: runs[seed] for name, runs in points.items() if runs.get(seed)}
            steps = sorted(set.intersection(*(set(values) for values in there.values()))) if there else []
            for name, values in there.items():
                if steps:
                    found[name][seed] = [values[step] for step in steps]
        return found

    def paired(self, variant: str, seed: int | None = None) -> list[Row]:
        """Paired rows of a variant, of all seeds or of one."""
        keys = {run["run"] for run in self.runs if seed is None or run["seed"] == seed}
        return [
            row for row in self.measured if row["kind"] == "paired" and row["variant"] == variant and row["run"] in keys
        ]

    def answers(self, name: str, precision: str) -> dict[int, list[float]]:
        """Evaluation after the last step: the share of right answers to each problem, by seed.

        A run that was evaluated earlier only is left out, as runs are compared after as many steps.
        """
        rows = self._evaluations(precision)
        last = max((row["step"] for row in rows if row["step"] > 0), default=None)
        found = {row["run"]: shares(row) for row in rows if row["step"] == last}
        return {seed: found[key] for seed, key in self.keys(name).items() if key in found}

    def first_answers(self, precision: str) -> dict[int, list[float]]:
        """The same of the weights that all runs begin with, which are evaluated once."""
        rows = [row for row in self._evaluations(precision) if row["step"] == 0]
        return {0: shares(rows[0])} if rows else {}

    def _evaluations(self, precision: str) -> list[Row]:
        return [row for row in self.measured if row["kind"] == "evaluation" and row["precision"] == precision]


def shares(row: Row) -> list[float]:
    """An evaluation's share of right answers to each problem."""
    return [right / row["samples"] for right in row["right"]]


def paired_ratio(rows: Sequence[Row]) -> Estimate:
    """k3 of the 4-bit engine over that of the bf16 engine, over the tokens of some paired rows."""
    return ratio_of_sums([by_prompt(row, "k3_nvfp4") for row in rows], [by_prompt(row, "k3_bf16") for row in rows])


def sampled_ratio(rows: Sequence[Row]) -> Estimate | None:
    """k3 a token of the 4-bit engine over that of the bf16 engine, each as it sampled responses of its own.

    None where no row has both.
    """
    rows = having(rows, "k3_bf16_sampled", "lengths_bf16")
    if not rows:
        return None
    above, below = ("k3_sampled", "lengths"), ("k3_bf16_sampled", "lengths_bf16")
    return ratio_of_means(
        *([(by_prompt(row, total), by_prompt(row, count)) for row in rows] for total, count in (above, below))
    )


def having(rows: Iterable[Row], *columns: str) -> list[Row]:
    """Rows that have all these columns; earlier ones may lack some."""
    return [row for row in rows if all(row.get(column) is not None for column in columns)]


def by_prompt(row: Row, column: str) -> list[float]:
    """A paired row's sums over all responses to a prompt."""
    values, samples = row[column], row["samples"]
    return [sum(values[i : i + samples]) for i in range(0, len(values), samples)]


def per_token(rows: Sequence[Row], column: str, lengths: str = "lengths") -> float:
    """A column that holds a sum a response, over the number of tokens, of several rows."""
    return float(sum(sum(row[column]) for row in rows) / sum(sum(row[lengths]) for row in rows))


def last_quarter(runs: Mapping[str, BySeed]) -> dict[str, dict[int, Sequence[float]]]:
    """The last quarter of the steps of `Results.common`, at least one step."""
    return {name: {seed: run[-max(len(run) // 4, 1) :] for seed, run in seeds.items()} for name, seeds in runs.items()}
