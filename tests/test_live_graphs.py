"""Tapes repeated by graphs give the bits of the tapes; what cannot be captured goes on without them."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers_live import Bare, Up
from standin_engine import Model, announced, checkpoint
from test_live_quick import Factor, Layer, numbers
from torch import nn

from nvfp4_qat import live_graphs, live_process
from nvfp4_qat.live_graphs import Graphs
from nvfp4_qat.live_repeat import same_bits
from nvfp4_qat.live_tape import Recorder

CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Fake:
    """Graphs without a GPU: what was captured is done again, and copied to where its results are."""

    def __init__(self, fails=(), wrong=False):
        self.fails, self.wrong, self.nbytes, self.made, self.replays = fails, wrong, 0, 0, 0

    def clear(self):
        self.nbytes = 0

    def trial(self, run):
        if "trial" in self.fails:
            raise RuntimeError("the host waits")
        run()

    def graph(self, run):
        if "graph" in self.fails:
            raise RuntimeError("capture is invalid")
        made = run()
        self.made, self.nbytes = self.made + 1, self.nbytes + 1000

        def replay():
            self.replays += 1
            new = run()
            pairs = [*zip(made.results, new.results, strict=True)]
            for old, fresh in [*pairs, *([(made.same, new.same)] if made.same is not None else [])]:
                old.copy_(fresh + 1 if self.wrong else fresh)

        return replay, made


def rescaled(own, table):
    """What an engine does: a factor found from the largest of some numbers, a table of its own, padding."""
    wide = own["scale"].float()
    positive = wide > 0
    factor = 1.0
    if positive.any():
        largest = wide[positive].max()
        if largest < 448:
            factor = (448 / largest).log2().floor().exp2().item()
    scaled = (wide * factor)[:, table]
    scaled[scaled < 2] = 0
    return [own["codes"].t().contiguous() ^ 1, scaled.half(), own["codes"]]


def parameters(seed, largest=4.0, rows=8, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 16, generator=g) * largest
    scale.view(-1)[3] = largest
    codes = torch.randint(256, (rows, 16), dtype=torch.uint8, generator=g)
    made = {"codes": codes, "scale": scale.to(torch.float8_e4m3fn)}
    return {name: nn.Parameter(t.to(device), requires_grad=False) for name, t in made.items()}


def tape(seed=0, order=range(15, -1, -1), process=rescaled, **options):
    own = parameters(seed, **options)
    recorder = Recorder(own)
    with torch.no_grad(), recorder:
        made = process(own, list(order))
    return recorder.tape(made)


def check(found, own):
    assert all(same_bits(a, b) for a, b in zip(found.results, rescaled(own, list(range(15, -1, -1))), strict=True))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_equal_layers_share_a_graph(device):
    fake = Fake() if device == "cpu" else None
    graphs = Graphs(torch.device(device), fake)
    tapes = [tape(i, device=device) for i in range(4)]
    assert len({t.signature() for t in tapes}) == 1
    for turn in range(3):
        for i, t in enumerate(tapes):
            own = parameters(10 * turn + i, device=device)
            before = {name: p.detach().clone() for name, p in own.items()}
            found = graphs.run(t, own)
            assert bool(found.same)
            check(found, own)
            assert all(same_bits(before[name], p) for name, p in own.items())
    assert graphs.count == 1 and graphs.nbytes > 0
    if fake is not None:
        assert (fake.made, fake.replays) == (1, 11)  # the first use is that of a tape, the second is compared
    graphs.clear()
    assert graphs.count == 0 and graphs.nbytes == 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_another_number_is_said_on_the_device(device):
    graphs = Graphs(torch.device(device), Fake() if device == "cpu" else None)
    t = tape(device=device)
    said = []
    for largest in (4.0, 4.0, 4.0, 1.0, 4.0, 0.0, 4.0):
        own = parameters(1, largest, device=device)
        found = graphs.run(t, own)
        said.append(bool(found.same))
        if said[-1]:
            check(found, own)
    assert said == [True, True, True, False, True, False, True]
    assert graphs.count == 1


def test_other_programs_have_other_signatures():
    same = tape().signature()
    assert same is not None and tape(7).signature() == same
    for other in (
        tape(rows=16),
        tape(order=range(16)),
        tape(largest=1.0),
        tape(process=lambda own, table: [own["codes"] ^ 1]),
        tape(process=lambda own, table: [own["codes"] ^ 2]),
    ):
        assert other.signature() not in (None, same)
    assert tape(process=lambda own, _: [own["scale"].float() * 0.0]).signature() != (
        tape(process=lambda own, _: [own["scale"].float() * -0.0]).signature()
    )


def test_what_others_may_change_counts_by_where_it_is():
    shared = torch.arange(16)

    def process(table):
        return tape(process=lambda own, _: [own["codes"][:, table]])

    one, two = process(shared), process(shared)
    assert one.signature() == two.signature() != process(shared.clone()).signature()
    graphs = Graphs(CPU, Fake())
    for i in range(4):
        shared.copy_(shared.flip(0))
        found = graphs.run((one, two)[i % 2], parameters(i))
        assert same_bits(found.results[0], parameters(i)["codes"].detach()[:, shared])
    assert graphs.count == 1


@pytest.mark.parametrize(
    "fake", [Fake(fails=["trial"]), Fake(fails=["graph"]), Fake(wrong=True)], ids=["trial", "graph", "bits"]
)
def test_a_kind_that_cannot_be_captured_goes_on_without(fake):
    graphs, t = Graphs(CPU, fake), tape()
    for seed in range(4):
        own = parameters(seed)
        check(graphs.run(t, own), own)
    assert graphs.count == 0 and fake.replays <= 1


@pytest.mark.gpu
def test_what_cuda_cannot_capture_leaves_cuda_as_it_was():
    def waits(own, table):
        return [own["scale"].float()[own["codes"] > 99].sum() + own["scale"].float()]  # a size that only numbers tell

    device = torch.device("cuda")
    graphs, t = Graphs(device), tape(process=waits, device="cuda")
    other = tape(device="cuda")
    for seed in range(4):
        own = parameters(seed, device="cuda")
        assert same_bits(graphs.run(t, own).results[0], waits(own, None)[0])
        check(graphs.run(other, own), own)
        torch.rand(3, device="cuda")
        torch.cuda.synchronize()
    assert graphs.count == 1 and torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
def test_graphs_run_in_order_with_the_stream_that_calls_them():
    graphs, t, side = Graphs(torch.device("cuda")), tape(device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        for seed in range(20):
            own = parameters(seed, device="cuda")
            torch.cuda._sleep(1_000_000)
            for p in own.values():
                p.data.copy_(p.detach().clone())
            found = graphs.run(t, own)
            kept = [r.clone() for r in found.results]
            expected = rescaled(own, list(range(15, -1, -1)))
            assert all(same_bits(a, b) for a, b in zip(kept, expected, strict=True))
    assert graphs.count == 1


def test_large_layers_and_full_memory(monkeypatch):
    fake = Fake()
    graphs = Graphs(CPU, fake)
    monkeypatch.setattr(live_graphs, "LARGEST", 8 * 16 * 2 - 1)
    for seed in range(3):
        check(graphs.run(tape(), parameters(seed)), parameters(seed))
    assert fake.made == 0
    monkeypatch.undo()
    monkeypatch.setattr(live_graphs, "MOST", 999)
    graphs = Graphs(CPU, fake)
    one, other = tape(), tape(rows=16)
    for seed in range(3):
        graphs.run(one, parameters(seed))
        graphs.run(other, parameters(seed, rows=16))
    assert graphs.count == 1 and len(graphs._memory) == 1


def test_answers_for_the_host_are_not_captured():
    def compares(own, table):
        return [own["codes"] ^ (1 if torch.equal(own["codes"], own["codes"]) else 2)]

    fake = Fake()
    graphs, t = Graphs(CPU, fake), tape(process=compares)
    assert t.waits
    for seed in range(3):
        assert same_bits(graphs.run(t, parameters(seed)).results[0], parameters(seed)["codes"] ^ 1)
    assert fake.made == 0


def test_writes_into_parameters_do_not_reach_those_that_are_given():
    def writes(own, table):
        own["codes"].data.bitwise_xor_(3)
        return [own["codes"].data, own["codes"] ^ 1]

    graphs, t = Graphs(CPU, Fake()), tape(process=writes)
    for seed in range(4):
        own = parameters(seed)
        found = graphs.run(t, own)
        assert same_bits(own["codes"], parameters(seed)["codes"])
        assert same_bits(found.results[0], own["codes"] ^ 3) and same_bits(found.results[1], own["codes"] ^ 2)


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ([3.0, 8, 2], True),
        ([8.0, 1, 9], True),  # the factor is the same
        ([8.0, 1, 16], False),
        ([8.0, 1, float("nan")], True),  # it is not looked at
        ([0.0, -8, -2], False),
        ([-1.0, -8, -2], False),
        ([8.0, 1, float("inf")], False),
    ],
)
def test_a_maximum_of_some_is_one_of_all(values, same):
    def code(w):
        return w * w[w >= 0].max().log2().floor().exp2().item() if len(w) else w

    own = {"w": nn.Parameter(torch.tensor([8.0, 1, 2]), requires_grad=False)}
    recorder = Recorder(own)
    with torch.no_grad(), recorder:
        made = code(own["w"])
    t = recorder.tape([made])
    assert not any(step.function is torch.ops.aten.index.Tensor for step in t._steps)
    w = nn.Parameter(torch.tensor(values), requires_grad=False)
    found = t.run({"w": w})
    assert bool(found.same) == same
    if same:
        assert same_bits(found.results[0], code(w))


def test_a_mask_that_changed_in_between_is_left_as_it_is():
    def code(w):
        mask = w > 2
        some = w[mask]
        w = w.clone()
        mask.fill_(True)
        return some.max() + w

    own = {"w": nn.Parameter(torch.tensor([8.0, 1, 2]), requires_grad=False)}
    recorder = Recorder(own)
    with torch.no_grad(), recorder:
        made = code(own["w"])
    assert any(step.function is torch.ops.aten.index.Tensor for step in recorder.tape([made])._steps)


def with_graphs(engine):
    fake = Fake()
    engine.live.quick.graphs = Graphs(CPU, fake)
    return fake


def test_updates_by_graphs_are_exact(monkeypatch):
    monkeypatch.setattr(live_process, "UNSURE", 1)
    engine, fake = Up(lambda: Model(), checkpoint(0)), None
    for seed in range(1, 7):
        engine.update(checkpoint(seed))
        engine.check(checkpoint(seed))
        fake = with_graphs(engine) if fake is None else fake
    quick = engine.live.quick
    assert quick.taken == 4 * quick.proved and 0 < quick.graphs.count < quick.proved and fake.replays > 0


@pytest.mark.parametrize("unsure", [1, 1 << 27])
def test_layers_whose_number_is_another_one_are_done_again_in_the_same_update(unsure, monkeypatch):
    monkeypatch.setattr(live_process, "UNSURE", unsure)

    def weights(i, *largest):
        return {
            f"{n}.weight": numbers(10 * i + j, v).bfloat16()
            for j, (n, v) in enumerate(zip("abc", largest, strict=True))
        }

    engine = Up(lambda: Bare(**{n: Layer(Factor) for n in "abc"}), weights(0, 1.0, 1.0, 1.0))
    fake, taken = None, []
    updates = [(1.0,) * 3] * 5 + [(1.0, 4.0, 1.0), (4.0, 4.0, 1.0), (4.0, 4.0, 1.0), (4.0, 4.0, 1.0)]
    for i, largest in enumerate(updates):
        new = weights(i + 1, *largest)
        live = engine.live
        live.begin(announced(new))
        live.load(new.items())
        live.commit()
        engine.check(new)
        fake = with_graphs(engine) if fake is None else fake
        taken.append(live.quick.taken)
    assert [b - a for a, b in itertools.pairwise(taken)] == [0, 3, 3, 3, 2, 1, 2, 3]
    assert fake.made == 2


def test_an_update_that_is_given_up_holds_nothing():
    engine = Up(lambda: Bare(a=Layer(Factor)), {"a.weight": numbers(0, 1.0).bfloat16()})
    for i in range(3):
        engine.update({"a.weight": numbers(i, 1.0).bfloat16()})
    engine.live.begin(announced({"a.weight": numbers(0, 4.0).bfloat16()}))
    engine.live._take(engine.live._recipe, "a.weight", numbers(0, 4.0).bfloat16())
    assert engine.live._processing._unsure
    engine.live.abandon()
    assert not engine.live._processing._unsure and not engine.live.whole
    engine.update({"a.weight": numbers(5, 4.0).bfloat16()})
    engine.check({"a.weight": numbers(5, 4.0).bfloat16()})
