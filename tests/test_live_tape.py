"""Processing that is repeated from a tape gives the bits that its code gives, or says that it cannot."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nvfp4_qat.live_repeat import CannotRepeatError
from nvfp4_qat.live_tape import Recorder

PERMUTATION = [(7 * i) % 64 for i in range(64)]


def parameters(seed: int, rows: int = 96, columns: int = 64, scale: float = 4.0) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    values = {
        "weight": torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, generator=g),
        "weight_scale": (torch.rand(rows, columns // 16, generator=g) * scale).to(torch.float8_e4m3fn),
        "global": torch.rand((), generator=g) + 1,
    }
    values["weight_scale"].view(-1)[0] = scale  # the factor hangs on the largest
    return {name: nn.Parameter(t, requires_grad=False) for name, t in values.items()}


def process(layer: SimpleNamespace) -> None:
    """What kernels ask for: views, repacking, a factor found on the host, masks, loops, new attributes."""
    q = layer.weight.data.T.contiguous()
    layer.packed = torch.stack([(q >> 4 * i & 15).sum(0, dtype=torch.int32) for i in range(3)])
    workspace = torch.zeros(8, dtype=torch.int32)
    workspace[2:5] = 3
    layer.workspace = workspace
    scales = layer.weight_scale.T.contiguous().to(torch.bfloat16)
    scales = scales.reshape(-1, 64)[:, PERMUTATION].reshape(-1, scales.shape[1]).contiguous()
    if not (scales >= 0).all():
        raise AssertionError("scales are positive")
    wide = scales.float()
    factor = 1.0
    positive = wide > 0
    if positive.any():
        largest = wide[positive].max()
        if largest < 448:
            factor = (448 / largest).log2().floor().exp2().item()
    halves = (scales.float() * factor).to(torch.half) * 2
    halves[halves < 2] = 0
    layer.factor = factor
    layer.scales = nn.Parameter((halves.view(torch.int16) << 1).view(torch.float8_e4m3fn)[:, 1::2].contiguous(), False)
    buffer = torch.empty(3, *layer.packed.shape[1:], dtype=torch.int32)
    for i in range(3):
        buffer[i].copy_(layer.packed[2 - i])
    layer.reversed = buffer
    layer.given = layer.weight
    layer.twice = layer.global_ * 2 / factor


def run(own: dict, recorder: Recorder | None = None) -> SimpleNamespace:
    layer = SimpleNamespace(weight=own["weight"], weight_scale=own["weight_scale"], global_=own["global"])
    with torch.no_grad():
        if recorder is None:
            process(layer)
        else:
            with recorder:
                process(layer)
    return layer


def results(layer: SimpleNamespace) -> list[torch.Tensor]:
    return [layer.packed, layer.scales, layer.reversed, layer.given, layer.twice, layer.workspace, layer.packed[1:2]]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(
        (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()) and torch.equal(bits(x), bits(y))
        for x, y in zip(a, b, strict=True)
    )


def recorded(seed: int = 0, **options):
    own = parameters(seed, **options)
    recorder = Recorder(own)
    layer = run(own, recorder)
    return recorder.tape(results(layer))


def test_a_tape_gives_what_the_code_gives():
    tape = recorded()
    assert len(tape) < 50  # without views and without what is the same every time
    for seed in range(1, 6):
        own = parameters(seed)
        before = {name: bits(p).clone() for name, p in own.items()}
        again = tape.repeat(own)
        assert again is not None and same(again, results(run(own)))
        assert all(torch.equal(before[name], bits(p)) for name, p in own.items())
        assert again[3].data_ptr() == own["weight"].data_ptr()
    assert not tape.changes_parameters


def test_a_number_that_the_code_looks_at_is_another_one():
    tape = recorded()
    other = parameters(1, scale=1.0)
    assert run(other).factor != run(parameters(0)).factor
    assert tape.repeat(other) is None
    assert tape.repeat(parameters(2)) is not None  # and the tape is none the worse for it


def test_parameters_of_another_form():
    assert recorded().repeat(parameters(1, rows=128)) is None


def test_memory_is_freed_as_soon_as_nothing_needs_it():
    from weakref import ref

    p = {"w": nn.Parameter(torch.randn(64), requires_grad=False)}
    made = []

    def code(w):
        for _ in range(20):
            w = w + 1
        return w

    recorder = Recorder(p)
    with recorder:
        out = code(p["w"])
    tape = recorder.tape([out])
    add = torch.ops.aten.add.Tensor

    def watched(*args, **kwargs):
        t = add(*args, **kwargs)
        made.append(ref(t))
        alive.append(sum(r() is not None for r in made))
        return t

    alive: list[int] = []
    for step in tape._program:
        assert step.function is add
        step.function = watched
    (again,) = tape.repeat(p)
    assert torch.equal(again, code(p["w"])) and max(alive) <= 2 and len(alive) == 20


def test_writes_into_parameters_and_views_of_them():
    def code(own):
        own["w"].data[1:3].mul_(2)
        own["w"].data.view(torch.int32)[0] = 7
        return own["w"].data * 3

    def some(seed):
        return {
            "w": nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)), requires_grad=False)
        }

    own = some(0)
    recorder = Recorder(own)
    with recorder:
        out = code(own)
    tape = recorder.tape([out, own["w"]])
    assert tape.changes_parameters
    first, second = some(1), some(1)
    again = tape.repeat(first)
    assert same(again, [code(second), second["w"].detach()])


def test_parameters_that_begin_within_their_memory():
    whole = torch.arange(12.0)
    own = {"w": nn.Parameter(whole[2:8].view(2, 3), requires_grad=False)}
    recorder = Recorder(own)
    with recorder:
        out = own["w"].t()[1:].contiguous() + own["w"].data.view(-1)[3]
    tape = recorder.tape([out, out[0]])
    other = nn.Parameter(torch.arange(100.0)[50:56].view(2, 3), requires_grad=False)
    again = tape.repeat({"w": other})
    assert torch.equal(again[0], other.t()[1:] + other.view(-1)[3]) and torch.equal(again[1], again[0][0])


def record(code, own=None, changing=()):
    own = own or {"w": nn.Parameter(torch.arange(6.0), requires_grad=False)}
    recorder = Recorder(own, changing)
    with torch.no_grad(), recorder:
        out = code(own["w"])
    return recorder.tape([out])


def test_memory_that_is_used_again_is_another_tensor():
    def code(w):
        total = w.sum()
        for i in range(50):  # each of these is gone before the next, and its memory taken again
            total = total + torch.tensor([float(i)]).sum() * w[i % 6]
        return total

    tape = record(code)
    w = nn.Parameter(torch.randn(6), requires_grad=False)
    assert torch.equal(tape.repeat({"w": w})[0], code(w))


def test_comparisons_that_answer_at_once():
    def code(w):
        return w * 2 if torch.equal(w[:2], w[2:4]) else w * 3

    tape = record(code)
    assert torch.equal(tape.repeat({"w": nn.Parameter(torch.arange(6.0) + 1, False)})[0], (torch.arange(6.0) + 1) * 3)
    assert tape.repeat({"w": nn.Parameter(torch.ones(6), False)}) is None


def test_sizes_that_hang_on_numbers():
    tape = record(lambda w: w[w > 2].sum())
    for values in ([5.0] * 6, [0.0, 9, 0, 9, 0, 0], [0.0] * 6):
        w = torch.tensor(values)
        assert torch.equal(tape.repeat({"w": nn.Parameter(w, False)})[0], w[w > 2].sum())


def test_what_a_tape_cannot_hold():
    outside = torch.zeros(6)

    def accumulates(w):
        outside.add_(w)
        return outside * 1

    with pytest.raises(CannotRepeatError, match="was there before"):
        record(accumulates)
    with pytest.raises(CannotRepeatError, match="part of a tensor"):
        record(lambda w: w[w > 2][1:].sum())
    with pytest.raises(CannotRepeatError, match="no number|not one"):
        record(lambda w: w * (w.sum() * float("nan")).item())
    state = torch.ones(6)
    with pytest.raises(CannotRepeatError, match="values may change"):
        record(lambda w: w + state, changing=[state])
    assert torch.equal(
        record(lambda w: w + state).repeat({"w": nn.Parameter(torch.ones(6), False)})[0], torch.ones(6) * 2
    )
