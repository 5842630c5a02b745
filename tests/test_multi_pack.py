"""The amaxes and the packing of many tensors at once against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers_multi import BF16, FP16, FP32, FP64, MARKS, TILES, Mode, expected_amaxes, randn, some_g
from helpers_numerics import assert_same_bits
from torch import Tensor

from nvfp4_qat import reference
from nvfp4_qat.multi import NAN_BITS, Amaxes, Packs

pytestmark = MARKS


@pytest.fixture(params=["loops", "kernels"])
def mode(request: pytest.FixtureRequest) -> Mode:
    return Mode(request.param)


def several() -> tuple[list[Tensor], list[int], list[int], int]:
    """Weights of all kinds: tensors, items, first indices, and how many indices there are."""
    entries = [
        (randn(5, 48), 1, 0),
        (randn(3, 7, 32), 3, 1),
        (randn(9, 16, dtype=FP32), 1, 0),  # of the same fusion group as the first
        (randn(2, 2, 2, 16, dtype=FP16), 2, 5),
        (randn(0, 64), 0, 7),
        (randn(0, 64, dtype=FP32), 2, 7),
        (randn(4, 32, dtype=FP64), 1, 9),
        (randn(6, 32, offset=8), 2, 10),  # 16 bytes in: aligned
        (randn(6, 32, offset=1), 2, 12),  # in the middle of a word
        (randn(6, 32, offset=2), 2, 14),
        (randn(3, 32, dtype=FP32, offset=1), 3, 16),
        (randn(1, 64), 1, 19),
        (randn(130, 16), 1, 20),  # more blocks than a row of the table
        (randn(2, 130, 16, dtype=FP16), 2, 21),
    ]
    tensors, items, first = (list(column) for column in zip(*entries, strict=True))
    return tensors, items, first, 23


def test_amaxes(mode: Mode) -> None:
    tensors, items, first, n = several()
    amaxes = Amaxes([mode.put(t) for t in tensors], items, first, tiles=TILES, kernels=mode.kernels)
    out, expected = mode.zeros(n), expected_amaxes(tensors, items, first, n)
    amaxes(out)
    assert_same_bits(out.view(FP32), expected, "amaxes")
    assert (expected[[7, 8]] == 0).all()
    # What is there counts: a larger number stays, a smaller one goes.
    out.view(FP32)[:] = expected.to(mode.device)
    out.view(FP32)[::2] *= 2
    out.view(FP32)[1::4] /= 2
    before = out.view(FP32).cpu().clone()
    amaxes(out)
    assert_same_bits(out.view(FP32), torch.maximum(before, expected), "amaxes joined with others")


def test_amaxes_of_what_is_not_whole_blocks(mode: Mode) -> None:
    tensors = [torch.randn(13), torch.randn(3, 5), torch.randn(4, 10).bfloat16(), torch.tensor(-3.0)]
    items, first = [1, 3, 4, 1], [0, 1, 4, 8]
    out = mode.zeros(9)
    Amaxes([mode.put(t) for t in tensors], items, first, tiles=TILES, kernels=mode.kernels)(out)
    assert_same_bits(out.view(FP32), expected_amaxes(tensors, items, first, 9), "amaxes")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_nan_wins(mode: Mode, dtype: torch.dtype) -> None:
    w = torch.randn(5, 4, 16, dtype=dtype)
    w[1, 2, 3], w[2, 0, 0], w[3, 1, 1], w[4, 3, 15] = torch.nan, -torch.nan, -torch.inf, torch.nan
    w[4, 0, 0] = torch.inf
    out = mode.zeros(5)
    Amaxes([mode.put(w)], [5], [0], tiles=TILES, kernels=mode.kernels)(out)
    assert_same_bits(out.view(FP32), reference.amax(w, 1), "amaxes")
    assert out[[1, 2, 4]].tolist() == [NAN_BITS] * 3
    packed, scale, again = mode.zeros(160, torch.uint8), mode.zeros(20, torch.uint8), mode.zeros(5)
    g = torch.ones(5, device=mode.device)
    Packs([mode.put(w)], [5], [0], [packed], [scale], tiles=TILES, kernels=mode.kernels)(g, again)
    assert torch.equal(out, again)
    nan = (scale.view(torch.float8_e4m3fn).float().isnan().view(5, 4)).cpu()
    assert torch.equal(nan, w.isnan().any(-1))


class Packed:
    """`several` packed into one buffer, with guards around each result."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.tensors, self.items, self.first, self.n = several()
        self.here = [mode.put(t) for t in self.tensors]
        self.places: list[tuple[slice, slice]] = []
        at = 16
        for w in self.tensors:
            codes = slice(at, at + w.numel() // 2)
            scales = slice(codes.stop + 5, codes.stop + 5 + w.numel() // 16)
            self.places.append((codes, scales))
            at = -(-(scales.stop + 1) // 16) * 16
        self.buffer = torch.full((at,), 0xAA, dtype=torch.uint8, device=mode.device)
        self.packs = Packs(
            self.here,
            self.items,
            self.first,
            [self.buffer[c] for c, _ in self.places],
            [self.buffer[s] for _, s in self.places],
            tiles=TILES,
            kernels=mode.kernels,
        )

    def check(self, g: Tensor, only: list[int] | None = None) -> None:
        """The bytes of every tensor (in ``only``) are the reference's and the others are as they were made."""
        expected = torch.full(self.buffer.shape, 0xAA, dtype=torch.uint8)
        for i in range(len(self.tensors)) if only is None else only:
            w, n, first, (codes, scales) = self.tensors[i], self.items[i], self.first[i], self.places[i]
            if w.numel():
                packed, scale = reference.quantize(w.reshape(n, -1, 16), g[first : first + n].cpu())
                expected[codes], expected[scales] = packed.flatten(), scale.flatten()
        assert_same_bits(self.buffer, expected, "packed bytes")


def test_packs(mode: Mode) -> None:
    made = Packed(mode)
    g = some_g(made.n).to(mode.device)
    made.packs(g)
    made.check(g)


def test_packing_and_amax_in_one_pass(mode: Mode) -> None:
    made = Packed(mode)
    g, amax = some_g(made.n).to(mode.device), mode.zeros(made.n)
    amax[3] = 1 << 30
    made.packs(g, amax)
    made.check(g)
    expected = expected_amaxes(made.tensors, made.items, made.first, made.n).view(torch.int32)
    expected[3] = 1 << 30
    assert torch.equal(amax.cpu(), expected)


def test_packing_what_moved(mode: Mode) -> None:
    """Items that are said to have moved are packed with their new multipliers, and nothing is written elsewhere."""
    made = Packed(mode)
    g = some_g(made.n)
    made.packs(g.to(mode.device))
    for chosen in (torch.arange(made.n) % 3 == 0, torch.arange(made.n) == 5, torch.ones(made.n, dtype=torch.bool)):
        g = torch.where(chosen, g * 4, g)
        made.packs(g.to(mode.device), moved=chosen.int().to(mode.device))
        made.check(g)
    made.buffer ^= 0xFF
    made.packs(g.to(mode.device), moved=mode.zeros(made.n))
    made.buffer ^= 0xFF
    made.check(g)


def test_comparing_finds_every_byte(mode: Mode) -> None:
    made = Packed(mode)
    g = some_g(made.n).to(mode.device)
    made.packs(g)

    def differing() -> list[int]:
        found = mode.zeros(made.n)
        made.packs.compare(g, found)
        made_of = made.buffer.clone()
        assert set(found.tolist()) <= {0, 1} and torch.equal(made.buffer, made_of)
        return [i for i, flag in enumerate(found.tolist()) if flag]

    assert differing() == []
    generator = torch.Generator().manual_seed(0)
    for round_ in range(4):  # a bit in each tensor at once: in the first and last byte, and anywhere; codes and scales
        flipped, expected = torch.zeros_like(made.buffer), set()
        for w, n, first, places in zip(made.tensors, made.items, made.first, made.places, strict=True):
            if w.numel():
                place = places[round_ % 2]
                size = (place.stop - place.start) // n  # bytes of an item
                at = (0, size * n - 1, *torch.randint(size * n, (2,), generator=generator).tolist())[round_]
                flipped[place.start + at] = 1 << int(torch.randint(8, (), generator=generator))
                expected.add(first + at // size)
        made.buffer ^= flipped
        assert differing() == sorted(expected), round_
        made.buffer ^= flipped
    made.buffer[[s.stop for _, s in made.places]] ^= 0xFF  # between the tensors
    assert differing() == []


def test_packing_only_some(mode: Mode) -> None:
    made = Packed(mode)
    g, amax = some_g(made.n).to(mode.device), mode.zeros(made.n)
    some = [12, 1, 4, 8, 2]
    part = made.packs.only(some)
    part(g, amax)
    made.check(g, some)
    chosen = [[values[i] for i in some] for values in (made.tensors, made.items, made.first)]
    assert_same_bits(amax.view(FP32), expected_amaxes(*chosen, made.n), "amaxes of some")
    assert part.fits(chosen_here := [made.here[i] for i in some]) and not made.packs.fits(chosen_here)
    made.packs.only([4])(g)  # nothing but an empty tensor
    made.packs.only([])(g)


def test_values_are_read_anew_at_every_call(mode: Mode) -> None:
    made = Packed(mode)
    g = some_g(made.n).to(mode.device)
    made.packs(g)
    for here, w in zip(made.here, made.tensors, strict=True):
        w.mul_(-0.37)
        here.copy_(w)
    g = some_g(made.n).to(mode.device)
    made.packs(g)
    made.check(g)


def test_fits(mode: Mode) -> None:
    tensors = [mode.put(randn(4, 32)), mode.put(randn(2, 16, dtype=FP32)), mode.put(randn(0, 16))]
    out = [mode.zeros(64, torch.uint8), mode.zeros(16, torch.uint8), mode.zeros(0, torch.uint8)]
    scale = [mode.zeros(8, torch.uint8), mode.zeros(2, torch.uint8), mode.zeros(0, torch.uint8)]
    parameters = [torch.nn.Parameter(t) for t in tensors]
    for built in (
        Amaxes(parameters, [1, 1, 1], [0, 1, 2], tiles=TILES, kernels=mode.kernels),
        Packs(parameters, [1, 1, 1], [0, 1, 2], out, scale, tiles=TILES, kernels=mode.kernels),
    ):
        assert built.fits(parameters) and built.fits(tensors)
        with torch.no_grad():
            parameters[0].add_(1)
        assert built.fits(parameters), "written in place"
        assert not built.fits(parameters[:2])
        assert not built.fits([tensors[0].clone(), *tensors[1:]])
        assert not built.fits([tensors[0].view(2, 64), *tensors[1:]])
        assert not built.fits([tensors[0].view(FP16), *tensors[1:]])
        moved = torch.nn.Parameter(tensors[0].clone())
        assert not built.fits([moved, *parameters[1:]])
        moved.data = tensors[0]
        assert built.fits([moved, *parameters[1:]])
