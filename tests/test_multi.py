"""Many tensors at once against the reference, bit for bit: tensor by tensor on a CPU, and the kernels.

The kernels run on the GPU if there is one, else in Triton's interpreter, whose cost is per program: sizes are small and
so are the tiles, and every tensor ends in the middle of a tile. `test_gpu_multi` has the sizes of models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers_numerics import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_qat import reference
from nvfp4_qat.multi import NAN_BITS, Amaxes, Packs
from nvfp4_qat.multi_table import Table, Tiles
from nvfp4_qat.multi_unpack import UnpackPart, Unpacks

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # the interpreter's numpy
if HAS_GPU:
    pytestmark.append(pytest.mark.gpu)
TILES = Tiles(blocks=8, steps=2, share=4)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Mode:
    """Where the tensors are and who computes."""

    def __init__(self, name: str) -> None:
        self.kernels = name == "kernels"
        self.device = torch.device("cuda" if self.kernels and HAS_GPU else "cpu")

    def put(self, t: Tensor) -> Tensor:
        """``t`` on the device, at the same offset from an aligned address as it has in its own storage."""
        if t.device == self.device:
            return t
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(self.device)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    def zeros(self, n: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=self.device)


@pytest.fixture(params=["loops", "kernels"])
def mode(request: pytest.FixtureRequest) -> Mode:
    return Mode(request.param)


def randn(*shape: int, dtype: torch.dtype = BF16, offset: int = 0) -> Tensor:
    """Random weights that start ``offset`` elements into their storage."""
    n = int(np.prod(shape))
    flat = (torch.randn(n + offset) * 0.05).to(dtype)
    return flat[offset:].view(shape)


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


def expected_amaxes(tensors: list[Tensor], items: list[int], first: list[int], n: int) -> Tensor:
    out = torch.zeros(n)
    for w, count, i in zip(tensors, items, first, strict=True):
        if w.numel():
            part = reference.amax(w.reshape(count, -1), 1)
            out[i : i + count] = torch.maximum(out[i : i + count], part)
    return out


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


def some_g(n: int) -> Tensor:
    """A multiplier per index, of both policies."""
    amax = torch.rand(n) * 0.3 + 1e-3
    return torch.where(torch.arange(n) % 2 == 0, reference.global_scale(amax), reference.global_scale(amax, "amax"))


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


@pytest.mark.parametrize("tiles", [Tiles(1, 1, 1), Tiles(4, 1, 1), Tiles(4, 3, 1), Tiles(2, 2, 8), Tiles(256, 1, 2)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_tiles_change_nothing(tiles: Tiles, dtype: torch.dtype) -> None:
    mode = Mode("kernels")
    tensors = [randn(2, 13, 16, dtype=dtype), randn(1, 32, dtype=dtype), randn(8, 16, dtype=dtype)]
    here, items, first = [mode.put(t) for t in tensors], [2, 1, 1], [1, 0, 3]
    g, amaxes = some_g(4), mode.zeros(4)
    packed = [torch.zeros(t.numel() // 2, dtype=torch.uint8, device=mode.device) for t in tensors]
    scale = [torch.zeros(t.numel() // 16, dtype=torch.uint8, device=mode.device) for t in tensors]
    Packs(here, items, first, packed, scale, tiles=tiles, kernels=True)(g.to(mode.device), amaxes)
    alone = mode.zeros(4)
    Amaxes(here, items, first, tiles=tiles, kernels=True)(alone)
    assert torch.equal(alone, amaxes)
    assert_same_bits(alone.view(FP32), expected_amaxes(tensors, items, first, 4), "amaxes")
    for w, n, i, p, s in zip(tensors, items, first, packed, scale, strict=True):
        codes, scales = reference.quantize(w.view(n, -1, 16), g[i : i + n])
        assert_same_bits(p, codes.flatten(), "codes")
        assert_same_bits(s, scales.flatten(), "scales")
    unit = Unit([((2, 13, 16), 2), ((1, 32), 1), ((8, 16), 1)], world=2)
    unit.check(mode, unit.gathered(), [dtype] * 3, tiles)


class Unit:
    """Weights of one FSDP unit, packed by the reference, cut into ranks as FSDP2 does, and laid out to be gathered."""

    def __init__(self, weights: list[tuple[tuple[int, ...], int]], world: int) -> None:
        self.world, self.shapes = world, [shape for shape, _ in weights]
        self.g = some_g(sum(items for _, items in weights) + 1)
        self.packed: list[tuple[Tensor, Tensor]] = []
        self.parts: list[UnpackPart] = []
        at, index = 16, 1
        for shape, items in weights:
            w = randn(*shape)
            total = w.numel() // 16
            self.packed.append(reference.quantize(w.view(items, -1, 16), self.g[index : index + items]))
            blocks = -(-shape[0] // world) * (total // shape[0])
            scale = at + blocks * 8 + 3
            self.parts.append(UnpackPart(at, scale, blocks, total, items, index))
            at = -(-(scale + blocks) // 16) * 16
            index += items
        self.nbytes = at

    def gathered(self) -> Tensor:
        """Every rank's chunk; what pads it is random."""
        chunks = torch.randint(0, 256, (self.world, self.nbytes), dtype=torch.uint8)
        for part, (codes, scale) in zip(self.parts, self.packed, strict=True):
            for rank in range(self.world):
                mine = slice(rank * part.blocks, min((rank + 1) * part.blocks, part.total))
                codes_here, scale_here = codes.view(-1, 8)[mine], scale.view(-1)[mine]
                chunks[rank, part.codes : part.codes + codes_here.numel()] = codes_here.flatten()
                chunks[rank, part.scale : part.scale + scale_here.numel()] = scale_here
        return chunks.flatten()

    def expected(self, dtypes: list[torch.dtype]) -> Iterator[Tensor]:
        for part, (codes, scale), shape, dtype in zip(self.parts, self.packed, self.shapes, dtypes, strict=True):
            g = self.g[part.first : part.first + part.items]
            yield reference.dequantize(codes, scale, g, dtype).view(shape)

    def check(self, mode: Mode, gathered: Tensor, dtypes: list[torch.dtype], tiles: Tiles = TILES) -> None:
        unpacks = Unpacks(self.parts, self.world, mode.device, tiles=tiles, kernels=mode.kernels)
        g = self.g.to(mode.device)
        for start in (16, 32, 1):  # addresses change from call to call, and a result may begin anywhere
            sizes = [part.total * 16 for part in self.parts]
            wide = [torch.full((n + 48,), 7.0, dtype=d, device=mode.device) for n, d in zip(sizes, dtypes, strict=True)]
            outs = [
                torch.nn.Parameter(t[start : start + n].view(shape))
                for t, n, shape in zip(wide, sizes, self.shapes, strict=True)
            ]
            versions = [t._version for t in outs]
            unpacks(mode.put(gathered), g, outs)
            assert versions == [t._version for t in outs]
            for n, t, out, wanted in zip(sizes, wide, outs, self.expected(dtypes), strict=True):
                assert_same_bits(out.detach(), wanted, f"a weight of {self.world} ranks")
                assert (t[:start] == 7).all() and (t[start + n :] == 7).all()


