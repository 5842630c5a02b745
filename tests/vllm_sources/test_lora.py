"""Updates of a model around whose layers vLLM has put LoRA's wrappers: the base below them is updated as ever.

Adapters are as they were, also where an engine has discarded its memory.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from comparing import contents, different, kernel_tensors, reachable_tensors
from engine import Engine
from families import VOCABULARY, some
from test_updates import update
from torch import Tensor, nn

from nvfp4_qat.live_vllm_adapters import without_adapters

CPU = torch.device("cpu")


def wrap(model: nn.Module, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine with ``enable_lora`` does after loading."""
    manager = pytest.importorskip("vllm.lora.model_manager", reason="this vLLM has LoRA elsewhere")
    from vllm.config.lora import LoRAConfig
    from vllm.platforms import current_platform

    cpu = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: cpu))
    lora = LoRAConfig(max_lora_rank=8, max_loras=1, max_cpu_loras=1)
    lora.lora_dtype = torch.bfloat16
    monkeypatch.setattr(config, "lora_config", lora)
    manager.create_lora_manager(model, 64, 64, VOCABULARY, lora, config, CPU)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What kernels read, without what belongs to adapters."""
    found = kernel_tensors(without_adapters(model))
    return {name: t for name, t in found.items() if "lora" not in name and "punica" not in name}


WRAPPED = some("qwen3", "qwen2", "qwen3-moe")


def expect_refusal(engine: Engine) -> None:
    if os.environ["VLLM_SOURCES"] >= "0.26" and engine.family.name == "qwen3-moe":
        pytest.xfail("from 0.26 vLLM has experts' weights elsewhere if there is LoRA: an engine refuses the update")


@pytest.mark.parametrize("place", ["alone", "rank1of2"])
@pytest.mark.parametrize("family", WRAPPED)
def test_updated_model_equals_a_fresh_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_refusal(engine)
    model = engine.model(engine.family.checkpoint(0))
    assert without_adapters(model) is model
    wrap(model, engine.config, monkeypatch)
    bare = without_adapters(model)
    assert bare is not model and not any(".base_layer" in name for name, _ in bare.named_modules())
    assert any(".base_layer" in name for name, _ in model.named_modules())
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in bare.parameters()} <= own
    live = engine.live(model)
    for seed in (1, 2, 3, 4):
        update(live, engine.family.checkpoint(seed))
    fresh = engine.model(engine.family.checkpoint(4))
    wrap(fresh, engine.config, monkeypatch)
    assert different(weights(model), weights(fresh)) == [] and len(weights(model)) > 20
    assert live.quick.proved > 0 and live.quick.refused == []


@pytest.mark.parametrize("place", ["alone", "rank1of2"])
@pytest.mark.parametrize("family", WRAPPED)
def test_adapters_are_there_again_when_memory_was_discarded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when vLLM sleeps at level 2, which keeps buffers only, with adapters loaded."""
    expect_refusal(engine)
    model, checkpoint = engine.model(engine.family.checkpoint(0)), engine.family.checkpoint(1)
    wrap(model, engine.config, monkeypatch)
    stacked = [
        t for name, t in reachable_tensors(model).items() if "lora_a_stacked" in name or "lora_b_stacked" in name
    ]
    assert len(stacked) > 8
    for t in stacked:
        t.data.normal_()
    live = engine.live(model)
    update(live, checkpoint)
    everything, buffers = reachable_tensors(model), {t.data_ptr() for t in model.buffers()}
    if (
        engine.size > 1 and engine.family.name != "qwen2" and os.environ["VLLM_SOURCES"] >= "0.20"
    ):  # the head is wrapped
        assert any("sharded_to_full_mapping_gpu" in name for name in everything)
    before = contents(everything)
    live.keep()
    for t in everything.values():
        if t.numel() and t.data_ptr() not in buffers:
            t.data.untyped_storage().fill_(0x5A)
    assert contents(everything) != before
    update(live, checkpoint)
    after = contents(everything)
    assert [name for name in before if after[name] != before[name]] == []
