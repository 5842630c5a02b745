"""Cost of module mode on one device: forward and backward of one layer, and the bytes it keeps between them.

    python benchmarks/bench_modules.py                       Qwen3-8B's linear layers, Qwen3-30B-A3B's experts
    python benchmarks/bench_modules.py --tiny                dry run, also on a CPU

Four variants of a layer take turns: ``bf16`` as it is; ``module`` (`QATLinear`, `QATExperts`) with weights that did not
change; ``module, packing``, the same after a write to the weight before every forward, so that it is packed each time
(once per optimizer step in training); ``requantize`` (`arms.Requantize`), amax and fake quantize at every read.

Two times are taken. ``us`` is from call to call as a training loop sees it: for small layers that is the time Python
needs. ``device_us`` is the GPU's alone: a pause keeps it busy until all calls are queued (not where packing waits for
the device). ``held_bytes`` is what is allocated between forward and backward beyond parameters, packed copy, input and
output; a requantized layer holds a bf16 copy of its weight there.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from arms import apply_arm
from common import RESULTS, Row, World, append, environment, paired, rotated, run, summary
from shapes import MODELS, make_model
from torch import Tensor, nn

VARIANTS = {"bf16": "bf16", "module": "module", "module, packing": "module", "requantize": "requantize"}
"""Name → what `apply_arm` does to the layer."""

TARGET_MS, MOST = 4.0, 64
"""A sample runs the layer for about so long, and no more often than so many times: launch queues hold 1,024 kernels."""

CYCLES_PER_SECOND = 2e9
"""Not less than any GPU's clock: a pause may last longer than asked for, not shorter."""


@dataclass(frozen=True)
class Case:
    """A kind of layer: linear layers are 2-D, experts are those of one block."""

    name: str
    model: str
    make: Callable[[torch.device], nn.Module]
    """A module that has the layer as ``layer``, in bf16."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--only", choices=["linear", "experts"], help="default: both")
    parser.add_argument("--tiny", action="store_true", help="small layers")
    parser.add_argument("--out", type=Path, default=RESULTS / "modules.jsonl", help="file the rows are appended to")
    return parser


class One(nn.Module):
    """A model of one layer, so that `apply_qat` has something to look through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def linear_cases(tiny: bool) -> list[Case]:
    def make(rows: int, columns: int) -> Callable[[torch.device], nn.Module]:
        def layer(device: torch.device) -> nn.Module:
            torch.manual_seed(0)
            linear = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
            nn.init.normal_(linear.weight, std=0.02)
            return One(linear)

        return layer

    name = "tiny" if tiny else "Qwen3-8B"
    shape = MODELS[name][1]
    width, hidden, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    sizes = {
        "q, o": (shape["num_attention_heads"] * head, width),
        "k, v": (shape["num_key_value_heads"] * head, width),
        "gate, up": (hidden, width),
        "down": (width, hidden),
    }
    return [Case(layer, name, make(*size)) for layer, size in sizes.items()]


def experts_case(tiny: bool) -> Case:
    name = "tiny-moe" if tiny else "Qwen3-30B-A3B"

    def layer(device: torch.device) -> nn.Module:
        return One(make_model(name, 1, torch.bfloat16, device).get_submodule("model.layers.0.mlp.experts"))

    return Case("experts", name, layer)


