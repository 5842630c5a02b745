"""Many tensors at once at the sizes of models: thousands of tensors, gigabytes, offsets beyond 32 bits, CUDA graphs.

What is expected comes from the launches for one tensor, which `test_kernels_sizes` holds to the reference at all sizes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from nvfp4_qat import launch, reference  # noqa: E402
from nvfp4_qat.multi import Amaxes, Packs  # noqa: E402
from nvfp4_qat.multi_unpack import UnpackPart, Unpacks  # noqa: E402

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def needs(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free / 2**30:.0f}")


def same(made: Tensor, expected: Tensor) -> bool:
    return torch.equal(made.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


class Model:
    """Weights, each with as many items as its first dimension or one, packed into one buffer as shards are."""

    def __init__(self, weights: list[Tensor], items: list[int]) -> None:
        self.weights, self.items = weights, items
        self.first = [sum(items[:i]) for i in range(len(items))]
        self.n = sum(items)
        self.codes, self.scales, at = [], [], 0
        for w in weights:
            self.codes.append(at)
            at += -(-w.numel() // 2 // 16) * 16
        for w in weights:
            self.scales.append(at)
            at += w.numel() // 16
        self.buffer = torch.zeros(-(-at // 16) * 16, dtype=torch.uint8, device="cuda")

    def packs(self) -> Packs:
        packed = [self.buffer[at : at + w.numel() // 2] for at, w in zip(self.codes, self.weights, strict=True)]
        scale = [self.buffer[at : at + w.numel() // 16] for at, w in zip(self.scales, self.weights, strict=True)]
        return Packs(self.weights, self.items, self.first, packed, scale)

    def amaxes(self) -> Tensor:
        out = torch.zeros(self.n, dtype=torch.int32, device="cuda")
        Amaxes(self.weights, self.items, self.first)(out)
        return out

    def check(self, g: Tensor) -> None:
        """Every byte of the buffer, and the weights that come out of it again."""
        for w, n, i, at, scales in zip(self.weights, self.items, self.first, self.codes, self.scales, strict=True):
            if w.numel() == 0:
                continue
            shaped = w.view(n, -1, 16)
            packed = torch.empty(*shaped.shape[:-1], 8, dtype=torch.uint8, device="cuda")
            scale = torch.empty(*shaped.shape[:-1], 1, dtype=torch.uint8, device="cuda")
            launch.quantize(shaped, g[i : i + n], packed, scale)
            assert same(self.buffer[at : at + packed.numel()], packed)
            assert same(self.buffer[scales : scales + scale.numel()], scale)
        for start in range(0, len(self.weights), 16):
            some = [i for i in range(start, min(start + 16, len(self.weights))) if self.weights[i].numel()]
            outs = [torch.full_like(self.weights[i], 7) for i in some]
            Unpacks([self.part(i) for i in some], 1, torch.device("cuda"))(self.buffer, g, outs)
            for i, out in zip(some, outs, strict=True):
                w, n, first = self.weights[i], self.items[i], self.first[i]
                expected = torch.empty_like(w)
                launch.fake_quantize(w.view(n, -1, 16), g[first : first + n], expected.view(n, -1, 16))
                assert same(out, expected)
        self.check_comparing(g)

    def check_comparing(self, g: Tensor) -> None:
        """Nothing differs; with a bit flipped in the last byte of each weight's codes or scales, the last item does."""
        packs, filled = self.packs(), [i for i, w in enumerate(self.weights) if w.numel()]
        for places, size in (([], 1), (self.codes, 2), (self.scales, 16)):
            ends = [places[i] + self.weights[i].numel() // size - 1 for i in filled] if places else []
            at = torch.tensor(ends, dtype=torch.int64, device="cuda")
            self.buffer[at] ^= 0x40
            differs = torch.zeros(self.n, dtype=torch.int32, device="cuda")
            packs.compare(g, differs)
            self.buffer[at] ^= 0x40
            expected = torch.zeros_like(differs)
            expected[[self.first[i] + self.items[i] - 1 for i in filled if places]] = 1
            assert same(differs, expected)

    def part(self, i: int) -> UnpackPart:
        """Weight i in the buffer, taken for the bytes of one rank."""
        total = self.weights[i].numel() // 16
        return UnpackPart(self.codes[i], self.scales[i], total, total, self.items[i], self.first[i])


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(std=0.02)


def test_thousands_of_tensors() -> None:
    """4,000 weights of three dtypes, from 16 numbers to five million: some experts, some empty, some not aligned."""
    generator = torch.Generator().manual_seed(0)
    weights, items = [], []
    for i in range(4000):
        rows, blocks = (int(2 ** (10 * torch.rand((), generator=generator))) for _ in range(2))
        experts = 1 + i % 5 if i % 4 == 0 else 1
        dtype = (BF16, BF16, FP32, FP16)[i % 7 % 4]
        if i % 100 == 99:
            rows = 0
        w = normal(experts * rows * min(blocks, 64) * 16 + 1, dtype=dtype)
        w = w[1:] if i % 50 == 7 else w[:-1]
        weights.append(w.view(experts * rows, -1) if rows else w.view(0, 16))
        items.append(experts)
    model = Model(weights, items)
    bits = model.amaxes()
    for w, n, first in zip(weights, items, model.first, strict=True):
        expected = reference.amax(w.reshape(n, -1), 1) if w.numel() else torch.zeros(n, device="cuda")
        assert same(bits[first : first + n].view(FP32), expected)
    g = reference.global_scale(bits.view(FP32))
    packs, again = model.packs(), torch.zeros_like(bits)
    packs(g, again)
    assert same(bits, again)
    model.check(g)

    half = list(range(0, len(weights), 2))
    model.buffer.zero_()
    packs.only(half)(g)
    packs.only([i + 1 for i in half])(g)
    model.check(g)


def test_gigabytes() -> None:
    """A weight of 2.2 · 10^9 numbers and one of 2.2 · 10^9 in experts; the buffer's scales begin beyond 2^31 bytes."""
    needs(40)
    weights = [normal(1 << 15, 1 << 16), normal(8, 1 << 13, (1 << 15) + 16), normal(3, 16)]
    weights[0][-1, -1], weights[1][7, -1, -1] = 3.0, -2.0
    model = Model(weights, [1, 8, 3])
    assert model.scales[0] > 1 << 31
    bits = model.amaxes()
    magnitudes = bits.view(FP32)
    assert magnitudes[0] == 3 and magnitudes[8] == 2
    assert same(magnitudes[1:8], weights[1][:7].abs().amax((1, 2)).float())
    g = reference.global_scale(magnitudes)
    again = torch.zeros_like(bits)
    model.packs()(g, again)
    assert same(bits, again)
    model.check(g)


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_gigabytes(world: int) -> None:
    """Chunks of more than 2^31 bytes for a weight of 2.1 · 10^9 numbers, of which the last rank has fewer."""
    needs(40)
    rows, width, missing = 1 << 15, 1 << 16, 5
    per_rank = rows // world
    w = normal(per_rank * world - missing, width)
    g = reference.global_scale(launch.amax(w).view(1))
    blocks = per_rank * width // 16
    codes, scale = 1 << 31, (1 << 31) + blocks * 8 + 1  # what other weights would fill
    gathered = torch.full((world, -(-(scale + blocks) // 16) * 16), 0xAA, dtype=torch.uint8, device="cuda")
    for rank, chunk in enumerate(gathered):
        shard = w[rank * per_rank : (rank + 1) * per_rank].contiguous()
        launch.quantize(
            shard,
            g[0],
            chunk[codes : codes + shard.numel() // 2].view(len(shard), -1),
            chunk[scale : scale + shard.numel() // 16].view(len(shard), -1),
        )
    total = w.numel() // 16
    wide = torch.full((w.numel() + 2 * width,), 7.0, dtype=BF16, device="cuda")
    out = wide[width:-width].view(w.shape)
    Unpacks([UnpackPart(codes, scale, blocks, total, 1, 0)], world, torch.device("cuda"))(gathered.view(-1), g, [out])
    launch.fake_quantize(w, g[0], w)
    assert same(out, w)
    assert (wide[:width] == 7).all() and (wide[-width:] == 7).all()


def test_a_call_neither_waits_nor_allocates_and_can_be_recorded() -> None:
    model = Model([normal(256, 512), normal(4, 64, 128), normal(128, 256, dtype=FP32)], [1, 4, 1])
    bits, g = torch.zeros(6, dtype=torch.int32, device="cuda"), torch.ones(6, device="cuda")
    amaxes, packs = Amaxes(model.weights, model.items, model.first), model.packs()
    unpacks = Unpacks([model.part(i) for i in range(3)], 1, torch.device("cuda"))
    outs = [torch.empty_like(w) for w in model.weights]

    def step() -> None:
        amaxes(bits)
        packs(g, bits)
        unpacks(model.buffer, g, outs)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        assert torch.cuda.max_memory_allocated() == before
    finally:
        torch.cuda.set_sync_debug_mode("default")

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for w in model.weights:
        w.mul_(-3)
    g.fill_(0.01)
    bits.zero_()
    model.buffer.zero_()
    graph.replay()
    model.check(g)
    assert same(bits, model.amaxes())
