"""Measure the weights that runs kept: ``python experiments/measure.py CONFIG --out DIR`` (`run` calls it).

Two engines are started, one that holds 4-bit weights and one that holds bf16, and are given one set of kept weights
after the other. Rows are appended to ``measured-<kind>-s<seed>.jsonl`` as soon as they are known; what is there already
is not measured again.

``paired``
    The 4-bit engine samples responses. These tokens are scored by it, by the bf16 engine that holds the *dequantized*
    weights, and by the trainer, which computes with the same values. A row holds for every response the sum of its
    tokens' k3 between trainer and each engine: ``k3_nvfp4`` and ``k3_bf16`` of whole sequences that are scored, and
    ``k3_sampled`` of what the 4-bit engine said of each token when it sampled it, one after the other with a KV cache.
    The ratio of the first two is what 4-bit kernels add to the mismatch that bf16 has. The bf16 engine is given the
    same prompts and the same seed then: ``k3_bf16_sampled`` is for its own responses, of ``lengths_bf16`` tokens, what
    ``k3_sampled`` is for the others. ``k3_engines`` and ``apart`` hold the two engines' scores of the first tokens
    against each other: a response's sum of k3, bf16 over 4-bit, and its largest difference of log-probabilities.
    `variants` says what else either side may hold, and ``differs`` how much of it is not the contract's.
``evaluation``
    The weights after the last step: in bf16, in 4 bits, and in 4 bits with attention in bf16 where a run was trained
    like that. All runs are asked the same problems; ``right`` holds for each how many responses are right.

All runs of an experiment begin with the same weights: those before the first step are measured once, as the first
run's. A row also holds `nvfp4_qat.machine.circumstances`, and in ``weights`` how the weights' digest begins: where a
run has been made again, its rows are measured again. Weights are kept where the run was made: `unmeasured` says what
cannot be measured any more without them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from experiment import Experiment, Run
from pool import follow
from rows import read
from safetensors.torch import load_file
from torch import Tensor
from variants import VARIANTS, Variant, differences, sides

import nvfp4_qat as nq
from nvfp4_qat.alone import alone
from nvfp4_qat.demo_config import DemoConfig
from nvfp4_qat.engine import Sample, SamplingEngine
from nvfp4_qat.machine import circumstances
from nvfp4_qat.models import load_model
from nvfp4_qat.policy_update import response_logprobs
from nvfp4_qat.rl import arm_plan, prepare_arm, start_engine, stop_ids, trainer_device
from nvfp4_qat.rollouts import Graded, collate, right_answers, stable_seed
from nvfp4_qat.runlog import kept_weights, load_kept
from nvfp4_qat.tasks import encode_prompts, make_task
from nvfp4_qat.tensor_digest import digest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import append  # noqa: E402

PROBLEMS, SAMPLES = 64, 4
"""Responses of a paired row: to so many problems, so many each."""

EVALUATED, EVALUATED_SAMPLES = 512, 8
"""The same of an evaluation, where a task has that many."""

KINDS = ("paired", "evaluation")
"""Of rows. Those of a seed's runs are in a file for each, so that they can be measured at the same time."""

FFN = "nvfp4-ffn"
"""The precision of an engine that leaves attention in bf16."""

VARIANT_STEPS = 3
"""On how many of a run's kept weights other contracts are tried: the first, the last, and between."""


