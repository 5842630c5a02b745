"""The reference against the oracle, exhaustively where the domain is small."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from helpers_numerics import CASES, all_codes_and_scales, assert_same_bits, bf16, multipliers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_qat import format, ops, reference
from nvfp4_qat.errors import UserError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def patterns(x: Tensor) -> np.ndarray:
    """bf16 patterns of a tensor of any dtype, rounded by the oracle."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(np.uint16)
    return oracle.bf16_bits(x.double().numpy())


def by_oracle(w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scale bytes and the dequantized bf16 weight, as the oracle has them."""
    blocks = patterns(w).reshape(-1, 16)
    rows = g.expand(w.shape[: g.ndim]).reshape(-1).repeat_interleave(len(blocks) // g.numel()).numpy()
    codes, scale = oracle.quantize(blocks, rows)
    values = oracle.dequantize(codes, scale, rows)
    lead = w.shape[:-1]
    return (
        torch.from_numpy(oracle.pack(codes)).reshape(*lead, -1),
        torch.from_numpy(scale).reshape(*lead, -1),
        bf16(values).reshape(w.shape),
    )


def check(w: Tensor, g: Tensor) -> None:
    packed, scale, values = by_oracle(w, g)
    got_packed, got_scale = reference.quantize(w, g)
    assert_same_bits(got_scale, scale, "block scales", w=w, g=g)
    assert_same_bits(got_packed, packed, "packed codes", w=w, scale=scale, g=g)
    for dtype in {torch.bfloat16, w.dtype}:
        assert_same_bits(reference.dequantize(packed, scale, g, dtype), values.to(dtype), "dequantized", w=w, g=g)
    assert_same_bits(reference.fake_quantize(w, g), values.to(w.dtype), "fake quantized", w=w, g=g)


@pytest.mark.parametrize("case", CASES)
def test_corner_cases(case: str) -> None:
    check(*CASES[case]())


def test_grids_are_the_formats() -> None:
    assert tuple(oracle.E2M1[:8]) == format.E2M1_GRID
    assert tuple((oracle.E2M1[:7] + oracle.E2M1[1:8]) / 2) == format.E2M1_TIES
    assert (oracle.E4M3[0x7E], oracle.E4M3[0x08]) == (format.E4M3_MAX, format.E4M3_MIN_NORMAL)
    assert format.E2M1_MAX * format.E4M3_MAX == format.GLOBAL_RANGE


def test_ties_go_to_the_even_code() -> None:
    # With scale and g one the elements are the products.
    x = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -0.0])
    expected = torch.tensor([6, 0, 1, 1, 2, 2, 4, 4, -0.0, -1, -1, -2, -2, -4, -4, -0.0])
    assert_same_bits(reference.fake_quantize(x, torch.tensor(1.0)), expected, "ties", x=x)
    packed, _ = reference.quantize(x, torch.tensor(1.0))
    assert oracle.unpack(packed.numpy()).tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 8]


def test_the_product_with_the_rounded_inverse_is_the_definition() -> None:
    """Dividing by the scale gives other codes near ties; the corner cases hold elements that tell them apart."""
    w, g = CASES["near_ties"]()
    packed, scale = reference.quantize(w, g)
    x = np.abs(oracle.bf16_value(patterns(w))).reshape(-1, 16)
    scaled = oracle.times(x.astype(np.float32), oracle.inverse(g.numpy())[:, None])
    s = oracle.E4M3[scale.reshape(-1).numpy()]
    product = oracle.times(scaled, oracle.inverse(s.astype(np.float32))[:, None])
    quotient = (scaled.astype(np.float64) / s[:, None]).astype(np.float32)
    by_quotient = oracle.nearest(quotient.astype(np.float64), oracle.E2M1[:8], np.arange(8, dtype=np.uint8))
    codes = oracle.unpack(packed.numpy()).reshape(-1, 16) % 8
    distance = np.abs(product[:, 1, None] - np.array(format.E2M1_TIES)).min(1) / np.spacing(product[:, 1])
    assert all((distance == ulps).sum() > 100 for ulps in (0, 1, 2))
    assert (codes != by_quotient).sum() > 10


def test_every_code_under_every_scale_byte_and_multiplier() -> None:
    packed, scale = all_codes_and_scales()
    g = multipliers()
    codes = np.tile(np.arange(16, dtype=np.uint8), (len(g) * 256, 1))
    expected = oracle.dequantize(codes, np.tile(scale[:, 0].numpy(), len(g)), g.repeat_interleave(256).numpy())
    expected = bf16(expected).reshape(len(g), 256, 16)
    packed, scale = (t.expand(len(g), -1, -1) for t in (packed, scale))
    for dtype in DTYPES:
        got = reference.dequantize(packed, scale, g, dtype)
        assert_same_bits(got, expected.to(dtype), f"dequantized to {dtype}", scale=scale)


def test_with_a_power_of_two_the_weight_is_exact_in_bf16() -> None:
    for g in 2.0 ** np.arange(-100.0, 9):
        products = oracle.E2M1[:8, None] * oracle.E4M3[oracle.NORMAL_SCALES] * g
        assert np.array_equal(oracle.bf16_value(oracle.bf16_bits(products)), products)


@pytest.mark.parametrize("policy", format.POLICIES)
def test_global_scale_of_every_bf16(policy: str) -> None:
    amaxes = oracle.BF16[oracle.BF16 <= 2688 * 2.0**8]
    expected = np.array([oracle.global_scale(a, policy) for a in amaxes])
    got = reference.global_scale(torch.from_numpy(amaxes.astype(np.float32)), policy)
    assert_same_bits(got, torch.from_numpy(expected), f"global scale, {policy}", amax=torch.from_numpy(amaxes))


@pytest.mark.parametrize("policy", format.POLICIES)
def test_global_scale_around_every_boundary(policy: str) -> None:
    boundaries = (2688 * 2.0 ** np.arange(-136, 9)).astype(np.float32)
    around = np.stack([np.nextafter(boundaries, np.float32(0)), boundaries, np.nextafter(boundaries, np.float32(1e9))])
    got = reference.global_scale(torch.from_numpy(around), policy).numpy()
    expected = np.vectorize(lambda a: oracle.global_scale(float(a), policy))(around)
    assert_same_bits(torch.from_numpy(got), torch.from_numpy(expected), policy, amax=torch.from_numpy(around))
    if policy == "pow2":
        steps = np.log2(got)
        at_least = np.maximum(np.arange(-136, 9), -100)
        assert np.array_equal(steps[0], at_least) and np.array_equal(steps[1], at_least)
        assert np.array_equal(steps[2], np.maximum(np.arange(-136, 9) + 1, -100))


def test_global_scale_bounds() -> None:
    top = torch.tensor(2688 * 2.0**8)
    assert float(ops.global_scale(top)) == 2.0**8
    assert float(ops.global_scale(torch.tensor(1e-38))) == 2.0**-100
    assert float(ops.global_scale(torch.tensor(0.0))) == float(ops.global_scale(torch.tensor(0.0), "amax")) == 1.0
    beyond = torch.nextafter(top, torch.tensor(torch.inf))
    for bad in (beyond, torch.tensor(torch.inf), torch.tensor([1.0, torch.nan])):
        for policy in format.POLICIES:
            with pytest.raises(UserError, match="the weight holds"):
                ops.global_scale(bad, policy)


def test_the_amax_policy_survives_a_checkpoint() -> None:
    """A checkpoint stores 1/g, rounded; the reader's 1/(1/g) is g again."""
    amaxes = torch.from_numpy(oracle.BF16[oracle.BF16 <= 2688 * 2.0**8].astype(np.float32))
    g = reference.global_scale(amaxes, "amax")
    assert_same_bits(1 / (1 / g), g, "1/(1/g)", amax=amaxes)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_other_dtypes_are_rounded_to_bf16_first(dtype: torch.dtype) -> None:
    # Near midpoints between bf16 numbers, where a second rounding or a truncation shows.
    rng = np.random.default_rng(2)
    midpoints = (rng.integers(0x2000, 0x4700, 1 << 14) * 65536 + 0x8000).astype(np.int32)
    near = (midpoints + rng.integers(-1, 2, len(midpoints)).astype(np.int32)).view(np.float32)
    if dtype == torch.float16:
        near = near[(near > 1e-3) & (near < 6e4)]
        near = near[: len(near) // 16 * 16]
    w = torch.from_numpy(near.reshape(-1, 16)).to(dtype)
    w[:, ::3] *= -1
    check(w, torch.tensor(0.5))
    largest = bf16(oracle.bf16_bits(np.abs(w.double().numpy()).max(1))).float()
    assert_same_bits(reference.amax(w, 1), largest, "amax", w=w)


def test_amax() -> None:
    w, _ = CASES["every_finite_bf16"]()
    assert float(reference.amax(w)) == oracle.BF16[0x7F7F]
    assert_same_bits(reference.amax(w, 2), w.float().abs().amax(-1), "amax of rows")
    w = torch.randn(3, 4, 5, 16)
    for value in (torch.nan, torch.inf, -torch.inf):
        w[1, 2, 3, 4] = value
        expected = torch.tensor(value).abs()
        assert_same_bits(reference.amax(w), expected, "amax")
        got = reference.amax(w, 2)
        assert_same_bits(got[1, 2], expected, "amax")
        assert got.shape == (3, 4) and int(got.isfinite().sum()) == 11
    assert reference.amax(torch.empty(3, 0, 16), 1).tolist() == [0, 0, 0]


def test_a_nan_spoils_its_block_and_no_other() -> None:
    w = torch.randn(4, 64)
    w[2, 20] = torch.nan
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2, 1] = True
    g = torch.tensor(2.0**-10)
    fake = reference.fake_quantize(w, g)
    packed, scale = reference.quantize(w, g)
    for got in (fake, reference.dequantize(packed, scale, g, torch.float32)):
        assert torch.equal(got.isnan(), expected.repeat_interleave(16, 1))


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight of two to four dimensions and a multiplier for any number of its leading dimensions."""
    lead = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape = (*lead, 16 * draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-30, 10))
    if draw(st.booleans()):  # strides are not the shape's
        w = w.transpose(0, -1).contiguous().transpose(0, -1)
    w = w.to(draw(st.sampled_from(DTYPES[:1] + DTYPES[2:])))
    largest = reference.amax(w, draw(st.integers(0, len(lead))))
    return w, reference.global_scale(largest, draw(st.sampled_from(format.POLICIES)))


@settings(max_examples=200, deadline=None)
@given(weights())
def test_shapes(case: tuple[Tensor, Tensor]) -> None:
    w, g = case
    check(w, g)
    packed, scale = reference.quantize(w, g)
    assert packed.shape == (*w.shape[:-1], w.shape[-1] // 2) and scale.shape == (*w.shape[:-1], w.shape[-1] // 16)
    if g.ndim:  # each item is what it is alone
        alone = [reference.fake_quantize(w[i], g[i]) for i in range(len(w))]
        assert_same_bits(torch.stack(alone), reference.fake_quantize(w, g), "item by item")
