"""After an engine has discarded the memory of its weights, an update makes it as if started anew."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers_live import NEW, OLD, Bare, One, Up, weight
from standin_engine import Model, announced
from standin_layers import ALONE, EXPERTS, Method, Place, fixed
from standin_trainer import packed, trainer
from standin_vllm import LLM
from torch import Tensor, nn

from nvfp4_qat.rollout import Rollout


def discard(model):
    """What is left after vLLM's level 2: buffers, and memory with any contents."""
    held = {id(b) for b in model.buffers()}
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        found = {**layer._parameters, **vars(layer), **getattr(getattr(method, "config", None), "__dict__", {})}
        for tensor in found.values():
            if isinstance(tensor, Tensor) and id(tensor) not in held:
                tensor.data.untyped_storage().fill_(0x5A)


def locks(model):
    return {name: layer.workspace for name, layer in model.named_modules() if hasattr(layer, "workspace")}


@pytest.mark.parametrize("place", [ALONE, Place(1, 2), Place(0, 1, 1, 2)], ids=str)
def test_an_update_after_waking_up_gives_what_a_fresh_model_has(place):
    inputs = {f"layers.1.experts.{e}.{p}.input_global_scale": torch.tensor([2.0 + e])
              for e in range(EXPERTS) for p in ("gate_proj", "up_proj", "down_proj")}  # fmt: skip
    engine = Up(partial(Model, place), OLD | inputs)
    for weights in (NEW, OLD):
        assert engine.live.keep() > 0
        kept = {t.data_ptr() for t, _ in engine.live._kept._kept}
        weights_of = {n: p for n, p in engine.model.named_parameters() if n.endswith(("weight", "weight_scale"))}
        assert [n for n, p in weights_of.items() if p.data_ptr() in kept] == []
        discard(engine.model)
        with pytest.raises(AssertionError):
            engine.check(weights | inputs)
        assert not engine.live.whole
        engine.update(weights)
        engine.check(weights | inputs)
        assert len(locks(engine.model)) > 5 and not any(lock.any() for lock in locks(engine.model).values())


class Table(One):
    """Has a table among its plain attributes, and a parameter that no checkpoint has."""

    def __init__(self):
        super().__init__(method=Method)
        self.table = torch.arange(5.0)
        self.inner_input_global_scale = fixed(torch.full((2,), 3.0))


def test_tables_and_parameters_that_no_update_brings_are_there_again():
    engine = Up(lambda: Bare(one=Table()), weight())
    engine.live.keep()
    discard(engine.model)
    assert engine.model.one.table[1] != 1
    weights = weight()
    engine.update(weights)
    engine.check(weights)
    assert engine.model.one.table.tolist() == [0, 1, 2, 3, 4]
    assert engine.model.one.inner_input_global_scale.tolist() == [3, 3]


class Adapted(nn.Module):
    """A layer with adapters around it, as vLLM's LoRA has them."""

    __module__ = "vllm.lora.layers"

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_a_stacked = (torch.arange(6.0), torch.arange(3.0))


def test_adapters_are_there_again():
    """Through a worker, which has the model with its wrappers."""
    llm = LLM(packed(0))
    worker, head = llm.core.workers[0], llm.core.workers[0].model_runner.get_model()
    head.layers[0].o_proj = adapted = Adapted(head.layers[0].o_proj)
    model, plan = trainer(1)
    engines = Rollout.connect(llm, plan)
    engines.sync(model)
    before = worker.digest()
    engines.sleep(2)
    for tensor in adapted.lora_a_stacked:
        tensor.fill_(7)
    engines.wake_up(["weights"])
    engines.sync(model)
    assert [t.tolist() for t in adapted.lora_a_stacked] == [[0, 1, 2, 3, 4, 5], [0, 1, 2]]
    assert worker.digest() == before and head.layers[0].o_proj is adapted


def test_what_is_kept_stays_so_until_an_update_writes():
    engine = Up(Model, OLD)
    size = engine.live.keep()
    discard(engine.model)
    assert engine.live.keep() == size  # once more: not of the memory that is gone
    engine.live.begin(announced(NEW))
    engine.live.abandon()
    name, tensor = next(iter(NEW.items()))
    engine.live.begin(announced(NEW))
    engine.live.load([(name, tensor)])  # and the sender is gone
    assert not engine.live.whole
    engine.live.keep()
    discard(engine.model)
    engine.update(NEW)
    engine.check(NEW)
