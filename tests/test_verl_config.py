"""Configurations of verl: where QAT is turned on, what cannot run and is refused, and by whom."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path
from typing import Any

import pytest

verl = pytest.importorskip("verl", reason="verl is not installed")

import nvfp4_qat as nq  # noqa: E402
from nvfp4_qat.errors import UserError  # noqa: E402
from nvfp4_qat.integrations import verl_rollout  # noqa: E402
from nvfp4_qat.integrations.verl_config import settle  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's
ACTOR, FSDP = "actor_rollout_ref.actor.qat", "actor_rollout_ref.actor.fsdp_config.qat"
ROLLOUT = "actor_rollout_ref.rollout.qat"


def config(*overrides: str) -> Any:
    """verl's own schema and defaults, with overrides as on its command line."""
    from hydra import compose, initialize_config_dir

    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    always = [
        "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1", "actor_rollout_ref.actor.strategy=fsdp2",
    ]  # fmt: skip
    with initialize_config_dir(config_dir=folder, version_base=None):
        return compose("ppo_trainer", overrides=[*always, *overrides])


def validated(*overrides: str) -> Any:
    from verl.utils.config import validate_config

    found = config(*overrides)
    validate_config(found, use_reference_policy=False, use_critic=False)
    return found


@pytest.mark.parametrize("place", [ACTOR, FSDP])
def test_either_place_turns_qat_on_for_trainer_and_rollout(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = validated(f"{place}.enable=True", f"{place}.ignore_patterns=[lm_head,re:.*self_attn.*]").actor_rollout_ref
    for block in (found.actor.qat, found.actor.fsdp_config.qat, found.rollout.qat):
        assert block.enable and list(block.ignore_patterns) == ["lm_head", "re:.*self_attn.*"]
    assert "nvfp4-qat: QAT is on, w4a16, all layers but lm_head, re:.*self_attn.*" in capsys.readouterr().out


def test_both_places_may_say_the_same() -> None:
    found = validated(f"{ACTOR}.enable=True", f"{FSDP}.enable=True", f"{FSDP}.ignore_patterns=[lm_head]")
    assert list(found.actor_rollout_ref.actor.qat.ignore_patterns) == ["lm_head"]


def test_the_rollout_may_say_the_same() -> None:
    said = "{enable: True, ignore_patterns: [lm_head]}"
    found = validated(f"{ACTOR}.enable=True", f"{FSDP}.ignore_patterns=[lm_head]", f"{ROLLOUT}={said}")
    assert found.actor_rollout_ref.rollout.qat == found.actor_rollout_ref.actor.qat
    settle(found)  # as where a run is started from what was validated


def test_a_rollout_in_4_bits_alone_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"rollout\.qat\.enable is true alone: set actor_rollout_ref\.actor\.qat\.enable"
    ):
        validated(f"{ROLLOUT}={{enable: True}}")


