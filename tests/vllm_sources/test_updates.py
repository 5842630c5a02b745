"""New weights in a live model are the bytes that a freshly loaded model has, at the addresses that kernels know."""

from __future__ import annotations

import random
from typing import Any

import pytest
from comparing import contents, different, kernel_tensors, reachable_tensors, workspaces
from engine import Engine
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


def updated_four_times(engine: Engine, names: str) -> None:
    """The first processed by vLLM and noted, the second both ways, the rest by tapes and routines."""
    first, second, third = (engine.family.checkpoint(seed) for seed in (1, 2, 3))
    model, fresh = engine.model(first), engine.model(second)
    before, scratch = kernel_tensors(model) | reachable_tensors(model), workspaces(model)
    addresses = {name: t.data_ptr() for name, t in before.items()}
    scratch_before = contents(scratch)
    changing = different(kernel_tensors(model), kernel_tensors(fresh))
    assert len(changing) >= len(list(model.parameters())) // 2

    live = engine.live(model)
    for seed, checkpoint in enumerate((third, first, third, second)):
        update(live, named(checkpoint, names), seed)

    assert live.whole and live.quick.taken == 2 * live.quick.proved
    assert live.quick.refused == []
    assert_same(model, fresh)
    after = kernel_tensors(model) | reachable_tensors(model)
    assert {name: t.data_ptr() for name, t in after.items()} == addresses
    assert all(workspaces(model)[name] is t for name, t in scratch.items())
    assert contents(scratch) == scratch_before


@NAMES
def test_updated_model_equals_a_fresh_one(engine: Engine, names: str) -> None:
    updated_four_times(engine, names)


@NAMES
@pytest.mark.parametrize("place", ["rank0of2-experts", "rank1of2-experts"])
@pytest.mark.parametrize("family", some("qwen3-moe", "deepseek-v3"))
def test_ranks_that_hold_whole_experts(engine: Engine, names: str) -> None:
    updated_four_times(engine, names)


@NAMES
@pytest.mark.parametrize("place", ["stage0of2", "stage1of2"])
@pytest.mark.parametrize("family", some("qwen3", "qwen3-tied", "qwen3-moe", "deepseek-v3"))
def test_stages_of_a_pipeline(engine: Engine, names: str) -> None:
    assert "PPMissingLayer" in {type(layer).__name__ for layer in engine.unloaded().modules()}
    updated_four_times(engine, names)


@pytest.mark.parametrize("family", some("qwen3", "qwen3-tied", "qwen3-moe"))
def test_an_update_that_stopped_is_healed_by_the_next(engine: Engine) -> None:
    first, second, third = (engine.family.checkpoint(seed) for seed in (1, 2, 3))
    model, fresh = engine.model(first), engine.model(third)
    live = engine.live(model)
    live.begin([entry for entry, _ in second])
    load(live, second[: len(second) // 2], 0)
    assert not live.whole
    update(live, third)
    assert live.whole
    assert_same(model, fresh)


@pytest.mark.parametrize("family", some("deepseek-v2-bf16-attention", "deepseek-v3"))
def test_latent_attention_has_its_copies(engine: Engine) -> None:
    """What multi-head latent attention makes of `kv_b_proj` is among the tensors that are compared, and changes."""
    first, second = (engine.family.checkpoint(seed) for seed in (1, 2))
    model = engine.model(first)
    made = {name: t for name, t in kernel_tensors(model).items() if name.endswith((".W_UV", ".W_UK_T"))}
    assert len(made) == 4
    before = contents(made)
    update(engine.live(model), second)
    after = contents(made)
    assert all(after[n][0] == before[n][0] and after[n][1] != before[n][1] for n in made)


@pytest.mark.parametrize("family", some("qwen3", "deepseek-v3"))
def test_scales_of_the_kv_cache_stay_as_they_were_measured(engine: Engine) -> None:
    """vLLM measures them on the first tokens, and sets them to 1 when it processes a model anew."""
    first, second = (engine.family.checkpoint(seed) for seed in (1, 2))
    model = engine.model(first)
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "_k_scale_float")]
    assert layers and all(layer._k_scale_float == 1.0 == layer._k_scale.item() for layer in layers)
    for layer in layers:
        for which in "qkv":
            getattr(layer, f"_{which}_scale").data.fill_(0.25)
            setattr(layer, f"_{which}_scale_float", 0.25)
    update(engine.live(model), second)
    for layer in layers:
        for which in "qkv":
            assert getattr(layer, f"_{which}_scale").item() == 0.25 == getattr(layer, f"_{which}_scale_float")


@pytest.mark.parametrize("family", some("qwen3", "qwen3-tied", "qwen3-moe", "deepseek-v3"))
def test_a_discarded_memory_is_filled_again(engine: Engine) -> None:
    """As when vLLM sleeps at level 2, which keeps buffers only."""
    first, second = (engine.family.checkpoint(seed) for seed in (1, 2))
    model, fresh = engine.model(first), engine.model(second)
    live, buffers = engine.live(model), {t.data_ptr() for t in model.buffers()}
    live.keep()
    lost = [t for t in (kernel_tensors(model) | reachable_tensors(model) | workspaces(model)).values() if t.numel()]
    for tensor in lost:
        if tensor.data_ptr() not in buffers:
            tensor.data.untyped_storage().fill_(0x5A)
    update(live, second)
    assert_same(model, fresh)
    assert different(workspaces(model), workspaces(fresh)) == []
