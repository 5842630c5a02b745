"""All stale weights of a model are packed together: how often, with what result, and what an error leaves behind."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import qwen3_moe, stack
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

import nvfp4_qat as nq
from nvfp4_qat import batch as batching
from nvfp4_qat import ops
from nvfp4_qat.core import pack_from_masters
from nvfp4_qat.qat_module import packed_weights_of
from nvfp4_qat.state import PackedWeight

ON = nq.QATConfig(enable=True)
AMAX = nq.QATConfig(enable=True, global_scale="amax")


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a GPU."""

    BLOCKING = {Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, torch.equal, Tensor.equal}

    def __init__(self, count: Counter[str]) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.BLOCKING:
            self.count["waits"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch) -> Any:
    """A context that yields how many passes over the weights were started in it, over how many weights, and waits."""
    count: Counter[str] = Counter()

    class Amaxes(batching.Amaxes):
        def __call__(self, out: Tensor) -> None:
            count["amax"] += 1
            super().__call__(out)

    class Packs(batching.Packs):
        def __init__(self, tensors: Any, *args: Any) -> None:
            super().__init__(tensors, *args)
            self.size = len(tensors)

        def only(self, indices: Any) -> Any:
            packs = super().only(indices)
            packs.__class__, packs.size = Packs, len(indices)
            return packs

        def __call__(self, g: Tensor, amax: Tensor | None = None) -> None:
            count["pack"] += 1
            count["packed"] += self.size
            super().__call__(g, amax)

    monkeypatch.setattr(batching, "Amaxes", Amaxes)
    monkeypatch.setattr(batching, "Packs", Packs)

    @contextlib.contextmanager
    def counting() -> Iterator[Counter[str]]:
        count.clear()
        with Waits(count):
            yield count

    return counting


def weights(model: nn.Module) -> dict[str, PackedWeight]:
    return {weight.name: weight for weight in packed_weights_of(model)}


def definition(model: nn.Module, policy: str) -> dict[str, ops.PackedNVFP4]:
    """What the packed copies have to be, group by group."""
    found = {}
    for members in nq.qat_plan(model).groups().values():
        masters = [model.get_parameter(m.name).detach() for m in members]
        amax = torch.stack([ops.amax(w, m.batch_dims) for w, m in zip(masters, members, strict=True)]).amax(0)
        g = ops.global_scale(amax, policy)
        found |= {m.name: ops.quantize(w, g) for w, m in zip(masters, members, strict=True)}
    return found


def assert_kept(model: nn.Module, policy: str = "pow2") -> None:
    kept = weights(model)
    for name, want in definition(model, policy).items():
        assert kept[name].value is not None and kept[name].holds(want), name


def change(model: nn.Module, factor: float = 1.01, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor).add_((torch.randn(p.shape, generator=generator) * 1e-3).to(p.device))


