"""Time and memory of a whole training step: bf16, gather mode (also with what is gathered kept), module mode,
and re-quantizing at every read.

    torchrun --nproc_per_node 2 benchmarks/bench_step.py --model Qwen3-8B --tokens 2048 8192
    python benchmarks/bench_step.py --model Qwen3-8B --arms bf16 module requantize          one GPU, no FSDP2
    NCCL_P2P_DISABLE=1 torchrun --nproc_per_node 2 benchmarks/bench_step.py --slow-link ...
    torchrun --nproc_per_node 2 benchmarks/bench_step.py --model tiny --tokens 64           dry run on a CPU

A step is forward, loss, backward, gradient clipping and fused AdamW; for the QAT arms also amax, its all-reduce and
packing (`arms.Trainer`). Packing happens at the first forward after an optimizer step, so as many packings as steps
fall into a sample, the time of ``--steps`` consecutive steps after ``--lead`` more that are not timed. Where the host
is what a step waits for, and is faster now and slower then, samples of one step without a lead tell more: what is
compared is then closer in time.

The arms take turns within one process. Where all of them fit on the GPU they stay there (``--hold all``) and their
memory is told apart by counting; else each is built anew for its turn (``--hold one``). In every round the first arm
is timed once more ("bf16 again"): how far its ratio to itself is from 1 is what a difference must exceed.

What the arms claim is checked: before the first update gather mode and module mode must give the same loss to the bit,
and no QAT arm that of bf16; gather mode must gather fewer bytes than bf16. A row says so under "check"; rows with
anything but "ok" there are not drawn, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from arguments import DTYPES, model_parser
from arms import ARMS, GATHERING, Trainer, apply_arm, shard
from common import Row, Stopwatch, Traffic, World, append, environment, link, link_speed, paired, rotated, run, summary
from shapes import MODELS, make_batch, make_model
from step_profile import profile

AGAIN = "bf16 again"

Batches = dict[int, list[torch.Tensor]]


def build_parser() -> argparse.ArgumentParser:
    parser = model_parser(__doc__, "step.jsonl")
    parser.add_argument("--arms", choices=ARMS, nargs="+", help="all by default; without FSDP2 all but gather")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="per GPU and micro-batch")
    parser.add_argument("--sequence", type=int, default=2048, help="length of a sequence")
    parser.add_argument("--masters", choices=DTYPES, nargs="+", default=["bf16"], help="dtype of the parameters")
    parser.add_argument("--micro-batches", type=int, default=1, help="gradient accumulation")
    parser.add_argument("--steps", type=int, default=3, help="steps timed per round and arm")
    parser.add_argument("--lead", type=int, default=1, help="steps before these, not timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps after building an arm")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: do not clip")
    parser.add_argument("--fsdp", action=argparse.BooleanOptionalAction, help="default: with torchrun")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--again", action=argparse.BooleanOptionalAction, default=True, help="time the first arm twice")
    parser.add_argument("--hold", choices=["auto", "all", "one"], default="auto", help="arms on the GPU at a time")
    parser.add_argument("--slow-link", action="store_true", help="insist on NCCL_P2P_DISABLE=1 in the environment")
    parser.add_argument("--budget", type=float, help="seconds after which no further round begins")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also trace two steps of every arm into DIR")
    return parser


@dataclass
class Measured:
    """What was seen of an arm at one number of tokens."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    reserved: int | None = None
    retries: int = 0


