"""Time of the Triton kernels on a GPU, as a multiple of a plain device copy of the same bf16 values.

    python benchmarks/bench_kernels.py                      every case, a row each
    python benchmarks/bench_kernels.py --only many unpack   some of them
    python benchmarks/bench_kernels.py --tune               ratios for other tile sizes and warps; no rows

Cases:

- ``one``: a single weight, through `nvfp4_qat.launch`; beside it PyTorch's own amax, this package's definition in plain
  PyTorch, and a copy that moves as many bytes as packing and unpacking must.
- ``many``: all linear weights of Qwen3-8B, and the experts of eight layers of Qwen3-30B-A3B, through `nvfp4_qat.multi`;
  beside it one launch a weight, and ``torch._foreach_norm``.
- ``unpack``: the gathered bytes of 1, 2 and 4 ranks to the weights of one layer.
- ``peers``: fake quantization of other packages, where they are installed (`peer_kernels`); the amax is given.

The floors are the bytes a kernel must move over those of the copy: 1 for fake quantize, 0.64 for packing and unpacking,
0.5 for amax. The copy is timed twice, before and after the rest: what the two differ by is noise. Times are those of
the device, which clears its L2 cache before each and then pauses for longer than Python takes to launch, so that a slow
host does not count; ``host_us`` is how long a call keeps Python, with the device's queue never full.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, Row, append, environment
from kernel_tables import FLOORS
from peer_kernels import available
from torch import Tensor

from nvfp4_qat import launch, multi, reference
from nvfp4_qat.multi import Amaxes, Packs
from nvfp4_qat.multi_table import Tiles
from nvfp4_qat.multi_unpack import UNPACK, UnpackPart, Unpacks

SHAPES = [(4096, 4096), (24576, 4096), (196608, 2048)]
FEWER = "copy of as many bytes"
"""As packing and unpacking move: what is over the floor here is not the kernels', but comes with small tensors."""

Shapes = Sequence[tuple[int, ...]]
Runs = dict[str, Callable[[], object]]

QWEN3_8B: Shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288)]
"""The linear weights of a layer; it has 36."""

QWEN3_30B_A3B: Shapes = [(128, 1536, 2048), (128, 2048, 768)]
"""The experts of a layer; it has 48."""


PAUSE = 300_000
"""Cycles that the device waits before each run: 150 microseconds and more, in which Python launches it."""


def device_times(run: Callable[[], object], milliseconds: int) -> list[float]:
    """Microseconds of each run on the device, about ``milliseconds`` together, after a few that are not timed."""
    whole_cache = torch.empty(256 << 20, device="cuda", dtype=torch.int8)

    def timed(repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            whole_cache.zero_()
            torch.cuda._sleep(PAUSE)
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1000 * begin.elapsed_time(end) for begin, end in events]

    first = statistics.median(timed(10))
    return timed(max(20, min(1000, round(1000 * milliseconds / first))))


def measure(runs: Runs, milliseconds: int) -> Row:
    """Times of each, and their medians over that of ``copy``, which is timed again at the end."""
    times = {}
    for name, run in {**runs, "copy again": runs["copy"]}.items():
        times[name] = sorted(device_times(run, milliseconds))
    copy = statistics.median(times["copy"] + times["copy again"])
    quantiles = {name: [round(t[int(q * (len(t) - 1))], 2) for q in (0.1, 0.5, 0.9)] for name, t in times.items()}
    return {
        "us_p10_p50_p90": quantiles,
        "times_a_copy": {name: round(statistics.median(t) / copy, 3) for name, t in times.items()},
        "repeats": {name: len(t) for name, t in times.items()},
        "floors": {name: floor for name, floor in FLOORS.items() if name in times},
    }


