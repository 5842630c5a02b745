"""A small inference engine in the way of vLLM: what `live_model` is tested with where no vLLM can run.

`Model` has the layers of `standin_layers`, and loads checkpoints by name; of names that it does not know, it passes
over some and raises for others. `Graph` keeps the memory that a model's operands had once and computes with it, like a
CUDA graph: whoever puts an operand somewhere else is found out by an old result. `StandinCode` is what `live_model`
asks for, and `checkpoint` makes weights, with experts apart or, `fused`, in one tensor.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from standin_layers import (
    ALONE,
    BF16,
    EXPERTS,
    FP8,
    HIDDEN,
    INNER,
    VOCAB,
    Attention,
    Embedding,
    Experts,
    Layer,
    Linear,
    Method,
    Norm,
)
from torch import nn

from nvfp4_qat.live_recipe import Incoming, Part

LAYERS = 2
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")
STACKED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
STACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
EXPERT_SHARDS = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}


class Absent(nn.Module):
    """In place of what another pipeline stage has."""


class Block(nn.Module):
    def __init__(self, place, experts):
        super().__init__()
        self.norm = Norm()
        self.qkv_proj = Linear(HIDDEN, [HIDDEN] * 3, place, bias=True)
        self.o_proj = Linear(HIDDEN, [HIDDEN], place, row=True, bias=True)
        self.kv_b_proj = Linear(HIDDEN, [2 * HIDDEN])
        self.attn = Attention(self.kv_b_proj)
        if experts:
            self.router, self.experts = Linear(HIDDEN, [EXPERTS], method=Method), Experts(place)
        else:
            self.gate_up_proj = Linear(HIDDEN, [INNER] * 2, place)
            self.down_proj = Linear(INNER, [HIDDEN], place, row=True)


class Model(nn.Module):
    def __init__(self, place=ALONE, tied=True):
        super().__init__()
        self.tied, self.embed = tied, Embedding(place)
        self.layers = nn.ModuleList(Block(place, i % 2) for i in range(LAYERS))
        self.norm, self.lm_head = Norm(), Embedding(place)
        if tied:
            self.lm_head.weight = self.embed.weight

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, tensor in weights:
            if "rotary" in name or (self.tied and name.startswith("lm_head.")):
                continue
            part = name.split(".")[-2]
            if expert := re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)\.(\w+)", name):
                fused, shard = EXPERT_SHARDS[part]
                key, number = f"{expert[1]}{fused}_{expert[4]}", int(expert[2])
                if key in params:
                    params[key].weight_loader(params[key], tensor, weight_name=key, shard_id=shard, expert_id=number)
            elif part in STACKED:
                fused, shard = STACKED[part]
                param = params[name.replace(part, fused)]
                param.weight_loader(param, tensor, shard)
            else:
                getattr(params[name], "weight_loader", copied)(params[name], tensor)

    def operands(self):
        layers = [(name, layer) for name, layer in self.named_modules() if isinstance(layer, Layer)]
        return {f"{name}:{n}": t for name, layer in layers for n, t in layer.operands().items()}

    def run(self, operands, tokens):
        def of(name):
            return {n.partition(":")[2]: t for n, t in operands.items() if n.startswith(f"{name}:")}

        def compute(name, *x):
            return self.get_submodule(name).compute(*x, **of(name))

        x = of("embed")["weight"][tokens].float()
        for i in range(LAYERS):
            at = f"layers.{i}."
            x = compute(f"{at}norm", x)
            q, k, v = compute(f"{at}qkv_proj", x).chunk(3, -1)
            x = compute(f"{at}norm", x + compute(f"{at}o_proj", q * k.sigmoid() + v) + compute(f"{at}attn", x))
            if i % 2:
                x = x + compute(f"{at}experts", x, compute(f"{at}router", x))
            else:
                gate, up = compute(f"{at}gate_up_proj", x).chunk(2, -1)
                x = x + compute(f"{at}down_proj", F.silu(gate) * up)
        return compute("norm", x) @ of("lm_head")["weight"].float().T

    def forward(self, tokens):
        return self.run(self.operands(), tokens)


class Stage(Model):
    """One of two stages of a pipeline: the embedding and the first block, or the second block and the head."""

    def __init__(self, number):
        super().__init__(tied=False)
        self.layers[1 - number] = Absent()
        for name in (("norm", "lm_head"), ("embed",))[number]:
            setattr(self, name, Absent())

    def load_weights(self, weights):
        absent = tuple(f"{name}." for name, layer in self.named_modules() if isinstance(layer, Absent))
        super().load_weights((name, t) for name, t in weights if not name.startswith(absent))


class Graph:
    """A model's pass over the memory that its operands have now."""

    def __init__(self, model):
        self.model, self.operands = model, {name: t.detach() for name, t in model.operands().items()}

    def replay(self, tokens):
        return self.model.run(self.operands, tokens)


def copied(param, loaded_weight):
    assert param.shape == loaded_weight.shape
    param.data.copy_(loaded_weight)


