"""Places of codes are found through any regular repacking, and changed there as if everything had been repacked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_qat import live_maps
from nvfp4_qat.live_maps import NoMapError, found

CPU = torch.device("cpu")


def codes_of(packed: Tensor) -> Tensor:
    """uint8[..., K/2] → uint8[rows, K]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).flatten(0, -2)


def packed_of(codes: Tensor) -> Tensor:
    return codes[..., ::2] | codes[..., 1::2] << 4


def tiled(a: int, b: int):
    """Tiles one after the other by columns, and in each a permutation; as 32-bit words."""
    order = torch.randperm(a * b, generator=torch.Generator().manual_seed(a))

    def process(packed: Tensor) -> list[Tensor]:
        codes = codes_of(packed)
        tiles = codes.view(codes.shape[0] // a, a, codes.shape[1] // b, b).permute(2, 0, 1, 3).reshape(-1, a * b)
        return [packed_of(tiles[:, order].reshape(-1, 64)).contiguous().view(torch.int32)]

    return process


def experts_apart(packed: Tensor) -> list[Tensor]:
    """The rows of each expert in two tensors, transposed, with padding."""
    halves = packed.view(torch.int32).chunk(2, -2)
    return [torch.nn.functional.pad(half.mT.contiguous(), (0, 3)) for half in halves]


PROCESSES = {
    "as they are": ((128, 64), lambda packed: [packed.clone()]),
    "transposed": ((128, 64), lambda packed: [packed.view(torch.int32).t().contiguous()]),
    "64 x 16": ((192, 48), tiled(64, 16)),
    "16 x 64": ((48, 96), tiled(16, 64)),
    "64 x 64": ((128, 64), tiled(64, 64)),
    "few rows": ((24, 64), tiled(8, 16)),
    "experts": ((3, 128, 32), experts_apart),
}


def random_codes(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1 << 23, 2048])
@pytest.mark.parametrize("name", PROCESSES)
def test_changed_codes_are_those_of_repacking_everything(name, chunk, monkeypatch):
    monkeypatch.setattr(live_maps, "CHUNK", chunk)
    shape, process = PROCESSES[name]
    found_map = found(shape, process, CPU)
    old, new = random_codes(shape, 1), random_codes(shape, 2)
    new = torch.where(torch.rand(shape) < 0.3, new, old)
    live = process(old)
    flips = codes_of(old ^ new).flatten()
    changed = flips.nonzero()[:, 0]
    order = torch.randperm(len(changed))
    found_map.change(live, changed[order], flips[changed[order]])
    for a, b in zip(live, process(new), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found_map.read(live, changed), codes_of(new).flatten()[changed])


@pytest.mark.gpu
def test_codes_that_share_a_byte_are_changed_on_a_gpu():
    device, shape = torch.device("cuda"), (1024, 512)
    process = tiled(64, 16)
    found_map = found(shape, lambda packed: [t.to(device) for t in process(packed.cpu())], device)
    old, new = random_codes(shape, 1), random_codes(shape, 2)
    live = [t.to(device) for t in process(old)]
    flips = codes_of(old ^ new).flatten()
    order = torch.randperm(len(flips))
    found_map.change(live, order.to(device), flips[order].to(device))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(live, process(new), strict=True))


def test_a_map_is_small():
    shape = (2048, 512)
    found_map = found(shape, tiled(64, 16), CPU)
    assert found_map.tile == (64, 16)
    assert found_map.nbytes < torch.Size(shape).numel() / 16


@pytest.mark.parametrize(
    "process",
    [
        lambda packed: [packed ^ 0x80],  # changed
        lambda packed: [torch.where(packed & 15 == 3, packed ^ 1, packed)],  # one code becomes another
        lambda packed: [packed[:-1]],  # some are gone
        lambda packed: [torch.cat((packed, packed[:1]))],  # some are there twice
        lambda packed: [packed + packed.roll(1)],
        lambda packed: [torch.ones(3, dtype=torch.uint8), packed],  # something else beside them
        lambda packed: [packed.view(-1)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]],
        lambda packed: [packed if packed.unique().numel() < 200 else packed.flip(0)],  # hangs on the codes
    ],
)
def test_what_is_no_regular_permutation_has_no_map(process):
    with pytest.raises(NoMapError):
        found((64, 64), process, CPU)


def test_shapes_that_no_tile_divides_have_no_map():
    with pytest.raises(NoMapError, match="no tile size divides"):
        found((3, 32), lambda packed: [packed.clone()], CPU)
