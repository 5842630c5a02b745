"""New weights in a live model are the bytes that a freshly loaded model has, at the addresses that kernels know."""

from __future__ import annotations

import random

import pytest
from comparing import contents, different, kernel_tensors, reachable_tensors, workspaces
from engine import CPU, Engine
from families import Checkpoint, by_checkpoint_name, some
from torch import nn

from nvfp4_qat.live_model import LiveModel

NAMES = pytest.mark.parametrize("names", ["checkpoint-names", "fused-experts"])


def load(live: LiveModel, checkpoint: Checkpoint, seed: int) -> None:
    """In random order and portions."""
    order = random.Random(seed)
    left = order.sample(checkpoint, len(checkpoint))
    while left:
        size = order.randint(1, 9)
        live.load((entry.name, tensor) for entry, tensor in left[:size])
        left = left[size:]


def update(live: LiveModel, checkpoint: Checkpoint, seed: int = 0) -> None:
    live.begin([entry for entry, _ in checkpoint])
    load(live, checkpoint, seed)
    live.commit()


def named(checkpoint: Checkpoint, names: str) -> Checkpoint:
    return by_checkpoint_name(checkpoint) if names == "checkpoint-names" else checkpoint


def assert_same(model: nn.Module, fresh: nn.Module) -> None:
    assert different(kernel_tensors(model), kernel_tensors(fresh)) == []
    assert different(reachable_tensors(model), reachable_tensors(fresh)) == []


def updated_three_times(engine: Engine, forms: str, names: str) -> None:
    first, second = (engine.family.checkpoint(seed) for seed in (1, 2))
    model, fresh = engine.model(first), engine.model(second)
    before, scratch = kernel_tensors(model) | reachable_tensors(model), workspaces(model)
    addresses = {name: t.data_ptr() for name, t in before.items()}
    scratch_before = contents(scratch)
    changing = different(kernel_tensors(model), kernel_tensors(fresh))
    assert len(changing) >= len(list(model.parameters())) // 2

    live = LiveModel(model, engine.code(model, forms), CPU)
    for seed, checkpoint in enumerate((second, first, second)):
        update(live, named(checkpoint, names), seed)

    assert live.whole
    assert_same(model, fresh)
    after = kernel_tensors(model) | reachable_tensors(model)
    assert {name: t.data_ptr() for name, t in after.items()} == addresses
    assert all(workspaces(model)[name] is t for name, t in scratch.items())
    assert contents(scratch) == scratch_before


@NAMES
def test_updated_model_equals_a_fresh_one(engine: Engine, forms: str, names: str) -> None:
    updated_three_times(engine, forms, names)


@NAMES
@pytest.mark.parametrize("place", ["rank0of2-experts", "rank1of2-experts"])
@pytest.mark.parametrize("family", some("qwen3-moe", "deepseek-v3"))
def test_ranks_that_hold_whole_experts(engine: Engine, forms: str, names: str) -> None:
    updated_three_times(engine, forms, names)


@pytest.mark.parametrize("family", some("qwen3", "qwen3-tied", "qwen3-moe"))
def test_an_update_that_stopped_is_healed_by_the_next(engine: Engine, forms: str) -> None:
    first, second, third = (engine.family.checkpoint(seed) for seed in (1, 2, 3))
    model, fresh = engine.model(first), engine.model(third)
    live = LiveModel(model, engine.code(model, forms), CPU)
    live.begin([entry for entry, _ in second])
    load(live, second[: len(second) // 2], 0)
    assert not live.whole
    update(live, third)
    assert live.whole
    assert_same(model, fresh)


@pytest.mark.parametrize("family", some("deepseek-v2-bf16-attention", "deepseek-v3"))
def test_latent_attention_has_its_copies(engine: Engine, forms: str) -> None:
    """What multi-head latent attention makes of `kv_b_proj` is among the tensors that are compared, and changes."""
    first, second = (engine.family.checkpoint(seed) for seed in (1, 2))
    model = engine.model(first)
    made = {name: t for name, t in kernel_tensors(model).items() if name.endswith((".W_UV", ".W_UK_T"))}
    assert len(made) == 4
    before = contents(made)
    update(LiveModel(model, engine.code(model, forms), CPU), second)
    after = contents(made)
    assert all(after[n][0] == before[n][0] and after[n][1] != before[n][1] for n in made)
