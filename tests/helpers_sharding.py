"""Training with sharded weights and in one process, side by side: models and batches, a reference, and counters."""

from __future__ import annotations

import contextlib
import copy
import gc
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from distributed import models
from distributed.models import Layer
from small_models import qwen3_moe
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import nvfp4_qat as nq
from nvfp4_qat import window
from nvfp4_qat.naming import canonical_name

DEVICE = "cpu"
"""Where this process computes; see `use`."""

ON = nq.QATConfig(enable=True)
EXACT = nq.QATConfig(enable=True, global_scale="amax")
"""With this policy every change of a weight's largest magnitude shows; powers of two rarely move."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@dataclass
class Sharding:
    """A way to shard a model.

    Args:
        wrap: shards a model by units of a class, and gives what is called instead of it.
        masters: the parameters in full, by canonical name, as copies.
        no_sync: a context in which gradients are added up locally.
        clip: clips gradients; gives their norm.
        dtype: what it computes in, if not in that of the masters.
        config: how weights are quantized.
    """

    wrap: Callable[[nn.Module, type[nn.Module]], nn.Module]
    masters: Callable[[nn.Module], dict[str, Tensor]]
    no_sync: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
    clip: Callable[[nn.Module, float], Tensor]
    dtype: torch.dtype | None = None
    config: nq.QATConfig = ON

    def __call__(self, model: nn.Module, unit: type[nn.Module] = Layer) -> nn.Module:
        """Quantize and shard."""
        nq.apply_qat(model, self.config)
        return self.wrap(model, unit)


def use(device: str) -> None:
    """Say where models and batches belong from now on."""
    global DEVICE
    DEVICE = device


def decoder(seed: int = 0) -> nn.Module:
    """In every fusion group another weight than the first has the largest magnitude."""
    model = models.decoder(seed)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.v_proj.weight.mul_(3.0)
            layer.mlp.up_proj.weight.mul_(20.0)
    return model.to(DEVICE)


def uneven(seed: int = 0) -> nn.Module:
    return models.uneven(seed).to(DEVICE)


def moe(implementation: str = "grouped_mm") -> nn.Module:
    return qwen3_moe(implementation=implementation).to(DEVICE)


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def batch(step: int, rank: int = 0, width: int = 64) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1000 * rank + step)).to(DEVICE)


def loss_of(y: Tensor) -> Tensor:
    return y.float().square().mean()


class Reference:
    """One process in module mode. With ``dtype`` it computes in that from fp32 masters, as mixed precision does."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, optimizer: str = "loop", config: nq.QATConfig = ON
    ) -> None:
        self.masters = model
        self.working = model if dtype is None else copy.deepcopy(model).to(dtype)
        nq.apply_qat(self.working, config)
        self.optimizer = OPTIMIZERS[optimizer](self.masters.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.working(x.to(next(self.working.parameters()).dtype) if x.is_floating_point() else x)
        return result

    def step(self) -> None:
        self.collect_grads()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.working is not self.masters:
            with torch.no_grad():
                for master, working in self._pairs():
                    working.copy_(master)

    def collect_grads(self) -> None:
        """Gradients in the masters' dtype."""
        if self.working is not self.masters:
            for master, working in self._pairs():
                if working.grad is not None:
                    master.grad, working.grad = working.grad.to(master.dtype), None

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.masters.parameters(), self.working.parameters(), strict=True))

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.masters.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 0.0) -> None:
    got = {canonical_name(name): t for name, t in got.items()}
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    wrong = {}
    for name, t in want.items():
        error = (got[name].double().to(t.device) - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-30)
        if not error <= tolerance:
            wrong[name] = float(error)
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def assert_equal_forward(y: Tensor, expected: Tensor) -> None:
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected), f"largest difference {(y - expected).abs().max()}"


@contextlib.contextmanager
def counted_renewals() -> Iterator[list[int]]:
    """How many weights each pass over weights for their amaxes covers."""
    passes: list[int] = []
    original = window.Amaxes

    def counting(tensors: Any, *args: Any) -> Any:
        passes.append(len(tensors))
        return original(tensors, *args)

    with unittest.mock.patch.object(window, "Amaxes", counting):
        yield passes


@contextlib.contextmanager
def quantized_tensors() -> Iterator[Callable[[], int]]:
    """Keeps track of everything that `window` quantizes; yields a function that counts the bytes not yet freed."""
    made: list[StorageWeakRef] = []
    original = window.fake_quantized

    def recording(*args: Any) -> Tensor:
        result = original(*args)
        made.append(StorageWeakRef(result.untyped_storage()))
        return result

    def alive() -> int:
        storages = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in made]
        assert made
        return sum(storage.nbytes() for storage in storages if storage is not None)

    with unittest.mock.patch.object(window, "fake_quantized", recording):
        yield alive


def net_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that a function has allocated and not freed, on a CPU by this thread, and its result.

    Garbage in cycles, of before or of the function, does not count, whenever it would be collected.
    """

    def collected() -> Any:
        result = run()
        gc.collect()
        return result

    gc.collect()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        result = collected()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = collected()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), result
