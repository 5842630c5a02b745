"""Gather mode on two GPUs and more, with NCCL: the cases of the CPU tests, and those of tests/distributed/gpu.py."""

import pytest
import torch
from distributed import (
    checkpoints,
    experts,
    features,
    gpu,
    hsdp,
    misuse,
    own_gather,
    parameters,
    settling,
    sync,
    traffic,
    training,
    writes,
)
from helpers_distributed import cases, group

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]
four_gpus = pytest.mark.skipif(GPUS < 4, reason="needs four CUDA devices")

two_gpu = group(gpu, world=2, device="cuda")
training_of_two = group(training, world=2, device="cuda")
features_of_two = group(features, experts, world=2, device="cuda")
traffic_of_two = group(traffic, world=2, device="cuda")
states_of_two = group(checkpoints, sync, world=2, device="cuda")
safety_of_two = group(misuse, parameters, settling, writes, world=2, device="cuda")
own_gather_of_two = group(own_gather, world=2, device="cuda")
hsdp_of_four = group(hsdp, own_gather, traffic, world=4, device="cuda")


@pytest.mark.parametrize("name", cases(gpu, world=2))
def test_gpu(two_gpu, name):
    two_gpu.check(name)


@pytest.mark.parametrize("name", cases(training, world=2))
def test_training(training_of_two, name):
    training_of_two.check(name)


@pytest.mark.parametrize("name", cases(features, experts, world=2))
def test_features(features_of_two, name):
    features_of_two.check(name)


@pytest.mark.parametrize("name", cases(traffic, world=2))
def test_traffic(traffic_of_two, name):
    traffic_of_two.check(name)


@pytest.mark.parametrize("name", cases(checkpoints, sync, world=2))
def test_states(states_of_two, name):
    states_of_two.check(name)


@pytest.mark.parametrize("name", cases(misuse, parameters, settling, writes, world=2))
def test_safety(safety_of_two, name):
    safety_of_two.check(name)


@pytest.mark.parametrize("name", cases(own_gather, world=2))
def test_own_gather(own_gather_of_two, name):
    own_gather_of_two.check(name)


@four_gpus
@pytest.mark.parametrize("name", cases(hsdp, own_gather, traffic, world=4))
def test_replicas(hsdp_of_four, name):
    hsdp_of_four.check(name)
