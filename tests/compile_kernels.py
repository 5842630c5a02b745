"""Compile every kernel for Hopper and print its PTX as JSON; needs no GPU.

`test_kernels` runs this in a process of its own, because a process either interprets Triton kernels or compiles them.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_qat import kernels, launch

POINTERS = {"bf16": "*i32", "fp16": "*i32", "fp32": "*i64"}
FIXED = {"g_ptr": "*fp32", "packed_ptr": "*u8", "scale_ptr": "*u8", "blocks_per_item": "i32", "size": "i64"}


def ptx(kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object]) -> str:
    """PTX of a kernel for pointers and sizes divisible by 16, under the options that `launch` uses."""
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n == "size"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.OPTIONS).asm["ptx"])


def main() -> None:
    result = {}
    for dtype, (_, name) in launch.DTYPES.items():
        short = name.name
        words = FIXED | {"w_ptr": POINTERS[short], "out_ptr": POINTERS[short]}
        values = words | {"w_ptr": "*i16" if short == "bf16" else f"*{short}", "out_ptr": "*i32"}
        tile = {"DTYPE": name, "BLOCKS": launch.BLOCKS}
        steps = {"TILE": launch.TILE, "STEPS": launch.STEPS}
        result[f"amax {dtype}"] = ptx(kernels.amax_kernel, values, steps)
        result[f"quantize {dtype}"] = ptx(kernels.quantize_kernel, words, tile)
        result[f"dequantize {dtype}"] = ptx(kernels.dequantize_kernel, words | {"packed_ptr": "*i32"}, tile)
        result[f"fake_quantize {dtype}"] = ptx(kernels.fake_quantize_kernel, words, tile)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
