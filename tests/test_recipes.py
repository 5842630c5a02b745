"""The recipes: configurations against verl's schema, data on small files, evaluation without an engine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

verl = pytest.importorskip("verl", reason="verl is not installed")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

import nvfp4_qat as nq  # noqa: E402
from nvfp4_qat.integrations.verl_config import config_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's
RECIPES = Path(__file__).parent.parent / "recipes"
RUNS = sorted(path.name for path in RECIPES.glob("run_*.sh"))
IGNORED = ["lm_head", "embed_tokens", "re:.*mlp.gate$"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for a class's module
    spec.loader.exec_module(module)
    return module


data, offline = load("prepare_dapo_data"), load("eval_offline")


def bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    variables = {**kept, "PYTHON": sys.executable, **variables}
    return subprocess.run([RECIPES / script, *arguments], capture_output=True, text=True, env=variables)


# --- scripts ---


def test_scripts_parse_and_can_be_started() -> None:
    scripts = sorted(RECIPES.glob("*.sh"))
    assert len(scripts) == 11
    for script in scripts:
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert os.access(script, os.X_OK) == (script.name != "common.sh"), script  # which is sourced


def python_that(tmp_path: Path, code: int) -> tuple[Path, Path]:
    """A `python` that notes its arguments and exits, and what it has noted."""
    log, program = tmp_path / "log", tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {code}\n')
    program.chmod(0o755)
    return program, log


def test_a_run_stops_where_the_plugin_is_not_active(tmp_path: Path) -> None:
    program, log = python_that(tmp_path, 1)
    done = bash(RUNS[0], PYTHON=str(program))
    assert done.returncode == 1 and log.read_text() == "-m nvfp4_qat.integrations.verl\n"


def test_a_run_starts_after_the_plugin_has_answered(tmp_path: Path) -> None:
    program, log = python_that(tmp_path, 0)
    done = bash(RUNS[0], PYTHON=str(program), DATA_DIR=str(tmp_path))
    assert done.returncode == 1 and "dapo-math-17k.parquet; run recipes/prepare_dapo_data.sh, or set TR" in done.stderr
    for name in ("dapo-math-17k", "aime-2024"):
        (tmp_path / f"{name}.parquet").touch()
    done = bash(RUNS[0], "trainer.nnodes=2", PYTHON=str(program), DATA_DIR=str(tmp_path))
    first, second = log.read_text().splitlines()[-2:]
    assert done.returncode == 0 and first == "-m nvfp4_qat.integrations.verl"
    assert second.startswith("-m verl.trainer.main_ppo --config-path") and second.endswith("trainer.nnodes=2")


# --- configurations ---


def arguments_of(script: str, *overrides: str, **variables: str) -> list[str]:
    done = bash(script, *overrides, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def composed(script: str, *overrides: str, **variables: str) -> Any:
    """What verl's main has after it has validated the configuration."""
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    arguments = arguments_of(script, *overrides, **variables)
    assert arguments[1:4] == ["-m", "verl.trainer.main_ppo", "--config-path"]
    folder, flag, name, *rest = arguments[4:]
    assert flag == "--config-name"
    with initialize_config_dir(config_dir=folder, version_base=None):
        config = compose(name, overrides=rest)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    return config


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    return {script: composed(script) for script in RUNS}


def test_there_is_a_run_for_each_arm() -> None:
    arms = ("bf16", "noqat", "w4a16", "w4a16_FFN_only")
    assert RUNS == sorted(f"run_qwen3_{size}_{arm}.sh" for size in ("8b", "30b") for arm in arms)


@pytest.mark.parametrize("script", RUNS)
def test_trainer_and_rollout_have_the_precision_of_the_name(script: str, configs: dict[str, Any]) -> None:
    model = configs[script].actor_rollout_ref
    blocks = [model.actor.qat, model.actor.fsdp_config.qat, model.rollout.qat]
    assert [block.enable for block in blocks] == ["bf16" not in script] * 3
    if "bf16" not in script:
        want = [*IGNORED, "re:.*self_attn.*"] if "FFN_only" in script else IGNORED
        for block in blocks:
            assert list(block.ignore_patterns) == want
            name = "nvfp4_noqat.json" if "noqat" in script else "nvfp4_w4a16.json"
            assert block.quantization_config_path == str(RECIPES / "config" / name)
            assert config_of(block)[1].train == ("noqat" not in script)
            assert nq.QATConfig.from_dict({k: v for k, v in block.items() if not k.startswith("_")}).enable
    assert model.model.path == ("Qwen/Qwen3-30B-A3B-Base" if "30b" in script else "Qwen/Qwen3-8B-Base")


