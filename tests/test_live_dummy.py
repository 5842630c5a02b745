"""What random weights leave in attention layers is set back, or refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_dummy import check_scales, reset_scales
from nvfp4_qat.vllm import LiveWeights


class Attention(nn.Module):
    """With the scales of vLLM's, as random weights leave them."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "prob"):
            self.register_buffer(f"_{name}_scale", torch.tensor(-7.5e-4))
            setattr(self, f"_{name}_scale_float", -7.5e-4)
        self._o_scale_float = None
        self.weight_scale = nn.Parameter(torch.full((2,), 3.0))


class Worker:
    """vLLM's own."""

    def __init__(self, load_format):
        self.vllm_config = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
        self.loaded = []

    def load_model(self, *, load_dummy_weights=False):
        self.loaded.append(load_dummy_weights)
        model = nn.ModuleList([Attention(), nn.Linear(2, 2)])
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        return "loaded"


class Extended(Worker, LiveWeights):
    """Mixed as vLLM does it."""


def scales(model):
    layer = model[0]
    tensors = [getattr(layer, f"_{name}_scale") for name in ("q", "k", "v", "prob")]
    return [float(t) for t in tensors] + [getattr(layer, f"_{name}_scale_float") for name in ("q", "k", "v", "prob")]


def test_a_worker_with_the_extension_sets_them_back_where_it_loads():
    worker = Extended("dummy")
    assert worker.load_model(load_dummy_weights=True) == "loaded" and worker.loaded == [True]
    model = worker.model_runner.get_model()
    assert scales(model) == [1.0] * 8
    assert model[0].weight_scale.tolist() == [3.0, 3.0] and model[0]._o_scale_float is None
    check_scales(worker, model)
    assert reset_scales(model) == 0


def test_those_of_a_checkpoint_are_left_alone():
    worker = Extended("auto")
    worker.load_model()
    assert scales(worker.model_runner.get_model()) == pytest.approx([-7.5e-4] * 8)
    check_scales(worker, worker.model_runner.get_model())


def test_an_engine_that_loaded_without_the_extension_is_refused():
    worker = Worker("dummy")
    worker.load_model()
    with pytest.raises(MismatchError, match=r"scales from them \(_k_scale, _k_scale_float, .*\), which no update"):
        check_scales(worker, worker.model_runner.get_model())


def test_the_tensors_stay_where_they_are():
    model = nn.ModuleList([Attention()])
    before = {name: t.data_ptr() for name, t in model.named_buffers()}
    assert reset_scales(model) == 8
    assert {name: t.data_ptr() for name, t in model.named_buffers()} == before
