"""Layers of a small engine in the way of vLLM: parameters as checkpoints have them, and then as kernels read them.

Loaders take one rank's part of a tensor; ranks are numbers only. After loading, quantization methods turn parameters
into nibbles as transposed and padded int32 words, scales in another dtype and order, one number for the global scales
of fused layers, a lock, and a configuration that refers to some of them and keeps something made from others. Attention
derives two views of one matrix from a projection beside it. ``compute`` is a function of such operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
HIDDEN, INNER, EXPERTS, VOCAB = 32, 32, 4, 21
PAD, ORDER = 20, [0, 2, 4, 6, 1, 3, 5, 7]
SHIFTS = 4 * torch.arange(8, dtype=torch.int64)[:, None]
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GRID = torch.cat((GRID, -GRID))


@dataclass(frozen=True)
class Place:
    """Which rank of which groups a model is of."""

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1


ALONE = Place()


class EngineParameter(nn.Parameter):
    """A parameter whose loader is a property, and which knows along which dimensions it is split."""

    def __new__(cls, data, *_):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, loader, output_dim=None, input_dim=None):
        self._loader, self.output_dim, self.input_dim = loader, output_dim, input_dim

    @property
    def weight_loader(self):
        return self._loader

    @weight_loader.setter
    def weight_loader(self, loader):
        self._loader = loader


def fixed(data):
    return nn.Parameter(data, requires_grad=False)


def repacked(packed):
    """uint8[..., N, K/2] as int32[..., K/8, N and padding]."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).mT.long()
    codes = F.pad(codes, (0, -codes.shape[-1] % PAD)).unflatten(-2, (-1, 8))
    return (codes[..., ORDER, :] << SHIFTS).sum(-2).to(torch.int32)


def reordered(scale):
    """float8[..., N, K/16] as float16[..., K/16, N and padding]."""
    return F.pad(scale.half().mT, (0, -scale.shape[-2] % PAD)).roll(1, -1)


def multiplied(x, weight, scale, number, rows):
    """A kernel: x times the first rows of a weight in the form of `repacked` and `reordered`."""
    codes = torch.empty((*weight.shape[:-1], 8, weight.shape[-1]), dtype=torch.int64)
    codes[..., ORDER, :] = (weight.unsqueeze(-2) >> SHIFTS) & 15
    whole = GRID[codes.flatten(-3, -2)] * scale.roll(-1, -1).float().repeat_interleave(16, -2)
    return x @ (whole * number)[..., :rows]


@dataclass
class KernelConfig:
    """``shared`` is the memory of one of the layer's own tensors, ``sums`` are made from another."""

    shared: Tensor
    sums: Tensor


class Method:
    """Weights are computed with as they were loaded."""

    config = None

    def process_weights_after_loading(self, layer):
        pass


class Packed(Method):
    def process_weights_after_loading(self, layer):
        layer.workspace = torch.zeros(4, dtype=torch.int32)
        layer.weight = fixed(repacked(layer.weight_packed))
        del layer.weight_packed
        layer.weight_scale = fixed(reordered(layer.weight_scale))
        layer.weight_global_scale = fixed(1 / layer.weight_global_scale.max())
        if getattr(layer, "bias", None) is not None:
            layer.bias = fixed(layer.bias.roll(1))
        self.config = KernelConfig(layer.weight_scale.data, layer.weight_scale.float().sum(0))


class PackedExperts(Method):
    def process_weights_after_loading(self, layer):
        layer.workspace = torch.zeros(4, dtype=torch.int32)
        for name in ("w13", "w2"):
            packed, scale = getattr(layer, f"{name}_weight_packed").data, getattr(layer, f"{name}_weight_scale").data
            numbers = getattr(layer, f"{name}_weight_global_scale")
            delattr(layer, f"{name}_weight_packed")
            if name == "w13":
                packed, scale = (torch.cat(t.chunk(2, 1)[::-1], 1) for t in (packed, scale))
                numbers = numbers[:, 0]
            setattr(layer, f"{name}_weight", fixed(repacked(packed)))
            setattr(layer, f"{name}_weight_scale", fixed(reordered(scale)))
            setattr(layer, f"{name}_weight_scale_2", 1 / numbers)
            setattr(layer, f"{name}_input_scale", 1 / getattr(layer, f"{name}_input_global_scale"))
        self.config = KernelConfig(layer.w13_weight_scale_2, layer.w2_weight_scale.float().sum((1, 2)))


class Layer(nn.Module):
    def add(self, name, shape, dtype, *dims):
        self.register_parameter(name, EngineParameter(torch.empty(shape, dtype=dtype), self.weight_loader, *dims))

    def operands(self):
        """What kernels read."""
        every = {**self._parameters, **self._buffers, **vars(self)}
        own = {n: t for n, t in every.items() if isinstance(t, Tensor)}
        config = getattr(getattr(self, "quant_method", None), "config", None)
        return {n: t for n, t in own.items() if n != "workspace"} | (vars(config) if config else {})


