"""Reinforcement learning's round at real size: training steps, sync, generation, with Qwen3-30B-A3B on four GPUs.

    torchrun --nproc_per_node 4 experiments/real_size.py --arm nvfp4
    torchrun --nproc_per_node 4 experiments/real_size.py --arm bf16
    torchrun --nproc_per_node 4 experiments/real_size.py --budget-only           what would be held, and no more
    torchrun --nproc_per_node 2 experiments/real_size.py --tiny --engine none    dry run on a CPU

Trainer and engine are on the same GPUs. The trainer is FSDP2 with random weights (`real_size_trainer`), the engine a
vLLM over all of them (`real_size_engine`), which sleeps while the trainer computes. In the arm ``nvfp4`` the trainer is
in gather mode and the engine holds the packed weights that it is sent; in ``bf16`` the trainer is without QAT, and the
engine gets its tensors in bf16. Everything else is equal. The order:

1. The bytes that a GPU is expected to hold (`real_size_budget`); what does not fit ends here.
2. The engine, with dummy weights. The trainer. The first sync, which finds out where everything goes, then tokens; a
   second sync, which proves quicker ways of processing.
3. The engine sleeps. A first step; a step whose bytes on the wire are counted; steps that are taken apart.
4. Rounds: whole steps, wake up the weights, sync, wake up the KV cache, generate, sleep.
5. Syncs of weights that rank 0 has gathered before (``nvfp4``), and of those that are packed on their ranks;
   `Rollout.verify` with the model; how far trainer and engine are apart (`real_size_scores`).

Rows are appended to ``--out`` as soon as they are known, each with ``what`` it is of; a run that ends early has left
those before. Times are those of the slowest rank; ``seconds`` of a sync is all of it, packing included. Bytes are of
the GPU that holds most. One rank that fails ends all (`real_size_ranks`).

Deliberately missing: data, rewards and a loss of reinforcement learning (the loss is the cross-entropy of random
tokens), and engines on other GPUs than the trainer's.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nvfp4_qat as nq
from nvfp4_qat.engine_memory import GIB, write_config
from nvfp4_qat.rollout import Rollout
from nvfp4_qat.start_folder import start_folder, start_word

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from common import Row, Stopwatch, World, summary  # noqa: E402
from real_size_budget import Bare, Budget, expected  # noqa: E402
from real_size_engine import Engine, Options  # noqa: E402
from real_size_ranks import Guard, Team, limit, run  # noqa: E402
from real_size_rows import Rows, allocator, release, used  # noqa: E402
from real_size_scores import Sampled, mismatch  # noqa: E402
from real_size_trainer import DTYPES, PHASES, Experts, Parts, configuration, make, plain_stream  # noqa: E402
from shapes import make_batch  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "real_size.jsonl"

QUICK = 3
"""The first sync in which quick ways of processing are used."""

TINY: dict[str, Any] = {
    "model": "tiny-moe", "tokens": 64, "sequence": 32, "steps": 1, "divided": 1, "rounds": 2, "resyncs": 1,
    "sequences": 4, "scored": 3, "prompt": 4, "new_tokens": 4, "length": 64, "batched_tokens": 64, "kv_gib": 0.001,
}  # fmt: skip
"""Defaults of a dry run."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=["nvfp4", "bf16"], default="nvfp4", help="of trainer and engine")
    parser.add_argument("--model", choices=["Qwen3-30B-A3B", "tiny-moe"], default="Qwen3-30B-A3B")
    parser.add_argument("--layers", type=int, help="decoder layers; by default the original's")
    parser.add_argument("--tiny", action="store_true", help="a dry run: other defaults, for a CPU")
    parser.add_argument("--masters", choices=DTYPES, default="fp32", help="dtype of masters and optimizer state")
    parser.add_argument("--tokens", type=int, default=4096, help="per GPU and step")
    parser.add_argument("--sequence", type=int, default=2048, help="length of the trainer's sequences")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--divided", type=int, default=3, help="steps that are timed phase by phase")
    parser.add_argument("--rounds", type=int, default=3, help="of steps, sync and generation")
    parser.add_argument("--steps", type=int, default=2, help="whole steps in a round")
    parser.add_argument("--resyncs", type=int, default=3, help="more syncs at the end, of each kind")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="compare all weights")
    parser.add_argument("--scored", type=int, default=64, help="sequences whose tokens trainer and engine both score")
    parser.add_argument("--seed", type=int, default=0)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=["vllm", "none"], default="vllm")
    engine.add_argument("--tensor-parallel", type=int, help="its GPUs; by default all")
    engine.add_argument("--expert-parallel", action="store_true", help="whole experts on each GPU")
    engine.add_argument("--sleep", type=int, choices=[0, 1, 2], default=2, help="level, while the trainer computes")
    engine.add_argument("--kv-gib", type=float, default=16.0, help="of KV cache on each GPU")
    engine.add_argument("--sequences", type=int, default=256, help="that are generated at once")
    engine.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    engine.add_argument("--new-tokens", type=int, default=128, help="generated for each prompt")
    engine.add_argument("--length", type=int, default=2048, help="most tokens of a sequence")
    engine.add_argument("--batched-tokens", type=int, default=8192, help="most tokens of a forward")
    engine.add_argument("--eager", action="store_true", help="without CUDA graphs")
    engine.add_argument("--engine-options", type=json.loads, default={}, metavar="JSON", help="more of vllm.LLM's")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--budget-only", action="store_true", help="say what would be held, and end")
    limits.add_argument("--over-budget", action="store_true", help="run although it is not expected to fit")
    limits.add_argument("--gpu-gib", type=float, default=139.8, help="of a GPU, where there is none to ask")
    limits.add_argument("--time", type=float, default=400.0, help="seconds after which no further round begins")
    limits.add_argument("--limit", type=float, default=560.0, help="seconds after which the run is ended")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file the rows are appended to")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_args(argv).tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args(argv)


