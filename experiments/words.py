"""How the page calls things and writes numbers: the same words everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from intervals import LEAST_STEPS, Estimate  # noqa: E402
from row_tools import short  # noqa: E402
from rows import Results, Row, having  # noqa: E402

from nvfp4_qat.report_page import small  # noqa: E402
from nvfp4_qat.tasks import make_task  # noqa: E402

MODELS = {
    "dense": "Qwen3 of 65 M parameters",
    "moe": "Qwen3-MoE of 61 M parameters",
    "smollm2": "SmolLM2-135M-Instruct",
}

ARM_LABELS = {"bf16": "bf16", "noqat": "no QAT", "qat": "QAT", "qat-ffn": "QAT of FFN only"}

SUFFIXES = {"": "", "-fast": " (lr × 2)"}
"""What a run's name says behind its arm."""

PRECISIONS = {"bf16": "master weights, in bf16", "nvfp4": "in NVFP4", "nvfp4-ffn": "in NVFP4, attention in bf16"}

OWN_PRECISION = {"bf16": "bf16", "noqat": "nvfp4", "qat": "nvfp4", "qat-ffn": "nvfp4-ffn"}
"""What an arm samples in."""


def label(results: Results, name: str) -> str:
    """What a run is called."""
    arm = results.arm(name)
    return ARM_LABELS[arm] + SUFFIXES.get(name.removeprefix(arm), f" ({name})")


def bf16_of(results: Results, name: str) -> str | None:
    """The bf16 run that a run is compared with: of the same settings; None: there is none, or it is that one."""
    base = f"bf16{name.removeprefix(results.arm(name))}"
    return base if base != name and base in results.names() else None


def with_interval(estimate: Estimate, write: Callable[[float], str]) -> str:
    """``1.02 (0.99 – 1.05)``, or the number alone where it has no interval."""
    if not estimate.has_interval:
        return write(estimate.value)
    return f"{write(estimate.value)} ({write(estimate.low)} – {write(estimate.high)})"


def each(values: Mapping[int, float], write: Callable[[float], str]) -> str:
    """The value of each seed: ``1.02, 1.03``."""
    return ", ".join(write(value) for value in values.values()) or "–"


def seeds(values: Mapping[int, float], write: Callable[[float], str]) -> str:
    """The same behind a number: ``; seeds 1.02, 1.03``, and nothing of a single seed."""
    return f"; seeds {each(values, write)}" if len(values) > 1 else ""


def times(value: float) -> str:
    """A factor."""
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def factor(value: float) -> str:
    """A factor near 1, where the third digit counts."""
    return times(value) if value >= 2 else f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """``+0.012``, ``−0.012``, ``0.000``"""
    return _signed(f"{value:+.3f}")


def signed_points(value: float) -> str:
    """A difference of shares in percentage points, without the words."""
    return _signed(f"{100 * value:+.1f}")


def _signed(text: str) -> str:
    return text.replace("-", "−") if float(text) else text[1:]


def blocks(estimate: Estimate) -> str:
    """``blocks of 20 steps``: what was drawn for a curve's interval, or that there is none."""
    if not estimate.has_interval:
        return f"no interval: it rests on fewer than {LEAST_STEPS} steps"
    return f"blocks of {_list(map(str, estimate.blocks))} steps"


def share(count: int, of: int) -> str:
    """``12.3 %``; never 0 % of something, nor 100 % of what is not all."""
    if count == 0:
        return "none"
    if count == of:
        return "all"
    return f"{100 * count / of:.3g} %" if 0.001 < count / of < 0.999 else f"{count:,} of {of:,}"


def machines(rows: Iterable[Row]) -> str:
    """Where and with what something was computed, in a sentence.

    Args:
        rows: `nvfp4_qat.machine.circumstances`.
    """
    found = list(rows)
    if not found:
        return ""
    gpus = _list(short(row["gpu"]) if row["gpu"] else "CPU" for row in found)
    packages = [f"{name} {_list(row['versions'].get(key, '–') for row in found)}" for key, name in _PACKAGES]
    commits = _list(row["commit"] or "unknown" for row in found)
    return f"{gpus}, {', '.join(packages)}, commit {commits}, {_list(row['date'] for row in found)}."


def sharing(runs: Iterable[Row]) -> str:
    """Among how many a GPU was shared, in a sentence; empty where each run had one of its own.

    Args:
        runs: rows of ``runs.jsonl``.
    """
    counts = {run.get("runs_on_gpu") for run in runs}
    known = sorted(count for count in counts if count)
    if not known or known == [1]:
        return "" if known and None not in counts else "How many runs shared a GPU was not recorded."
    unknown = ", of some runs it was not recorded how many" if None in counts else ""
    return f"Seconds are those of a GPU that up to {known[-1]} runs shared{unknown}."


def settings(runs: Iterable[Row]) -> str:
    """What runs have in common, and what is said about their model, in sentences; empty where rows do not say it.

    Args:
        runs: rows of ``runs.jsonl``.
    """
    runs = list(runs)
    notes = [f"{note.rstrip('.')}." for note in dict.fromkeys(run.get("note") for run in runs) if note]
    configs = having((run.get("config") or {} for run in runs), *_SETTINGS)
    if not configs:
        return " ".join(notes)
    tasks = [make_task(config["task"], config["model"]) for config in configs]
    said = {name: _list(_number(config[name]) for config in configs) for name in _SETTINGS}
    warmed = _list(_number(100 * c["warmup_until"]) for c in configs if c.get("warmup_until"))
    warm_up = f"Warmed up on the task until a sampled answer is right with a chance of {warmed} %. " if warmed else ""
    truncated = {config.get("tis") for config in configs}
    tis = f"bound {_list(map(_number, truncated))}, on in every arm; it corrects part of the mismatch"
    if None in truncated:
        tis = "off" if truncated == {None} else "on in some arms only"
    return " ".join([
        *notes,
        f"{warm_up}Task: {_list(task.name for task in tasks)}, responses of at most "
        f"{_list(str(task.max_new_tokens) for task in tasks)} tokens. A step: {said['prompts']} prompts × "
        f"{said['samples']} samples, {said['minibatches']} minibatches, learning rate {said['lr']}. "
        f"Truncated importance sampling: {tis}.",
    ])  # fmt: skip


_SETTINGS = ("model", "task", "prompts", "samples", "minibatches", "lr")


def _number(value: object) -> str:
    return small(value) if isinstance(value, float) else str(value)


_PACKAGES = (("vllm", "vLLM"), ("torch", "torch"))


def _list(texts: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(texts))


def k3(value: float) -> str:
    """A mean k3."""
    return small(value)
