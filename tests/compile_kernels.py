"""Compile every kernel for Ampere and Hopper and print the PTX as JSON; needs no GPU.

`test_kernels_compiled` runs this in a process of its own, because a process either interprets Triton kernels or
compiles them.
"""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_qat import (
    kernels,
    launch,
    live_changes_kernel,
    live_routes,
    live_snapshot,
    live_sums,
    live_sums_kernel,
    multi,
    multi_kernels,
    multi_unpack,
)

TARGETS = (80, 90)
POINTERS = {"bf16": "*i32", "fp16": "*i32", "fp32": "*i64"}
FIXED = {"g_ptr": "*fp32", "packed_ptr": "*u8", "scale_ptr": "*u8", "blocks_per_item": "i32", "size": "i64"}
TABLE = {
    "table_ptr": "*i64",
    "out_ptr": "*i32",
    "amax_ptr": "*i32",
    "moved_ptr": "*i32",
    "differs_ptr": "*i32",
    "gathered_ptr": "*u8",
    "g_ptr": "*fp32",
}


def ptx(kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object], target: int) -> str:
    """PTX of a kernel for pointers and sizes divisible by 16, under the options that `launch` uses."""
    constants = dict(constants)
    options = {**launch.OPTIONS, "num_warps": constants.pop("num_warps", 4)}
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*") or name == "size"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"])


def single(target: int) -> dict[str, str]:
    """The kernels for one tensor."""
    result = {}
    for dtype, (_, name) in launch.DTYPES.items():
        short = name.name
        words = FIXED | {"w_ptr": POINTERS[short], "out_ptr": POINTERS[short]}
        values = words | {"w_ptr": "*i16" if short == "bf16" else f"*{short}", "out_ptr": "*i32"}
        steps = {"TILE": launch.TILE, "STEPS": launch.STEPS}

        def tile(t: launch.Tile, name: object = name) -> dict[str, object]:
            return {"DTYPE": name, "BLOCKS": t.blocks, "num_warps": t.warps}

        fakes = {"": launch.FAKE_QUANTIZE, "small ": launch.SMALL_FAKE_QUANTIZE}
        packs = {"": launch.QUANTIZE, "small ": launch.SMALL_QUANTIZE}
        result[f"amax {dtype}"] = ptx(kernels.amax_kernel, values, steps, target)
        for size, t in packs.items():
            options = tile(t) | {"STEPS": t.steps}
            result[f"quantize {size}{dtype}"] = ptx(kernels.quantize_kernel, words, options, target)
        packed = words | {"packed_ptr": "*i32"}
        result[f"dequantize {dtype}"] = ptx(kernels.dequantize_kernel, packed, tile(launch.DEQUANTIZE), target)
        for size, t in fakes.items():
            options = tile(t) | {"STEPS": t.steps}
            result[f"fake_quantize {size}{dtype}"] = ptx(kernels.fake_quantize_kernel, words, options, target)
    return result


def many(target: int) -> dict[str, str]:
    """The kernels for many tensors."""
    result = {}
    for dtype, (_, type_) in launch.DTYPES.items():
        types = TABLE | {f"out{i}": f"*{type_.name}" for i in range(multi_unpack.OUTS)}
        amax, pack, unpack = (
            {"BLOCKS": t.blocks, "STEPS": t.steps, "PROGRAMS": t.share}
            for t in (multi.AMAX, multi.PACK, multi_unpack.UNPACK)
        )
        values, words = {"DTYPE": launch.VALUES[dtype]}, {"DTYPE": type_}
        kernel = multi_kernels.multi_quantize_kernel
        result[f"amax many {dtype}"] = ptx(multi_kernels.multi_amax_kernel, types, amax | values, target)
        for name, options in {"": (False, False), " with amax": (True, False), " that moved": (False, True)}.items():
            chosen = pack | words | dict(zip(("AMAX", "MOVED"), options, strict=True))
            result[f"quantize many{name} {dtype}"] = ptx(kernel, types, chosen, target)
        result[f"compare many {dtype}"] = ptx(multi_kernels.multi_compare_kernel, types, pack | words, target)
        result[f"dequantize many {dtype}"] = ptx(multi_kernels.multi_dequantize_kernel, types, unpack | words, target)
    return result


def sums(target: int) -> dict[str, str]:
    """The checksums of live weights, of words and of bytes."""
    words, steps, programs = live_sums.Sums(torch.device("cpu"), kernel=True).tile
    tile = {"WORDS": words, "STEPS": steps, "PROGRAMS": programs}
    types = {"table_ptr": "*i64", "out_ptr": "*i64"}
    return {
        f"sums {t}": ptx(live_sums_kernel.sums_kernel, types, tile | {"TYPE": t}, target) for t in (tl.int64, tl.uint8)
    }


def changes(target: int) -> dict[str, str]:
    """What finds and makes live changes."""
    types = {
        "table_ptr": "*i64", "counts_ptr": "*i32", "ends_ptr": "*i64", "at_ptr": "*i64", "flips_ptr": "*u8",
        "count": "i32", "rows": "i32", "addresses_ptr": "*i64",
    }  # fmt: skip
    tiles = {t: {"TYPE": t, "WORDS": live_snapshot.TILE, "SEARCH": live_snapshot.SEARCH} for t in (tl.int64, tl.uint8)}
    counts = {f"count {t}": ptx(live_changes_kernel.count_kernel, types, tile, target) for t, tile in tiles.items()}
    takes = {f"take {t}": ptx(live_changes_kernel.take_kernel, types, tile, target) for t, tile in tiles.items()}
    sizes = {"SEARCH": 11, "PLACES": live_routes.PLACES}
    return counts | takes | {"flip": ptx(live_changes_kernel.flip_kernel, types, sizes, target)}


def main() -> None:
    result = {}
    for target in TARGETS:
        made = single(target) | many(target) | sums(target) | changes(target)
        result |= {f"{name} sm_{target}": text for name, text in made.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
