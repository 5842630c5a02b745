"""How many math problems a checkpoint solves: avg@k with its interval, by vLLM, graded by verl's ``math_dapo``.

``run`` answers every problem of some parquet files (`prepare_dapo_data`) k times and writes ``DATASET-PRECISION.json``
for each file as soon as it is done; one that is there with the same settings is not computed again. ``summary`` reads
all of a folder, prints them as a table and writes ``summary.json``, with the difference between the precisions.

avg@k is the mean over problems of the share of right answers. Its interval is a bootstrap over problems: with 30 of
them, which problems an exam happens to have is most of what is uncertain. A difference is taken problem by problem
first, which removes that part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PRECISIONS = ("bf16", "nvfp4")
RESAMPLES = 10_000


class EvaluationError(Exception):
    """What is wrong with the data or the command, in a sentence that says what to do."""


@dataclass(frozen=True)
class Settings:
    """How a model is asked.

    Args:
        samples: answers to each problem, the k of avg@k.
        temperature: of sampling.
        top_p: of sampling.
        max_tokens: of an answer; a longer one is cut off, and wrong unless it said its answer before.
        prompt_tokens: room for a problem.
        seed: of the engine.
    """

    samples: int = 32
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 20480
    prompt_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """A prompt as chat messages, and the right answer."""

    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True)
class Response:
    """An answer of the model: its text, how many tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


Engine = Callable[[Sequence[Problem], Settings], list[list[Response]]]
"""Gives ``samples`` responses to each problem."""


def main(argv: list[str] | None = None) -> int:
    """Run or summarize; the exit code is 2 if something is wrong."""
    parser = argparse.ArgumentParser(description="avg@k of a checkpoint on math problems.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="answer and grade")
    run.add_argument("--model", required=True, help="folder of a checkpoint, or a hub id")
    run.add_argument("--precision", required=True, choices=PRECISIONS, help="what to call it in the results")
    run.add_argument("--data", required=True, nargs="+", type=Path, metavar="FILE", help="parquet files")
    run.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    run.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of the engine (1)")
    run.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="of the engine (0.9)")
    for name, default in asdict(Settings()).items():
        run.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    summary = commands.add_parser("summary", help="of all results in a folder")
    summary.add_argument("out", type=Path, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        if args.command == "summary":
            print(summarize(args.out))
            return 0
        check_precision(args.model, args.precision)
        settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})

        def start() -> Engine:
            return vllm_engine(args.model, args.tensor_parallel, args.gpu_memory_utilization, settings)

        evaluate(args.model, args.precision, args.data, args.out, settings, start)
    except (EvaluationError, OSError) as error:
        print(f"eval_offline: {error}", file=sys.stderr)
        return 2
    return 0


def check_precision(model: str, precision: str) -> None:
    """Refuse a folder whose weights are not what its results would say.

    Raises:
        EvaluationError: it is 4-bit where it should not be, or the other way round.
    """
    file = Path(model) / "config.json"
    if not file.is_file():
        return
    quantized = "quantization_config" in json.loads(file.read_text(encoding="utf-8"))
    if quantized != (precision == "nvfp4"):
        raise EvaluationError(f"{model} is {'' if quantized else 'not '}a quantized checkpoint: --precision is wrong")


def evaluate(
    model: str, precision: str, files: Sequence[Path], out: Path, settings: Settings, start: Callable[[], Engine]
) -> list[Path]:
    """Evaluate what has no result yet.

    Args:
        model: what is evaluated; part of the result.
        precision: of its weights.
        files: of problems; a result has the name of its file.
        out: folder of the results.
        settings: how it is asked.
        start: starts the engine; called once, and only if something is to be computed.

    Returns:
        The results' files.

    Raises:
        EvaluationError: a result is there that was made otherwise, or a file of problems cannot be read.
    """
    asked = {"model": model, "settings": asdict(settings)}
    targets = {file: out / f"{file.stem}-{precision}.json" for file in files}
    missing = {}
    for file, target in targets.items():
        if not target.exists():
            missing[file] = problems_of(file)
            continue
        found = json.loads(target.read_text(encoding="utf-8"))
        different = [key for key, value in asked.items() if found[key] != value]
        if different:
            raise EvaluationError(
                f"{target} was made with another {' and '.join(different)}: remove it, or give another --out"
            )
        print(f"{target} is there: avg@{settings.samples} {found['avg']:.4f}", flush=True)
    engine = start() if missing else None
    for file, problems in missing.items():
        assert engine is not None
        began = time.perf_counter()
        responses = engine(problems, settings)
        row = {"dataset": file.stem, "precision": precision, **asked, **graded(problems, responses)}
        row |= {"seconds": round(time.perf_counter() - began, 1), "versions": _versions()}
        _write(targets[file], row)
        print(f"{targets[file]}: avg@{settings.samples} {row['avg']:.4f}", flush=True)
    return list(targets.values())


