"""The models of the distributed tests: small, of operations whose order is fixed, with every kind of weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
NAME = "layers.1.mlp.up_proj.weight"
"""A weight of `decoder`, to be written or spoiled."""


class Norm(nn.Module):
    """RMS norm: a parameter of one dimension that stays as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype) * self.weight


class Attention(nn.Module):
    """One head, fewer rows in k and v; q, k and v share a global scale."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width // 2, bias=bias)
        self.k_proj = nn.Linear(width, width // 2, bias=bias)
        self.v_proj = nn.Linear(width, width // 4, bias=bias)
        self.o_proj = nn.Linear(width // 4, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
        return self.o_proj(scores.softmax(-1).to(v.dtype) @ v)


class MLP(nn.Module):
    """gate and up share a global scale."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.input_norm, self.post_norm = Norm(width), Norm(width)
        self.self_attn = Attention(width, bias)
        self.mlp = MLP(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.post_norm(x))


class Decoder(nn.Module):
    """A small decoder on vectors instead of tokens. The head stays unquantized, as in the default config."""

    def __init__(self, depth: int = 2, width: int = WIDTH, hidden: int = 96, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(Layer(width, hidden, bias) for _ in range(depth))
        self.norm = Norm(width)
        self.lm_head = nn.Linear(width, 24, bias=False)
        with torch.no_grad():  # siblings of different size: a shared scale must show
            for layer in self.layers:
                layer.mlp.gate_proj.weight.mul_(7.0)
                layer.self_attn.k_proj.weight.mul_(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Narrow(nn.Module):
    """A weight with an odd number of rows, and one back, which K makes unfit for 4 bits unless it divides by 16."""

    def __init__(self, k: int, rows: int) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(k, rows), nn.Linear(rows, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(torch.tanh(self.wide(x[..., : self.wide.in_features])))


class Uneven(nn.Module):
    """Shards of different length, ranks that hold nothing, few blocks in a row, and a quantized weight at the root."""

    ROWS, COLUMNS = (97, 3, 1, 33, 64), (64, 64, 64, 16, 48)

    def __init__(self) -> None:
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(Narrow(k, rows) for rows, k in zip(self.ROWS, self.COLUMNS, strict=True))
        self.last = nn.Linear(WIDTH, 17)  # at the root
        self.lm_head = nn.Linear(17, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(torch.tanh(self.last(x)))


def decoder(seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: object) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**kwargs).to(dtype)


def uneven(seed: int = 0, dtype: torch.dtype = torch.float32) -> Uneven:
    torch.manual_seed(seed)
    return Uneven().to(dtype)


def ones(device: str) -> Tensor:
    """An input for any of them."""
    return torch.ones(2, 5, WIDTH, device=device)
