"""Module mode under DistributedDataParallel: two gloo processes equal one process that sees both batches."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_models import stack
from torch.nn.parallel import DistributedDataParallel

import nvfp4_qat as nq

STEPS = 3


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(100 * step + rank))


def train(rank: int, directory: str, options: dict) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    model = stack(seed=rank)  # different weights: DDP sends those of rank 0 to all, after apply_qat and a first forward
    nq.apply_qat(model, nq.QATConfig(enable=True))
    model(batch(rank, 99))
    ddp = DistributedDataParallel(model, **options)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2, fused=True)
    for step in range(STEPS):
        ddp(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = batch(0, 7)
    assert torch.equal(ddp(x), model.reference(x))
    assert nq.qat_plan(ddp) is nq.qat_plan(model)
    torch.save(model.state_dict(), f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


def run(tmp_path, **options) -> list[dict[str, torch.Tensor]]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(train, args=(str(tmp_path), options), nprocs=2)
    return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]


def test_two_processes_equal_one(tmp_path):
    first, second = run(tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = stack(seed=0)
    nq.apply_qat(model, nq.QATConfig(enable=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        (sum(model(batch(rank, step)).square().mean() for rank in range(2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_static_graph_and_gradient_views(tmp_path):
    first, second = run(tmp_path, static_graph=True, gradient_as_bucket_view=True)
    assert all(torch.equal(first[name], second[name]) for name in first)
