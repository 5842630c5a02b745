"""Models small enough for a test, the straight-through reference they are compared with, and gradients to compare."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4_qat import ops


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, g):
        return ops.quantize(w, g).dequantize(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def straight_through(w: Tensor, *siblings: Tensor, batch_dims: int = 0, policy: str = "pow2") -> Tensor:
    """The definition: the dequantized weight in forward, the identity in backward; siblings share the global scale."""
    amaxes = [ops.amax(t, batch_dims) for t in (w, *siblings)]
    return _StraightThrough.apply(w, ops.global_scale(torch.stack(amaxes).amax(0), policy))


class MLP(nn.Module):
    """gate, up and down as in Llama, so that gate and up share a global scale; a head that stays bf16."""

    def __init__(self, width: int = 32, hidden: int = 48, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def reference(self, x: Tensor) -> Tensor:
        """Forward through the definition, from the same parameters."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        hidden = F.silu(F.linear(x, straight_through(gate.weight, up.weight), gate.bias))
        hidden = hidden * F.linear(x, straight_through(up.weight, gate.weight), up.bias)
        return F.linear(hidden, straight_through(down.weight), down.bias)


class Stack(nn.Module):
    """A few MLP blocks and an unquantized head."""

    def __init__(self, depth: int = 2, width: int = 32, hidden: int = 48, bias: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLP(width, hidden, bias) for _ in range(depth))
        self.lm_head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)

    def reference(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.reference(x)
        return self.lm_head(x)


def stack(seed: int = 0, **kwargs) -> Stack:
    torch.manual_seed(seed)
    model = Stack(**kwargs)
    with torch.no_grad():  # siblings of different size: a shared scale must show
        for block in model.blocks:
            block.gate_proj.weight.mul_(7.0)
    return model


def qwen3_moe(seed: int = 0, implementation: str = "eager", **overrides):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False, **overrides,
    })  # fmt: skip
    config._experts_implementation = implementation
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


def qwen3(seed: int = 0, **overrides):
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
        **overrides,
    })  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def reference_of(model):
    """A copy whose parameters are replaced by their straight-through values, computed by the definition."""
    from torch.nn.utils import parametrize

    twin = copy.deepcopy(model)

    class Quantized(torch.nn.Module):
        def __init__(self, *siblings, batch_dims=0):
            super().__init__()
            self.siblings, self.batch_dims = siblings, batch_dims

        def forward(self, w):
            return straight_through(w, *(s() for s in self.siblings), batch_dims=self.batch_dims)

    for layer in twin.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        originals = [m.weight.detach().clone() for m in qkv]
        for i, m in enumerate(qkv):
            others = [lambda t=t: t for j, t in enumerate(originals) if j != i]
            parametrize.register_parametrization(m, "weight", Quantized(*others))
        parametrize.register_parametrization(attention.o_proj, "weight", Quantized())
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(experts, name, Quantized(batch_dims=1))
    return twin


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, differing


def master_grads(model):
    """`grads` of a `reference_of`, with the names of the model that it is a copy of."""
    return {
        name.replace("parametrizations.", "").replace(".original", ""): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
