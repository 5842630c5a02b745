"""The Triton kernels against the reference, bit for bit: on the GPU if there is one, else in Triton's interpreter.

`test_reference` holds the reference to an independent oracle on the same inputs. Tiles are large where the kernels are
interpreted, because the interpreter's cost is per program; `test_tile_boundaries` covers many small ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_numerics import BITS, CASES, all_codes_and_scales, assert_same_bits, multipliers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_qat import format, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
tl = pytest.importorskip("triton.language")

from nvfp4_qat import kernels, launch  # noqa: E402

BLOCKS = 256 if DEVICE == "cuda" else 4096
pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # the interpreter's numpy
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
TILE = launch.TILE if DEVICE == "cuda" else 1 << 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def tile(blocks: int, tuned: launch.Tile) -> launch.Tile:
    """Tiles of that many blocks; as many as ships on a GPU, unless a test wants others."""
    return tuned if DEVICE == "cuda" and blocks == BLOCKS else launch.Tile(blocks, 4, tuned.steps)


def launched(w: Tensor, g: Tensor, blocks: int = BLOCKS, small: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scale bytes and the fake-quantized weight from the kernels, with large or small tensors' tiles."""
    pack, both = (
        (launch.SMALL_QUANTIZE, launch.SMALL_FAKE_QUANTIZE) if small else (launch.QUANTIZE, launch.FAKE_QUANTIZE)
    )
    w, g = w.to(DEVICE), g.to(DEVICE)
    packed = torch.empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.empty((*w.shape[:-1], w.shape[-1] // 16), dtype=torch.uint8, device=DEVICE)
    fake = torch.empty(w.shape, dtype=w.dtype, device=DEVICE)
    launch.quantize(w, g, packed, scale, tile(blocks, pack))
    launch.fake_quantize(w, g, fake, tile(blocks, both))
    return packed, scale, fake


def dequantized(packed: Tensor, scale: Tensor, g: Tensor, dtype: torch.dtype, blocks: int = BLOCKS) -> Tensor:
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=DEVICE)
    packed, scale, g = packed.to(DEVICE), scale.to(DEVICE), g.to(DEVICE)
    launch.dequantize(packed, scale, g, out, tile(blocks, launch.DEQUANTIZE))
    return out


def check(w: Tensor, g: Tensor, blocks: int = BLOCKS) -> None:
    expected_packed, expected_scale = reference.quantize(w, g)
    expected = reference.fake_quantize(w, g)
    for small in (True, False) if DEVICE == "cuda" and blocks == BLOCKS else (False,):
        packed, scale, fake = launched(w, g, blocks, small)
        assert_same_bits(scale, expected_scale, "block scales", w=w, g=g)
        assert_same_bits(packed, expected_packed, "packed codes", w=w, scale=expected_scale, g=g)
        assert_same_bits(fake, expected, "fake quantized", w=w, scale=expected_scale, g=g)
    again = dequantized(packed, scale, g, w.dtype, blocks)
    assert_same_bits(again, reference.dequantize(expected_packed, expected_scale, g, w.dtype), "dequantized", w=w, g=g)
    largest = launch.amax_bits(w.to(DEVICE), g.ndim, tile=TILE, steps=1)
    assert_same_bits(largest.view(torch.float32), reference.amax(w, g.ndim), "amax", w=w)


@pytest.mark.parametrize("case", CASES)
def test_corner_cases(case: str) -> None:
    w, g = CASES[case]()
    if DEVICE == "cpu" and len(g) > 64:  # interpreted, every multiplier costs a program
        some = torch.linspace(0, len(g) - 1, 64).long()
        w, g = w[some], g[some]
    check(w, g, blocks=min(BLOCKS, triton.next_power_of_2(w[0].numel() // 16)))


@triton.jit
def rounding_kernel(bits_ptr, bf16_ptr, scale_ptr, code_ptr, weight_ptr, N: tl.constexpr):
    """The kernels' four roundings of any fp32 number, as they would follow from other inputs than bf16."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    bits = tl.load(bits_ptr + at)
    tl.store(bf16_ptr + at, kernels._to_bf16(bits))
    tl.store(scale_ptr + at, kernels._block_scale(bits & kernels.MAGNITUDE, 1.0))
    code = kernels._code(bits & kernels.MAGNITUDE, 1.0, 1.0) & 0xFF
    tl.store(code_ptr + at, code | ((bits >> 28) & 8))
    tl.store(weight_ptr + at, kernels._weight(bits & kernels.MAGNITUDE, 1.0, 1.0))


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bf16, E4M3 of a sixth (clamped), E2M1 codes, and the magnitude as dequantized; all but the codes as float32."""
    n = 1 << 16 if DEVICE == "cpu" else 1024
    padded = torch.zeros(-(-len(x) // n) * n, device=DEVICE)
    padded[: len(x)] = x.to(DEVICE)
    out = [torch.empty_like(padded, dtype=torch.int32) for _ in range(4)]
    rounding_kernel[(len(padded) // n,)](padded.view(torch.int32), *out, N=n, **launch.OPTIONS)
    bf16, scale, code, weight = (t[: len(x)].cpu() for t in out)
    return bf16.view(torch.float32), scale.view(torch.float32), code, weight.view(torch.float32)


def check_rounding(x: Tensor) -> None:
    bf16, scale, code, weight = rounded(x)
    assert_same_bits(bf16, x.bfloat16().float(), "bf16", x=x)
    reached = (x.abs() >= 2.0**-126) & (x.abs() < 2.0**111) | x.isnan() | (x == 0)
    assert_same_bits(weight[reached], x[reached].abs().bfloat16().float(), "the dequantized bf16", x=x[reached])
    x = torch.where(x.isnan(), 0, x)
    clamped = (x.abs() / 6).clamp(format.E4M3_MIN_NORMAL, format.E4M3_MAX)
    scale = torch.where(bf16.isnan(), format.E4M3_MIN_NORMAL, scale)
    assert_same_bits(scale, clamped.to(torch.float8_e4m3fn).float(), "E4M3", x=x)
    ties = torch.tensor(format.E2M1_TIES)
    # A magnitude above k ties has code k; one on a tie goes to the even of the codes beside it.
    below = torch.bucketize(x.abs(), ties)
    expected = below + ((below < 7) & (x.abs() == ties[below.clamp(max=6)]) & (below % 2 == 1))
    expected += torch.signbit(x) * 8
    keep = ~bf16.isnan()
    assert_same_bits(code[keep], expected[keep].int(), "E2M1", x=x[keep])


def test_roundings_on_a_dense_sample() -> None:
    """Every 2053rd fp32 pattern of either sign: all exponents, subnormals, infinities and NaNs."""
    patterns = torch.arange(-(2**31), 2**31, 2053, dtype=torch.int64).int()
    check_rounding(patterns.view(torch.float32))


def test_e4m3_rounding_equals_torch_between_the_clamps() -> None:
    low, high = (torch.tensor(6 * x).view(torch.int32).item() for x in (format.E4M3_MIN_NORMAL, format.E4M3_MAX))
    check_rounding(torch.arange(low, high + 1, 59, dtype=torch.int32).view(torch.float32))


def test_roundings_around_every_tie() -> None:
    """32 fp32 numbers on either side of every midpoint and every representable number, of all three formats."""
    scales = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scale_ties = (scales[1:] + scales[:-1]) / 2
    grid = torch.tensor([*format.E2M1_GRID, *format.E2M1_TIES, format.E2M1_MAX + 1])
    bf16 = torch.arange(0, 2**31, 2**15, dtype=torch.int64).int().view(torch.float32)
    centres = torch.cat([6 * scales, 6 * scale_ties, grid, bf16[torch.randperm(len(bf16))[:4096]]])
    around = centres.view(torch.int32)[:, None] + torch.arange(-32, 33, dtype=torch.int32)
    x = around.flatten().clamp(min=0).view(torch.float32)
    check_rounding(torch.cat([x, -x]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_every_scale_byte_and_multiplier(dtype: torch.dtype) -> None:
    packed, scale = all_codes_and_scales()
    g = torch.cat([multipliers(), torch.tensor([-0.37])])
    packed, scale = (t.expand(len(g), -1, -1).contiguous() for t in (packed, scale))
    expected = reference.dequantize(packed, scale, g, dtype)
    assert_same_bits(dequantized(packed, scale, g, dtype, blocks=256), expected, str(dtype), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_other_dtypes_are_rounded_to_bf16_first(dtype: torch.dtype) -> None:
    midpoints = torch.randint(0x2000, 0x4700, (1 << 14,), dtype=torch.int32) * 65536 + 0x8000
    near = (midpoints + torch.randint(-1, 2, midpoints.shape, dtype=torch.int32)).view(torch.float32)
    near *= torch.randint(0, 2, near.shape) * 2 - 1
    near = near.clamp(-6e4, 6e4) if dtype == torch.float16 else near
    check(near.to(dtype).view(64, 256), torch.tensor(0.375))


def test_amax_keeps_nan_and_joins_what_is_there() -> None:
    w = torch.randn(3, 2, 2, 32)
    w[1, 1, 0, 5], w[2, 0, 1, 7], w[2, 1, 1, 31] = torch.nan, -torch.inf, torch.nan
    for dtype in DTYPES:
        for dims in range(4):
            got = launch.amax(w.to(DEVICE, dtype), dims)
            assert_same_bits(got, reference.amax(w.to(dtype), dims), f"amax of {dtype}", w=w)
    members = torch.randn(3, 5, 2, 16)
    shared = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    for member in members.to(DEVICE):
        launch.amax_bits(member, 1, out=shared)
    assert_same_bits(shared.view(torch.float32), reference.amax(members.transpose(0, 1), 1), "amax of a group")
    assert launch.amax(torch.zeros(2, 0, 16, device=DEVICE), 1).tolist() == [0, 0]
    odd = torch.randn(7, 13)
    assert_same_bits(launch.amax(odd.to(DEVICE), 1), reference.amax(odd, 1), "amax of rows of 13")


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_a_nan_spoils_its_block_and_no_other(dtype: torch.dtype) -> None:
    w = torch.randn(4, 64, dtype=dtype)
    w[0, 3], w[2, 20] = -torch.nan, torch.nan
    spoilt = torch.zeros(4, 4, dtype=torch.bool)
    spoilt[0, 0] = spoilt[2, 1] = True
    g = torch.tensor(2.0**-10)
    packed, scale, fake = launched(w, g, blocks=16)
    for got in (fake, dequantized(packed, scale, g, dtype, blocks=16)):
        assert torch.equal(got.isnan().cpu(), spoilt.repeat_interleave(16, 1))
    expected = reference.fake_quantize(w, g)
    assert_same_bits(fake, expected, "the other blocks", w=w)


def test_a_nan_multiplier_is_not_silent() -> None:
    w, g = torch.randn(2, 2, 16), torch.tensor([torch.nan, 1.0])
    packed, scale, fake = launched(w, g, blocks=2)
    for got in (fake, dequantized(packed, scale, g, torch.bfloat16, blocks=2)):
        assert (
            got.isnan().cpu().flatten(1).any(1).tolist()
            == got.isnan().cpu().flatten(1).all(1).tolist()
            == [True, False]
        )


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", [(5, 48), (3, 4, 32)])
def test_dequantizing_prepared_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape)
    g = reference.global_scale(reference.amax(w, len(shape) - 2))
    packed, scale = (t.to(DEVICE) for t in reference.quantize(w, g))
    run = launch.prepare_dequantize(packed, scale, g.to(DEVICE), tile(8, launch.DEQUANTIZE))
    assert run is not None
    for _ in range(2):
        out = torch.full(shape, 7, dtype=dtype, device=DEVICE)
        assert run(out)
        assert_same_bits(out, reference.dequantize(packed.cpu(), scale.cpu(), g, dtype), "weights", scale=scale)
        packed.add_(0x11)  # other codes in the same place
    assert not run(torch.empty(shape, dtype=torch.float64, device=DEVICE))
    odd = torch.empty(w.numel() + 1, dtype=dtype, device=DEVICE)[1:]
    assert not run(odd)
    assert launch.prepare_dequantize(packed.transpose(0, -1), scale, g) is None


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("items", [1, 3])
def test_tile_boundaries(blocks: int, items: int) -> None:
    """Numbers of blocks that fill tiles exactly, miss by one and are less than one; nothing is written outside."""
    for count in (1, 7, 8, 9):
        w = torch.randn(items, count, 16, dtype=torch.bfloat16)
        g = reference.global_scale(reference.amax(w, 1), "amax")
        check(w, g, blocks)
        guard = torch.full((items * count + 2, 16), 7.0, dtype=torch.bfloat16, device=DEVICE)
        launch.fake_quantize(w.to(DEVICE), g.to(DEVICE), guard[1:-1].view(w.shape), tile(blocks, launch.FAKE_QUANTIZE))
        assert (guard[0] == 7).all() and (guard[-1] == 7).all()
    for size, steps in ((1, 1), (8, 2), (16, 4)):
        got = launch.amax_bits(w.to(DEVICE), 1, tile=size, steps=steps).view(torch.float32)
        assert_same_bits(got, reference.amax(w, 1), "amax", w=w)


def test_more_items_than_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MAX_ITEMS", 3)
    w = torch.randn(4, 2, 2, 16)
    g = reference.global_scale(reference.amax(w, 2))
    check(w, g, blocks=2)


def test_tensors_that_words_do_not_fit() -> None:
    """Slices of a buffer that start in the middle of a word, as inputs and as results."""
    g = torch.tensor(0.01, device=DEVICE)
    for dtype in DTYPES[:3]:
        buffer = torch.randn(2 + 64, device=DEVICE).to(dtype)
        for start in (0, 1):
            w = buffer[start : start + 64].view(2, 32)
            result = torch.zeros_like(buffer)
            launch.fake_quantize(w, g, result[start : start + 64].view(2, 32), launch.Tile(4, 4, 3))
            expected = reference.fake_quantize(w.cpu(), g.cpu())
            assert_same_bits(result[start : start + 64].view(2, 32), expected, f"{dtype} from {start}", w=w)
            assert result[:start].sum() == 0 and result[start + 64 :].sum() == 0
    packed = torch.randint(0, 256, (3 + 32,), dtype=torch.uint8, device=DEVICE)
    scale = torch.randint(8, 127, (1 + 4,), dtype=torch.uint8, device=DEVICE)
    for start in (0, 1, 3):
        part = packed[start : start + 32].view(2, 16), scale[1:].view(2, 2)
        expected = reference.dequantize(*(t.cpu() for t in part), g.cpu())
        assert_same_bits(dequantized(*part, g, torch.bfloat16, blocks=4), expected, f"codes from {start}")


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight of one to four dimensions and a multiplier for some of its leading ones, as few programs."""
    lead = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = (*lead, 16 * draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-30, 10))
    if draw(st.booleans()):
        w = w.transpose(0, -1).contiguous().transpose(0, -1)
    w = w.to(draw(st.sampled_from(DTYPES[:1] + DTYPES[2:])))
    largest = reference.amax(w, draw(st.integers(0, min(2, len(lead)))))
    return w, reference.global_scale(largest, draw(st.sampled_from(format.POLICIES)))


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from([4, 64]))
def test_shapes(case: tuple[Tensor, Tensor], blocks: int) -> None:
    check(*case, blocks)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements in one item, and in several: the last rows are what they are alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.0f}")
    w = torch.randn(1, 16, device=DEVICE, dtype=torch.bfloat16).expand((1 << 27) + 4096, 16).contiguous()
    w[-4096:] = torch.randn(4096, 16, device=DEVICE)
    w[-1, -1] = 100
    for items in (1, 4):
        shaped = w.view(items, -1, 16)
        g = reference.global_scale(launch.amax(shaped, 1).cpu()).to(DEVICE)
        assert_same_bits(launch.amax(shaped, 1), shaped.abs().amax((1, 2)).float(), "amax")
        packed, scale, fake = launched(shaped, g)
        out = dequantized(packed, scale, g, torch.bfloat16)
        assert torch.equal(out.view(torch.int16), fake.view(torch.int16))
        tail, last = shaped[-1, -4096:].cpu(), g[-1].cpu()
        assert_same_bits(fake[-1, -4096:], reference.fake_quantize(tail, last), f"the end of {items} items")
        expected_packed, expected_scale = reference.quantize(tail, last)
        assert_same_bits(packed[-1, -4096:], expected_packed, "the last codes")
        assert_same_bits(scale[-1, -4096:], expected_scale, "the last scales")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_reference_gives_the_same_on_a_gpu(case: str) -> None:
    """So that the tests of large weights may compute what they expect there."""
    w, g = CASES[case]()
    for made, expected in zip(reference.quantize(w.cuda(), g.cuda()), reference.quantize(w, g), strict=True):
        assert_same_bits(made, expected, f"{case} on the GPU", w=w)
    assert_same_bits(reference.fake_quantize(w.cuda(), g.cuda()), reference.fake_quantize(w, g), case, w=w)


def check_on_gpu(w: Tensor, batch_dims: int) -> None:
    """`check` for weights of any size and strides on the GPU: slice by slice, with the reference there."""
    policy = format.POLICIES[w.shape[-1] // 16 % 2]
    largest = launch.amax(w, batch_dims)
    whole = torch.stack([part.abs().amax() for part in w]) if batch_dims else w.abs().amax()
    assert_same_bits(largest, whole.bfloat16().float(), "amax")
    g = reference.global_scale(largest, policy)
    packed = torch.full((*w.shape[:-1], w.shape[-1] // 2), 0xAA, dtype=torch.uint8, device=DEVICE)
    scale = torch.full((*w.shape[:-1], w.shape[-1] // 16), 0xAA, dtype=torch.uint8, device=DEVICE)
    launch.quantize(w, g, packed, scale)
    fake, again = (torch.full(w.shape, 7, dtype=w.dtype, device=DEVICE) for _ in range(2))
    launch.fake_quantize(w, g, fake)
    prepared = launch.prepare_dequantize(packed, scale, g)
    if prepared is None or not prepared(again):
        launch.dequantize(packed, scale, g, again)
    step = max(1, (1 << 26) // w.shape[-1])
    for expert in range(len(w)) if batch_dims else [slice(None)]:
        one = g[expert] if batch_dims else g
        tensors = [t[expert].reshape(-1, t.shape[-1]) for t in (w, packed, scale, fake, again)]
        for row in range(0, len(tensors[0]), step):
            part, *made = (t[row : row + step] for t in tensors)
            result = reference.fake_quantize(part, one)
            for name, got, expected in zip(
                ("codes", "scales", "fake quantized", "dequantized"),
                made,
                (*reference.quantize(part, one), result, result),
                strict=True,
            ):
                integer = BITS[got.element_size()][0]
                assert torch.equal(got.view(integer), expected.view(integer)), f"{name} from row {row} of {w.shape}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kib", [1, 3, 17, 96, 1000, 12_345, 123_456, 1 << 20, 5 << 20])
def test_sizes_from_a_kibibyte_to_gigabytes(kib: int, dtype: torch.dtype) -> None:
    """Flat, per expert, in the middle of a buffer, transposed and strided: 5 GiB are 2.7 · 10^9 numbers in bf16."""
    free, _ = torch.cuda.mem_get_info()
    if free < (8 << 30) + 9 * kib * 1024:
        pytest.skip(f"needs {9 * kib / 2**20 + 8:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")
    numbers = kib * 1024 // dtype.itemsize
    width = 16 * max(1, int((numbers / 16) ** 0.5) // 16)
    rows = max(2, numbers // width)
    buffer = torch.empty(rows * width + 8, dtype=dtype, device=DEVICE).normal_(std=0.02)
    w = buffer[: rows * width].view(rows, width)
    check_on_gpu(w, 0)
    check_on_gpu(buffer[1 : 1 + rows * width].view(rows, width), 0)
    check_on_gpu(w[: rows // 2 * 2].view(2, rows // 2, width), 1)
    if rows >= 32:
        even = w[: rows // 32 * 32]
        check_on_gpu(even.t(), 0)
        check_on_gpu(even.view(2, -1, width).transpose(1, 2), 1)
        check_on_gpu(even[::2, : width // 16 // 2 * 16 or 16], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_large_weights(dtype: torch.dtype) -> None:
    w = torch.randn(4, 1024, 2048, dtype=dtype) * 0.02
    for policy in format.POLICIES:
        check(w, reference.global_scale(reference.amax(w, 1), policy))
        check(w, reference.global_scale(reference.amax(w), policy))


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
