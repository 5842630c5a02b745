"""A trainer's model whose weights `standin_engine.Model` takes, layer by layer under the same names."""

from __future__ import annotations

import torch
from standin_engine import LAYERS
from standin_layers import BF16, EXPERTS, HIDDEN, INNER, VOCAB
from torch import nn

import nvfp4_qat as nq


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(HIDDEN, HIDDEN))
        self.kv_b_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        if experts:
            self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
            self.experts = nn.ModuleList(MLP() for _ in range(EXPERTS))
        else:
            for name, layer in MLP().named_children():
                self.add_module(name, layer)


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block(i % 2) for i in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)


def trainer(seed=0, ignore=()):
    """A model with random weights, prepared for training in 4 bits; and its plan."""
    model = Trainer().to(BF16)
    plan = nq.apply_qat(model, nq.QATConfig(enable=True, ignore_patterns=("embed", "router", *ignore)))
    perturb(model, seed)
    return model, plan


def perturb(model, seed):
    """Other weights, the same for the same seed whatever they were before."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    nq.refresh(model)


def packed(seed):
    """What an engine loads from the checkpoint of such a model."""
    return dict(nq.packed_weights(trainer(seed)[0]))