ORIGINAL = {
    "algorithm.adv_estimator": "grpo", "algorithm.use_kl_in_reward": False, "algorithm.filter_groups.enable": True,
    "algorithm.filter_groups.metric": "acc", "algorithm.filter_groups.max_inflight_gen_batches": 2,
    "algorithm.rollout_correction.rollout_is": "token", "algorithm.rollout_correction.rollout_is_threshold": 2.0,
    "algorithm.rollout_correction.rollout_rs": None, "algorithm.rollout_correction.bypass_mode": False,
    "data.max_prompt_length": 1024, "data.max_response_length": 20480, "data.train_batch_size": 32,
    "data.truncation": "left", "data.filter_overlong_prompts": True, "data.prompt_key": "prompt",
    "actor_rollout_ref.actor.strategy": "fsdp2", "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.28, "actor_rollout_ref.actor.clip_ratio_c": 10.0,
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean", "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.optim.lr": 1e-6, "actor_rollout_ref.actor.optim.weight_decay": 0.1,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant", "actor_rollout_ref.actor.grad_clip": 1.0,
    "actor_rollout_ref.actor.entropy_coeff": 0, "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.use_dynamic_bsz": True, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 21504,
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True, "actor_rollout_ref.rollout.n": 16,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 21504, "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0, "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1, "actor_rollout_ref.rollout.max_num_seqs": 256,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.9, "actor_rollout_ref.rollout.calculate_log_probs": True,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 32768, "actor_rollout_ref.rollout.load_format": "dummy",
    "actor_rollout_ref.rollout.enable_chunked_prefill": True, "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.prompt_length": 1024, "actor_rollout_ref.rollout.response_length": 20480,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 0.6, "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 1.0, "actor_rollout_ref.rollout.val_kwargs.n": 32,
    "actor_rollout_ref.model.use_remove_padding": True, "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True, "trainer.use_v1": True,
    "actor_rollout_ref.actor.fsdp_config.param_offload": True, "trainer.v1.trainer_mode": "sync",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": True, "reward.reward_manager.name": "dapo",
    "trainer.test_freq": 5, "trainer.save_freq": 5, "trainer.val_before_train": True, "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8, "trainer.max_actor_ckpt_to_keep": 3, "trainer.resume_mode": "auto",
}  # fmt: skip


