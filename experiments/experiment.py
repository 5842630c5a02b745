"""An experiment as data: a YAML file that names runs and says what is particular about each.

.. code-block:: yaml

    model: small             # what `nvfp4_qat.models.load_model` takes
    model_seed: 0            # of random weights and their warm-up, which all runs share
    seeds: [0, 1]            # of prompts and sampling; every run is made once with each
    settings: {steps: 200}   # fields of `nvfp4_qat.demo_config.DemoConfig`, for all runs
    runs:                    # by name: the arm, and fields that differ from the settings
      qat: {arm: qat}
      qat-fast: {arm: qat, lr: 1.0e-4}
    paired: [qat]            # runs whose kept weights are measured in both precisions (`measure`)
    variants: qat            # the run on whose weights other contracts are tried (`variants`); none if absent

A run with a seed is called ``<name>-s<seed>``; that is also its directory below the experiment's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from nvfp4_qat.demo_config import ARMS, DemoConfig
from nvfp4_qat.errors import UserError

OWN = ("out", "arms", "seed", "model", "model_seed", "resume", "progress", "cache")
"""Fields of `DemoConfig` that an experiment sets itself."""


@dataclass(frozen=True)
class Run:
    """One run of an experiment with one seed."""

    name: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.name}-s{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """What a file says; see the module.

    Args:
        name: of the file, without its ending.
        model, model_seed, seeds, settings, runs, paired, variants: as in the file.
    """

    name: str
    model: str
    model_seed: int
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, Any]]
    paired: tuple[str, ...] = ()
    variants: str | None = None

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Read a file.

        Raises:
            UserError: it is missing, no YAML, or says something that is not known; the message says what is.
        """
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        known = {field.name for field in fields(cls)} - {"name"}
        given = document if isinstance(document, dict) else {}
        if unknown := sorted(given.keys() - known) or sorted({"model", "runs"} - given.keys()):
            raise UserError(
                f"{path}: {', '.join(unknown)}: a file says {', '.join(sorted(known))}, and must say model and runs"
            )
        given = {"model_seed": 0, "seeds": [0], "settings": {}, **given}
        experiment = cls(
            path.stem, **{**given, "seeds": tuple(given["seeds"]), "paired": tuple(given.get("paired", ()))}
        )
        experiment._check(path)
        return experiment

    def _check(self, path: Path) -> None:
        settings = {field.name for field in fields(DemoConfig)} - set(OWN)
        for name, run in {"settings": self.settings, **self.runs}.items():
            allowed = settings if name == "settings" else settings | {"arm"}
            if unknown := sorted(run.keys() - allowed):
                raise UserError(
                    f"{path}, {name}: {', '.join(unknown)} is no setting: take {', '.join(sorted(allowed))}"
                )
        for name, run in self.runs.items():
            if run.get("arm") not in ARMS:
                raise UserError(f"{path}, {name}: arm is {run.get('arm')!r}: one of {', '.join(ARMS)}")
        if missing := [name for name in (*self.paired, self.variants) if name is not None and name not in self.runs]:
            raise UserError(f"{path}: {', '.join(missing)} is none of its runs: {', '.join(self.runs)}")

    def chosen(self, names: tuple[str, ...] | None, seeds: tuple[int, ...] | None) -> list[Run]:
        """Runs, seed by seed so that arms which are compared run at the same time.

        Args:
            names, seeds: which; None: all.

        Raises:
            UserError: there is no such run.
        """
        if unknown := [name for name in names or () if name not in self.runs]:
            raise UserError(f"no run {', '.join(unknown)} in {self.name}: {', '.join(self.runs)}")
        return [Run(name, seed) for seed in seeds or self.seeds for name in names or self.runs]

    def config(self, run: Run, out: Path) -> DemoConfig:
        """The settings of a run.

        Args:
            run: which.
            out: the experiment's directory.
        """
        own = {key: value for key, value in self.runs[run.name].items() if key != "arm"}
        return DemoConfig.for_model(
            self.model,
            out / run.key,
            arms=(self.arm(run.name),),
            seed=run.seed,
            model_seed=self.model_seed,
            resume=True,
            progress=False,
            cache=out / "cache",
            **{**self.settings, **own},
        )

    def arm(self, name: str) -> str:
        """The arm of a run."""
        arm: str = self.runs[name]["arm"]
        return arm