def host(run: Callable[[], object], calls: int = 50) -> float:
    """Microseconds of Python in a call, the median: what it costs if the device has other work."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - start))
    return round(statistics.median(samples), 1)


def normal(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)


class One:
    """A weight, and everything that is done to it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.w = normal(*shape)
        self.g = reference.global_scale(launch.amax(self.w))
        self.packed = torch.empty(*shape[:-1], shape[-1] // 2, device="cuda", dtype=torch.uint8)
        self.scale = torch.empty(*shape[:-1], shape[-1] // 16, device="cuda", dtype=torch.uint8)
        self.out, self.bits = torch.empty_like(self.w), torch.zeros((), device="cuda", dtype=torch.int32)

    def runs(self) -> Runs:
        return {
            "copy": lambda: self.out.copy_(self.w),
            "fake quantize": lambda: launch.fake_quantize(self.w, self.g, self.out),
            "quantize": lambda: launch.quantize(self.w, self.g, self.packed, self.scale),
            "dequantize": lambda: launch.dequantize(self.packed, self.scale, self.g, self.out),
            "amax": lambda: launch.amax_bits(self.w, out=self.bits),
        }


def one(milliseconds: int) -> Iterator[Row]:
    for shape in SHAPES:
        weight = One(shape)
        runs = weight.runs()
        runs["torch amax"] = partial(torch.linalg.vector_norm, weight.w, torch.inf)
        runs["plain PyTorch"] = partial(reference.fake_quantize, weight.w, weight.g)
        n = round(weight.w.numel() * FLOORS["quantize"])
        runs[FEWER] = partial(weight.out.view(-1)[:n].copy_, weight.w.view(-1)[:n])
        yield {"case": "one", "name": " x ".join(map(str, shape)), **measure(runs, milliseconds)}


class Many:
    """Weights that lie one after the other, so that one copy moves them all, and where they are packed to."""

    def __init__(self, shapes: Shapes) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.flat, self.copy = normal(sum(sizes)), torch.empty(sum(sizes), device="cuda", dtype=torch.bfloat16)
        self.weights = [part.view(shape) for part, shape in zip(self.flat.split(sizes), shapes, strict=True)]
        self.items = [shape[0] if len(shape) == 3 else 1 for shape in shapes]
        self.first = [sum(self.items[:i]) for i in range(len(shapes))]
        self.packed = [torch.empty(n // 2, device="cuda", dtype=torch.uint8) for n in sizes]
        self.scale = [torch.empty(n // 16, device="cuda", dtype=torch.uint8) for n in sizes]
        self.bits = torch.zeros(sum(self.items), device="cuda", dtype=torch.int32)
        Amaxes(self.weights, self.items, self.first)(self.bits)
        self.g = reference.global_scale(self.bits.view(torch.float32))

    def amaxes(self, tiles: Tiles = multi.AMAX) -> Callable[[], object]:
        amaxes = Amaxes(self.weights, self.items, self.first, tiles=tiles)

        def run() -> None:
            self.bits.zero_()
            amaxes(self.bits)

        return run

    def packs(self, tiles: Tiles = multi.PACK, amax: bool = False) -> Callable[[], object]:
        packs = Packs(self.weights, self.items, self.first, self.packed, self.scale, tiles=tiles)

        def run() -> None:
            if amax:
                self.bits.zero_()
            packs(self.g, self.bits if amax else None)

        return run

    def one_by_one(self) -> None:
        for w, n, i, packed, scale in zip(self.weights, self.items, self.first, self.packed, self.scale, strict=True):
            shaped = w.view(n, -1, w.shape[-1])
            launch.quantize(shaped, self.g[i : i + n], packed.view(n, -1), scale.view(n, -1))


def many(milliseconds: int) -> Iterator[Row]:
    for name, shapes in (("Qwen3-8B", [*QWEN3_8B] * 36), ("Qwen3-30B-A3B experts, 8 layers", [*QWEN3_30B_A3B] * 8)):
        model = Many(shapes)
        runs: Runs = {
            "copy": partial(model.copy.copy_, model.flat),
            "amax": model.amaxes(),
            "quantize": model.packs(),
            "quantize and amax": model.packs(amax=True),
            "quantize one by one": model.one_by_one,
        }
        if max(model.items) == 1:
            runs["torch foreach amax"] = partial(torch._foreach_norm, model.weights, torch.inf)
        row: Row = {"case": "many", "name": name, "tensors": len(shapes), "elements": model.flat.numel()}
        row |= {"tiles": {"amax": multi.AMAX._asdict(), "quantize": multi.PACK._asdict()}}
        yield {**row, **measure(runs, milliseconds), "host_us": {op: host(run) for op, run in runs.items()}}
        del model, runs


class Layer:
    """The gathered bytes of a layer, and its full weights."""

    def __init__(self, shapes: Shapes, world: int) -> None:
        self.world, at, index, self.parts = world, 0, 0, []
        for shape in shapes:
            total, items = torch.Size(shape).numel() // 16, shape[0] if len(shape) == 3 else 1
            blocks = -(-shape[0] // world) * (total // shape[0])
            self.parts.append(UnpackPart(at, at + blocks * 8, blocks, total, items, index))
            at, index = -(-(at + blocks * 9) // 16) * 16, index + items
        # Codes at random; scales, which lie after them, in the range of real ones.
        self.gathered = torch.randint(0, 256, (world, at), device="cuda", dtype=torch.uint8)
        for part in self.parts:
            self.gathered[:, part.scale : part.scale + part.blocks].clamp_(0x30, 0x7E)
        self.gathered = self.gathered.view(-1)
        self.g = torch.full((index,), 2.0**-12, device="cuda")
        sizes = [part.total * 16 for part in self.parts]
        self.flat, self.copy = normal(sum(sizes)), torch.empty(sum(sizes), device="cuda", dtype=torch.bfloat16)
        self.outs = [part.view(shape) for part, shape in zip(self.flat.split(sizes), shapes, strict=True)]

    def unpacks(self, tiles: Tiles = UNPACK) -> Callable[[], object]:
        unpacks = Unpacks(self.parts, self.world, self.flat.device, tiles=tiles)
        return lambda: unpacks(self.gathered, self.g, self.outs)

    def runs(self) -> Runs:
        return {"copy": lambda: self.copy.copy_(self.flat), "dequantize": self.unpacks()}


def unpack(milliseconds: int) -> Iterator[Row]:
    for name, shapes in (("Qwen3-8B layer", QWEN3_8B), ("Qwen3-30B-A3B experts, 1 layer", QWEN3_30B_A3B)):
        for world in (1, 2, 4):
            layer = Layer(shapes, world)
            runs = layer.runs()
            row: Row = {"case": "unpack", "name": name, "ranks": world, "elements": layer.flat.numel()}
            row |= {"tiles": {"dequantize": UNPACK._asdict()}}
            yield {**row, **measure(runs, milliseconds), "host_us": {op: host(run) for op, run in runs.items()}}


def peers(milliseconds: int) -> Iterator[Row]:
    for shape in SHAPES:
        weight = One(shape)
        runs, versions, skipped = available(weight.w, launch.amax(weight.w))
        for name, reason in skipped.items():
            print(f"# skipped {name}: {reason}", flush=True)
        ours = weight.runs()
        runs = {"copy": ours["copy"], "fake quantize": ours["fake quantize"], **runs}
        row = {"case": "peers", "name": " x ".join(map(str, shape)), "versions": versions}
        yield {**row, **measure(runs, milliseconds)}


CASES: dict[str, Callable[[int], Iterator[Row]]] = {"one": one, "many": many, "unpack": unpack, "peers": peers}

SPAN = 4096
"""Blocks in a row of the table while tuning."""

TILES = {
    "amax": [(b, s, w) for b in (256, 512) for s in (2, 4, 8, 16) for w in (4, 8)],
    "quantize": [(64, 1, 2), (128, 1, 2), *((b, s, w) for b, w in ((128, 4), (256, 4), (256, 8)) for s in (1, 2, 4))],
    "dequantize": [(64, 1, 2), (128, 1, 2), *((b, s, w) for b, w in ((128, 4), (256, 4), (256, 8)) for s in (1, 2, 4))],
    "fake quantize": [(b, s, w) for b, w in ((32, 1), (64, 2), (64, 4), (128, 4), (256, 8)) for s in (1, 2, 3, 4)],
}
"""Blocks, steps and warps to try."""


def tune(kinds: list[str]) -> None:
    """Print ratios to a copy for several ways to divide the work; each must be compiled, which takes about a second."""
    model, layer, weight = Many([*QWEN3_8B] * 12), Layer(QWEN3_8B, 2), One((24576, 4096))

    def fake_quantize(tiles: Tiles) -> Callable[[], object]:
        tile = launch.Tile(tiles.blocks, tiles.warps, tiles.steps)
        return lambda: launch.fake_quantize(weight.w, weight.g, weight.out, tile)

    copies: dict[str, Callable[[], object]] = {
        "amax": lambda: model.copy.copy_(model.flat),
        "quantize": lambda: model.copy.copy_(model.flat),
        "dequantize": lambda: layer.copy.copy_(layer.flat),
        "fake quantize": lambda: weight.out.copy_(weight.w),
    }
    makers: dict[str, list[tuple[str, Callable[[Tiles], Callable[[], object]]]]] = {
        "amax": [("amax", model.amaxes)],
        "quantize": [("quantize", model.packs), ("quantize and amax", lambda tiles: model.packs(tiles, amax=True))],
        "dequantize": [("dequantize", layer.unpacks)],
        "fake quantize": [("fake quantize", fake_quantize)],
    }
    for kind in kinds:
        copy = statistics.median(device_times(copies[kind], 200))
        for blocks, steps, warps in TILES[kind]:
            tiles = Tiles(blocks, steps, max(1, SPAN // (blocks * steps)), warps)
            for name, make in makers[kind]:
                times = sorted(device_times(make(tiles), 60))
                ratios = [times[int(q * (len(times) - 1))] / copy for q in (0.1, 0.5, 0.9)]
                text = "  ".join(f"{ratio:.3f}" for ratio in ratios)
                print(f"{name:18} {blocks:4} blocks {steps:2} steps {warps} warps   p10 p50 p90  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), help="cases; all by default")
    parser.add_argument("--tune", choices=TILES, nargs="*", help="try other tiles, of all kinds or the named ones")
    parser.add_argument("--milliseconds", type=int, default=200, help="how long to repeat each")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.jsonl", help="file the rows are appended to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if arguments.tune is not None:
        tune(arguments.tune or list(TILES))
        return
    where = environment(torch.device("cuda"))
    for case in arguments.only:
        for row in CASES[case](arguments.milliseconds):
            print(json.dumps(row), flush=True)
            append(arguments.out, [row | where])


if __name__ == "__main__":
    main()
