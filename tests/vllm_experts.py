"""The weights that a vLLM layer of experts computes with, read out of its results.

An expert is not linear in its input, so its weights are not read by an identity alone. The trainer's model is changed
for it: two of an expert's three matrices get entries of which every product is exact, and inputs are large powers of
two at one place, which is also large enough for ``silu(x) = x`` above zero and 0 below. What comes out are entries of
the third matrix times known numbers, rounded to bf16 once. Routing is one-hot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nvfp4_qat as nq

ENTRY = 6 * 2.0**-8
"""As large as a random weight, and exact in 4 bits: the largest code, times a power of two."""

INPUT = 2.0**24


def wrong_experts(model: Any, rollout: Any, live: Any, config: Any) -> list[str]:
    """Matrices of experts that are not the trainer's to the bit: "layer.expert: gate"; all are read.

    Args:
        model: the trainer's, a Qwen3-MoE; afterwards it has its weights again, and the engine others.
        rollout: from it to the engine.
        live: the engine's model, in this process.
        config: vLLM's.
    """
    layers = {n: m for n, m in model.named_modules() if n.endswith(".mlp.experts")}
    before = {n: (m.gate_up_proj.detach().clone(), m.down_proj.detach().clone()) for n, m in layers.items()}
    wrong = []
    for matrix in ("gate", "up", "down"):
        for name, layer in layers.items():
            _only(layer, matrix, *before[name])
        rollout.sync(model)
        for name, layer in layers.items():
            experts = next(m for n, m in live.named_modules() if n.startswith(name) and hasattr(m, "w13_weight"))
            for e in range(layer.gate_up_proj.shape[0]):
                if not _read(experts, layer, matrix, e, config):
                    wrong.append(f"{name}.{e}: {matrix}")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.gate_up_proj.copy_(before[name][0])
            layer.down_proj.copy_(before[name][1])
    return wrong


@torch.no_grad()
def _only(layer: Any, matrix: str, gate_up: Tensor, down: Tensor) -> None:
    """Leave one of the three matrices as it is."""
    inner, hidden = down.shape[-1], down.shape[-2]
    identity = torch.eye(inner, hidden, dtype=down.dtype, device=down.device) * ENTRY
    gate, up = gate_up.chunk(2, -2)
    gate = gate if matrix == "gate" else torch.full_like(gate, ENTRY)
    if matrix != "up":
        up = identity.expand_as(up) if matrix == "down" else torch.full_like(up, ENTRY)
    layer.gate_up_proj.copy_(torch.cat([gate, up], -2))
    layer.down_proj.copy_(down if matrix == "down" else identity.t().expand_as(down))


@torch.no_grad()
def _read(experts: Any, layer: Any, matrix: str, e: int, config: Any) -> bool:
    """Whether an expert's results are those of the trainer's dequantized weights."""
    gate_up, down = (_dequantized(p)[e].double() for p in (layer.gate_up_proj, layer.down_proj))
    gate, up = gate_up.chunk(2)
    inner, hidden = gate.shape
    one = torch.eye(hidden, dtype=torch.bfloat16, device=gate_up.device) * INPUT
    found = _computed(experts, one, e, config)
    if matrix == "down":  # place i of the input is place i of what `down` gets
        factor = INPUT * ENTRY
        return bool(torch.equal(found[:inner], (down * factor * factor).t().to(torch.bfloat16)))
    if matrix == "up":
        expected = INPUT * ENTRY * (INPUT * up) * ENTRY
    else:
        found = torch.where(found != 0, found, _computed(experts, -one, e, config))
        expected = INPUT * gate * (INPUT * ENTRY) * ENTRY
    return bool(torch.equal(found[:, :inner], expected.t().to(torch.bfloat16)))


def _dequantized(p: Tensor) -> Tensor:
    return nq.fake_quantize(p.detach(), nq.global_scale(nq.amax(p.detach(), batch_dims=1)))


def _computed(experts: Any, x: Tensor, e: int, config: Any) -> Tensor:
    """What one expert makes of inputs [places, hidden]; a second one takes part with weight 0."""
    from vllm.forward_context import set_forward_context

    count = experts.w13_weight.shape[0]
    ids = torch.tensor([[e, (e + 1) % count]], dtype=torch.int32, device=x.device).expand(len(x), 2).contiguous()
    weights = torch.tensor([[1.0, 0.0]], device=x.device).expand(len(x), 2).contiguous()
    with set_forward_context(None, config, num_tokens=len(x)):
        out: Tensor = experts.quant_method.apply(experts, x, weights, ids, None, None)
    return out
