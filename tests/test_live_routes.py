"""Routes lead to memory that a kernel can reach, and leave everything else alone."""

from __future__ import annotations

import pytest
import torch

from nvfp4_qat.live_changes import Layout
from nvfp4_qat.live_copies import Loads
from nvfp4_qat.live_recipe import Incoming
from nvfp4_qat.live_regions import Copy, Region, merged, moved, run_of
from nvfp4_qat.live_routes import Routes, Target

U8, CPU = torch.uint8, torch.device("cpu")


def copy(key, there, start, count):
    return Copy(key, Region(there, (count,), (1,), U8), Region(start, (count,), (1,), U8))


def routes(targets, *copies, sizes=(64, 33, 16)):
    layout = Layout([Incoming(f"t{i}", (n,), U8, ()) for i, n in enumerate(sizes)])
    loads = {f"t{i}": Loads([c for j, c in copies if j == i]) for i in range(len(sizes))}
    return layout, Routes(layout, loads, targets.get, CPU)


def test_bytes_are_flipped_where_their_copies_are_and_nowhere_else():
    memory = torch.zeros(200, dtype=U8)
    first, second = memory[3:90], memory[101:140]  # at odd addresses
    targets = {"a": Target([first]), "b": Target([second])}
    layout, found = routes(
        targets,
        (0, copy("a", 10, 0, 32)),
        (0, copy("b", 0, 40, 8)),
        (1, copy("b", 8, 0, 33 - 10)),
        (2, copy("a", 60, 4, 8)),
    )
    assert set(found.keys) == {"t0", "t1", "t2"} and found.nbytes > 0
    at = torch.arange(layout.nbytes)
    flips = (at % 255 + 1).to(U8)
    order = torch.randperm(len(at))
    found.flip(at[order], flips[order])
    want = torch.zeros(200, dtype=U8)
    want[3 + 10 : 3 + 42] = flips[:32]
    want[101:109] = flips[40:48]
    want[109 : 109 + 23] = flips[64 : 64 + 23]
    want[3 + 60 : 3 + 68] = flips[112 + 4 : 112 + 12]
    assert torch.equal(memory, want)
    found.flip(at, flips)
    assert not memory.any()


@pytest.mark.parametrize(
    "target",
    [
        None,
        Target([torch.empty(64, dtype=U8, device="meta")]),
        Target([torch.empty(64, 2, dtype=U8)[:, 0]]),
    ],
)
def test_what_a_kernel_cannot_reach_has_no_route(target):
    memory = torch.zeros(64, dtype=U8)
    _, found = routes({"a": target, "b": Target([memory])}, (0, copy("a", 0, 0, 64)), (1, copy("b", 0, 0, 33)))
    assert set(found.keys) == {"t1", "t2"}


def test_copies_that_are_no_runs_or_overlap_have_no_route():
    targets = {"a": Target([torch.zeros(64, dtype=U8)])}
    columns = Copy("a", Region(0, (4, 2), (2, 1), U8), Region(0, (4, 2), (4, 1), U8))
    wide = Copy("a", Region(0, (4,), (1,), torch.float32), Region(0, (4,), (1,), torch.bfloat16))
    both = [(2, copy("a", 0, 0, 10)), (2, copy("a", 20, 5, 10))]
    _, found = routes(targets, (0, columns), (1, wide), *both)
    assert not found.keys
    found.flip(torch.arange(8), torch.ones(8, dtype=U8))


def test_empty_copies_are_none():
    empty = copy("a", 0, 0, 0)
    assert merged([empty]) == [] and run_of(empty) == (0, 0, 0)
    taken, to = moved(copy("a", 5, 0, 3), torch.arange(4))
    assert taken.tolist() == [True, True, True, False] and to.tolist() == [5, 6, 7]
