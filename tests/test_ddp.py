"""Module mode under DistributedDataParallel: two gloo processes equal one process that sees both batches."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from helpers_distributed import Env, case
from helpers_two_processes import of_two
from small_models import Stack, stack
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nvfp4_qat as nq

ON = nq.QATConfig(enable=True)
STEPS = 3


def batch(env: Env, rank: int, step: int) -> Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(100 * step + rank)).to(env.device)


def train(env: Env, **options: Any) -> Stack:
    model = stack(seed=env.rank).to(env.device)  # other weights on each rank: DDP sends all those of rank 0,
    nq.apply_qat(model, ON)
    model(batch(env, env.rank, 99))  # after apply_qat and a first forward
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2, fused=True)
    for step in range(STEPS):
        ddp(batch(env, env.rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = batch(env, 0, 7)
    assert torch.equal(ddp(x), model.reference(x))
    assert nq.qat_plan(ddp) is nq.qat_plan(model)
    return model


def assert_equal_on_all_ranks(model: Stack) -> None:
    for name, value in model.state_dict().items():
        others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(others, value)
        assert all(torch.equal(value, other) for other in others), name


@case(2)
def two_processes_equal_one(env: Env) -> None:
    trained = train(env)
    assert_equal_on_all_ranks(trained)
    model = stack(seed=0).to(env.device)
    nq.apply_qat(model, ON)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        (sum(model(batch(env, rank, step)).square().mean() for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@case(2)
def static_graph_and_gradient_views(env: Env) -> None:
    assert_equal_on_all_ranks(train(env, static_graph=True, gradient_as_bucket_view=True))


@case(2)
def gradient_accumulation(env: Env) -> None:
    model = stack().to(env.device)
    nq.apply_qat(model, ON)
    ddp, once = DistributedDataParallel(model), stack().to(env.device)
    nq.apply_qat(once, ON)
    with ddp.no_sync():
        ddp(batch(env, 0, 0)).square().mean().backward()
    ddp(batch(env, 0, 1)).square().mean().backward()
    for step in range(2):
        once(batch(env, 0, step)).square().mean().backward()
    for mine, other in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)  # the average of two equal numbers


two, two_gpus, test_two_processes, test_two_gpus = of_two(sys.modules[__name__])
