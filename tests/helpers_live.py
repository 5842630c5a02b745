"""Engines that are up and take new weights, and models of single layers with odd loaders or processing."""

from __future__ import annotations

import random
from functools import partial

import torch
from standin_engine import Graph, Model, announced, checkpoint, start
from standin_layers import ALONE, BF16, Layer, Method, fixed
from torch import Tensor, nn

from nvfp4_qat.live_model import LiveModel

OLD, NEW = checkpoint(1), checkpoint(2)


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def without(weights, *names):
    return {name: t for name, t in weights.items() if name not in names}


class Up:
    """An engine that was started with some weights.

    Args:
        build: makes its model, anew at each call.
    """

    def __init__(self, build, weights):
        self.build, self.model = build, build()
        self.code = start(self.model, weights)
        self.graph, self.live = Graph(self.model), LiveModel(self.model, self.code, torch.device("cpu"))

    def update(self, weights, entries=None, rng=None):
        """New weights in random order and portions."""
        rng, items = rng or random.Random(0), list(weights.items())
        rng.shuffle(items)
        self.live.begin(announced(weights) if entries is None else entries)
        while items:
            count = rng.randint(1, 9)
            self.live.load(items[:count])
            items = items[count:]
        self.live.commit()

    def check(self, weights):
        """All that kernels read is as if the engine had been started with these weights, and where it was."""
        fresh = self.build()
        start(fresh, weights)
        want, got = fresh.operands(), self.model.operands()
        assert want.keys() == got.keys() == self.graph.operands.keys()
        for name, tensor in got.items():
            at = self.graph.operands[name]
            assert (tensor.data_ptr(), tensor.stride()) == (at.data_ptr(), at.stride()), f"{name} has moved"
            assert bits(tensor) == bits(want[name]), f"{name} is not that of a fresh model"
        assert self.live.whole and not self.live.updating

    def everything(self):
        """Each tensor of the model with what holds it, its address and its data."""
        found = {}
        for name, layer in self.model.named_modules():
            held = {**layer._parameters, **layer._buffers, **vars(layer)}
            held |= layer.operands() if isinstance(layer, Layer) else {}
            for n, t in held.items():
                if isinstance(t, Tensor):
                    found[name, n] = (id(layer._parameters.get(n)), t.data_ptr(), bits(t))
                elif n in layer._parameters:
                    found[name, n] = None
        return found


def up(place=ALONE, tied=True):
    """The stand-in for a whole model, started with the old weights."""
    return Up(partial(Model, place, tied), OLD if tied else checkpoint(1, False))


class Bare(nn.Module):
    """A model of some layers only."""

    tied = False
    load_weights, operands = Model.load_weights, Model.operands

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class One(Layer):
    """A layer with one weight, its loader and how it is processed."""

    def __init__(self, loader=None, method=None, dtype=BF16):
        super().__init__()
        self.weight = fixed(torch.zeros(4, 6, dtype=dtype))
        if loader is not None:
            self.weight.weight_loader = loader
        self.quant_method = method() if method else None


class Odd(One):
    """A layer with what odd methods ask for: a bias that is None, an order of its rows, and what processes it."""

    def __init__(self, method):
        super().__init__(method=method)
        self.register_parameter("bias", None)
        self.order = torch.tensor([2, 0, 3, 1])
        self.scheme = getattr(self.quant_method, "scheme", None)


class Reversed(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.copy_(layer.weight.flip(0))


class Scaled(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.mul_(layer.weight[0, 0].clone())


def one(loader=None, method=None, dtype=BF16):
    """How a model of one such layer is built."""
    return lambda: Bare(one=One(loader, method, dtype))


def weight(new=None, dtype=BF16):
    """Weights of such a model."""
    return {"one.weight": (torch.randn(4, 6) if new is None else new).to(dtype)}
