"""Time of the Triton kernels on a GPU, as a multiple of a plain device copy of the same bf16 tensor.

    python benchmarks/bench_kernels.py                 the sizes as launched by default
    python benchmarks/bench_kernels.py --sweep         also other tile sizes and warps

The floors are the bytes a kernel must move over those of the copy: 1 for fake quantize, 0.64 for packing and unpacking,
0.5 for amax. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import triton
from triton.testing import do_bench

from nvfp4_qat import launch, reference

SHAPES = [(4096, 4096), (24576, 4096), (196608, 2048)]


def microseconds(run: Callable[[], object]) -> list[float]:
    """20th, 50th and 80th percentile."""
    return [round(1000 * t, 2) for t in do_bench(run, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])]


def bench(shape: tuple[int, int], blocks: int, warps: int) -> dict[str, object]:
    launch.OPTIONS["num_warps"] = warps
    w = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    g = reference.global_scale(launch.amax(w))
    packed = torch.empty(shape[0], shape[1] // 2, device="cuda", dtype=torch.uint8)
    scale = torch.empty(shape[0], shape[1] // 16, device="cuda", dtype=torch.uint8)
    out, bits = torch.empty_like(w), torch.zeros((), device="cuda", dtype=torch.int32)
    runs = {
        "copy": lambda: out.copy_(w),
        "fake_quantize": lambda: launch.fake_quantize(w, g, out, blocks=blocks),
        "quantize": lambda: launch.quantize(w, g, packed, scale, blocks=blocks),
        "dequantize": lambda: launch.dequantize(packed, scale, g, out, blocks=blocks),
        "amax": lambda: launch.amax_bits(w, out=bits),
    }
    times = {name: microseconds(run) for name, run in runs.items()}
    ratios = {name: round(t[1] / times["copy"][1], 3) for name, t in times.items()}
    return {"shape": shape, "blocks": blocks, "warps": warps, "us_p20_p50_p80": times, "times_a_copy": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes and numbers of warps")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps({"gpu": torch.cuda.get_device_name(), **versions}), flush=True)
    default = (launch.BLOCKS, launch.OPTIONS["num_warps"])
    sweep = [(blocks, warps) for warps in (2, 4, 8) for blocks in (64, 128, 256, 512)] if arguments.sweep else [default]
    for blocks, warps in sweep:
        for shape in SHAPES:
            print(json.dumps(bench(shape, blocks, warps)), flush=True)


if __name__ == "__main__":
    main()
