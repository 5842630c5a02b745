"""Changes between two streams, applied to the first, give the second; whatever changes, and however little."""

from __future__ import annotations

import pytest
import torch

from nvfp4_qat import live_changes, live_snapshot
from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_changes import FAR, Layout, compressed, from_pieces, places, to_pieces
from nvfp4_qat.live_recipe import Incoming, Part
from nvfp4_qat.live_snapshot import Snapshot

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # the interpreter's numpy

SHAPES = {
    "a.weight_packed": ((40, 64), torch.uint8),
    "a.weight_scale": ((40, 8), torch.float8_e4m3fn),
    "a.weight_global_scale": ((1,), torch.float32),
    "norm.weight": ((33,), torch.bfloat16),
    "embed.weight": ((350, 100), torch.bfloat16),
    "last.weight": ((7,), torch.bfloat16),
}
ENTRIES = [Incoming(name, shape, dtype, (Part(name),)) for name, (shape, dtype) in SHAPES.items()]


CPU = torch.device("cpu")


def weights(seed):
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, (shape, dtype) in SHAPES.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        made[name] = torch.randint(127, (size,), dtype=torch.uint8, generator=g).view(dtype).view(shape)
    return made


def moved(old, fraction, seed=0):
    g = torch.Generator().manual_seed(seed)
    new = {}
    for name, t in old.items():
        data = t.clone().view(-1).view(torch.uint8)
        chosen = torch.rand(data.shape, generator=g) < fraction
        data[chosen] ^= 1
        new[name] = data.view(t.dtype).view(t.shape)
    return new


