"""Time and bytes of getting a sharded model's weights out for a rollout engine.

    torchrun --nproc_per_node 2 benchmarks/bench_sync.py --model Qwen3-8B --layers 36
    torchrun --nproc_per_node 2 benchmarks/bench_sync.py --model tiny       dry run on a CPU

Compared are `nvfp4_qat.packed_weights` of a model in gather mode, in both layouts, for every rank and for rank 0 alone,
and what one does without it, on the same weights under plain FSDP2: bf16 tensors by ``full_tensor()`` one after the
other, or by FSDP2's own all-gather, unit by unit; and ``full_tensor()`` followed by `QATQuantizer`. The streams are
consumed and dropped; sending them on is not part of the time.

``received_bytes`` is what a rank gets from the others, ``stream_bytes`` what the stream holds, ``extra_bytes`` the peak
above the two models. The packed streams are compared with the quantizer's, tensor by tensor, by name, shape and the sum
of their bytes; a difference is in the row under "check", and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from arguments import DTYPES, model_parser
from arms import apply_arm, shard
from common import Row, Stopwatch, Traffic, World, append, environment, link, link_speed, paired, rotated, run, summary
from shapes import MODELS, make_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import nvfp4_qat as nq

Stream = Iterable[tuple[str, Tensor]]
BASELINE = "bf16, full_tensor()"


def build_parser() -> argparse.ArgumentParser:
    parser = model_parser(__doc__, "sync.jsonl")
    parser.add_argument("--masters", choices=DTYPES, default="bf16", help="dtype of the parameters")
    parser.add_argument("--packed", action=argparse.BooleanOptionalAction, default=True, help="measure packed_weights")
    return parser


@dataclass
class Method:
    """A way to the weights, and what was seen of it."""

    name: str
    layout: str
    ranks: str
    stream: Callable[[], Stream]
    seconds: list[float] = field(default_factory=list)
    extra: int = 0
    received: int = 0
    stream_bytes: int = 0
    content: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def look(self, world: World) -> None:
        """Run once, untimed: what comes out, and how many bytes travel for it."""
        with Traffic(world) as traffic:
            for name, tensor in self.stream():
                self.stream_bytes += tensor.nbytes
                if self.name != BASELINE:
                    self.content[name] = (tensor.dtype, tuple(tensor.shape), _sum(tensor))
        self.received = int(world.largest(traffic.gathered + traffic.reduced)[0])

    def time(self, world: World) -> None:
        gc.collect()
        world.reset_peak()
        before = world.allocated()
        with Stopwatch(world) as watch:
            for _, tensor in self.stream():
                del tensor
        self.seconds.append(watch.seconds)
        self.extra = max(self.extra, int(world.largest(world.peak() - before)[0]))


def _sum(tensor: Tensor) -> int:
    return int(tensor.contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64))


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in bf16, gathered one after the other; masters in fp32 are cast before."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().to(torch.bfloat16)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unsharded(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in the dtype FSDP2 gathers it in, one FSDP unit after the other."""
    layers: Any = model.model.layers  # type: ignore[union-attr]
    for unit in [*layers, model]:
        unit.unshard()
        for name, parameter in unit.named_parameters():
            if not isinstance(parameter, DTensor):  # the root's: what is in no layer
                yield name, parameter.detach()
        unit.reshard()


def methods(args: argparse.Namespace, world: World) -> list[Method]:
    """Build both models and list the ways."""
    config = nq.QATConfig(enable=True)
    dtype = DTYPES[args.masters]
    plain = make_model(args.model, args.layers, dtype, world.device)
    plan = nq.QuantPlan.from_model(plain, config)
    shard(plain, dtype, world.mesh, checkpointing=False)

    def quantized(layout: Literal["checkpoint", "fused"]) -> Stream:
        return nq.QATQuantizer(config, plan, layout).quantize(full_tensors(plain))

    ways = [
        Method(BASELINE, "fused", "all", lambda: full_tensors(plain)),
        Method("bf16, unshard()", "fused", "all", lambda: unsharded(plain)),
        Method("full_tensor(), quantize", "checkpoint", "all", lambda: quantized("checkpoint")),
        Method("full_tensor(), quantize", "fused", "all", lambda: quantized("fused")),
    ]
    if args.packed:
        model = make_model(args.model, args.layers, dtype, world.device)
        apply_arm("gather", model)
        shard(model, dtype, world.mesh, checkpointing=False)

        def packed(layout: Literal["checkpoint", "fused"], ranks: Literal["all"] | int) -> Method:
            stream = lambda: nq.packed_weights(model, layout=layout, ranks=ranks)  # noqa: E731
            return Method("packed_weights", layout, str(ranks), stream)

        ways += [packed("checkpoint", "all"), packed("fused", "all"), packed("checkpoint", 0), packed("fused", 0)]
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return ways


def check(method: Method, expected: Method | None, world: World) -> str:
    """ "ok", or how the stream differs from the quantizer's."""
    if method.name != "packed_weights" or expected is None:
        return "ok"
    if method.ranks == "0" and world.rank != 0:
        return "ok" if not method.content else "a rank that receives nothing got a stream"
    names = method.content.keys() | expected.content.keys()
    wrong = sorted(name for name in names if method.content.get(name) != expected.content.get(name))
    return f"{len(wrong)} tensors differ from the quantizer's, {wrong[0]} first" if wrong else "ok"


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.layers = args.layers or MODELS[args.model][2]
    world = World.join()
    if world.mesh is None:
        parser.error("start it with torchrun, with one process too: torchrun --nproc_per_node 1 ...")
    speed = link_speed(world)
    ways = methods(args, world)
    for way in ways:
        way.look(world)
    gc.collect()
    gc.freeze()  # collections before every sample then take no time
    for round_ in range(args.repeats):
        for way in rotated(ways, round_):
            way.time(world)
    gc.unfreeze()
    ok, rows = True, []
    for way in ways:
        expected = next((w for w in ways if w.name.endswith("quantize") and w.layout == way.layout), None)
        verdict = check(way, expected, world)
        somewhere = bool(world.largest(verdict != "ok")[0])
        if somewhere and verdict == "ok":
            verdict = "not ok on another rank"
        ok = ok and not somewhere
        rows.append({
            "benchmark": "sync", "method": way.name, "layout": way.layout, "ranks": way.ranks,
            "model": args.model, "layers": args.layers, "masters": args.masters, "gpus": world.size,
            "link": link(world), "link_gb_s": speed,
            **summary("seconds", way.seconds, 5), **paired(way.seconds, ways[0].seconds),
            "stream_bytes": way.stream_bytes, "received_bytes": way.received,
            "extra_bytes": way.extra if world.device.type == "cuda" else None,
            "check": verdict, **environment(world.device),
        })  # fmt: skip
    if world.rank == 0:
        append(args.out, rows)
        print(table(rows), flush=True)
    return 0 if ok else 1


def table(rows: list[Row]) -> str:
    """The rows for a person to read."""
    lines = [f"{'method':<25}{'layout':<12}{'ranks':<6}{'ms':>9}{'ratio':>8}{'received GB':>13}{'extra GB':>10}  check"]
    for row in rows:
        numbers = f"{1000 * row['seconds']:>9.1f}{row['ratio']:>8.3f}{row['received_bytes'] / 1e9:>13.3f}"
        numbers += f"{(row['extra_bytes'] or 0) / 1e9:>10.3f}"
        lines.append(f"{row['method']:<25}{row['layout']:<12}{row['ranks']:<6}{numbers}  {row['check']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