class Bench:
    """A trainer and engines, given the same weights again and again.

    Args:
        cfg: of any run of the experiment.
        ffn: whether an engine is wanted that leaves attention in bf16.
    """

    def __init__(self, cfg: DemoConfig, ffn: bool) -> None:
        loaded = load_model(cfg.model, seed=cfg.weights_seed)
        self.cfg, self.tokenizer = cfg, loaded.tokenizer
        self.task = make_task(cfg.task, cfg.model)
        self.device = trainer_device(cfg)
        self.model = loaded.model.to(self.device)
        self.plans = {"bf16": arm_plan(self.model, "bf16"), "nvfp4": arm_plan(self.model, "noqat")}
        if ffn:
            other = load_model(cfg.model, seed=cfg.weights_seed).model
            prepare_arm(other, "qat-ffn")
            self.plans[FFN] = arm_plan(other, "qat-ffn")
        self._end = contextlib.ExitStack()
        stops = stop_ids(self.model, self.tokenizer)
        self.engines: dict[str, SamplingEngine] = {}
        try:
            for name, plan in self.plans.items():
                engine = start_engine(self.model, plan, stops, cfg)
                self._end.callback(engine.close)
                self.engines[name] = engine
        except BaseException:
            self._end.close()
            raise

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def weights(self, path: Path) -> dict[str, Tensor]:
        """Kept weights, where the trainer computes."""
        return {name: tensor.to(self.device) for name, tensor in load_file(path).items()}

    def paired(self, masters: Mapping[str, Tensor], variant: Variant, key: str) -> dict[str, Any]:
        """One paired row's numbers; see the module.

        Args:
            masters: kept weights.
            variant: what either side holds of them.
            key: seeds problems and sampling.
        """
        both = sides(masters, self.plans["nvfp4"], variant)
        contract = sides(masters, self.plans["nvfp4"], VARIANTS["contract"])
        load_kept(self.model, both.trainer)
        self.engines["nvfp4"].load(both.stream())
        self.engines["bf16"].load(iter(both.trainer.items()))
        problems = self.task.problems(PROBLEMS, f"paired/{key}")
        asked = (
            encode_prompts(self.tokenizer, problems),
            SAMPLES,
            self.task.max_new_tokens,
            stable_seed(f"paired/{key}"),
        )
        samples = _flat(self.engines["nvfp4"].generate(*asked))
        trainer = self._trainer(samples)
        nvfp4, bf16 = (self.engines[name].score(samples) for name in ("nvfp4", "bf16"))
        own = _flat(self.engines["bf16"].generate(*asked))
        return {
            "tokens": sum(len(sample.response) for sample in samples),
            "k3_nvfp4": _k3_sums(trainer, nvfp4),
            "k3_bf16": _k3_sums(trainer, bf16),
            "k3_sampled": _k3_sums(trainer, [sample.logprobs for sample in samples]),
            "k3_bf16_sampled": _k3_sums(self._trainer(own), [sample.logprobs for sample in own]),
            "k3_engines": _k3_sums(bf16, nvfp4),
            "apart": _apart(bf16, nvfp4),
            "lengths": [len(sample.response) for sample in samples],
            "lengths_bf16": [len(sample.response) for sample in own],
            "samples": SAMPLES,
            "differs": differences(both, contract),
        }

    @torch.no_grad()
    def _trainer(self, samples: Sequence[Sample]) -> list[list[float]]:
        """What the trainer gives the same tokens."""
        batch = collate([[Graded(sample, 0.0, True) for sample in samples]], self.tokenizer.pad_token_id)
        rows: list[list[float]] = []
        for start in range(0, len(samples), self.cfg.micro_batch):
            part = batch.rows(slice(start, start + self.cfg.micro_batch)).to(self.device)
            rows += response_logprobs(self.model, part).tolist()
        return [row[: len(sample.response)] for row, sample in zip(rows, samples, strict=True)]

    def evaluation(self, masters: Mapping[str, Tensor], precision: str) -> dict[str, Any]:
        """One evaluation's numbers; ``precision`` is one of `precisions`."""
        engine, plan = self.engines[precision], self.plans[precision]
        stream = iter(masters.items()) if precision == "bf16" else sides(masters, plan, VARIANTS["contract"]).stream()
        engine.load(stream)
        right, length = right_answers(engine, self.task, self.tokenizer, EVALUATED, EVALUATED_SAMPLES)
        return {"samples": EVALUATED_SAMPLES, "right": right, "response_length": length}


