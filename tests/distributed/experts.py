"""Fused 3-D experts of transformers: scales per expert, experts divided over ranks, each way to run them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from helpers_distributed import Env, case
from small_models import qwen3, qwen3_moe
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import nvfp4_qat as nq
from distributed.instruments import Collectives
from distributed.pair import FULL, MIXED, Pair, Units, expected_gather


def tokens(rank: int, step: int, device: str) -> Tensor:
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1000 * step + rank)).to(device)


class Logits(nn.Module):
    """A language model as a function from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


class TokenPair(Pair):
    def inputs(self, micro: int = 0) -> list[Tensor]:
        ranks = [0 if self.alike else rank for rank in range(self.env.world)]
        return [tokens(rank, 10 * self.count + micro, self.env.device) for rank in ranks]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return list(model.model.model.layers)


def experts_apart(model: nn.Module) -> list[nn.Module]:
    """Experts in units of their own, as expert parallelism would have it."""
    found = []
    for layer in decoder_layers(model):
        found += [layer.mlp.experts, layer]
    return found


def moe(implementation: str = "eager", experts: int = 4, **overrides: Any) -> nn.Module:
    used = min(2, experts)
    return Logits(qwen3_moe(0, implementation, num_experts=experts, num_experts_per_tok=used, **overrides))


SETUPS: dict[str, dict[str, Any]] = {
    f"{implementation}-{experts}": {"make": functools.partial(moe, implementation, experts), "policy": policy}
    for implementation, experts, policy in (
        ("eager", 1, FULL),
        ("eager", 3, MIXED),
        ("eager", 4, FULL),
        ("grouped_mm", 1, MIXED),
        ("grouped_mm", 3, MIXED),
        ("grouped_mm", 4, MIXED),
        ("batched_mm", 1, MIXED),
        ("batched_mm", 3, FULL),
        ("batched_mm", 4, MIXED),
    )
}


@case(2, setup=SETUPS)
def experts_implementations(env: Env, **setup: Any) -> None:
    pair = TokenPair(env, units=decoder_layers, **setup)
    assert any(entry.batch_dims for entry in pair.plan.quantized), "experts are not quantized"
    pair.compare_forward()
    for _ in range(3):
        pair.step()


@case(2)
def experts_in_units_of_their_own(env: Env) -> None:
    pair = TokenPair(env, make=moe, units=experts_apart, policy=MIXED)
    for _ in range(2):
        pair.step()


@case(2)
def expert_scales_move_apart(env: Env) -> None:
    """One expert of rank 0 grows, one of rank 1 shrinks to zero: only their own global scales change."""
    pair = TokenPair(env, make=moe, units=decoder_layers)
    name = next(entry.name for entry in pair.plan.quantized if entry.batch_dims)
    with torch.no_grad():
        factors = torch.tensor([300.0, 1.0, 1.0, 0.0], device=env.device)[:, None, None]
        sharded = pair.parameters()[name]
        sharded.to_local().mul_(factors[2 * env.rank : 2 * env.rank + 2])
        dict(pair.twin.model.named_parameters())[name].mul_(factors)
    for _ in range(2):
        pair.step()


@case(2)
def bytes_of_experts(env: Env) -> None:
    """4.5 bits a weight; at most four bytes more per expert and weight, for its global scale, and alignment."""
    pair = TokenPair(env, make=moe, units=decoder_layers, policy=MIXED, reshard_after_forward=True)
    pair.compare_forward()
    with Collectives() as seen:
        pair.compare_forward()
    quantized, rest = expected_gather(pair, env.world)
    extra = seen.gathered() - quantized - rest
    experts = [entry for entry in pair.plan.quantized if entry.batch_dims]
    assert 0 <= extra <= 4 * sum(entry.shape[0] for entry in experts) + 32 * len(pair.plan.quantized), extra


@case(2)
def dense_model_of_transformers(env: Env) -> None:
    """q, k and v in different units share a global scale; the embedding is tied to nothing; gradient checkpointing."""

    def make() -> nn.Module:
        model = qwen3()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return Logits(model)

    def units(model: nn.Module) -> list[nn.Module]:
        found: list[nn.Module] = []
        for layer in decoder_layers(model):
            found += [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.up_proj, layer]
        return found

    pair = TokenPair(env, make=make, units=units, policy=MIXED)
    pair.model.train()
    for _ in range(3):
        pair.step()


@case(2)
def a_tied_embedding(env: Env) -> None:
    """The head is the embedding, not quantized, and lives in the root's unit."""
    pair = TokenPair(env, make=lambda: Logits(qwen3(tie_word_embeddings=True)), units=decoder_layers, policy=MIXED)
    for _ in range(2):
        pair.step()


@case(2)
def experts_under_compile(env: Env) -> None:
    def wrap(model: nn.Module, units: Units, **options: Any) -> nn.Module:
        for unit in units(model):
            unit.compile(backend="aot_eager")
            fully_shard(unit, **options)
        return fully_shard(model, **options)

    torch._dynamo.reset()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    pair = TokenPair(env, make=functools.partial(moe, "grouped_mm"), units=decoder_layers, policy=policy, wrap=wrap)
    assert nq.qat_plan(pair.model) is pair.plan
    for _ in range(2):
        pair.step()