WEIGHTS = [((7, 48), 1), ((5, 3, 16), 5), ((1, 32), 1), ((3, 16), 3), ((40, 16), 1)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_unpacks(mode: Mode, world: int) -> None:
    """Uneven shards, ranks that hold padding only, and experts that ranks cut between them."""
    unit = Unit(WEIGHTS, world)
    unit.check(mode, unit.gathered(), [BF16] * len(WEIGHTS))


def test_an_expert_in_two_ranks(mode: Mode) -> None:
    """Items need not end where shards end."""
    unit = Unit([((6, 16), 2), ((10, 32), 5), ((4, 16), 1)], 4)
    unit.check(mode, unit.gathered(), [BF16] * 3)


def test_more_weights_than_a_launch_takes_and_dtypes_mixed(mode: Mode) -> None:
    weights = [((2 + i % 3, 16 * (1 + i % 2)), 1) for i in range(19)]
    dtypes = [FP32 if i % 5 == 0 else FP16 if i % 7 == 0 else BF16 for i in range(19)]
    unit = Unit(weights, 2)
    unit.check(mode, unit.gathered(), dtypes)
    unit.check(mode, unit.gathered(), [BF16] * 19)


def test_one_object_serves_dtypes_and_buffers_that_change(mode: Mode) -> None:
    unit = Unit(WEIGHTS[:2], 2)
    unpacks = Unpacks(unit.parts, 2, mode.device, tiles=TILES, kernels=mode.kernels)
    shifted = torch.zeros(unit.gathered().numel() + 1, dtype=torch.uint8)
    shifted[1:] = unit.gathered()
    for gathered, dtype in ((unit.gathered(), BF16), (shifted[1:], FP32), (unit.gathered(), FP32), (shifted[1:], BF16)):
        outs = [torch.empty(shape, dtype=dtype, device=mode.device) for shape in unit.shapes]
        unpacks(mode.put(gathered), unit.g.to(mode.device), outs)
        for out, wanted in zip(outs, unit.expected([dtype] * 2), strict=True):
            assert_same_bits(out, wanted, str(dtype))


def test_unpacking_in_inference_mode(mode: Mode) -> None:
    unit = Unit(WEIGHTS[:1], 1)
    with torch.inference_mode():
        out = torch.empty(unit.shapes[0], dtype=BF16, device=mode.device)
        unpacks = Unpacks(unit.parts, 1, mode.device, tiles=TILES, kernels=mode.kernels)
        unpacks(mode.put(unit.gathered()), unit.g.to(mode.device), [out])
        assert_same_bits(out, next(unit.expected([BF16])), "in inference mode")


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whatever_shapes(data: st.DataObject) -> None:
    """Pack shards, gather, unpack: what a step does, for drawn weights and ranks, ends at the fake-quantized weight."""
    mode = Mode("kernels")
    world = data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=4))
    weights = [randn(rows, 16 * k, dtype=data.draw(st.sampled_from([BF16, FP32]))) for rows, k in shapes]
    items = [len(w) if data.draw(st.booleans()) else 1 for w in weights]
    first = [sum(items[:i]) for i in range(len(items))]
    amaxes = mode.zeros(sum(items))
    Amaxes([mode.put(w) for w in weights], items, first, tiles=TILES, kernels=True)(amaxes)
    g = reference.global_scale(amaxes.view(FP32), data.draw(st.sampled_from(["pow2", "amax"])))

    rows = [-(-len(w) // world) for w in weights]
    blocks = [r * w.shape[1] // 16 for r, w in zip(rows, weights, strict=True)]
    codes = [sum(blocks[:i]) * 8 + 16 * i - sum(blocks[:i]) * 8 % 16 for i in range(len(blocks))]
    end = codes[-1] + blocks[-1] * 8
    scales = [end + sum(blocks[:i]) for i in range(len(blocks))]
    nbytes = -(-(scales[-1] + blocks[-1]) // 16) * 16
    gathered = torch.zeros(world, nbytes, dtype=torch.uint8, device=mode.device)
    for rank, buffer in enumerate(gathered):
        shards = [mode.put(w[rank * r : (rank + 1) * r].clone()) for w, r in zip(weights, rows, strict=True)]
        mine = [len(s) if n > 1 else min(len(s), 1) for s, n in zip(shards, items, strict=True)]
        packed = [buffer[c : c + s.numel() // 2] for c, s in zip(codes, shards, strict=True)]
        scale = [buffer[c : c + s.numel() // 16] for c, s in zip(scales, shards, strict=True)]
        places = [f + (rank * r if n > 1 else 0) for f, n, r in zip(first, items, rows, strict=True)]
        Packs(shards, mine, places, packed, scale, tiles=TILES, kernels=True)(g)
    parts = [
        UnpackPart(codes[i], scales[i], blocks[i], w.numel() // 16, items[i], first[i]) for i, w in enumerate(weights)
    ]
    outs = [torch.empty(w.shape, dtype=w.dtype, device=mode.device) for w in weights]
    Unpacks(parts, world, mode.device, tiles=TILES, kernels=True)(gathered.flatten(), g, outs)
    for w, out, n, f in zip(weights, outs, items, first, strict=True):
        wanted = reference.fake_quantize(w.view(n, -1, w.shape[1]), g[f : f + n].cpu()).view(w.shape)
        assert_same_bits(out, wanted, "packed, gathered and unpacked", w=w)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each dtype, whatever the number of tensors; one for eight results of a dtype."""
    from nvfp4_qat import multi_kernels

    kernels = {name: Counted(getattr(multi_kernels, name)) for name in dir(multi_kernels) if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(multi_kernels, name, kernel)

    def launches() -> list[int]:
        counts = [kernels[f"multi_{name}_kernel"].launches for name in ("amax", "quantize", "dequantize")]
        for kernel in kernels.values():
            kernel.launches = 0
        return counts

    mode, out = Mode("kernels"), Mode("kernels").zeros(40)
    tensors = [mode.put(randn(2, 16, dtype=FP32 if i % 3 else BF16)) for i in range(40)]
    Amaxes(tensors, [1] * 40, list(range(40)), tiles=TILES, kernels=True)(out)
    assert launches() == [2, 0, 0]
    results = [[torch.empty(t.numel() // n, dtype=torch.uint8, device=mode.device) for t in tensors] for n in (2, 16)]
    packs = Packs(tensors, [1] * 40, list(range(40)), *results, tiles=TILES, kernels=True)
    packs(torch.ones(40, device=mode.device))
    assert launches() == [0, 2, 0]
    packs(torch.ones(40, device=mode.device), out)
    assert launches() == [0, 2, 0]
    for dtypes, count in (([BF16] * 8, 1), ([BF16] * 9, 2), ([BF16, FP32] * 4, 2)):
        unit = Unit([((2, 16), 1)] * len(dtypes), 1)
        outs = [torch.empty(2, 16, dtype=dtype, device=mode.device) for dtype in dtypes]
        unpacks = Unpacks(unit.parts, 1, mode.device, tiles=TILES, kernels=True)
        for _ in range(2):
            unpacks(mode.put(unit.gathered()), unit.g.to(mode.device), outs)
            assert launches() == [0, 0, count]


def test_rows_of_a_table_far_apart() -> None:
    """Addresses and offsets beyond 32 bits, checked without the memory: every block is in one row, at its place."""
    tiles = Tiles(blocks=256, steps=4, share=1 << 12)
    runs = np.array([[1 << 46, 1 << 45, 1 << 44, (1 << 28) + 5, 3], [7 << 40, 5 << 40, 0, 1, (1 << 31) - 1]])
    table = Table(runs, (32, 8, 1), None, tiles, torch.device("cpu"))
    span = 256 * 4 << 12
    rows = table.rows.tolist()
    assert len(rows) == (1 << 28) // span + 2 and table.grid == (len(rows) << 12,)
    for k, (values, codes, scales, last) in enumerate(rows[:-1]):
        assert (values, codes, scales) == ((1 << 46) + 32 * k * span, (1 << 45) + 8 * k * span, (1 << 44) + k * span)
        assert (last & 0xFFFFFFFF, last >> 32) == (span if k < len(rows) - 2 else 5, 3)
    assert rows[-1] == [7 << 40, 5 << 40, 0, 1 | ((1 << 31) - 1) << 32]


def test_layouts_that_cannot_be_are_refused() -> None:
    w, packed, scale = randn(4, 16), torch.zeros(32, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    for arguments in (
        ([w.t()], [1], [0], [packed], [scale]),
        ([w], [3], [0], [packed], [scale]),
        ([w], [1], [0], [packed[1:]], [scale]),
        ([w], [1], [0], [packed], [scale.float()]),
        ([w], [1], [0, 1], [packed], [scale]),
        ([randn(4, 8)], [4], [0], [packed[:16]], [scale[:2]]),
    ):
        with pytest.raises(AssertionError):
            Packs(*arguments)
    for part in (UnpackPart(8, 64, 4, 4, 1, 0), UnpackPart(0, 64, 1, 4, 1, 0), UnpackPart(0, 64, 4, 4, 3, 0)):
        with pytest.raises(AssertionError):
            Unpacks([part], 2, torch.device("cpu"))