class Arm:
    """One arm: builds its model and optimizer, times steps, gives its memory back."""

    def __init__(self, name: str, masters: str, args: argparse.Namespace, world: World, batches: Batches) -> None:
        self.name, self.masters, self.args, self.world, self.batches = name, masters, args, world, batches
        self.measured: dict[int, Measured] = defaultdict(Measured)
        self.loss = self.gathered = self.reduced = self.parameters = 0.0
        self._trainer: Trainer | None = None
        self._resident = 0

    def build(self) -> None:
        """Make the model, train it for a few steps, and count its loss, traffic and memory."""
        if self._trainer is not None:
            return
        args, world, first = self.args, self.world, not self.measured
        gc.collect()
        before = world.allocated()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved(world.device)
        model = make_model(args.model, args.layers, DTYPES[self.masters], world.device)
        apply_arm(self.name, model)
        shard(model, DTYPES[self.masters], world.mesh if args.fsdp else None, args.checkpointing)
        self.parameters = sum(p.numel() for p in model.parameters())
        self._trainer = Trainer(model, DTYPES[self.masters], args.fsdp, args.clip)
        if world.device.type == "cuda":  # what making the model needed is not what training needs
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(world.device)
        most = max(args.tokens)
        for i in range(args.warmup):
            if first and i == 0:
                self.loss = float(self._steps(most, 1))
            elif first and i == 1:
                with Traffic(world) as traffic:
                    self._steps(most, 1)
                self.gathered, self.reduced = world.largest(traffic.gathered, traffic.reduced)
            else:
                self._steps(most, 1)
        gc.collect()
        world.wait()
        self._resident = world.allocated() - before
        if world.device.type == "cuda":
            self.measured[most].reserved = torch.cuda.max_memory_reserved(world.device) - reserved

    def drop(self) -> None:
        """Free everything the arm holds."""
        self._trainer = None
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def time(self, tokens: int) -> None:
        """Take one sample."""
        world, measured = self.world, self.measured[tokens]
        gc.collect()
        gc.disable()  # a collection takes as long as many launches and would hit any arm
        world.reset_peak()
        others = world.allocated() - self._resident
        retries = self._retries()
        if self.args.lead:
            self._steps(tokens, self.args.lead)
        with Stopwatch(world) as watch:
            self._steps(tokens, self.args.steps)
        gc.enable()
        measured.seconds.append(watch.seconds / self.args.steps)
        measured.peak = max(measured.peak, world.peak() - others)
        measured.retries += self._retries() - retries

    def trace(self, tokens: int, file: Path) -> None:
        """Profile two steps and write what limits them."""
        self._steps(tokens, 1)
        profile(lambda: self._steps(tokens, 2), self.world, file)

    def _steps(self, tokens: int, count: int) -> torch.Tensor:
        assert self._trainer is not None
        for _ in range(count):
            loss = self._trainer.step(self.batches[tokens])
        return loss

    def _retries(self) -> int:
        if self.world.device.type == "cpu":
            return 0
        return int(torch.cuda.memory_stats(self.world.device)["num_alloc_retries"])


def make_batches(args: argparse.Namespace, world: World) -> Batches:
    """What every arm trains on, over and over: this rank's micro-batches for each number of tokens."""
    first = world.rank * args.micro_batches
    return {
        tokens: [
            make_batch(args.model, tokens, args.sequence, world.device, seed)
            for seed in range(first, first + args.micro_batches)
        ]
        for tokens in args.tokens
    }


def fits(args: argparse.Namespace, masters: str, world: World) -> bool:
    """Whether all arms fit on the GPU at once: parameters and AdamW's two averages of each, and one arm's step."""
    if world.device.type == "cpu":
        return True
    with torch.device("meta"):
        model = make_model(args.model, args.layers, torch.bfloat16, torch.device("meta"))
    parameters = sum(p.numel() for p in model.parameters())
    size = DTYPES[masters].itemsize
    ranks = world.size if args.fsdp else 1
    resident = len(args.arms) * parameters * 3 * size // ranks
    step = parameters * (size / ranks + (0 if args.fsdp else 2)) + 12e9 + max(args.tokens) * 1e6
    free, _ = torch.cuda.mem_get_info(world.device)
    needed = resident + max(step, 1.3 * parameters * size)
    return not world.largest(needed > 0.92 * free)[0]  # one answer for all ranks