class StandinCode:
    """`live_recipe.EngineCode` of these models; made before a model is processed."""

    def __init__(self, model):
        self.names, self.forms = {}, {layer: layer._parameters for layer in model.modules()}
        self.forms = {layer: self.checkpoint_form(layer) for layer in self.forms}
        self.names = {layer: self.constructed(layer) for layer in self.forms}

    def checkpoint_form(self, layer):
        return {name: on_meta(form) for name, form in self.forms.get(layer, {}).items() if form is not None}

    def constructed(self, layer):
        return self.names.get(layer) or frozenset((*layer._parameters, *layer._buffers, *layer.__dict__))

    def processes(self, layer):
        return isinstance(getattr(layer, "quant_method", None), Method)

    def process(self, layer):
        layer.quant_method.process_weights_after_loading(layer)

    def derives(self, layer):
        return isinstance(layer, Attention)

    def derive(self, layer):
        layer.process_weights_after_loading(BF16)

    def elsewhere(self, model, name):
        return any(name.startswith(f"{n}.") for n, m in model.named_modules() if isinstance(m, Absent))

    def kept(self, layer, name):
        return isinstance(layer, Attention) and "cache_scale" in name

    def outlives(self, layer, name):
        return name in layer._buffers

    def optional(self, layer, name):
        return name.endswith("input_global_scale")

    def quicker(self, layer):
        return None

    def ours(self, cls):
        return not cls.__module__.startswith("torch")


def on_meta(parameter):
    form = parameter.data.to("meta", copy=True)
    form.__class__, form.__dict__ = parameter.__class__, dict(parameter.__dict__)
    return form


def start(model, weights):
    """Load a model and process it; its code."""
    code = StandinCode(model)
    model.load_weights(weights.items())
    with torch.no_grad():
        for wanted, prepare in ((code.processes, code.process), (code.derives, code.derive)):
            for layer in filter(wanted, model.modules()):
                prepare(layer)
    return code


def checkpoint(seed, tied=True):
    """All tensors of a model by name, experts apart."""
    rng, found = torch.Generator().manual_seed(seed), {}

    def dense(name, *shape):
        found[f"{name}"] = torch.randn(shape, generator=rng).to(BF16)

    def packed(name, n, k, number):
        codes = torch.randint(256, (n, k // 2), generator=rng, dtype=torch.uint8)
        scale = torch.randint(0x30, 0x50, (n, k // 16), generator=rng, dtype=torch.uint8).view(FP8)
        found.update(zip((f"{name}.{s}" for s in SUFFIXES), (codes, scale, torch.tensor([number])), strict=True))

    def number():
        return 2.0 ** int(torch.randint(3, 9, (1,), generator=rng))

    for name in ("embed", "lm_head")[: 1 if tied else 2]:
        dense(f"{name}.weight", VOCAB, HIDDEN)
    dense("norm.weight", HIDDEN)
    for i in range(LAYERS):
        at, shared = f"layers.{i}.", number()
        dense(f"{at}norm.weight", HIDDEN)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            packed(at + name, HIDDEN, HIDDEN, shared)
            dense(f"{at}{name}.bias", HIDDEN)
        packed(f"{at}kv_b_proj", 2 * HIDDEN, HIDDEN, number())
        for mlp in [f"{at}experts.{e}." for e in range(EXPERTS)] if i % 2 else [at]:
            shared = number()
            packed(f"{mlp}gate_proj", INNER, HIDDEN, shared)
            packed(f"{mlp}up_proj", INNER, HIDDEN, shared)
            packed(f"{mlp}down_proj", HIDDEN, INNER, number())
        if i % 2:
            dense(f"{at}router.weight", EXPERTS, HIDDEN)
    return found


def announced(weights):
    return [Incoming(name, tuple(t.shape), t.dtype, (Part(name),)) for name, t in weights.items()]


def fused(weights):
    """The same with the experts of a layer in one tensor, gate above up; and how that is announced."""
    found = {name: t for name, t in weights.items() if ".experts." not in name}
    entries = announced(found)
    for at in sorted({name.partition("0.gate_proj")[0] for name in weights if ".experts.0.gate_proj" in name}):
        for name, halves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for suffix in SUFFIXES:
                split = len(halves) == 2 and suffix != "weight_global_scale"
                of = halves if split else halves[:1]
                whole = torch.stack([torch.cat([weights[f"{at}{e}.{h}.{suffix}"] for h in of]) for e in range(EXPERTS)])
                whole = whole if len(halves) == 2 or suffix != "weight_global_scale" else whole.squeeze(1)
                rows = [(h * INNER, (h + 1) * INNER) if split else None for h in range(2)]
                parts = [Part(f"{at}{{}}.{h}.{suffix}", 0, EXPERTS, r) for h, r in zip(halves, rows, strict=False)]
                found[f"{at}{name}_{suffix}"] = whole
                entries.append(Incoming(f"{at}{name}_{suffix}", tuple(whole.shape), whole.dtype, tuple(parts)))
    return found, entries