def applied(layout, memory, changes):
    named = {}
    for number, piece in enumerate(changes):
        pieces = dict(to_pieces(piece, number))
        assert not pieces.keys() & named.keys()
        named |= pieces
    changes = from_pieces(named, CPU)
    for piece in changes:
        at, flips = piece.places()
        assert (at.diff() > 0).all() and (flips != 0).all()
    for at, flips in places(changes):
        assert sum(chosen.stop - chosen.start for _, chosen, _ in layout.split(at)) == len(at)
        memory[at] ^= flips


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize(
    ("piece", "few", "at_once", "tile"),
    [(1 << 27, 1 << 22, 1 << 23, 0), (1 << 14, 100, 500, 0), (1000, 9, 99, 0),
     (1 << 27, 1 << 22, 1 << 23, 1024), (1 << 14, 100, 500, 64), (9000, 1 << 22, 500, 64)],
)  # fmt: skip
@pytest.mark.parametrize("fraction", [0.0, 1e-5, 1e-3, 0.05, 0.9])
def test_old_weights_with_the_changes_are_the_new_ones(piece, few, at_once, fraction, tile, monkeypatch):
    for name, value in (("PIECE", piece), ("FEW", few), ("STEP", piece // 4), ("TILE", tile)):
        monkeypatch.setattr(live_snapshot, name, value)
    monkeypatch.setattr(live_changes, "AT_ONCE", at_once)
    layout = Layout(ENTRIES)
    old = weights(1)
    new = moved(old, fraction)
    snapshot, memory = Snapshot(layout, CPU, kernels=tile > 0), torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, t in old.items():
        snapshot.keep(name, t)
        layout.view(memory, name).copy_(t)
    changes = list(snapshot.changes(new.items()))
    applied(layout, memory, changes)
    for name, t in new.items():
        assert torch.equal(bits(layout.view(memory, name)), bits(t))
        assert torch.equal(bits(snapshot.view(name)), bits(t))
    changed = sum(int((bits(old[n]) != bits(new[n])).sum()) for n in new)
    assert sum(c.nbytes for c in changes) <= min(3 * changed + 3 * 8, layout.nbytes)
    assert list(snapshot.changes(new.items())) == []


@pytest.mark.gpu
@pytest.mark.parametrize("few", [1 << 23, 100])
@pytest.mark.parametrize("fraction", [0.0, 1e-3, 0.9])
def test_changes_on_a_gpu_are_those_of_a_cpu(fraction, few, monkeypatch):
    monkeypatch.setattr(live_snapshot, "PIECE", 1 << 14)
    monkeypatch.setattr(live_snapshot, "FEW", few)
    layout, old, new = Layout(ENTRIES), weights(1), moved(weights(1), fraction)
    found = []
    for device in ("cpu", "cuda"):
        snapshot = Snapshot(layout, torch.device(device))
        for name, t in old.items():
            snapshot.keep(name, t.to(device))
        pieces = list(snapshot.changes((name, t.to(device)) for name, t in new.items()))
        made = list(places(pieces))
        found.append([torch.cat([pair[i].cpu() for pair in made] or [torch.empty(0)]) for i in range(2)])
        assert all(torch.equal(bits(snapshot.view(name).cpu()), bits(t)) for name, t in new.items())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_large_tensors_on_a_gpu():
    g = torch.Generator("cuda").manual_seed(0)
    shapes = {"a": (1 << 28,), "b": (12345, 4097), "c": (3,), "d": (1 << 20, 40)}
    layout = Layout([Incoming(name, shape, torch.uint8, (Part(name),)) for name, shape in shapes.items()])
    snapshot = Snapshot(layout, torch.device("cuda"))
    old = {n: torch.randint(256, s, dtype=torch.uint8, device="cuda", generator=g) for n, s in shapes.items()}
    assert sum(piece.count for piece in snapshot.changes(old.items())) > 0.9 * layout.nbytes
    for fraction in (1e-3, 0.004, 0.03, 0.3):
        new = {}
        for name, t in old.items():
            chosen = torch.rand(t.shape, device="cuda", generator=g) < fraction
            new[name] = torch.where(chosen, t ^ 16, t)
        changed = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
        pieces = list(snapshot.changes(new.items()))
        for at, flips in places(pieces):
            changed[at] = flips
        for name, t in old.items():
            assert torch.equal(layout.view(changed, name), t ^ new[name])
            assert torch.equal(snapshot.view(name), new[name])
        assert sum(piece.count for piece in pieces) == sum(int((old[n] != new[n]).sum()) for n in old)
        old = new


@pytest.mark.parametrize("few", [1 << 23, 9])
def test_the_order_of_a_stream_does_not_matter(few, monkeypatch):
    monkeypatch.setattr(live_snapshot, "FEW", few)
    monkeypatch.setattr(live_snapshot, "STEP", 1024)
    layout, new = Layout(ENTRIES), weights(3)
    names = list(new)
    for order in (names[::-1], names[1:] + names[:1], names[1::2] + names[::2]):
        snapshot, memory = Snapshot(layout, CPU), torch.zeros(layout.nbytes, dtype=torch.uint8)
        applied(layout, memory, snapshot.changes((name, new[name]) for name in order))
        assert all(torch.equal(bits(layout.view(memory, name)), bits(t)) for name, t in new.items())


def test_pieces_that_begin_at_the_same_byte():
    sizes = {"a": 1024, "b": 512, "c": 512}
    layout = Layout([Incoming(name, (n,), torch.uint8, (Part(name),)) for name, n in sizes.items()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_snapshot, "FEW", 9)
        patch.setattr(live_snapshot, "STEP", 1024)
        snapshot, memory = Snapshot(layout, CPU), torch.zeros(layout.nbytes, dtype=torch.uint8)
        new = {name: torch.full((n,), 7, dtype=torch.uint8) for name, n in sizes.items()}
        applied(layout, memory, snapshot.changes((name, new[name]) for name in "acb"))
    assert (memory == 7).all()


def test_a_large_tensor_is_not_held_for_its_last_bytes(monkeypatch):
    monkeypatch.setattr(live_snapshot, "PIECE", 1000)
    snapshot = Snapshot(Layout(ENTRIES), CPU)
    snapshot.begin()
    list(snapshot.take("embed.weight", weights(1)["embed.weight"]))
    assert snapshot._waiting == []


def test_pieces_within_what_another_spans():
    layout, old, new = Layout(ENTRIES), weights(1), moved(weights(1), 0.01)
    snapshot, memory = Snapshot(layout, CPU), torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, t in old.items():
        snapshot.keep(name, t)
        layout.view(memory, name).copy_(t)
    names = list(new)
    order = [*names[:1], *names[-1:], *names[1:-1]]  # the first piece spans everything
    applied(layout, memory, snapshot.changes((name, new[name]) for name in order))
    assert all(torch.equal(bits(layout.view(memory, name)), bits(t)) for name, t in new.items())


@pytest.mark.parametrize("times", [-1, 0, 1, 2, 5])
@pytest.mark.parametrize("far", FAR.values())
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_distances_of_any_length(times, far, more):
    gap = max(1, times * far + more)
    flips = torch.zeros(gap + 12, dtype=torch.uint8)
    flips[[3, 3 + gap, 5 + gap]] = torch.tensor([1, 2, 255], dtype=torch.uint8)
    changes = compressed(1000, flips)
    (passed,) = from_pieces(dict(to_pieces(changes, 0)), CPU)
    for at, values in (changes.places(), passed.places()):
        assert at.tolist() == [1003, 1003 + gap, 1005 + gap] and values.tolist() == [1, 2, 255]


@pytest.mark.parametrize(("distance", "kind"), [(20, torch.uint8), (255, torch.uint8), (3000, torch.int16)])
def test_short_distances_take_a_byte_and_long_ones_two(distance, kind):
    flips = torch.zeros(200 * distance, dtype=torch.uint8)
    flips[::distance] = 7
    changes = compressed(0, flips)
    assert changes.gaps.dtype is kind and changes.nbytes == 200 * (1 + kind.itemsize)
    assert torch.equal(changes.places()[0], torch.arange(0, 200 * distance, distance))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), "1 tensors have not come: norm.weight"),
        (lambda w: w.update({"other": torch.zeros(1)}), "other was announced otherwise, or not"),
        (lambda w: w.update({"norm.weight": torch.zeros(33)}), "norm.weight was announced otherwise"),
    ],
)
def test_another_stream_than_announced(change, message):
    snapshot, new = Snapshot(Layout(ENTRIES), CPU), weights(0)
    snapshot.update = "of before"
    change(new)
    with pytest.raises(MismatchError, match=message):
        list(snapshot.changes(new.items()))
    assert snapshot.update is None


def test_a_tensor_that_comes_twice():
    snapshot, new = Snapshot(Layout(ENTRIES), CPU), weights(0)
    with pytest.raises(MismatchError, match="has come before"):
        list(snapshot.changes([*new.items(), *list(new.items())[:1]]))
