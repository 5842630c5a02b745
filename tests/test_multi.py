"""Many tensors at once as a whole: from shards to whole weights, in few launches, in any tiles, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_multi import BF16, FP32, MARKS, TILES, Mode, Unit, expected_amaxes, randn, some_g
from helpers_numerics import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_qat import reference
from nvfp4_qat.multi import Amaxes, Packs
from nvfp4_qat.multi_table import Table, Tiles
from nvfp4_qat.multi_unpack import UnpackPart, Unpacks

pytestmark = MARKS


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
    """A kernel, or what Triton compiled of one, that counts its launches."""

    def __init__(self, kernel: Any, whole: Counted | None = None) -> None:
        self.kernel, self.launches, self.whole = kernel, 0, whole or self
        self.arg_names = getattr(kernel, "arg_names", None)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Counted | None:
            self.whole.launches += 1
            compiled = self.kernel[grid](*arguments, **options)
            return None if compiled is None else Counted(compiled, self.whole)

        return run


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
