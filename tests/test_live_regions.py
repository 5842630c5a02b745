"""Copies between strided regions, merged, and what they cover, against counting every element."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvfp4_qat.live_regions import Copy, Region, _runs, clipped, coverage, merged, moved, region_of

U8, I16, F32, FP8, BF16 = torch.uint8, torch.int16, torch.float32, torch.float8_e4m3fn, torch.bfloat16


def offsets(region: Region) -> list[int]:
    """Where each element starts, in bytes, in the order of a copy."""
    at = itertools.product(*map(range, region.size))
    steps = [sum(i * s for i, s in zip(index, region.stride, strict=True)) for index in at]
    return [region.start + step * region.dtype.itemsize for step in steps]


def moves(copies: list[Copy]) -> Counter[tuple[str, int, int, torch.dtype, torch.dtype]]:
    """What goes where, element by element."""
    return Counter(
        (c.key, to, of, c.destination.dtype, c.source.dtype)
        for c in copies
        for to, of in zip(offsets(c.destination), offsets(c.source), strict=True)
    )


def counted(parameter: Tensor, regions: list[Region]) -> tuple[int, int]:
    """`coverage`, byte by byte."""
    times = [0] * parameter.nbytes
    for region in regions:
        for at in offsets(region):
            for byte in range(at, at + region.dtype.itemsize):
                times[byte] += 1
    size = parameter.element_size()
    return -(-times.count(0) // size), -(-sum(n - 1 for n in times if n) // size)


def copy_of(to: Tensor, of: Tensor, key: str = "a") -> Copy:
    return Copy(key, region_of(to), region_of(of))


dims = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)), max_size=3)


@st.composite
def families(draw: st.DrawFn) -> list[Copy]:
    """Copies of one shape, most of them a step apart as those of experts are, in one or two parameters."""
    sizes, to, of = zip(*found, strict=True) if (found := draw(dims)) else ((), (), ())
    kinds = draw(st.tuples(st.sampled_from([U8, I16, F32]), st.sampled_from([U8, I16, F32])))
    start, steps = (
        draw(st.tuples(st.integers(0, 9), st.integers(0, 9))),
        (draw(st.integers(-3, 9)), draw(st.integers(0, 9))),
    )
    found = []
    for i in range(draw(st.integers(1, 6))):
        jump = draw(st.sampled_from([0, 0, 0, 1, 5]))
        at = [(30 + s + i * step + jump) * kind.itemsize for s, step, kind in zip(start, steps, kinds, strict=True)]
        d, s = (Region(a, sizes, strides, kind) for a, strides, kind in zip(at, (to, of), kinds, strict=True))
        found.append(Copy(draw(st.sampled_from(["a", "a", "a", "b"])), d, s))
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(families(), max_size=3), st.randoms())
def test_merging_moves_every_element_as_before(families: list[list[Copy]], random) -> None:
    copies = [copy for family in families for copy in family]
    if random.random() < 0.3:
        random.shuffle(copies)
    found = merged(copies)
    assert moves(found) == moves(copies)
    assert all(stride >= 0 for c in found for stride in (*c.destination.stride, *c.source.stride))
    assert len(found) <= len(copies)


@settings(max_examples=500, deadline=None)
@given(families(), st.lists(st.integers(0, 80), max_size=4))
def test_parts_of_a_source_move_together_what_the_whole_moves(copies: list[Copy], cuts: list[int]) -> None:
    borders = sorted({0, *(4 * cut for cut in cuts), 1 << 12})
    found = []
    for first, last in itertools.pairwise(borders):
        for part in (part for copy in copies for part in clipped(copy, first, last)):
            assert all(first <= first + at < last for at in offsets(part.source))
            found.append(replace(part, source=replace(part.source, start=part.source.start + first)))
    assert moves(found) == moves(copies)


def test_values_are_not_cut_through() -> None:
    held = torch.empty(4, dtype=F32)
    with pytest.raises(ValueError, match="cannot be cut at bytes 0 or 6"):
        clipped(copy_of(held, held), 0, 6)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), dims, st.sampled_from([U8, I16, F32])), max_size=5))
def test_coverage_counts_every_byte(drawn: list) -> None:
    regions = []
    for start, sizes, kind in drawn:
        shape, stride = tuple(s for s, _, _ in sizes), tuple(s for _, s, _ in sizes)
        regions.append(Region(start * kind.itemsize, shape, stride, kind))
    extents = [(r, sum(n * s for n, s in zip(r.size, r.stride, strict=True)) + 1) for r in regions]
    end = max((r.start + extent * r.dtype.itemsize for r, extent in extents), default=3)
    for kind in (U8, I16, F32):
        parameter = torch.empty(end // kind.itemsize + 2, dtype=kind)
        assert coverage(parameter, regions) == counted(parameter, regions)


@pytest.mark.parametrize("rank, size", [(0, 1), (0, 2), (1, 2)])
def test_copies_of_all_experts_become_one_for_each_half(rank: int, size: int) -> None:
    experts, rows, columns = 6, 8, 10
    whole = torch.arange(experts * 2 * rows * columns, dtype=I16).view(experts, 2 * rows, columns)
    local = rows // size
    into, copies = torch.zeros(experts, 2 * local, columns, dtype=I16), []
    for half, e in itertools.product(range(2), range(experts)):
        part = whole[e, half * rows : (half + 1) * rows].narrow(0, rank * local, local)
        copies.append(copy_of(into[e].narrow(0, half * local, local), part))
    found = merged(copies)
    assert len(found) == 2 and coverage(into, [c.destination for c in found]) == (0, 0)
    for copy in found:
        copy.destination.of(into).copy_(copy.source.of(whole))
    halves = [h.narrow(1, rank * local, local) for h in whole.split(rows, 1)]
    assert torch.equal(into, torch.cat(halves, 1))


def test_experts_of_some_ranks_only_and_in_another_order_are_copied_right() -> None:
    whole, into = torch.arange(32).view(8, 4), torch.zeros(4, 4, dtype=torch.int64)
    for numbers, expected in (([2, 3, 4, 5], 1), ([1, 3, 5, 7], 1), ([0, 1, 6, 7], 2), ([3, 2, 1, 0], 4)):
        found = merged([copy_of(into[i], whole[e]) for i, e in enumerate(numbers)])
        assert len(found) == expected, numbers
        for copy in found:
            copy.destination.of(into).copy_(copy.source.of(whole))
        assert torch.equal(into, whole[numbers])


def test_one_value_for_all_rows_and_single_numbers() -> None:
    source, into = torch.tensor([3.0, 4.0]), torch.zeros(2, 5)
    found = merged([copy_of(into[i], source[i].expand(5)) for i in range(2)])
    (copy,) = found
    copy.destination.of(into).copy_(copy.source.of(source))
    assert torch.equal(into, source[:, None].expand(2, 5))
    (copy,) = merged([copy_of(into[i, 0], source[i]) for i in range(2)])
    assert copy.destination.numel == 2 and offsets(copy.destination) == [0, 20]


def test_transposed_tensors_are_copied_and_counted_like_others() -> None:
    experts, rows, columns = 5, 6, 4
    held, into = torch.empty(experts, rows, columns), torch.empty(experts, rows, columns)
    turned = merged([copy_of(into[e].T, held[e].T) for e in range(experts)])
    assert [(c.destination.size, c.destination.stride) for c in turned] == [((held.numel(),), (1,))]

    whole = torch.arange(float(experts * rows * columns)).view(experts, columns, rows)
    halves = [copy_of(into[e].T[k * 2 : k * 2 + 2], whole[e, k * 2 : k * 2 + 2]) for k in range(2) for e in range(5)]
    found = merged(halves)
    assert len(found) == 2 and coverage(into, [c.destination for c in found]) == (0, 0)
    for copy in found:
        copy.destination.of(into).copy_(copy.source.of(whole))
    assert torch.equal(into, whole.mT)


@pytest.mark.parametrize("turn", [lambda t: t.mT, lambda t: t.permute(2, 0, 1), lambda t: t.permute(1, 2, 0)])
def test_a_large_transposed_tensor_is_one_run_of_bytes(turn) -> None:
    large = torch.empty(64, 4096, 4096, dtype=U8, device="meta")
    starts, length = _runs(region_of(turn(large)))
    assert (starts.tolist(), length) == ([0], large.numel())
    assert coverage(large, [region_of(turn(large)[:1])]) == (large.numel() - turn(large)[0].numel(), 0)


def test_whole_tensors_of_one_shape_become_a_run_of_bytes() -> None:
    (copy,) = merged([copy_of(torch.empty(3, 4, 5), torch.empty(3, 4, 5))])
    assert (copy.destination.size, copy.destination.stride) == ((60,), (1,))


def test_copies_are_told_apart_by_parameter_and_dtype() -> None:
    one = copy_of(torch.empty(4, 4)[0], torch.empty(4, 4)[0])
    two = copy_of(torch.empty(4, 4)[1], torch.empty(4, 4)[1])
    assert len(merged([one, two])) == 1
    assert len(merged([one, replace(two, key="b")])) == 2
    assert len(merged([one, replace(two, source=replace(two.source, dtype=torch.int32))])) == 2
    assert len(merged([one, replace(two, destination=replace(two.destination, dtype=torch.int32))])) == 2


def test_a_region_is_the_same_view_of_any_tensor_of_that_form() -> None:
    form = torch.empty(6, 8, dtype=U8, device="meta")
    parts = {
        "rows": lambda t: t[2:4],
        "columns": lambda t: t[:, 3:5],
        "steps": lambda t: t[::2, 1::3],
        "transposed": lambda t: t[1:].T,
        "scale bytes": lambda t: t[3].view(FP8),
        "words": lambda t: t[2:, 4:].view(torch.int32),
        "one": lambda t: t[5, 7],
        "none": lambda t: t[6:],
        "expanded": lambda t: t[0, 0].expand(3),
    }
    held = torch.randint(256, (9, 8), dtype=U8)
    for name, part in parts.items():
        region = region_of(part(form))
        for tensor in (held[:6], held[2:8], held[1:7].clone()):
            got, want = region.of(tensor), part(tensor)
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype), name
            assert got.data_ptr() == want.data_ptr() or not got.numel(), name
            assert region.numel == want.numel()


def test_a_wider_view_of_memory_that_is_not_aligned_is_refused() -> None:
    region = region_of(torch.empty(8, dtype=U8, device="meta").view(torch.int32))
    bucket = torch.arange(16, dtype=U8)
    with pytest.raises((RuntimeError, ValueError)):
        region.of(bucket[1:9])


def test_missing_and_overlapping_elements_are_counted_exactly() -> None:
    parameter = torch.empty(4, 6, dtype=BF16)
    assert coverage(parameter, []) == (24, 0)
    assert coverage(parameter, [region_of(parameter)]) == (0, 0)
    assert coverage(parameter, [region_of(parameter[:, 1:])]) == (4, 0)
    assert coverage(parameter, [region_of(parameter[:3]), region_of(parameter[2:])]) == (0, 6)
    assert coverage(parameter, [region_of(parameter[:, :4]), region_of(parameter[:, 3:5])]) == (4, 4)
    assert coverage(parameter, [region_of(parameter)] * 3) == (0, 48)
    assert coverage(parameter, [region_of(parameter[1, 1]), region_of(parameter[1:2, :2])]) == (22, 1)
    assert coverage(parameter, [region_of(parameter[4:]), region_of(parameter[:, 6:])]) == (24, 0)
    assert coverage(parameter, [region_of(parameter.T)]) == (0, 0)
    assert coverage(parameter, [region_of(parameter[:2].view(I16)), region_of(parameter.view(U8)[3:])]) == (6, 0)
    assert coverage(torch.empty(0), []) == (0, 0)
    assert coverage(torch.empty(()), [region_of(torch.empty(()))]) == (0, 0)


@pytest.mark.parametrize(
    ("size", "source", "destination", "start", "one_piece"),
    [
        ((4, 6), (6, 1), (6, 1), 0, True),
        ((4, 6), (6, 1), (12, 1), 0, False),
        ((2, 2, 6), (12, 6, 1), (12, 6, 1), 0, True),
        ((4, 6), (1, 4), (1, 4), 0, True),
        ((4, 6), (1, 4), (6, 1), 0, False),
        ((3, 6), (6, 1), (6, 1), 12, False),
        ((3, 6), (6, 1), (6, 1), 0, False),
        ((24,), (1,), (1,), 0, True),
    ],
)
def test_bytes_of_a_copy_of_a_whole_tensor_are_moved_as_those_of_any_other(size, source, destination, start, one_piece):
    copy = Copy("p", Region(32, size, destination, torch.int16), Region(start, size, source, torch.int16))
    at = torch.arange(48)
    taken, to = moved(copy, at)
    quick, where = moved(copy, at, 48)
    assert (quick == slice(None)) == one_piece
    assert torch.equal(at[quick], at[taken]) and torch.equal(where, to)
