"""A sharded model in gather mode beside its single-process twin in module mode.

The twin lives in the same process, is trained on the data of every rank and reduces gradients with FSDP2's arithmetic,
so that everything can be compared bit by bit: FSDP2 sums the ranks' gradients in its reduce dtype and divides by their
number. With two ranks the sum has one order, and dividing by a power of two is exact, so gradients must be equal. With
four ranks the order of a sum of four is the backend's; cases say how they deal with it (`Twin.order`).

Where a comparison cannot be exact, the sharded model's gradients are checked against a bound and then given to the
twin, so that what follows, the optimizer's step and the next forward, is exact again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from helpers_distributed import Env
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import nvfp4_qat as nq
from distributed.instruments import padded_numel
from distributed.models import WIDTH, decoder

ON = nq.QATConfig(enable=True)
FULL = MixedPrecisionPolicy()
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Units = Callable[[nn.Module], Iterable[Any]]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Assert equality to the bit, in dtype and shape too, on whatever devices the two are."""
    found, expected = found.detach(), expected.detach().to(found.device)
    assert found.dtype == expected.dtype and found.shape == expected.shape, (
        f"{what}: {found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
    )
    if not torch.equal(found, expected):
        differ = found != expected
        worst = (found.double() - expected.double()).abs().max()
        raise AssertionError(f"{what}: {int(differ.sum())} of {differ.numel()} elements differ, by up to {worst:.3g}")


def as_bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().flatten().view(torch.uint8)


def same_stream(found: Iterable[tuple[str, Tensor]], expected: Iterable[tuple[str, Tensor]]) -> None:
    """Assert that two streams of packed weights hold the same tensors, byte for byte; each comes once."""
    wanted = {name: tensor.clone() for name, tensor in expected}
    for name, tensor in found:
        assert name in wanted, f"{name} comes twice, or should not come at all"
        other = wanted.pop(name)
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, (
            f"{name}: {tensor.dtype} {list(tensor.shape)} instead of {other.dtype} {list(other.shape)}"
        )
        assert type(tensor) in (Tensor, nn.Parameter), f"{name} is a {type(tensor).__name__}"
        same(as_bytes(tensor), as_bytes(other), name)
    assert not wanted, f"missing: {sorted(wanted)}"


