"""The committed rows of an experiment, read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from intervals import Estimate, ratio_of_sums

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
        """Runs without their seeds, in the file's order."""
        return list(dict.fromkeys(run["name"] for run in self.runs))

    def keys(self, name: str) -> list[str]:
        """The runs of a name, one for each seed."""
        return [run["run"] for run in self.runs if run["name"] == name]

    def arm(self, name: str) -> str:
        """The arm of a run."""
        return next(str(run["arm"]) for run in self.runs if run["name"] == name)

    def columns(self, name: str, column: str) -> list[list[float]]:
        """A column of each seed's run, steps without it left out."""
        return [[row[column] for row in self._metrics.get(key, []) if column in row] for key in self.keys(name)]

    def points(self, key: str, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column of one run."""
        rows = [row for row in self._metrics.get(key, []) if column in row]
        return [row["step"] for row in rows], [row[column] for row in rows]

    def paired(self, variant: str, names: Sequence[str] | None = None, steps: Sequence[int] | None = None) -> list[Row]:
        """Paired rows of a variant, of some runs and steps."""
        keys = None if names is None else {key for name in names for key in self.keys(name)}
        return [
            row
            for row in self.measured
            if row["kind"] == "paired"
            and row["variant"] == variant
            and (keys is None or row["run"] in keys)
            and (steps is None or row["step"] in steps)
        ]

    def evaluations(self, name: str, precision: str) -> list[Row]:
        """Evaluations of the last weights of a run, one a seed."""
        keys = set(self.keys(name))
        return [
            row
            for row in self.measured
            if row["kind"] == "evaluation" and row["run"] in keys and row["precision"] == precision
        ]


def paired_ratio(rows: Sequence[Row]) -> Estimate:
    """k3 of the 4-bit engine over that of the bf16 engine, per token, over the responses of some paired rows."""
    return ratio_of_sums(pooled(rows, "k3_nvfp4"), pooled(rows, "k3_bf16"))


def pooled(rows: Sequence[Row], column: str) -> list[float]:
    """A column that holds a value a response, of several rows."""
    return [value for row in rows for value in row[column]]


def per_token(rows: Sequence[Row], column: str) -> float:
    """Its sum over the number of tokens."""
    return sum(pooled(rows, column)) / sum(row["tokens"] for row in rows)