class Linear(Layer):
    """Split by rows, or by columns (``row``); ``widths`` are the rows of the layers that are fused in it."""

    def __init__(self, inputs, widths, place=ALONE, row=False, bias=False, method=Packed):
        super().__init__()
        self.quant_method, self.row, self.place = method(), row, place
        inputs, split = (inputs // place.tp_size, 1) if row else (inputs, place.tp_size)
        self.widths = [w // split for w in widths]
        rows = sum(self.widths)
        if isinstance(self.quant_method, Packed):
            self.add("weight_packed", (rows, inputs // 2), torch.uint8, 0, 1)
            self.add("weight_scale", (rows, inputs // 16), FP8, 0, 1)
            self.add("weight_global_scale", (len(widths),), torch.float32)
        else:
            self.add("weight", (rows, inputs), BF16, 0, 1)
        self.register_parameter("bias", None)
        if bias:
            self.add("bias", (rows,), BF16, 0)

    def weight_loader(self, param, loaded_weight, shard_id=None):
        target, index = param.data, {"q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)
        if param.output_dim is None:
            target, loaded_weight = target[index or 0], loaded_weight.reshape(())
        elif index is not None:
            target = target.narrow(0, sum(self.widths[:index]), self.widths[index])
        dim = param.input_dim if self.row else param.output_dim
        if dim is not None:
            size = target.shape[dim]
            loaded_weight = loaded_weight.narrow(dim, self.place.tp_rank * size, size)
        assert target.shape == loaded_weight.shape
        target.copy_(loaded_weight)

    def compute(self, x, weight, bias=None, weight_scale=None, weight_global_scale=None, shared=None, sums=None, **_):
        if weight_scale is None:
            return x @ weight.float().T
        rows = sum(self.widths)
        y = multiplied(x, weight, shared, weight_global_scale, rows) + sums[:rows] / 1e3
        return y if bias is None else y + bias.roll(-1)


class Experts(Layer):
    def __init__(self, place):
        super().__init__()
        self.quant_method, self.place = PackedExperts(), place
        count, inner = EXPERTS // place.ep_size, INNER // place.tp_size
        numbers = torch.arange(EXPERTS) - place.ep_rank * count
        self.register_buffer("expert_map", torch.where((numbers >= 0) & (numbers < count), numbers, -1))
        for name, n, k, shards in (("w13", 2 * inner, HIDDEN, (2,)), ("w2", HIDDEN, inner, ())):
            self.add(f"{name}_weight_packed", (count, n, k // 2), torch.uint8)
            self.add(f"{name}_weight_scale", (count, n, k // 16), FP8)
            self.add(f"{name}_weight_global_scale", (count, *shards), torch.float32)
            self.add(f"{name}_input_global_scale", (count, *shards), torch.float32)
            getattr(self, f"{name}_input_global_scale").fill_(1.5)

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        expert = int(self.expert_map[expert_id])
        if expert < 0:
            return False if return_success else None
        target, half = param.data[expert], int(shard_id == "w3")
        if weight_name.endswith("global_scale"):
            target, loaded_weight = target if shard_id == "w2" else target[half], loaded_weight.reshape(())
        else:
            target, dim = (target, 1) if shard_id == "w2" else (target.chunk(2)[half], 0)
            size = target.shape[dim]
            loaded_weight = loaded_weight.narrow(dim, self.place.tp_rank * size, size)
        assert target.shape == loaded_weight.shape
        target.copy_(loaded_weight)
        return True if return_success else None

    def compute(self, x, router, shared, sums, **t):
        inner, local = INNER // self.place.tp_size, router.softmax(-1)[..., self.expert_map >= 0].mT[..., None]
        both = multiplied(x, t["w13_weight"], t["w13_weight_scale"], shared[:, None, None], 2 * inner)
        up, gate = (both * t["w13_input_scale"].sum()).chunk(2, -1)
        number = t["w2_weight_scale_2"][:, None, None] + sums[:, None, None] / 1e3
        return (local * multiplied(F.silu(gate) * up, t["w2_weight"], t["w2_weight_scale"], number, HIDDEN)).sum(0)


class Embedding(Layer):
    """Padded to a multiple of 8 rows per rank, with zeros, by its loader."""

    def __init__(self, place):
        super().__init__()
        self.quant_method, self.place = Method(), place
        self.add("weight", (-(-VOCAB // (8 * place.tp_size)) * 8, HIDDEN), BF16, 0)

    def weight_loader(self, param, loaded_weight):
        assert loaded_weight.shape == (VOCAB, HIDDEN)
        start = min(self.place.tp_rank * len(param), VOCAB)
        loaded_weight = loaded_weight[start : start + len(param)]
        param[: len(loaded_weight)].data.copy_(loaded_weight)
        param[len(loaded_weight) :].data.fill_(0)


class Norm(Layer):
    """Has no quantization method, and no loader of its own."""

    def __init__(self):
        super().__init__()
        self.weight = fixed(torch.ones(HIDDEN, dtype=BF16))

    def compute(self, x, weight):
        return F.rms_norm(x, (HIDDEN,)) * weight


class Attention(Layer):
    """Has no weights of its own; computes with two views of one matrix made from ``kv_b_proj``.

    Like vLLM's, it has a scale of the cache, on the device and as a number.
    """

    def __init__(self, kv_b_proj):
        super().__init__()
        self.kv_b_proj = kv_b_proj
        self.register_buffer("cache_scale", torch.zeros(()))

    def process_weights_after_loading(self, dtype):
        whole = self.kv_b_proj.compute(torch.eye(HIDDEN), **self.kv_b_proj.operands()).to(dtype)
        self.w_uk_t, self.w_uv = whole[:, :HIDDEN].T, whole[:, HIDDEN:]
        self.cache_scale.fill_(1.0)
        self.cache_scale_float = 1.0

    def compute(self, x, w_uk_t, w_uv, cache_scale):
        return x * w_uk_t.float().sum(0) + x @ w_uv.float()