class Experiment:
    """All of a run, after the budget.

    Args:
        args: of the command line.
        team: the ranks.
        rows: what is measured.
        bare: the model on the meta device, in bf16, and what of it is 4-bit in the arm "nvfp4".
        budget: what is expected.
    """

    def __init__(self, args: argparse.Namespace, team: Team, rows: Rows, bare: Bare, budget: Budget) -> None:
        self.args, self.team, self.world, self.rows, self.bare, self.budget = args, team, team.world, rows, bare, budget
        self.start = time.perf_counter()
        self.engine: Engine | None = None
        """On rank 0, where there is one."""
        self.syncs: list[float] = []
        self.prompts = _prompts(args)

    def run(self) -> None:
        """Do everything."""
        guard = Guard() if self.team.leads and self.args.engine == "vllm" else None
        self.start_engine()
        self.build()
        self.sync()
        self.generate()
        self.sync()
        self.sleep()
        self.train()
        for number in range(self.args.rounds):
            if self.world.largest(time.perf_counter() - self.start > self.args.time)[0]:
                break
            if number:
                self.sleep()
            self.round(number + 1)
        self.finish()
        self.team.first(self.close)
        if guard is not None:
            guard.release()

    def close(self) -> None:
        """End the engine."""
        if self.engine is not None:
            self.engine.close()

    def start_engine(self) -> None:
        """Start it on rank 0 while nothing else is on the GPUs."""
        if self.args.engine == "none":
            return
        release(self.world)
        before = used(self.world)

        def action() -> tuple[float, list[Row]]:
            start = time.perf_counter()
            model, plan = self.bare.model, self.bare.plan if self.args.arm == "nvfp4" else self.bare.plan.unquantized()
            with start_folder(start_word(model.config, plan)) as directory:  # so that what vLLM compiled is found again
                write_config(directory, model, plan if plan.quantized else None)
                self.engine = Engine(directory, options(self.args, self.world))
            return time.perf_counter() - start, self.engine.memory()

        seconds, memory = self.team.first(action)
        self.rows.add(
            "engine", seconds=round(seconds, 2), workers=memory, options=options(self.args, self.world).row(),
            device_used_before_bytes=before, device_used_bytes=used(self.world),
        )  # fmt: skip

    def build(self) -> None:
        """Make the trainer, and connect with the engine."""
        args, world = self.args, self.world
        before, start = used(world), time.perf_counter()
        config = configuration(args.model, args.layers)
        model, self.plan = make(config, args.arm, args.masters, world, args.seed)
        self.trainer = Parts(model, args.masters, world, args.clip)
        world.wait()
        seconds = world.largest(time.perf_counter() - start)[0]
        self.batch: Tensor = make_batch(args.model, args.tokens, args.sequence, world.device, world.rank)
        self.rollout = Rollout.connect([] if self.engine is None else self.engine.llm, self.plan)
        parameters = sum(p.numel() for p in model.parameters())
        self.rows.add(
            "build", seconds=round(seconds, 2), parameters=parameters, quantized=len(self.plan.quantized),
            **self._most(self.trainer.held()), device_used_before_bytes=before, device_used_bytes=used(world),
        )  # fmt: skip

    def stream(self) -> Iterator[tuple[str, Tensor]] | None:
        """What a sync sends, where it is not the packed weights."""
        return plain_stream(self.trainer.model, self.plan) if self.args.arm == "bf16" else None

    def sync(self, **more: Any) -> float:
        """Send the weights to the engine; seconds."""
        with Stopwatch(self.world) as watch:
            report = self.rollout.sync(self.trainer.model, self.stream())
            self.team.first(lambda: None)  # on the CPU: ranks that are done leave their GPUs to the engine
        self.syncs.append(seconds := float(watch.seconds))
        self.rows.add(
            "sync", number=len(self.syncs), seconds=round(seconds, 4), bytes=report.bytes, tensors=report.tensors,
            extra_bytes=report.extra_bytes, version=report.version, device_used_bytes=used(self.world), **more,
        )  # fmt: skip
        return seconds

    def sleep(self) -> None:
        """Let the engine free its memory."""
        release(self.world)
        seconds = self._on_engine(lambda: self.rollout.sleep(self.args.sleep))
        if seconds is None:
            return
        now = used(self.world)
        train = next(rows for name, rows in self.budget.moments.items() if name.startswith("train"))
        there = {"masters", "packed_shards", "contexts and NCCL", "engine, asleep too"}
        there |= {"optimizer"} if self.trainer.optimizer.state else set()
        peak = now + sum(value for name, value in train.items() if name not in there)
        self.rows.add("sleep", seconds=round(seconds, 3), device_used_bytes=now, expected_peak_bytes=round(peak))
        if self.world.device.type == "cuda" and peak > self.budget.total and not self.args.over_budget:
            raise SystemExit(f"{now / GIB:.1f} GiB are in use, and a step needs more than is left: see --over-budget")

    def train(self) -> None:
        """A first step, one whose traffic is counted, and steps that are taken apart."""
        trainer, world, batch = self.trainer, self.world, self.batch
        world.reset_peak()
        with Experts(trainer.model) as experts, Stopwatch(world) as watch:
            loss = float(trainer.step([batch]))
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of the first step is {loss}")
        peak = int(world.largest(world.peak())[0])
        self.rows.add(
            "first step", seconds=round(watch.seconds, 3), loss=loss, peak_bytes=peak, device_used_bytes=used(world),
            experts=experts.row(),
        )  # fmt: skip
        release(world)
        self.rows.add("traffic", **trainer.traffic(batch), **trainer.gathered())
        seconds: dict[str, list[float]] = {}
        for _ in range(self.args.divided):
            taken, memory, loss = trainer.divided(batch)
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
        phases = [name for name in PHASES if name in seconds]
        medians = {k: v for name in phases for k, v in summary(f"{name}_seconds", seconds[name], 4).items()}
        self.rows.add("phases", **medians, loss=loss)
        self.rows.add("memory", **memory, device_used_bytes=used(world), **allocator(world))

    def round(self, number: int) -> None:
        """Train, send the weights, generate."""
        seconds = []
        for _ in range(self.args.steps):
            with Stopwatch(self.world) as watch:
                loss = self.trainer.step([self.batch])
            seconds.append(watch.seconds)
        self.rows.add(
            "steps", round=number, **summary("seconds", seconds, 4), loss=float(loss),
            device_used_bytes=used(self.world), **allocator(self.world),
        )  # fmt: skip
        release(self.world)
        weights = self._on_engine(lambda: self.rollout.wake_up(["weights"]))
        self.sync(round=number, wake_weights_seconds=weights)
        self.wake_cache(round=number)

    def wake_cache(self, **more: Any) -> None:
        """Let the engine go on, and generate."""
        release(self.world)
        cache = self._on_engine(lambda: self.rollout.wake_up(["kv_cache"]))
        self.generate(wake_kv_cache_seconds=cache, **more)

    def generate(self, **more: Any) -> None:
        """Let the engine sample, and say what its workers hold."""
        if self.args.engine == "none":
            return

        def action() -> tuple[float, int, list[Row]]:
            assert self.engine is not None
            return *self.engine.generate(self.prompts, self.args.new_tokens), self.engine.memory()

        seconds, tokens, memory = self.team.first(action)
        self.rows.add(
            "generate", seconds=round(seconds, 3), sequences=len(self.prompts), new_tokens=tokens,
            tokens_per_second=round(tokens / seconds, 1), workers=memory, device_used_bytes=used(self.world), **more,
        )  # fmt: skip

    def finish(self) -> None:
        """More syncs, all medians, and whether the engine has the model's weights."""
        rounds = self.syncs[QUICK - 1 :]
        gathered = self.hand_over() if self.args.arm == "nvfp4" else []
        packed = [self.sync(again=True) for _ in range(self.args.resyncs)]
        kinds = {"seconds": rounds, "from_packed_seconds": packed, "from_gathered_seconds": gathered}
        found = {k: v for name, samples in kinds.items() if samples for k, v in summary(name, samples, 4).items()}
        self.rows.add("syncs", **found)
        if self.args.verify:
            with Stopwatch(self.world) as watch:
                self.rollout.verify(self.trainer.model, self.stream())
            self.rows.add("verify", seconds=round(watch.seconds, 2), check="ok")
        if self.args.engine == "vllm" and self.args.scored:
            self.rows.add("mismatch", **mismatch(self.trainer.model, self.team, self.sample))

    def sample(self) -> Sampled:
        """Answers whose tokens both sides score."""
        assert self.engine is not None
        return self.engine.sample(self.prompts[: self.args.scored], self.args.new_tokens)

    def hand_over(self) -> list[float]:
        """Seconds of syncs of weights that rank 0 has packed and whole before; the KV cache makes room for them.

        The other ranks wait on the CPU, so these take what the way into the engine takes, and no more.
        """
        if self.args.engine == "none":
            return []
        self.sleep()
        self._on_engine(lambda: self.rollout.wake_up(["weights"]))
        model = self.trainer.model
        weights = list(nq.packed_weights(model, layout="fused", ranks=0))

        def action() -> float:
            return self.rollout.sync(model, weights).seconds

        seconds = [self.team.first(action) for _ in range(self.args.resyncs)]
        weights.clear()
        self.wake_cache()
        return seconds

    def _on_engine(self, action: Callable[[], None]) -> float | None:
        """Seconds of something that rank 0 does with an engine that sleeps at times; None: there is none."""
        if self.args.engine == "none" or not self.args.sleep:
            return None

        def timed() -> float:
            start = time.perf_counter()
            action()
            return time.perf_counter() - start

        return round(self.team.first(timed), 3)

    def _most(self, values: Row) -> Row:
        return {name: int(v) for name, v in zip(values, self.world.largest(*values.values()), strict=True)}