def measure(args: argparse.Namespace, masters: str, world: World) -> tuple[list[Arm], str]:
    """Time every arm in turn, ``args.repeats`` rounds of all; also says how many were held at a time."""
    batches = make_batches(args, world)
    arms = [Arm(name, masters, args, world, batches) for name in args.arms]
    turns = list(arms)
    if args.again:  # far from the first: what it measures is how much changes from turn to turn
        turns.insert((len(arms) + 1) // 2, Arm(AGAIN, masters, args, world, batches))
    hold = args.hold if args.hold != "auto" else "all" if fits(args, masters, world) else "one"
    gc.collect()
    gc.freeze()  # what was imported; collections before every sample then take no time
    if hold == "all":
        for arm in arms:
            arm.build()
    start = time.perf_counter()
    for round_ in range(args.repeats):
        for arm in rotated(turns, round_):
            runner = arms[0] if arm.name == AGAIN else arm
            runner.build()
            for tokens in args.tokens:
                runner.time(tokens)
                if arm is not runner:  # the sample belongs to the second entry of the same arm
                    arm.measured[tokens].seconds.append(runner.measured[tokens].seconds.pop())
            if hold == "one":
                runner.drop()
        if args.budget and world.largest(time.perf_counter() - start)[0] > args.budget:
            break
    if args.profile:
        for arm in arms:
            arm.build()
            for tokens in args.tokens:
                arm.trace(tokens, args.profile / f"{args.model}-{masters}-{tokens}-{link(world)}-{arm.name}")
            if hold == "one":
                arm.drop()
    for arm in arms:
        arm.drop()
    gc.unfreeze()
    return sorted(turns, key=lambda arm: arm.name == AGAIN), hold


def check(arm: Arm, arms: dict[str, Arm], world: World) -> str:
    """ "ok", or what contradicts the arm's claim."""
    bf16, module = arms.get("bf16"), arms.get("module")
    if arm.name in ("bf16", AGAIN):
        return "ok"
    if bf16 is not None and arm.loss == bf16.loss:
        return "the loss is that of bf16: nothing was quantized"
    if arm.name in GATHERING:
        if module is not None and arm.loss != module.loss:
            return f"the loss is {arm.loss!r}, in module mode {module.loss!r}"
        if bf16 is not None and world.size > 1 and arm.gathered >= bf16.gathered:
            return "as many bytes were gathered as in bf16"
    return "ok"


def rows(args: argparse.Namespace, masters: str, world: World, speed: float | None) -> list[Row]:
    """Measure one kind of masters."""
    turns, hold = measure(args, masters, world)
    arms = {arm.name: arm for arm in turns}
    result = []
    for tokens in args.tokens:
        for arm in turns:
            seen, runner = arm.measured[tokens], arms[args.arms[0]] if arm.name == AGAIN else arm
            peak, reserved = runner.measured[tokens].peak, runner.measured[tokens].reserved
            peak, retries = (int(v) for v in world.largest(peak, runner.measured[tokens].retries))
            row = {
                "benchmark": "step",
                "arm": arm.name,
                "model": args.model,
                "layers": args.layers,
                "parameters": int(runner.parameters),
                "gpus": world.size,
                "sharding": "FSDP2" if args.fsdp else "none",
                "tokens": tokens,
                "sequence": min(args.sequence, tokens),
                "micro_batches": args.micro_batches,
                "masters": masters,
                "checkpointing": args.checkpointing,
                "clip": args.clip,
                "link": link(world),
                "link_gb_s": speed,
                "steps": args.steps,
                "lead": args.lead,
                "hold": hold,
                **summary("ms", [1000 * s for s in seen.seconds]),
            }
            if args.arms[0] == "bf16":
                row |= paired(seen.seconds, arms["bf16"].measured[tokens].seconds)
            row |= {
                "loss": runner.loss,
                "peak_bytes": peak if world.device.type == "cuda" else None,
                "reserved_bytes": reserved,
                "gathered_bytes": int(runner.gathered),
                "reduced_bytes": int(runner.reduced),
                "alloc_retries": retries,
                "check": check(arm, arms, world),
                **environment(world.device),
            }
            result.append(row)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.slow_link and os.environ.get("NCCL_P2P_DISABLE") != "1":
        parser.error("--slow-link: NCCL reads its settings when it starts; run NCCL_P2P_DISABLE=1 torchrun ...")
    if args.warmup < 2:
        parser.error("--warmup must be at least 2: the loss is read in the first step, the traffic in the second")
    args.layers = args.layers or MODELS[args.model][2]
    world = World.join()
    if args.fsdp is None:
        args.fsdp = world.mesh is not None
    if args.fsdp and world.mesh is None:
        parser.error("--fsdp needs torchrun, with one process too: torchrun --nproc_per_node 1 ...")
    if world.size > 1 and not args.fsdp:
        parser.error("--no-fsdp is for one process")
    args.arms = args.arms or [arm for arm in ARMS if args.fsdp or arm not in GATHERING]
    if GATHERING & set(args.arms) and not args.fsdp:
        parser.error("gather mode needs FSDP2: start with torchrun")
    if "bf16" in args.arms:  # the baseline comes first
        args.arms.sort(key=lambda arm: arm != "bf16")
    else:
        args.again = False
    args.tokens.sort()
    speed, ok = link_speed(world), True
    for masters in args.masters:
        measured = rows(args, masters, world, speed)
        ok = ok and all(row["check"] == "ok" for row in measured)
        if world.rank == 0:
            append(args.out, measured)
            print(table(measured), flush=True)
    return 0 if ok else 1


def table(measured: list[Row]) -> str:
    """The rows for a person to read."""
    lines = [f"{'arm':<12}{'tokens':>7}{'ms':>9}{'ratio':>8}{'(range)':>16}{'peak GiB':>10}{'gathered GB':>13}  check"]
    for row in measured:
        ratios = row.get("ratio_samples", [float("nan")])
        spread = f"({min(ratios):.3f}-{max(ratios):.3f})"
        lines.append(
            f"{row['arm']:<12}{row['tokens']:>7}{row['ms']:>9.1f}{row.get('ratio', float('nan')):>8.3f}{spread:>16}"
            f"{(row['peak_bytes'] or 0) / 2**30:>10.2f}{row['gathered_bytes'] / 1e9:>13.2f}  {row['check']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
