"""Changes between two streams, applied to the first, give the second; whatever changes, and however little."""

from __future__ import annotations

import pytest
import torch

from nvfp4_qat import live_changes
from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_changes import FAR, Layout, Snapshot, compressed, from_pieces, to_pieces
from nvfp4_qat.live_recipe import Incoming, Part

SHAPES = {
    "a.weight_packed": ((40, 64), torch.uint8),
    "a.weight_scale": ((40, 8), torch.float8_e4m3fn),
    "a.weight_global_scale": ((1,), torch.float32),
    "norm.weight": ((33,), torch.bfloat16),
    "embed.weight": ((700, 300), torch.bfloat16),
    "last.weight": ((7,), torch.bfloat16),
}
ENTRIES = [Incoming(name, shape, dtype, (Part(name),)) for name, (shape, dtype) in SHAPES.items()]


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
    changes = sorted(changes, key=lambda piece: piece.start)
    for piece in changes:
        at, flips = piece.places()
        assert (at.diff() > 0).all() and (flips != 0).all()
    for name, at, flips in layout.taken_apart(changes):
        data = layout.view(memory, name).view(-1).view(torch.uint8)
        data[at] ^= flips


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize(("piece", "few", "at_once"), [(1 << 27, 1 << 22, 1 << 23), (1 << 17, 100, 500), (1000, 9, 99)])
@pytest.mark.parametrize("fraction", [0.0, 1e-5, 1e-3, 0.05, 0.9])
def test_old_weights_with_the_changes_are_the_new_ones(piece, few, at_once, fraction, monkeypatch):
    for name, value in (("PIECE", piece), ("FEW", few), ("AT_ONCE", at_once)):
        monkeypatch.setattr(live_changes, name, value)
    layout = Layout(ENTRIES)
    old = weights(1)
    new = moved(old, fraction)
    snapshot, memory = Snapshot(layout, torch.device("cpu")), torch.zeros(layout.nbytes, dtype=torch.uint8)
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
@pytest.mark.parametrize("fraction", [1e-3, 0.9])
def test_changes_on_a_gpu_are_those_of_a_cpu(fraction, monkeypatch):
    monkeypatch.setattr(live_changes, "PIECE", 1 << 16)
    layout, old, new = Layout(ENTRIES), weights(1), moved(weights(1), fraction)
    found = []
    for device in ("cpu", "cuda"):
        snapshot = Snapshot(layout, torch.device(device))
        for name, t in old.items():
            snapshot.keep(name, t.to(device))
        pieces = list(snapshot.changes((name, t.to(device)) for name, t in new.items()))
        found.append([(n, at.cpu(), flips.cpu()) for n, at, flips in layout.taken_apart(pieces)])
    for a, b in zip(*found, strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def test_the_order_of_a_stream_does_not_matter():
    layout, new = Layout(ENTRIES), weights(3)
    snapshot, memory = Snapshot(layout, torch.device("cpu")), torch.zeros(layout.nbytes, dtype=torch.uint8)
    applied(layout, memory, snapshot.changes(reversed(new.items())))
    assert all(torch.equal(bits(layout.view(memory, name)), bits(t)) for name, t in new.items())


def test_pieces_within_what_another_spans():
    layout, old, new = Layout(ENTRIES), weights(1), moved(weights(1), 0.01)
    snapshot, memory = Snapshot(layout, torch.device("cpu")), torch.zeros(layout.nbytes, dtype=torch.uint8)
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
    (passed,) = from_pieces(dict(to_pieces(changes)), torch.device("cpu"))
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
    snapshot, new = Snapshot(Layout(ENTRIES), torch.device("cpu")), weights(0)
    snapshot.version = 3
    change(new)
    with pytest.raises(MismatchError, match=message):
        list(snapshot.changes(new.items()))
    assert snapshot.version is None


def test_a_tensor_that_comes_twice():
    snapshot, new = Snapshot(Layout(ENTRIES), torch.device("cpu")), weights(0)
    with pytest.raises(MismatchError, match="has come before"):
        list(snapshot.changes([*new.items(), *list(new.items())[:1]]))