def test_hyperparameters_are_those_of_the_original(configs: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    for script, config in configs.items():
        found = {key: OmegaConf.select(config, key) for key in ORIGINAL}
        assert found == ORIGINAL, script
        actor = config.actor_rollout_ref.actor
        assert actor.ppo_max_token_len_per_gpu == config.data.max_prompt_length + config.data.max_response_length


def test_arms_of_a_model_differ_in_their_precision_and_name_only(configs: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    def rest(config: Any) -> Any:
        found: Any = OmegaConf.to_container(config, resolve=True)
        model = found["actor_rollout_ref"]
        for place in (model["actor"], model["actor"]["fsdp_config"], model["rollout"]):
            place.pop("qat")
        for key in ("experiment_name", "default_local_dir"):
            found["trainer"].pop(key)
        model["rollout"]["trace"].pop("experiment_name")
        return found

    for size in ("8b", "30b"):
        arms = [rest(configs[script]) for script in RUNS if f"_{size}_" in script]
        assert len(arms) == 4 and all(arm == arms[0] for arm in arms)


def test_variables_and_further_overrides_arrive(tmp_path: Path) -> None:
    path = tmp_path / "a model, lr=1"
    config = composed(
        RUNS[-1], "trainer.total_training_steps=3", "actor_rollout_ref.actor.strategy=fsdp", MODEL_PATH=str(path),
        TRAIN_FILE="/data/train.parquet", TEST_FILE="[/data/a.parquet,/data/b.parquet]", CKPTS_DIR="/ckpts", NNODES="2",
        NGPUS="4", EXP_NAME="try-1",
    )  # fmt: skip
    assert config.actor_rollout_ref.model.path == str(path)
    assert config.data.train_files == "/data/train.parquet"
    assert list(config.data.val_files) == ["/data/a.parquet", "/data/b.parquet"]
    trainer = config.trainer
    assert (trainer.default_local_dir, trainer.nnodes, trainer.n_gpus_per_node) == ("/ckpts", 2, 4)
    assert (trainer.experiment_name, trainer.total_training_steps) == ("try-1", 3)
    assert config.actor_rollout_ref.actor.strategy == "fsdp"


def test_verls_own_main_composes_the_same(configs: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    command = [*arguments_of("run_qwen3_30b_w4a16_FFN_only.sh"), "--cfg", "job", "--resolve"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    config = OmegaConf.create(done.stdout)
    assert list(config.actor_rollout_ref.actor.qat.ignore_patterns) == [*IGNORED, "re:.*self_attn.*"]
    assert config.reward == configs["run_qwen3_30b_w4a16_FFN_only.sh"].reward


def test_verl_reads_the_reward_from_these_keys(configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    if importlib.util.find_spec("aiohttp") is None:  # it asks reward models, of which there are none
        monkeypatch.setitem(sys.modules, "aiohttp", ModuleType("aiohttp"))

    config = configs["run_qwen3_8b_w4a16.sh"]
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "so it is 33.\nAnswer: 33")

    async def rewards() -> list[float]:
        manager = load_reward_manager(config, tokenizer)
        found = []
        for tokens in (100, 20480 - 512, 20480 - 256, 20480):
            mask = torch.arange(20480)[None] < tokens
            row = DataProto.from_dict(
                {"responses": torch.ones(1, 20480, dtype=torch.long), "attention_mask": mask},
                non_tensors={
                    "data_source": np.array(["aime2024"], dtype=object),
                    "reward_model": np.array([{"ground_truth": "33"}], dtype=object),
                    "extra_info": np.array([{}], dtype=object),
                },
            )
            answer = await manager.run_single(row)
            assert answer["reward_extra_info"]["acc"] is True
            found.append(float(answer["reward_score"]))
        return found

    assert asyncio.run(rewards()) == [1.0, 1.0, 0.5, 0.0]


def test_the_quantization_config_is_this_format() -> None:
    path = str(RECIPES / "config" / "nvfp4_w4a16.json")
    config = nq.QATConfig(enable=True, quantization_config_path=path)
    assert config.to_compressed_tensors(["lm_head"]) == nq.QATConfig(enable=True).to_compressed_tensors(["lm_head"])


# --- data ---


def verl_rows(file: Path, prompts: Sequence[str], times: int, answer: str = "7") -> None:
    """A parquet file as the hub has it: every prompt several times."""
    rows = [
        {
            "data_source": "math_dapo", "prompt": [{"content": prompt, "role": "user"}], "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "u"},
        }
        for _ in range(times) for prompt in prompts
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    verl_rows(folder / "BytedTsinghua-SIA" / "DAPO-Math-17k" / "data" / "dapo-math-17k.parquet", ["a", "b", "c"], 100)
    verl_rows(folder / "aime-2024.parquet", [f"problem {i}" for i in range(30)], 32)
    exam = [{"problem": f"Find {i}.", "answer": str(i), "id": str(i)} for i in range(28)]
    exam += [{"problem": "x", "answer": "336^\\circ"}, {"problem": "y", "answer": 7}]
    jsonl(folder / "aime25" / "test.jsonl", exam)
    return folder


def test_data_is_made_once_each_prompt_once(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    always = ["--out", str(out), "--from-folder", str(downloads), "--accept-counts"]
    assert data.main(always) == 0
    assert "dapo-math-17k.parquet: 3 rows of 300 in BytedTsinghua-SIA/DAPO-Math-17k" in capsys.readouterr().out
    found = {name: pq.read_table(out / f"{name}.parquet").to_pylist() for name in data.SOURCES}
    assert [len(rows) for rows in found.values()] == [3, 30, 30]
    assert found["dapo-math-17k"][1] == {
        "data_source": "math_dapo", "prompt": [{"role": "user", "content": "b"}], "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 1, "source": "BytedTsinghua-SIA/DAPO-Math-17k"},
    }  # fmt: skip
    exam = found["aime-2025"]
    assert [row["reward_model"]["ground_truth"] for row in exam[-3:]] == ["27", "336", "7"]
    assert exam[5]["prompt"][0]["content"].split("\n\n")[1] == "Find 5."
    assert {row["data_source"] for row in exam} == {"aime2025"}
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert data.main(always) == 0 and {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert "was there" in capsys.readouterr().out


def test_verl_takes_the_data_and_grades_it(downloads: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.reward_score import default_compute_score

    data.main(["--out", str(tmp_path), "--from-folder", str(downloads), "--accept-counts"])
    files = [str(tmp_path / f"{name}.parquet") for name in data.SOURCES]
    options = {"filter_overlong_prompts": False, "cache_dir": str(tmp_path / "cache")}
    rows = RLHFDataset(files, tokenizer=None, config=OmegaConf.create(options))
    assert len(rows) == 63 and rows[62]["index"] == 29
    for row in (rows[0], rows[3], rows[62]):
        answer = row["reward_model"]["ground_truth"]
        assert default_compute_score(row["data_source"], f"Answer: {answer}", answer)["score"] == 1.0


def test_counts_are_checked_and_nothing_is_left_behind(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    always = ["--out", str(out), "--from-folder", str(downloads)]
    assert data.main([*always, "--only", "aime-2024"]) == 0
    assert data.main(always) == 2
    assert "has 3 different prompts in 300 rows, expected were 17,398" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["aime-2024.parquet"]
    verl_rows(out / "dapo-math-17k.parquet", ["a"], 100)
    assert data.main(always) == 2 and "has 100 rows instead of 17,398" in capsys.readouterr().err
    (out / "dapo-math-17k.parquet").write_bytes(b"PAR1 half of it")
    assert data.main(always) == 2 and "is not a parquet file" in capsys.readouterr().err
    assert data.main([*always, "--accept-counts", "--overwrite"]) == 0
    assert pq.read_table(out / "dapo-math-17k.parquet").num_rows == 3


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.parquet"
    target.write_text("before")

    def full(table: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        data.write([], target)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"] and target.read_text() == "before"


def test_prompts_with_several_answers_are_counted(tmp_path: Path) -> None:
    verl_rows(tmp_path / "a.parquet", ["a", "b"], 2)
    verl_rows(tmp_path / "b.parquet", ["b", "c"], 1, answer="8")
    source = data.SOURCES["dapo-math-17k"]
    rows = [row for name in "ab" for row in data.rows_of(tmp_path / f"{name}.parquet", source)]
    kept, seen, conflicts = data.unique(iter(rows))
    assert [row["reward_model"]["ground_truth"] for row in kept] == ["7", "7", "8"]
    assert (seen, conflicts) == (6, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "x", "answer": "1000"}], "the answer '1000' is not a number from 0 to 999"),
        ([{"question": "x", "answer": "1"}], "KeyError('problem')"),
    ],
)
def test_damaged_files_are_named(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(tmp_path / "test.jsonl", rows)
    assert data.main(["--out", str(tmp_path), "--only", "aime-2025", "--from-folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "test.jsonl cannot be read as test.jsonl of math-ai/aime25" in error and message in error


def test_without_a_network_it_says_what_to_set(tmp_path: Path) -> None:
    done = bash("prepare_dapo_data.sh", DATA_DIR=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "could not be downloaded from http://127.0.0.1:9 (" in done.stderr
    assert "set HF_ENDPOINT to a mirror that this machine reaches, or give --from-folder" in done.stderr
    done = bash("prepare_dapo_data.sh", "--from-folder", str(tmp_path), DATA_DIR=str(tmp_path / "out"))
    assert done.returncode == 2 and "looked for data/dapo-math-17k.parquet, BytedTsinghua-SIA/DAPO" in done.stderr


# --- evaluation ---


def test_intervals_are_those_of_a_mean() -> None:
    assert offline.bootstrap_interval([0.5] * 30) == (0.5, 0.5)
    values = [1.0] * 12 + [0.0] * 18
    low, high = offline.bootstrap_interval(values)
    assert (low, high) == offline.bootstrap_interval(values)
    half = 1.96 * (0.4 * 0.6 / 30) ** 0.5  # of the normal distribution
    assert low == pytest.approx(0.4 - half, abs=0.02) and high == pytest.approx(0.4 + half, abs=0.02)
    narrow = offline.bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < 0.4 < narrow[1] < high


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Answer: 33", "33", True), ("Answer: $33$", "33", True), ("Answer: 33\nAnswer: 34", "33", False),
        ("it is 33", "33", False), (r"so \boxed{33}", "33", True), ("Answer: 33" + "." * 400, "33", False),
        ("", "0", False),
    ],
)  # fmt: skip
def test_grading_is_verls(text: str, answer: str, right: bool) -> None:
    assert offline.correct(text, answer) is right


class Answers:
    """An engine that is right where it is told to be, and how often it was started."""

    def __init__(self, share: dict[str, int]) -> None:
        self.share, self.started = share, 0

    def __call__(self) -> Any:
        self.started += 1

        def answer(problems: Sequence[Any], settings: Any) -> list[list[Any]]:
            right = [self.share.get(problem.answer, 0) for problem in problems]
            return [
                [
                    offline.Response(f"Answer: {problem.answer}" if i < n else "Answer: no", 10 * (i + 1), i > 0)
                    for i in range(settings.samples)
                ]
                for problem, n in zip(problems, right, strict=True)
            ]

        return answer


@pytest.fixture
def exams(tmp_path: Path) -> list[Path]:
    rows = [{"problem": f"Find {i}.", "answer": str(i)} for i in range(3)]
    jsonl(tmp_path / "aime-2025.jsonl", rows)
    data.main(["--out", str(tmp_path), "--only", "aime-2025", "--from-folder", str(tmp_path), "--accept-counts"])
    first, second = tmp_path / "aime-2025.parquet", tmp_path / "aime-2024.parquet"
    second.write_bytes(first.read_bytes())
    return [first, second]


def test_results_are_graded_kept_and_compared(exams: list[Path], tmp_path: Path) -> None:
    out, settings = tmp_path / "out", offline.Settings(samples=4)
    engine = Answers({"0": 4, "1": 1})
    (target,) = offline.evaluate("m", "bf16", exams[:1], out, settings, engine)
    row = json.loads(target.read_text())
    assert target.name == "aime-2025-bf16.json" and row["avg"] == pytest.approx(5 / 12)
    assert row["problems"][1] == {"answer": "1", "correct": 1, "samples": 4, "tokens": 25.0, "cut_off": 1}
    assert row["cut_off"] == 0.25 and row["interval"][0] <= row["avg"] <= row["interval"][1]
    assert "verl" in row["versions"] and row["settings"]["temperature"] == 0.6
    offline.evaluate("m", "bf16", exams, out, settings, engine)
    assert engine.started == 2 and sorted(p.name for p in out.iterdir()) == [
        "aime-2024-bf16.json",
        "aime-2025-bf16.json",
    ]
    offline.evaluate("m", "bf16", exams, out, settings, engine)
    assert engine.started == 2
    with pytest.raises(offline.EvaluationError, match="was made with another model and settings: remove it"):
        offline.evaluate("n", "bf16", exams, out, offline.Settings(samples=8), engine)
    offline.evaluate("m4", "nvfp4", exams[:1], out, settings, Answers({"0": 4}))
    table = offline.summarize(out)
    assert (
        "| aime-2025 | bf16 | 0.4167 |" in table and "aime-2025: nvfp4 - bf16 -0.0833, 95 % interval -0.2500" in table
    )
    summary = json.loads((out / "summary.json").read_text())
    assert [len(summary["results"]), list(summary["nvfp4 - bf16"])] == [3, ["aime-2025"]]
    with pytest.raises(offline.EvaluationError, match="has no results"):
        offline.summarize(tmp_path / "nowhere")


def test_a_checkpoint_is_not_called_what_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    always = ["run", "--model", str(tmp_path), "--out", str(tmp_path), "--data", str(tmp_path / "no.parquet")]
    assert offline.main([*always, "--precision", "bf16"]) == 2
    assert "is a quantized checkpoint: --precision is wrong" in capsys.readouterr().err
    assert offline.main([*always, "--precision", "nvfp4"]) == 2
    assert "no.parquet: run recipes/prepare_dapo_data.sh" in capsys.readouterr().err


def test_evaluation_asks_for_each_step_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "global_step_5"
    (checkpoint / "actor").mkdir(parents=True)
    variables = {"OUT": str(tmp_path / "out"), "DRY_RUN": "1", "K": "2", "PYTHON": "python", "DATA_DIR": "/data"}
    lines = bash("eval_offline.sh", str(checkpoint), "--seed", "3", IGNORE="re:.*self_attn.* x", **variables).stdout
    merged, nvfp4 = tmp_path / "out" / "merged", tmp_path / "out" / "nvfp4"
    assert f"--local_dir {checkpoint}/actor --target_dir {merged}.partial\nmv {merged}.partial {merged}\n" in lines
    assert f"export --model {merged} --out {nvfp4} --ignore re:.*self_attn.* --ignore x\n" in lines
    assert f"--model {nvfp4} --precision nvfp4" in lines and lines.count("--samples 2") == lines.count("--seed 3") == 2
    merged.mkdir(parents=True)
    nvfp4.mkdir()
    lines = bash("eval_offline.sh", str(checkpoint), PRECISIONS="nvfp4", **variables).stdout
    script = str(RECIPES / "eval_offline.py")
    assert [line.split()[1:3] for line in lines.splitlines()] == [
        ["-p", str(tmp_path / "out")], ["-m", "nvfp4_qat"], [script, "run"], [script, "summary"],
    ]  # fmt: skip
    assert bash("eval_offline.sh", str(tmp_path / "no")).returncode == 2


def test_results_of_one_checkpoint_are_not_those_of_another(tmp_path: Path) -> None:
    program, log = python_that(tmp_path, 0)
    variables = {"OUT": str(tmp_path / "out"), "PYTHON": str(program), "PRECISIONS": "bf16"}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for _ in range(2):
        assert bash("eval_offline.sh", str(tmp_path / "a"), **variables).returncode == 0
    assert len(log.read_text().splitlines()) == 4
    for arguments, more in ((tmp_path / "b", {}), (tmp_path / "a", {"IGNORE": "x"})):
        done = bash("eval_offline.sh", str(arguments), **variables, **more)
        assert done.returncode == 2 and "choose another OUT" in done.stderr


def test_what_is_evaluated_are_the_bytes_that_were_trained(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger
    from verl_on_a_cpu import engine, one_process, use_a_cpu

    from nvfp4_qat.integrations.verl_stream import NAME
    from nvfp4_qat.models import load_model, tiny_tokenizer

    tokenizer, base, actor, out = tiny_tokenizer(), tmp_path / "base", tmp_path / "actor", tmp_path / "merged"
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    use_a_cpu()
    with one_process():
        trained = engine(base, "fsdp2", {"enable": True})
        tokens = torch.randint(len(tokenizer), (2, 16))
        for _ in range(2):
            trained.optimizer_zero_grad()
            trained.module(input_ids=tokens, labels=tokens).loss.backward()
            trained.optimizer_step()
        stream, _ = trained.get_per_tensor_param()
        sent = {name: tensor.clone() for name, tensor in stream if name != NAME}
        actor.mkdir()
        torch.save(trained.module.state_dict(), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    AutoConfig.from_pretrained(base).save_pretrained(actor / "huggingface")
    tokenizer.save_pretrained(actor / "huggingface")
    FSDPModelMerger(
        ModelMergerConfig(
            operation="merge", backend="fsdp", target_dir=str(out), hf_upload_path=None, private=False,
            test_hf_dir=None, tie_word_embedding=False, trust_remote_code=False, is_value_model=False,
            local_dir=str(actor), hf_model_config_path=str(actor / "huggingface"), use_cpu_initialization=False,
        )
    ).merge_and_save()  # fmt: skip
    model = load_model(str(out)).model  # as `nvfp4-qat export` does
    nq.apply_qat(model, nq.QATConfig(enable=True))
    packed = dict(nq.packed_weights(model, layout="fused"))
    assert packed.keys() == sent.keys() and sum(name.endswith("weight_packed") for name in packed) >= 4
    for name, tensor in packed.items():
        assert torch.equal(tensor.view(torch.uint8), sent[name].view(torch.uint8)), name


# --- the page ---


def test_the_page_names_what_there_is() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (RECIPES / link).exists(), link
    assert sorted(set(re.findall(r"`(run_\w+\.sh)`", text))) == RUNS
