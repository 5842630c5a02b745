"""The Triton kernels on weights of any shape, place and size against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, MARKS, check, dequantized, launched, tile
from helpers_numerics import BITS, CASES, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_qat import format, launch, reference

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", [(5, 48), (3, 4, 32)])
def test_dequantizing_prepared_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape)
    g = reference.global_scale(reference.amax(w, len(shape) - 2))
    packed, scale = (t.to(DEVICE) for t in reference.quantize(w, g))
    run = launch.prepare_dequantize(packed, scale, g.to(DEVICE), tile(8, launch.DEQUANTIZE))
    assert run is not None
    for skipped in (0, 0, 2, 0):  # at an address that Triton compiles another kernel for
        out = torch.full((w.numel() + skipped,), 7, dtype=dtype, device=DEVICE)[skipped:].view(shape)
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
