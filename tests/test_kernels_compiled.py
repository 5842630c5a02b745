"""What Triton makes of the kernels for a GPU: nothing fused or approximated, and wide loads and stores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_kernels import MARKS

pytestmark = MARKS


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX of every kernel and dtype for Ampere and Hopper; making it also runs the assembler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout)
    return result


def test_kernels_compile_without_fusing_or_approximating(ptx: dict[str, str]) -> None:
    assert len(ptx) == 86
    lines, anchors = {"0f40000000", "0f3F000000"}, {"0f47800000", "0fC7800000"}  # 2 and 1/2; 2^16 and its negative
    exact = {
        "amax": set(),
        "quantize": lines,
        "compare": lines,
        "dequantize": anchors,
        "fake_quantize": lines | anchors,
        **dict.fromkeys(("sums", "count", "take", "flip"), set()),
    }
    for name, text in ptx.items():
        # Without a rounding mode the assembler may fuse; .ftz drops subnormals, .full and .approx are inexact.
        loose = re.findall(r"(?:mul|add|sub|fma|div|rcp)\.(?!rn\.f32|wide|lo|hi|s|u|b)[\w.]*", text)
        assert not loose, f"{name}: {set(loose)}"
        assert ".ftz" not in text, name
        factors = {line.split(", ")[2] for line in re.findall(r"fma\.rn\.f32[^;]*", text)}
        assert factors == exact[name.split()[0]], f"{name}: only exact products may be fused"
        assert ("div.rn.f32" in text) == name.startswith(("quantize", "compare", "fake_quantize"))


def test_weights_move_sixteen_bytes_at_a_time(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        if name.startswith(("sums", "count", "take", "flip")):  # of words of eight bytes, at addresses that a table has
            continue
        direction = "st" if name.startswith("dequantize") else "ld"
        assert re.search(direction + r"\.global[.\w:]*\.(v4\.b32|v2\.b64)", text), f"{name} is not vectorised"
