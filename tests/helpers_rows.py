"""Rows as experiments leave them, with numbers that are known: for tests of the page, and to look at its pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WHERE = {
    "commit": "0123456789",
    "date": "2026-01-02",
    "gpu": "NVIDIA H100 80GB HBM3",
    "versions": {"torch": "2.11.0", "vllm": "0.24.0"},
}

K3 = {"bf16": 2e-5, "noqat": 3e-3, "qat": 2.2e-5, "qat-ffn": 2.1e-5}

OWN = {"bf16": "bf16", "noqat": "nvfp4", "qat": "nvfp4", "qat-ffn": "nvfp4-ffn"}

NO_DIFFERENCE = {"values": 0, "codes": 0, "scales": 0, "divisors": 0}
OF = {"values": 16_000_000, "codes": 8_000_000, "scales": 1_000_000, "divisors": 56}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_experiment(
    folder: Path, runs: Mapping[str, str], seeds: Sequence[int] = (0, 1), steps: int = 200, cut: Mapping[str, int] = {}
) -> None:
    """``runs.jsonl`` and ``metrics.jsonl`` of an experiment.

    Args:
        folder: ``results/<name>``.
        runs: arms by name.
        seeds, steps: of each run.
        cut: runs, by key, that ended after fewer steps.
    """
    about, metrics = [], []
    for name, arm in runs.items():
        for seed in seeds:
            key = f"{name}-s{seed}"
            count = cut.get(key, steps)
            about.append({
                "run": key, "name": name, "arm": arm, "seed": seed, "steps": count, "circumstances": [WHERE],
                "runs_on_gpu": 3,
            })  # fmt: skip
            metrics += [{"run": key, **_step(arm, seed, step, steps)} for step in range(count)]
    write(folder / "runs.jsonl", about)
    write(folder / "metrics.jsonl", metrics)


def _step(arm: str, seed: int, step: int, steps: int) -> dict[str, Any]:
    # What the prompts of a step do is the same for all arms, what an arm does is its own.
    prompts = np.random.default_rng([seed, step]).normal()
    own = np.random.default_rng([seed, step, len(arm)]).normal()
    learned = 1 - np.exp(-3 * step / steps)
    row = {
        "step": step,
        "reward": -0.3 + 1.1 * learned + 0.05 * prompts + 0.01 * own,
        "rollout_corr/k3_kl": K3[arm] * float(np.exp(0.15 * prompts + 0.05 * own)) * (1 + 0.1 * seed),
        "entropy": 0.9 - 0.5 * learned + 0.01 * own,
        "grad_norm": 0.2 * float(np.exp(0.2 * own)),
        "sync_bytes": 130_000_000 if arm == "bf16" else 40_000_000,
        "time/step": 2.5 + 0.1 * own,
    }
    if arm != "bf16":
        row["flips/codes"] = 2e-4 * float(np.exp(0.3 * own))
    if step == steps - 1:
        row["eval_end/accuracy"] = 0.4 + 0.45 * learned
    if step % 20 == 0:
        row["eval/accuracy"] = 0.4 + 0.45 * learned + 0.01 * own
    return row


def weights_word(run: str, step: int) -> str:
    """The word for a run's weights; before the first step all runs have the same."""
    return hashlib.sha256(f"{run} {step}".encode() if step else b"").hexdigest()[:16]


def paired_row(run: str, step: int, variant: str = "contract", ratio: float = 1.0, **differs: Any) -> dict[str, Any]:
    """A paired row whose k3 ratio is known.

    Args:
        run, step, variant: whose.
        ratio: k3 of the NVFP4 engine over that of the bf16 engine, of every response.
        differs: of the row's ``trainer`` and ``engine``.
    """
    draw = np.random.default_rng([step, len(run)])
    lengths = draw.integers(20, 50, 256)
    below = draw.exponential(1e-5, 256) * lengths
    own = draw.integers(20, 50, 256)  # the bf16 engine's responses are others
    return {
        "kind": "paired", "run": run, "step": step, "variant": variant, "tokens": int(lengths.sum()),
        "k3_nvfp4": (ratio * below).tolist(), "k3_bf16": below.tolist(), "k3_sampled": (1.5 * below).tolist(),
        "k3_bf16_sampled": (1.4 * draw.exponential(1e-5, 256) * own).tolist(), "lengths_bf16": own.tolist(),
        "k3_engines": (0.5 * (1 + ratio) * below).tolist(), "apart": (0.02 * ratio * draw.random(256)).tolist(),
        "lengths": lengths.tolist(), "samples": 4, "weights": weights_word(run, step),
        "differs": {
            "trainer": {**NO_DIFFERENCE, **differs.get("trainer", {})},
            "engine": {**NO_DIFFERENCE, **differs.get("engine", {})},
            "of": OF,
        },
        **WHERE,
    }  # fmt: skip


def evaluation_row(run: str, step: int, precision: str, chance: float, samples: int = 8) -> dict[str, Any]:
    """An evaluation; all rows with one chance and run are alike."""
    draw = np.random.default_rng([sum(map(ord, run)), step])
    hard = np.random.default_rng(7).uniform(-0.3, 0.3, 512)  # the problems' own difficulty
    right = draw.binomial(samples, np.clip(chance + hard, 0, 1)).tolist()
    return {
        "kind": "evaluation", "run": run, "step": step, "precision": precision, "samples": samples, "right": right,
        "response_length": 40.0, "weights": weights_word(run, step), **WHERE,
    }  # fmt: skip


def write_everything(folder: Path) -> None:
    """Rows of all experiments, as if everything had been run."""
    plain = {arm: arm for arm in OWN}
    fast = {f"{arm}-fast": arm for arm in ("bf16", "noqat", "qat")}
    for name, runs, seeds in (("dense", {**plain, **fast}, (0, 1)), ("moe", plain, (0, 1)), ("smollm2", plain, (0,))):
        write_experiment(folder / name, runs, seeds, 60 if name == "smollm2" else 200)
        last = 60 if name == "smollm2" else 200
        measured = [evaluation_row("bf16-s0", 0, p, 0.4) for p in ("bf16", "nvfp4", "nvfp4-ffn")]
        for run in runs:
            for seed in seeds:
                precisions = ("bf16", "nvfp4", "nvfp4-ffn")
                measured += [evaluation_row(f"{run}-s{seed}", last, precision, 0.85) for precision in precisions]
        kept = {seed: range(20 * (seed > 0), last + 1, 20) for seed in seeds}
        measured += [paired_row(f"qat-s{seed}", step, ratio=1.02) for seed in seeds for step in kept[seed]]
        everything = {"values": 400_000, "codes": 300_000, "scales": 900_000, "divisors": 56}
        for seed in seeds if name != "smollm2" else ():
            for step in (0, 100, 200)[seed > 0 :]:
                run = f"qat-s{seed}"
                measured += [
                    paired_row(run, step, "amax", 1.01, trainer=everything, engine=everything),
                    paired_row(run, step, "unfused", 1.3, **dict.fromkeys(("trainer", "engine"), {"divisors": 12})),
                    paired_row(run, step, "unclamped", 1.02),
                    paired_row(run, step, "requantized", 90.0, engine=everything),
                    paired_row(run, step, "rounded-twice", 30.0, engine=everything),
                    paired_row(run, step, "repacked", 1.02),
                ]
        write(folder / name / "measured.jsonl", measured)
