"""The Triton kernels against the reference, bit for bit: every rounding, every code, and NaN.

`test_reference` holds the reference to an independent oracle on the same inputs. `test_kernels_sizes` covers shapes and
tiles.
"""

from __future__ import annotations

import pytest
import torch
from helpers_kernels import BLOCKS, DEVICE, DTYPES, MARKS, check, dequantized, launched, tl, triton
from helpers_numerics import CASES, all_codes_and_scales, assert_same_bits, multipliers
from torch import Tensor

from nvfp4_qat import format, kernels, launch, reference

pytestmark = MARKS


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