def full(t: Tensor) -> Tensor:
    """The whole of a sharded tensor, as a plain one; collective."""
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def bare(name: str) -> str:
    """A parameter's name without the components of wrappers."""
    for part in ("_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name


def batch(rank: int, step: int, device: str = "cpu", shape: Sequence[int] = (2, 5, WIDTH)) -> Tensor:
    """The input of a rank in a step, the same wherever it is asked for."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * step + rank)).to(device)


def loss_of(out: Tensor) -> Tensor:
    return out.float().square().mean()


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    # Steps of a size that moves codes, block scales and now and then a global scale. The same implementation for both
    # models: left alone, torch chooses by the type of the parameters.
    return torch.optim.AdamW(parameters, lr=2e-2, foreach=True)


def plain_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Parameter by parameter, so that sharded ones and others may be mixed."""
    return torch.optim.AdamW(parameters, lr=2e-2, foreach=False)


def layers(model: nn.Module) -> list[nn.Module]:
    return list(model.layers)


def linears(model: nn.Module) -> list[nn.Module]:
    """Every linear layer by itself: members of a fusion group are then in different units."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def nothing(model: nn.Module) -> list[nn.Module]:
    """No units of their own: the whole model is one."""
    return []


def shard(model: nn.Module, units: Units = layers, **options: Any) -> nn.Module:
    """`fully_shard` the units, then the rest."""
    for unit in units(model):
        fully_shard(unit, **options)
    return fully_shard(model, **options)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Models that are prepared meanwhile keep what they gather until the optimizer's step."""
    plain = nq.apply_qat

    def apply_qat(model: nn.Module, config: nq.QATConfig, gather: str | None = None) -> nq.QuantPlan:
        return plain(model, config, gather, keep_gathered=gather is not None)

    with mock.patch.object(nq, "apply_qat", apply_qat):
        yield


class Twin:
    """Single-process module mode, on the data of all ranks.

    Args:
        model: holds the master weights.
        policy: FSDP2's; weights are cast to its parameter dtype before module mode sees them.
        order: adds up the ranks' gradients as the backend does.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: MixedPrecisionPolicy = FULL,
        config: nq.QATConfig = ON,
        order: Callable[[list[Tensor]], Tensor] = lambda parts: sum(parts[1:], parts[0]),
    ) -> None:
        self.model, self.policy, self.order = model, policy, order
        self.compute = model
        dtype = policy.param_dtype
        if dtype is not None and any(p.dtype != dtype for p in model.parameters()):
            self.compute = copy.deepcopy(model)
            for parameter in self.compute.parameters():
                parameter.data = parameter.data.to(dtype)
        nq.apply_qat(self.compute, config)

    def __call__(self, x: Tensor) -> Tensor:
        if self.compute is not self.model:
            with torch.no_grad():
                for cast, master in zip(self.compute.parameters(), self.model.parameters(), strict=True):
                    cast.copy_(master)
        if self.policy.param_dtype is not None and self.policy.cast_forward_inputs and x.is_floating_point():
            x = x.to(self.policy.param_dtype)
        out: Tensor = self.compute(x)
        return out if self.policy.output_dtype is None else out.to(self.policy.output_dtype)

    def gradients(self, inputs: Iterable[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs, and one rank's gradients added up over the inputs, in the compute dtype."""
        self.compute.zero_grad()
        outputs = []
        for x in inputs:
            out = self(x)
            loss_of(out).backward()
            outputs.append(out.detach())
        found = {name: p.grad for name, p in self.compute.named_parameters() if p.grad is not None}
        self.compute.zero_grad()
        return outputs, found

    def reduce(self, ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """FSDP2's reduction: cast to the reduce dtype, add, divide by the number of ranks, cast to the master's."""
        reduced = {}
        for name, parameter in self.model.named_parameters():
            if name in ranks[0]:
                dtype = self.policy.reduce_dtype or ranks[0][name].dtype
                total = self.order([grads[name].to(dtype) for grads in ranks])
                reduced[name] = (total / len(ranks)).to(parameter.dtype)
        return reduced

    def give(self, gradients: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None


class Pair:
    """A model in gather mode under FSDP2 and its twin, trained in step.

    Args:
        env: where the case runs.
        make: makes the model; called twice.
        units: what becomes an FSDP unit of its own.
        policy: mixed precision.
        optimizer: makes an optimizer from parameters.
        prepare: changes both models before anything else (freezes, adapters).
        wrap: shards the model instead of `shard`, called with the model and the options.
        order: see `Twin`.
        alike: every rank sees the same data. Four equal numbers add up exactly in any order, so that gradients are
            exact again: with m the integer mantissa, 3m is off by at most 2 units when it is rounded to a multiple of 4
            units, and then 3m + m = 4m rounds back to 4m (ties go to even, and m is even where 3m is one).
        options: for `fully_shard`.
    """

    def __init__(
        self,
        env: Env,
        make: Callable[[], nn.Module] = decoder,
        units: Units = layers,
        policy: MixedPrecisionPolicy = FULL,
        optimizer: MakeOptimizer = adamw,
        prepare: Callable[[nn.Module], Any] = lambda model: None,
        wrap: Callable[..., nn.Module] = shard,
        order: Callable[[list[Tensor]], Tensor] = lambda parts: sum(parts[1:], parts[0]),
        config: nq.QATConfig = ON,
        alike: bool = False,
        **options: Any,
    ) -> None:
        self.env, self.alike, self.count = env, alike, 0
        self.plain = make().to(env.device)  # as it would be without the package
        self.dtype = next(self.plain.parameters()).dtype
        if policy.param_dtype is not None and not policy.cast_forward_inputs:
            self.dtype = policy.param_dtype
        model, twin = copy.deepcopy(self.plain), copy.deepcopy(self.plain)
        prepare(self.plain)
        prepare(model)
        prepare(twin)
        self.twin = Twin(twin, policy, config, order)
        self.plan = nq.apply_qat(model, config, gather="nvfp4")
        options.setdefault("mesh", env.mesh())
        self.model = wrap(model, units, mp_policy=policy, **options)
        self.optimizer = optimizer(self.model.parameters())
        self.twin_optimizer = optimizer(self.twin.model.parameters())

    def parameters(self) -> dict[str, nn.Parameter]:
        return {bare(name): p for name, p in self.model.named_parameters()}

    def forget_twin(self) -> None:
        """Drop everything but the sharded model and its optimizer, to measure memory."""
        del self.twin, self.twin_optimizer, self.plain

    def inputs(self, micro: int = 0) -> list[Tensor]:
        """This step's input of every rank."""
        step = 10 * self.count + micro
        ranks = [0 if self.alike else rank for rank in range(self.env.world)]
        width = getattr(self.plain, "width", WIDTH)
        return [batch(rank, step, self.env.device, (2, 5, width)).to(self.dtype) for rank in ranks]

    def step(self, micros: int = 1, exact: bool = True, before: Callable[[], Any] | None = None) -> None:
        """One optimizer step, everything compared on the way.

        Args:
            micros: micro-batches; FSDP2 reduces after each (`accumulate` in training.py has the other ways).
            exact: gradients must be equal to the bit; else see `compare_gradients`.
            before: called with gradients in place, before the optimizer's step, to clip them for instance.
        """
        outputs = []
        for micro in range(micros):
            out = self.model(self.inputs(micro)[self.env.rank])
            loss_of(out).backward()
            outputs.append(out.detach())
        expected, total = self.expect([[m] for m in range(micros)])
        for found, wanted in zip(outputs, expected, strict=True):
            same(found, wanted, f"output of step {self.count}")
        self.compare_gradients(total, exact)
        if before is not None:
            before()
        self.update()

    def expect(self, rounds: Sequence[Sequence[int]]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The twin's outputs for this rank, and gradients: added up by each rank in a round, then reduced and added."""
        outputs: list[Tensor] = []
        total: dict[str, Tensor] = {}
        for micros in rounds:
            ranks = []
            for rank in range(self.env.world):
                outs, grads = self.twin.gradients(self.inputs(micro)[rank] for micro in micros)
                ranks.append(grads)
                if rank == self.env.rank:
                    outputs += outs
            for name, grad in self.twin.reduce(ranks).items():
                total[name] = total[name] + grad if name in total else grad
            self._magnitude = {name: sum(g[name].float().abs() for g in ranks) for name in ranks[0]}
        return outputs, total

    def compare_gradients(self, expected: dict[str, Tensor], exact: bool = True) -> None:
        """Gradients equal the twin's; the twin gets those of the sharded model.

        If not exact, each element may be off by what the order of a sum over the ranks can change: with n numbers at
        most (n - 1) roundings, each of at most half a unit of the sum of magnitudes.
        """
        found = {name: full(p.grad).to(self.env.device) for name, p in self.parameters().items() if p.grad is not None}
        assert found.keys() == expected.keys(), f"gradients of {sorted(found.keys() ^ expected.keys())}"
        for name, grad in found.items():
            if exact:
                same(grad, expected[name], f"gradient of {name} in step {self.count}")
            else:
                bound = (self.env.world - 1) * 2.0**-24 * self._magnitude[name]  # fp32
                off = (grad - expected[name]).abs().float()
                assert bool((off <= bound).all()), (
                    f"gradient of {name}: off by {off.max():.3g}, bound {bound.max():.3g}"
                )
        self.twin.give(found)

    def update(self) -> None:
        """Both optimizers step; master weights are compared."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.twin_optimizer.step()
        self.twin_optimizer.zero_grad()
        self.count += 1
        self.compare_masters()

    def compare_masters(self) -> None:
        masters = dict(self.twin.model.named_parameters())
        for name, parameter in self.parameters().items():
            found, what = full(parameter), f"master {name} after {self.count} steps"
            if found.device == masters[name].device:
                same(found, masters[name], what)
            else:
                # Offloaded: a CPU's AdamW rounds otherwise than a GPU's. An update is of the size of the learning rate
                # (2e-2) and off by a few units of 2^-24 of it; then the twin goes on with what was found.
                torch.testing.assert_close(found, masters[name].detach().cpu(), rtol=1e-6, atol=1e-7, msg=what)
                with torch.no_grad():
                    masters[name].copy_(found)

    def compare_forward(self, what: str = "output", model: nn.Module | None = None) -> None:
        """A forward without gradients equals the twin's."""
        x = self.inputs(micro=9)[self.env.rank]
        with torch.no_grad():
            same((model or self.model)(x), self.twin(x), what)


def expected_gather(pair: Pair, world: int, names: Iterable[str] | None = None) -> tuple[int, int]:
    """Bytes a rank contributes when every unit is gathered once: of 4-bit weights, and of the rest."""
    quantized = rest = 0
    dtype = pair.twin.policy.param_dtype
    for name, parameter in pair.parameters().items():
        if names is not None and name not in names:
            continue
        numel = padded_numel(parameter.shape, world)
        if name in pair.plan:
            quantized += numel // 2 + numel // 16
        else:
            rest += numel * (dtype or parameter.dtype).itemsize
    return quantized, rest