def test_one_pass_and_one_wait_for_each_optimizer_step(counted):
    model = stack(depth=4)
    nq.apply_qat(model, ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(4, 32)
    with counted() as first:
        for _ in range(3):  # micro-batches
            model(x).square().sum().backward()
        assert first == {"amax": 1, "pack": 1, "packed": 12, "waits": 1}
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        with counted() as later:  # amaxes come along with packing
            for _ in range(3):
                model(x).square().sum().backward()
            assert later == {"pack": 1, "packed": 12, "waits": 1}
        assert_kept(model)


def test_weights_whose_scale_moved_are_packed_once_more(counted):
    model = stack(depth=3)
    nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    model(x)
    with torch.no_grad():
        model.blocks[1].up_proj.weight.mul_(3000.0)  # with gate_proj
        model.blocks[2].down_proj.weight.mul_(1 / 3000)
        for block in model.blocks:
            block.gate_proj.weight.mul_(1.001)
            block.down_proj.weight.mul_(1.001)
    with counted() as count:
        model(x)
    assert count == {"pack": 2, "packed": 9 + 3, "waits": 1}
    assert_kept(model)


@pytest.mark.parametrize("policy", ["pow2", "amax"])
@pytest.mark.parametrize("build", [lambda: stack(depth=2), lambda: qwen3_moe(implementation="grouped_mm")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copies_are_those_of_the_definition(build, policy, dtype):
    model = build().to(dtype)
    nq.apply_qat(model, nq.QATConfig(enable=True, global_scale=policy))
    run = (
        (lambda: model(torch.randint(0, 64, (1, 4))))
        if hasattr(model, "config")
        else lambda: model(torch.ones(1, 32, dtype=dtype))
    )
    addresses = None
    for step in range(4):
        run()
        assert_kept(model, policy)
        now = {n: [t.data_ptr() for t in w.value.tensors()] for n, w in weights(model).items()}
        assert addresses in (None, now), "captured CUDA graphs read the storages kept first"
        addresses = now
        change(model, factor=[1.0, 1.9, 0.3][step % 3], seed=step)


def test_nan_stops_who_reads_it_and_a_repair_mends_it():
    model = stack(depth=3)
    nq.apply_qat(model, ON)
    x = torch.randn(2, 32)
    loss = model(x).sum()
    bad = model.blocks[1].up_proj.weight
    good = bad.detach().clone()
    for p in model.parameters():
        p.data = p.data * 1.01  # moves no version counter: autograd itself would notice nothing
    bad.data[3, 5] = float("nan")
    masters = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(nq.UserError, match=r"blocks\.1\.up_proj\.weight holds NaN"):
            model(x)
    with pytest.raises(nq.MismatchError, match="changed between"):
        loss.backward()  # its copies were overwritten
    assert torch.equal(model.blocks[0](x), model.blocks[0].reference(x))
    for name, p in model.named_parameters():
        assert torch.equal(p, masters[name]) or name == "blocks.1.up_proj.weight"
    with torch.no_grad():
        bad.copy_(good)
    assert torch.equal(model(x), model.reference(x))
    assert_kept(model)


@pytest.mark.parametrize("config", [ON, AMAX], ids=["pow2", "amax"])
@pytest.mark.parametrize("value", [float("inf"), 1e8])
def test_what_is_out_of_range_names_the_tensor(config, value):
    model = stack()
    nq.apply_qat(model, config)
    model(torch.ones(1, 32))
    with torch.no_grad():
        model.blocks[0].down_proj.weight[0, 0] = value
    with pytest.raises(nq.UserError, match=r"blocks\.0\.down_proj\.weight holds"):
        model(torch.ones(1, 32))


def test_an_error_on_the_way_leaves_copies_stale(monkeypatch):
    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(2, 32)
    model(x)
    change(model)
    original = batching.reference.global_scale

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(batching.reference, "global_scale", fail)
    with pytest.raises(MemoryError):
        model(x)
    monkeypatch.setattr(batching.reference, "global_scale", original)
    assert torch.equal(model(x), model.reference(x))
    assert_kept(model)


def test_part_of_a_model_may_be_without_data_or_broken():
    model = stack(depth=3)
    nq.apply_qat(model, ON)
    model.blocks[2].to("meta")
    with torch.no_grad():
        model.blocks[1].gate_proj.weight.fill_(float("nan"))
    x = torch.randn(2, 32)
    assert torch.equal(model.blocks[0](x), model.blocks[0].reference(x))
    model.blocks[2].gate_proj.weight = nn.Parameter(torch.randn(48, 64)[:, ::2])  # with gaps
    model.blocks[2].to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    assert torch.equal(model(x), model.reference(x))


def test_weights_with_gaps_between_their_elements():
    model = stack()
    nq.apply_qat(model, ON)
    layer = model.blocks[0].up_proj
    layer.weight = nn.Parameter(torch.randn(48, 64)[:, ::2])
    x = torch.randn(2, 32)
    for _ in range(2):
        assert torch.equal(model(x), model.reference(x))
        change(model)


def test_an_export_after_a_step_packs_what_training_reads_next(counted):
    model = stack(depth=3)
    nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    with counted() as count:
        list(pack_from_masters(model))
    assert count["pack"] == 0 and all(w.value is None for w in weights(model).values())  # nothing is kept for an export
    model(x)
    change(model)
    with counted() as count:
        sent = {entry.name: value for entry, value in pack_from_masters(model)}
        model(x)
    assert count == {"pack": 1, "packed": 9, "waits": 1}
    for name, value in sent.items():
        assert weights(model)[name].holds(value)
        assert not {t.data_ptr() for t in value.tensors()} & {
            t.data_ptr() for w in weights(model).values() for t in w.value.tensors()
        }
    change(model, seed=1)
    model(x)
    assert all(
        w.holds(value) for w, value in zip(weights(model).values(), definition(model, "pow2").values(), strict=True)
    )


def test_what_is_only_handed_out_is_compared_and_not_repacked(counted):
    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(4, 32)
    loss = model(x).sum()
    model.state_dict()
    with counted() as count:
        model(x)
    assert count["pack"] == 0
    loss.backward()  # still the same generation


def test_frozen_weights_in_an_optimizer_are_left_alone():
    model = stack()
    nq.apply_qat(model, ON)
    model.blocks.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 32)).sum().backward()
    seen = {n: w.seen for n, w in weights(model).items()}
    optimizer.step()
    assert {n: w.signature() for n, w in weights(model).items()} == seen


def test_memory_that_weights_leave_is_freed():
    model = stack()
    nq.apply_qat(model, ON)
    x = torch.randn(2, 32)
    model(x)
    old = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data.clone()
    assert all(ref.expired() for ref in old)
    assert torch.equal(model(x), model.reference(x))


def test_models_that_share_nothing_are_packed_apart(counted):
    first, second = stack(seed=0), stack(seed=1)
    for model in (first, second):
        nq.apply_qat(model, ON)
    with counted() as count:
        first(torch.ones(1, 32))
    assert count["packed"] == 6
    with counted() as count:
        second(torch.ones(1, 32))
    assert count["packed"] == 6


def on_gpu(model: nn.Module, config: nq.QATConfig = ON) -> nn.Module:
    model = model.cuda()
    nq.apply_qat(model, config)
    return model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_packed_together_too(counted, copied):
    model = stack()
    nq.apply_qat(model, ON)
    model(torch.ones(1, 32))
    twin = copied(model)
    with counted() as count:
        twin(torch.ones(1, 32))
    assert count == {"amax": 1, "pack": 1, "packed": 6, "waits": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("config", [ON, AMAX], ids=["pow2", "amax"])
def test_a_gpu_packs_the_same_bytes_and_waits_once(config):
    model, twin = on_gpu(stack(depth=4), config), stack(depth=4)
    nq.apply_qat(twin, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # moves no power of two: no new tables
    x = torch.randn(4, 32, device="cuda")
    for step in range(5):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                loss = model(x).square().sum()
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in waits if "synchronizing" in str(w.message)]
        assert step < 2 or len(waits) == 1, [str(w) for w in waits]  # the first two build tables
        twin.load_state_dict(model.state_dict())
        twin(x.cpu())
        for name, weight in weights(model).items():
            for mine, other in zip(weight.value.tensors(), weights(twin)[name].value.tensors(), strict=True):
                assert torch.equal(mine.view(-1).view(torch.uint8).cpu(), other.view(-1).view(torch.uint8)), name
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.gpu
def test_a_stream_waits_for_what_another_one_packs(monkeypatch):
    class Late(batching.Packs):
        def __call__(self, *args: Any) -> None:
            torch.cuda._sleep(50_000_000)  # tens of milliseconds
            super().__call__(*args)

    monkeypatch.setattr(batching, "Packs", Late)
    model = on_gpu(stack(depth=2, width=256, hidden=1024), AMAX)
    x = torch.randn(4, 256, device="cuda")
    side = torch.cuda.Stream()
    for step in range(3):
        change(model)
        expected = stack(depth=2, width=256, hidden=1024).cuda()
        expected.load_state_dict(model.state_dict())
        nq.apply_qat(expected, AMAX)
        want = expected.blocks[1](x)
        torch.cuda.synchronize()
        model.blocks[0](x)  # packs everything, on this stream
        with torch.cuda.stream(side):
            got = model.blocks[1](x)
        torch.cuda.synchronize()
        assert torch.equal(got, want), step
