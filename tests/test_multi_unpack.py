"""The unpacking of what an FSDP unit has gathered against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers_multi import BF16, FP16, FP32, MARKS, TILES, Mode, Unit
from helpers_numerics import assert_same_bits

from nvfp4_qat.multi_unpack import Unpacks

pytestmark = MARKS
WEIGHTS = [((7, 48), 1), ((5, 3, 16), 5), ((1, 32), 1), ((3, 16), 3), ((40, 16), 1)]


@pytest.fixture(params=["loops", "kernels"])
def mode(request: pytest.FixtureRequest) -> Mode:
    return Mode(request.param)


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