class Runner:
    """One variant of one layer with one input."""

    def __init__(self, variant: str, case: Case, tokens: int, world: World) -> None:
        self.variant, self.world = variant, world
        self.layer, self.weights, self.weight_bytes = self._make(case)
        width = self.weights[0].shape[-1] if case.name != "experts" else MODELS[case.model][1]["hidden_size"]
        generator = torch.Generator(device=world.device).manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=world.device, dtype=torch.bfloat16, generator=generator)

        self.x = random(tokens, width).requires_grad_()
        self.rest: tuple[Tensor, ...] = ()
        if case.name == "experts":
            shape = MODELS[case.model][1]
            scores = random(tokens, shape["num_experts"]).float().softmax(-1)
            best, experts = scores.topk(shape["num_experts_per_tok"])
            self.rest = (experts, (best / best.sum(-1, keepdim=True)).bfloat16())
        self.grad = random(*self.forward().shape)
        self.calls = 1

    def _make(self, case: Case) -> tuple[nn.Module, list[Tensor], int]:
        model = case.make(self.world.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patterns of a whole model that match nothing in one layer
            apply_arm(VARIANTS[self.variant], model)
        weights: list[Tensor] = [p for p in model.parameters() if p.ndim > 1]
        return model.get_submodule("layer"), weights, sum(w.nbytes for w in weights)

    def forward(self) -> Tensor:
        out: Tensor = self.layer(self.x, *self.rest)
        return out

    def once(self) -> None:
        """Forward and backward, and a write before them where packing is to be seen."""
        if self.variant == "module, packing":
            for weight in self.weights:
                weight.detach().flatten()[:1].mul_(1.0)  # the smallest write that moves the version counter
        self.forward().backward(self.grad)
        self.x.grad = None
        for weight in self.weights:
            weight.grad = None

    def calibrate(self) -> None:
        """Warm up, and choose how often a sample runs the layer."""
        for _ in range(3):
            self.once()
        seconds = statistics.median(self.seconds(3) for _ in range(3))
        self.calls = max(2, min(MOST, round(TARGET_MS / 1000 / seconds)))

    def seconds(self, calls: int, queued: bool = False) -> float:
        """Seconds of one call, the mean of ``calls`` in a row; ``queued``: of the device alone."""
        cuda = self.world.device.type == "cuda"
        gc.disable()
        if not cuda:
            start = time.perf_counter()
            for _ in range(calls):
                self.once()
            taken = time.perf_counter() - start
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if queued:
                torch.cuda._sleep(round(calls * self.launching * 1.5 * CYCLES_PER_SECOND))
            begin.record()
            start = time.perf_counter()
            for _ in range(calls):
                self.once()
            self.launching = (time.perf_counter() - start) / calls
            end.record()
            torch.cuda.synchronize()
            taken = begin.elapsed_time(end) / 1000
        gc.enable()
        return taken / calls

    launching = 0.0
    """Seconds the host needed for a call, last time."""

    def held(self) -> int | None:
        """Bytes allocated between forward and backward, the output apart."""
        if self.world.device.type == "cpu":
            return None
        gc.collect()
        before = self.world.allocated()
        out = self.forward()
        held = self.world.allocated() - before - out.untyped_storage().nbytes()
        out.backward(self.grad)
        self.x.grad = None
        for weight in self.weights:
            weight.grad = None
        return held


def bench(case: Case, tokens: int, repeats: int, world: World) -> list[Row]:
    """The rows of one layer at one number of tokens."""
    runners = [Runner(variant, case, tokens, world) for variant in VARIANTS]
    queueable = [r for r in runners if world.device.type == "cuda" and r.variant != "module, packing"]
    for runner in runners:
        runner.calibrate()
    eager: dict[str, list[float]] = {r.variant: [] for r in runners}
    device: dict[str, list[float]] = {r.variant: [] for r in queueable}
    for round_ in range(repeats):
        for runner in rotated(runners, round_):
            eager[runner.variant].append(1e6 * runner.seconds(runner.calls))
        for runner in rotated(queueable, round_) if queueable else ():
            device[runner.variant].append(1e6 * runner.seconds(min(runner.calls, 8), queued=True))
    rows = []
    for runner in runners:
        row: Row = {
            "benchmark": "modules",
            "layer": case.name,
            "model": case.model,
            "shapes": [list(w.shape) for w in runner.weights],
            "tokens": tokens,
            "variant": runner.variant,
            "calls": runner.calls,
            **summary("us", eager[runner.variant], 2),
            **paired(eager[runner.variant], eager["bf16"]),
        }
        if runner.variant in device:
            row |= summary("device_us", device[runner.variant], 2)
            row |= paired(device[runner.variant], device["bf16"], "device_ratio")
        row |= {"held_bytes": runner.held(), "weight_bytes": runner.weight_bytes, **environment(world.device)}
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    world = World.join()
    cases = linear_cases(args.tiny) if args.only != "experts" else []
    if args.only != "linear":
        cases.append(experts_case(args.tiny))
    print(f"{'layer':<10}{'tokens':>7}  {'variant':<16}{'µs':>10}{'ratio':>8}{'GPU µs':>10}{'ratio':>8}{'held MB':>9}")
    for case in cases:
        for tokens in args.tokens:
            rows = bench(case, tokens, args.repeats, world)
            append(args.out, rows)
            for row in rows:
                numbers = f"{row['us']:>10.1f}{row['ratio']:>8.3f}"
                numbers += f"{row.get('device_us', 0):>10.1f}{row.get('device_ratio', 0):>8.3f}"
                held = f"{(row['held_bytes'] or 0) / 1e6:>9.2f}"
                print(f"{row['layer']:<10}{tokens:>7}  {row['variant']:<16}{numbers}{held}", flush=True)
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    run(main)