def problems_of(file: Path) -> list[Problem]:
    """The problems of a parquet file in verl's format.

    Raises:
        EvaluationError: there is none.
    """
    import pyarrow.parquet as pq

    if not file.exists():
        raise EvaluationError(f"there is no {file}: run recipes/prepare_dapo_data.sh, or set DATA_DIR")
    rows = pq.read_table(file, columns=["prompt", "reward_model"]).to_pylist()
    if not rows:
        raise EvaluationError(f"{file} has no problems")
    return [Problem(row["prompt"], row["reward_model"]["ground_truth"]) for row in rows]


def correct(text: str, answer: str) -> bool:
    """Whether a response is right, as verl's reward has it while training."""
    from verl.utils.reward_score import math_dapo

    return bool(math_dapo.compute_score(text, answer)["acc"])


def graded(problems: Sequence[Problem], responses: Sequence[Sequence[Response]]) -> dict[str, Any]:
    """The result of all responses: avg@k, its interval, and how each problem went."""
    rows = []
    for problem, answers in zip(problems, responses, strict=True):
        rows.append(
            {
                "answer": problem.answer,
                "correct": sum(correct(response.text, problem.answer) for response in answers),
                "samples": len(answers),
                "tokens": sum(response.tokens for response in answers) / len(answers),
                "cut_off": sum(not response.ended for response in answers),
            }
        )
    shares = [row["correct"] / row["samples"] for row in rows]
    return {
        "avg": float(np.mean(shares)),
        "interval": list(bootstrap_interval(shares)),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "cut_off": sum(row["cut_off"] for row in rows) / sum(row["samples"] for row in rows),
        "problems": rows,
    }


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """A confidence interval of a mean, by the percentile bootstrap.

    Args:
        values: one for each problem.
        level: of confidence.
        resamples: how often as many values are drawn with replacement.
        seed: of these draws; the same values have the same interval.

    Returns:
        The lower and the upper end.
    """
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(out: Path) -> str:
    """All results of a folder as a table; also written to ``summary.json``.

    Raises:
        EvaluationError: there are none.
    """
    rows = [
        json.loads(file.read_text(encoding="utf-8"))
        for precision in PRECISIONS
        for file in sorted(out.glob(f"*-{precision}.json"))
    ]
    if not rows:
        raise EvaluationError(f"{out} has no results")
    found = {(row["dataset"], row["precision"]): row for row in rows}
    lines = ["| problems | precision | avg@k | 95 % interval | k | tokens | cut off |", "| --- " * 7 + "|"]
    for (dataset, precision), row in sorted(found.items()):
        lines.append(
            f"| {dataset} | {precision} | {row['avg']:.4f} | {_ends(row['interval'])} | {row['settings']['samples']} "
            f"| {row['tokens']:,.0f} | {row['cut_off']:.1%} |"
        )
    differences = {
        dataset: difference(found[dataset, "nvfp4"], found[dataset, "bf16"])
        for dataset in sorted({row["dataset"] for row in rows})
        if all((dataset, precision) in found for precision in PRECISIONS)
    }
    lines += [
        f"{dataset}: nvfp4 - bf16 {row['difference']:+.4f}, 95 % interval {_ends(row['interval'])}"
        for dataset, row in differences.items()
    ]
    short = [{key: value for key, value in row.items() if key != "problems"} for row in rows]
    _write(out / "summary.json", {"results": short, "nvfp4 - bf16": differences})
    return "\n".join(lines)


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The difference of two results on the same problems, with its interval.

    Raises:
        EvaluationError: they have different problems or settings.
    """
    answers = [[problem["answer"] for problem in row["problems"]] for row in (a, b)]
    if answers[0] != answers[1] or a["settings"] != b["settings"]:
        raise EvaluationError(f"{a['dataset']}: the two precisions were asked other problems, or in another way")
    shares = [[p["correct"] / p["samples"] for p in row["problems"]] for row in (a, b)]
    values = [x - y for x, y in zip(*shares, strict=True)]
    return {"difference": float(np.mean(values)), "interval": list(bootstrap_interval(values))}


def vllm_engine(model: str, tensor_parallel: int, gpu_memory_utilization: float, settings: Settings) -> Engine:
    """A vLLM that answers; the precision is that of the checkpoint."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        tensor_parallel_size=tensor_parallel,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=settings.prompt_tokens + settings.max_tokens,
        seed=settings.seed,
    )

    def answer(problems: Sequence[Problem], settings: Settings) -> list[list[Response]]:
        sampling = SamplingParams(
            n=settings.samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
        )
        outputs: Any = llm.chat([problem.messages for problem in problems], sampling)
        return [
            [Response(c.text, len(c.token_ids), c.finish_reason == "stop") for c in output.outputs]
            for output in outputs
        ]

    return answer


def _ends(interval: Sequence[float]) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}"


def _versions() -> dict[str, str]:
    found = {}
    for package in ("nvfp4-qat", "verl", "vllm", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write(target: Path, row: dict[str, Any]) -> None:
    """Write JSON that appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.tmp")
    try:
        partial.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
