"""What a training step costs the host: bf16 against gather mode where the GPU never is what a step waits for.

    python benchmarks/bench_host.py                                                      one GPU
    python benchmarks/bench_host.py --layers 2 --repeats 2                               dry run on a CPU
    python benchmarks/bench_host.py --profile DIR                                        and where Python spends it

With few tokens a step takes as long as Python needs to launch it, and then the ratio of `bench_step` between several
processes is mostly noise: each waits for the slowest of all. Here it is one process, models as deep as those of
`bench_step` but narrow, and FSDP2 over ``--ranks`` ranks of which only this one exists: collectives cost the host what
they do, and bring nothing (PyTorch's ``fake`` process group). Everything else is real, kernels too. A row also says how
long the device still had to do when the host was done: near 0, the host was what took the time.
"""

from __future__ import annotations

import cProfile
import gc
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import model_parser
from arms import ARMS, Trainer, apply_arm, shard
from common import Row, World, append, environment, paired, rotated, run, summary
from shapes import MODELS, make_batch, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

AGAIN = "bf16 again"
TOKENS = 16


class OwnPart(DefaultReduceScatter):
    """A reduce-scatter that keeps this rank's part of its own gradients, where nobody else has any."""

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(input_tensor.view(-1)[: output_tensor.numel()])


def join(ranks: int) -> World:
    """Rank 0 of some, alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return World(0, ranks, device, init_device_mesh(device.type, (ranks,)))


class Arm:
    """One arm, trained: seconds of the host and of the device for some steps."""

    def __init__(self, name: str, args: Any, world: World) -> None:
        self.device = world.device
        model = make_model(args.model, args.layers, torch.bfloat16, world.device)
        apply_arm(name, model)
        shard(model, torch.bfloat16, world.mesh, checkpointing=True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(OwnPart())
        self._trainer = Trainer(model, torch.bfloat16, sharded=True, clip=1.0)
        self._batches = [make_batch(args.model, TOKENS, TOKENS, world.device, seed=0)]
        self.run(3)

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds until the host was done with ``steps`` steps, and then until the device was."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            loss = self._trainer.step(self._batches)
        launched = time.perf_counter()
        self._wait()
        end = time.perf_counter()
        if not bool(loss.isfinite()):
            raise SystemExit("the loss is not finite: nothing that was timed means anything")
        return launched - start, end - launched

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(args: Any, world: World) -> list[Row]:
    arms = {name: Arm(name, args, world) for name in args.arms}
    turns = [*arms, *([AGAIN] if "bf16" in arms else [])]
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    after: dict[str, list[float]] = {name: [] for name in turns}
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection takes as long as many launches and would hit any arm
    for round_ in range(args.repeats):
        for name in rotated(turns, round_):
            arm = arms["bf16" if name == AGAIN else name]
            host, device = arm.run(args.steps)
            seconds[name].append((host + device) / args.steps)
            after[name].append(device / args.steps)
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
        for name, arm in arms.items():
            with cProfile.Profile() as profile:
                arm.run(5)
            profile.dump_stats(args.profile / f"{args.model}-{name}.prof")
    gc.enable()
    gc.unfreeze()
    return [
        {
            "benchmark": "host", "arm": name, "model": args.model, "layers": args.layers, "ranks": world.size,
            "tokens": TOKENS, "steps": args.steps, **summary("ms", [1000 * s for s in seconds[name]]),
            **summary("device_after_ms", [1000 * s for s in after[name]]),
            **paired(seconds[name], seconds[turns[0]]), **environment(world.device),
        }
        for name in turns
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__, "host.jsonl")
    parser.set_defaults(model="narrow", repeats=60)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=["bf16", "gather", "keep"], help="the first is 1")
    parser.add_argument("--ranks", type=int, default=4, help="that FSDP2 believes in")
    parser.add_argument("--steps", type=int, default=1, help="steps timed per round and arm")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also profile five steps of every arm into DIR")
    args = parser.parse_args(argv)
    args.layers = args.layers or MODELS[args.model][2]
    rows = measure(args, join(args.ranks))
    append(args.out, rows)
    for row in rows:
        low, high = min(row["ratio_samples"]), max(row["ratio_samples"])
        print(
            f"{row['model']:<12}{row['arm']:<12}{row['ms']:>9.2f} ms{row['device_after_ms']:>8.2f} ms after"
            f"{row['ratio']:>8.3f} ({low:.3f}-{high:.3f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run(main)
