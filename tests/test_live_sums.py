"""Checksums: the kernel gives those of plain torch, and every change shows, of a value or of two places."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor

from nvfp4_qat.live_sums import Sums, line_of, words_of

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # the interpreter's numpy
CPU = torch.device("cpu")
TILE = (32, 2, 4)


def anything(*shape: int, dtype: torch.dtype = torch.uint8, offset: int = 0, seed: int = 0) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    rng = torch.Generator().manual_seed(seed)
    data = torch.randint(256, (count + offset,), dtype=torch.uint8, generator=rng)
    return data[offset:].view(dtype).view(shape)


def units() -> dict[str, list[Tensor]]:
    """Tensors of all kinds: long ones, of odd sizes and addresses, in another order, with gaps, repeated, empty."""
    return {
        "long": [anything(40, 129, dtype=torch.int64)],
        "several": [anything(64, 24), anything(8, dtype=torch.bfloat16, seed=1), anything(3, 5, dtype=torch.float32)],
        "odd": [anything(1, dtype=torch.float32), anything(300, offset=3), anything(7, 9)],
        "columns": [anything(16, 8, dtype=torch.int32).t()],
        "halves": list(anything(16, 16, dtype=torch.int32, seed=6).split([5, 11], 1)),
        "gaps": [anything(16, 16)[:, 3:7], anything(2, dtype=torch.int32)[:1].expand(5)],
        "empty": [anything(0, 4)],
        "none": [],
    }


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_the_kernel_gives_the_sums_of_plain_torch(device: str) -> None:
    moved: dict[int, torch.UntypedStorage] = {}

    def put(t: Tensor) -> Tensor:
        storage = moved.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().clone().to(device=device))
        return torch.empty(0, dtype=t.dtype, device=device).set_(storage, t.storage_offset(), t.shape, t.stride())

    found = units()
    there = {name: [put(t) for t in tensors] for name, tensors in found.items()}
    plain = Sums(CPU).of(found)
    assert plain.tolist()[-2:] == [0, 0] and len(set(plain.tolist())) == len(plain) - 1
    sums = Sums(torch.device(device), kernel=True, tile=TILE)
    for _ in range(2):
        assert sums.of(there).tolist() == plain.tolist()


def test_tables_follow_the_tensors() -> None:
    sums, found = Sums(CPU, kernel=True, tile=TILE), units()
    before = sums.of(found).tolist()
    found["long"] = [anything(40, 129, dtype=torch.int64, seed=5)]
    after = sums.of(found).tolist()
    assert before[0] != after[0] and before[1:] == after[1:]
    assert after == Sums(CPU).of(found).tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    t = anything(9, dtype=dtype) if dtype == torch.int64 else anything(61)
    sums, data = Sums(CPU), t.view(torch.uint8)
    seen = {int(sums.of({"": [t]}))}
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            seen.add(int(sums.of({"": [t]})))
            data[at] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(data)


@pytest.mark.parametrize("apart", [1, 2, 8, 16, 64, 1024])
def test_places_count(apart: int) -> None:
    t = anything(4096, seed=3)
    sums, data = Sums(CPU), t.clone()
    before = int(sums.of({"": [data]}))
    for at in range(0, 4096 - apart, 97):
        pair = [at, at + apart]
        data[pair] = t[pair[::-1]]
        assert (int(sums.of({"": [data]})) == before) == (t[pair[0]] == t[pair[1]])
        data.copy_(t)
    halves = data.view(2, 2048)
    assert int(sums.of({"": [halves[0], halves[1]]})) == before != int(sums.of({"": [halves[1], halves[0]]}))


def test_the_highest_bits_of_two_words_do_not_cancel() -> None:
    words = anything(64, dtype=torch.int64)
    sums, seen = Sums(CPU), set()
    for i in range(64):
        for j in range(i):
            words[[i, j]] ^= -(1 << 63)
            seen.add(int(sums.of({"": [words]})))
            words[[i, j]] ^= -(1 << 63)
    assert len(seen) == 64 * 63 // 2


def test_halves_of_a_matrix_are_read_together() -> None:
    matrix, sums = anything(16, 16, dtype=torch.int32, seed=6), Sums(CPU, kernel=True, tile=TILE)
    left, right = matrix.split([5, 11], 1)
    whole = sums.of({"": [matrix]})
    assert sums.of({"": [right, left]}) == sums.of({"": [left, right.as_strided(right.shape, right.stride())]}) == whole
    assert not sums._alone and sums.of({"": [left]}) != whole and sums._alone


def test_what_is_a_word() -> None:
    assert words_of(anything(4, 8)).dtype == torch.int64
    assert words_of(anything(3)).dtype == words_of(anything(8, offset=1)).dtype == torch.uint8
    assert line_of(anything(4, 6).t()) is not None and line_of(anything(4, 6)[:, :3]) is None
