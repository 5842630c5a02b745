"""The recipes: their scripts, their configurations against verl's schema, and their page."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

verl = pytest.importorskip("verl", reason="verl is not installed")

import torch  # noqa: E402
from helpers_recipes import RECIPES, bash, python_that  # noqa: E402

import nvfp4_qat as nq  # noqa: E402
from nvfp4_qat.integrations.verl_config import config_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's
RUNS = sorted(path.name for path in RECIPES.glob("run_*.sh"))
IGNORED = ["lm_head", "embed_tokens", "re:.*mlp.gate$"]


def test_scripts_parse_and_can_be_started() -> None:
    scripts = sorted(RECIPES.glob("*.sh"))
    assert len(scripts) == 11
    for script in scripts:
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert os.access(script, os.X_OK) == (script.name != "common.sh"), script  # which is sourced


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


def test_the_page_names_what_there_is() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (RECIPES / link).exists(), link
    assert sorted(set(re.findall(r"`(run_\w+\.sh)`", text))) == RUNS