def _flat(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def _k3_sums(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> list[float]:
    """For each response the sum over its tokens of ``ρ - 1 - log ρ``, with ρ the one's chance over the other's."""
    sums = []
    for a, b in zip(one, other, strict=True):
        ratio = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
        sums.append(_short(float((torch.expm1(ratio) - ratio).sum())))
    return sums


def _apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> list[float]:
    """For each response the largest difference of a token's log-probabilities."""
    return [
        _short(max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0))
        for a, b in zip(one, other, strict=True)
    ]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def weights_word(masters: Mapping[str, Tensor]) -> str:
    """Which weights kept ones are: what begins their `digest`."""
    return digest(masters)[:16]


def measured_file(out: Path, seed: int, kind: str) -> Path:
    """Where the rows of a kind and a seed's runs are."""
    return out / f"measured-{kind}-s{seed}.jsonl"


def measure(experiment: Experiment, out: Path, runs: Sequence[Run], kinds: Sequence[str] = KINDS) -> None:
    """Append the rows that are missing.

    Args:
        experiment: says what is measured.
        out: its directory, with the runs' weights.
        runs: which to look at.
        kinds: which rows.

    Raises:
        UserError: another process is measuring.
    """
    files = [measured_file(out, seed, kind) for seed in sorted({run.seed for run in runs}) for kind in kinds]
    with contextlib.ExitStack() as held:
        for file in files:
            out.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
            held.enter_context(alone(file))
        done = {_identity(row): row.get("weights") for file in files for row in read(file)}  # the newest row's
        there = cache(lambda path: weights_word(load_file(path)))
        rows = [(run, row) for run in runs for row in _rows(experiment, out, run) if row["kind"] in kinds]
        known = [_identity(row) in done and done[_identity(row)] == there(row["path"]) for _, row in rows]
        _measure(experiment, out, [each for each, is_known in zip(rows, known, strict=True) if not is_known])


def _measure(experiment: Experiment, out: Path, todo: Sequence[tuple[Run, dict[str, Any]]]) -> None:
    if not todo:
        return
    cfg = experiment.config(todo[0][0], out)
    where = circumstances(trainer_device(cfg), ROOT)
    with Bench(cfg, any(row.get("precision") == FFN for _, row in todo)) as bench:
        for path, several in groupby(todo, lambda item: item[1]["path"]):
            masters = bench.weights(Path(path))
            told = {"weights": weights_word(masters), **where}
            for run, row in several:
                del row["path"]
                if row["kind"] == "paired":
                    numbers = bench.paired(masters, VARIANTS[row["variant"]], f"{row['run']}/{row['step']}")
                else:
                    numbers = bench.evaluation(masters, row["precision"])
                append(measured_file(out, run.seed, row["kind"]), [{**row, **numbers, **told}])


def unmeasured(experiment: Experiment, out: Path, runs: Sequence[Run]) -> list[str]:
    """Runs that are to be measured, have not been, and whose weights are not where they were kept.

    Args:
        experiment: says what is measured.
        out: its directory.
        runs: which have made all their steps.
    """
    found = []
    for run in runs:
        cfg = experiment.config(run, out)
        if not cfg.keep_every or cfg.steps in kept_weights(out / run.key, experiment.arm(run.name)):
            continue
        rows = {kind: read(measured_file(out, run.seed, kind)) for kind in KINDS}
        kinds = KINDS if run.name in (*experiment.paired, experiment.variants) else ("evaluation",)
        last = {kind for kind in KINDS for row in rows[kind] if (row["run"], row["step"]) == (run.key, cfg.steps)}
        if not last.issuperset(kinds):
            found.append(run.key)
    return found


def precisions(experiment: Experiment) -> list[str]:
    """What weights are evaluated in: by plan of the `Bench`."""
    ffn = any(experiment.arm(name) == "qat-ffn" for name in experiment.runs)
    return ["bf16", "nvfp4", *([FFN] if ffn else [])]


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["run"], row["step"], row.get("variant"), row.get("precision")


def _rows(experiment: Experiment, out: Path, run: Run) -> Iterator[dict[str, Any]]:
    """What is to be measured of a run, and the weights it is measured on."""
    kept = kept_weights(out / run.key, experiment.arm(run.name))
    if not kept:
        return

    def row(kind: str, step: int, **more: str) -> dict[str, Any]:
        return {"kind": kind, "run": run.key, "step": step, **more, "path": str(kept[step])}

    seed = experiment.seeds[0]
    first = 0 in kept and run == Run(next(iter(experiment.runs)), seed)
    for step in (*([0] if first else []), *([max(kept)] if max(kept) > 0 else [])):
        for precision in precisions(experiment):
            yield row("evaluation", step, precision=precision)
    if run.name in experiment.paired:
        for step in kept:
            if step > 0 or run == Run(experiment.paired[0], seed):
                yield row("paired", step, variant="contract")
    if run.name == experiment.variants:
        steps = list(kept)
        chosen = [steps[round(i * (len(steps) - 1) / (VARIANT_STEPS - 1))] for i in range(VARIANT_STEPS)]
        for step in dict.fromkeys(chosen):
            for variant in VARIANTS:
                measured = variant == "contract" and run.name in experiment.paired
                if not measured and (step > 0 or run.seed == seed):
                    yield row("paired", step, variant=variant)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the weights that the runs of an experiment kept.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--runs", default="")
    parser.add_argument("--seeds", default="")
    parser.add_argument("--kinds", default=",".join(KINDS))
    args = parser.parse_args(arguments)
    follow()
    try:
        experiment = Experiment.load(args.config)
        names = tuple(filter(None, args.runs.split(","))) or None
        seeds = tuple(int(seed) for seed in args.seeds.split(",") if seed) or None
        measure(experiment, args.out, experiment.chosen(names, seeds), args.kinds.split(","))
    except nq.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
