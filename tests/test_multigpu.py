"""Gather mode on two GPUs and more, with NCCL: the cases of the CPU tests, and those of tests/distributed/gpu.py."""

import pytest
import torch
from distributed import checkpoints, experts, features, gpu, hsdp, own_gather, safety, sync, traffic, training
from helpers_distributed import cases, group

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]
four_gpus = pytest.mark.skipif(GPUS < 4, reason="needs four CUDA devices")

streams = group(gpu, world=2, device="cuda")
train = group(training, world=2, device="cuda")
other = group(features, world=2, device="cuda")
moe = group(experts, world=2, device="cuda")
bytes_sent = group(traffic, world=2, device="cuda")
states = group(checkpoints, world=2, device="cuda")
faults = group(safety, world=2, device="cuda")
packed = group(sync, world=2, device="cuda")
own = group(own_gather, world=2, device="cuda")
replicas = group(hsdp, world=4, device="cuda")


@pytest.mark.parametrize("name", cases(gpu, 2))
def test_gpu(streams, name):
    streams.check(name)


@pytest.mark.parametrize("name", cases(training, 2))
def test_training(train, name):
    train.check(name)


@pytest.mark.parametrize("name", cases(features, 2))
def test_features(other, name):
    other.check(name)


@pytest.mark.parametrize("name", cases(experts, 2))
def test_experts(moe, name):
    moe.check(name)


@pytest.mark.parametrize("name", cases(traffic, 2))
def test_traffic(bytes_sent, name):
    bytes_sent.check(name)


@pytest.mark.parametrize("name", cases(checkpoints, 2))
def test_checkpoints(states, name):
    states.check(name)


@pytest.mark.parametrize("name", cases(safety, 2))
def test_safety(faults, name):
    faults.check(name)


@pytest.mark.parametrize("name", cases(sync, 2))
def test_sync(packed, name):
    packed.check(name)


@pytest.mark.parametrize("name", cases(own_gather, 2))
def test_own_gather(own, name):
    own.check(name)


@four_gpus
@pytest.mark.parametrize("name", cases(hsdp, 4))
def test_replicas(replicas, name):
    replicas.check(name)
