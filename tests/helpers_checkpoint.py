"""Small models in QAT, a checkpoint of one, and what a model computes: what the tests of checkpoints share.

A test file takes the fixtures it needs by assignment, as in ``model = helpers_checkpoint.model``: imported by name they
would count as unused, and every argument of that name as a redefinition.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers_plan
import pytest
import torch
import transformers as tf

import nvfp4_qat as nq
from nvfp4_qat.checkpoint import save_checkpoint
from nvfp4_qat.qat_module import packed_weights_of

ON = nq.QATConfig(enable=True)
IDS = torch.arange(14).view(2, 7)


def make(architecture: str = "qwen3", dtype: torch.dtype = torch.bfloat16, policy: str = "pow2", **overrides: object):
    """A small model in QAT, its weights packed."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(helpers_plan.config(architecture, **overrides), dtype=dtype).eval()
    nq.apply_qat(model, nq.QATConfig(enable=True, global_scale=policy))
    nq.refresh(model)
    return model


def used_in_training(model) -> dict[str, torch.Tensor]:
    """The bf16 weights that the forward of a model in QAT computes with, by name."""
    return {weight.name: weight.kept(torch.bfloat16) for weight in packed_weights_of(model)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def model():
    """One dense layer; tests must not change it."""
    return make(num_hidden_layers=1, layer_types=["full_attention"])


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "checkpoint"
    save_checkpoint(model, path)
    return path


@pytest.fixture
def copy(written, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(written, tmp_path / "copy"))