def options(args: argparse.Namespace, world: World) -> Options:
    """How the engine is started."""
    return Options(
        tensor_parallel=args.tensor_parallel or world.size, kv_bytes=round(args.kv_gib * GIB),
        sequences=args.sequences, length=args.length, batched_tokens=args.batched_tokens, sleep=args.sleep > 0,
        expert_parallel=args.expert_parallel, eager=args.eager, more=args.engine_options,
    )  # fmt: skip


def _prompts(args: argparse.Namespace) -> list[list[int]]:
    words = configuration(args.model, args.layers).vocab_size
    generator = torch.Generator().manual_seed(args.seed)
    found: list[list[int]] = torch.randint(words, (args.sequences, args.prompt), generator=generator).tolist()
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    limit(args.limit)
    world = World.join()
    if world.mesh is None:
        raise SystemExit("start it with torchrun, with one process too: torchrun --nproc_per_node 1 ...")
    bare = Bare.of(args)
    args.layers = bare.model.config.num_hidden_layers
    budget = expected(args, world, bare)
    if world.rank == 0:
        print(budget.table(), flush=True)
    if args.budget_only:
        return 0
    if not (budget.fits or args.over_budget):
        raise SystemExit(budget.refusal())
    rows = Rows(args, world)
    rows.add("budget", **budget.row())
    Experiment(args, Team(world, args.limit), rows, bare, budget).run()
    return 0


if __name__ == "__main__":
    run(functools.partial(main, None))