@pytest.mark.parametrize("absent", [f"~{ACTOR}", f"{ACTOR}=null", f"~{FSDP}", f"{FSDP}=null"])
def test_a_place_that_was_taken_out_is_there_again(absent: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    found = validated(f"{FSDP if ACTOR in absent else ACTOR}.enable=True", absent).actor_rollout_ref
    assert found.rollout.qat.enable and omega_conf_to_dataclass(found.actor).engine.qat.enable


def test_without_qat_nothing_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    validated(f"{ACTOR}.ignore_patterns=[a]", f"{FSDP}.ignore_patterns=[b]", "actor_rollout_ref.rollout.name=sglang")
    assert "nvfp4-qat" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"{ACTOR}.ignore_patterns=[a]", f"{FSDP}.ignore_patterns=[b]"],
            r"ignore_patterns is \['a'\] and .* keep one",
        ),
        ([f"+{FSDP}.keep_gathered=True"], "have no key keep_gathered; known keys: enable, mode, group_size"),
        ([f"{FSDP}.mode=w4a4"], "4-bit activations"),
        ([f"{FSDP}.group_size=32"], "group_size must be 16"),
        ([f"{FSDP}.quantization_config_path=/nowhere.json"], "cannot read /nowhere.json"),
        (["actor_rollout_ref.rollout.name=sglang"], "rollout.name is sglang"),
        (["actor_rollout_ref.rollout.load_format=auto"], "load_format is auto: leave it at dummy"),
        (["actor_rollout_ref.rollout.quantization=fp8"], "rollout.quantization is fp8"),
        (["actor_rollout_ref.model.lora.merge=True"], "adapters cannot be merged"),
        (["actor_rollout_ref.actor.strategy=fsdp_turbo"], "actor.strategy is fsdp_turbo"),
        (
            ["actor_rollout_ref.rollout.checkpoint_engine.backend=mooncake"],
            "backend is mooncake, which sends all as bf16",
        ),
        (
            ["actor_rollout_ref.rollout.checkpoint_engine.backend=nccl", "actor_rollout_ref.model.lora_rank=8"],
            "leaves out adapters that are not merged",
        ),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides={a:1}"], "vllm.hf_overrides is set: QAT sets it"),
        (["actor_rollout_ref.rollout.dtype=float16"], "rollout.dtype is float16: leave it at bfloat16"),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.dtype=half"], "vllm.dtype is half: leave it out"),
        (["actor_rollout_ref.actor.fsdp_config.dtype=float16"], "fsdp_config.dtype is float16, but the rollout"),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.enable_eplb=True"], "enable_eplb is true: weights cannot"),
        ([f"{ROLLOUT}=null"], "rollout.qat is set to None, which is not what actor.qat says: do not set it"),
        ([f"~{ROLLOUT}"], "rollout.qat is set to None, which"),
        ([f"{ROLLOUT}={{enable: False}}"], "rollout.qat is set to {'enable': False}, which is not"),
        ([f"{ROLLOUT}={{enable: True, mode: w4a4}}"], "rollout.qat is set to .*'w4a4'}, which is not"),
        ([f"{ROLLOUT}={{enable: True, other: 1}}"], "rollout.qat is set to .*'other': 1}, which is not"),
        (["actor_rollout_ref.model.mtp.enable_rollout=True"], "draft models get no 4-bit weights"),
    ],
)
def test_what_cannot_run_stops_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validated(f"{ACTOR}.enable=True", *overrides)


def test_workers_notice_that_the_driver_has_no_plugin() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    with pytest.raises(Exception, match="the plugin of nvfp4-qat was not active where"):
        omega_conf_to_dataclass(config(f"{ACTOR}.enable=True").actor_rollout_ref.actor)
    assert omega_conf_to_dataclass(validated(f"{ACTOR}.enable=True").actor_rollout_ref.actor).engine.qat.enable


def test_megatrons_quantization_is_left_to_verl(tmp_path: Path) -> None:
    path = tmp_path / "modelopt.json"
    path.write_text('{"quant_method": "modelopt"}')
    block = {"enable": True, "quantization_config_path": str(path)}
    assert not verl_rollout.enabled(types.SimpleNamespace(config=types.SimpleNamespace(qat=block)))


def test_programs_that_do_not_validate_are_settled_too() -> None:
    from verl.trainer import main_ppo

    found = config(f"{ACTOR}.enable=True", "actor_rollout_ref.rollout.name=sglang")
    with pytest.raises(UserError, match="rollout.name is sglang"):
        main_ppo.run_ppo(found, task_runner_class=None)


def test_options_beside_the_quantization_config(tmp_path: Path) -> None:
    from nvfp4_qat.integrations.verl_config import config_of

    path = tmp_path / "nvfp4.json"
    document = nq.QATConfig(enable=True).to_compressed_tensors(["lm_head"])
    block = {"enable": True, "quantization_config_path": str(path), "ignore_patterns": ["lm_head"]}
    path.write_text(json.dumps({**document, "nvfp4_qat": {"gather": "module", "global_scale": "amax"}}))
    qat, options = config_of(block)
    assert (qat.global_scale, options.gather, options.keep_gathered) == ("amax", "module", False)
    assert "nvfp4_qat" not in qat.to_compressed_tensors(["lm_head"])
    path.write_text(json.dumps({**document, "nvfp4_qat": {"gathers": "module"}}))
    with pytest.raises(UserError, match="unknown keys gathers; known: gather, keep_gathered, global_scale, train"):
        config_of(block)
