"""The demo with vLLM as its rollout engine, with a stand-in for vLLM: what it is given, in which order, and errors."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import standin_generate
import torch
from helpers_rl import TOKENIZER, EvenFirst, micro_config, micro_model

import nvfp4_qat as nq
from nvfp4_qat import demo
from nvfp4_qat.cli import main
from nvfp4_qat.demo import run_demo
from nvfp4_qat.engine import RolloutEngine
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.policy_update import response_logprobs
from nvfp4_qat.rl import arm_plan, plain_weights, prepare_arm, start_engine, stop_ids
from nvfp4_qat.rollouts import Graded, collate
from nvfp4_qat.vllm_engine import require_vllm

PROMPTS = [TOKENIZER(text).input_ids for text in ("12>", "9876>", "5>")]
ARMS = ("bf16", "noqat", "qat", "qat-ffn")


@pytest.fixture
def made(monkeypatch):
    """The engines that were started."""
    monkeypatch.setattr(demo, "make_task", lambda spec, model: EvenFirst())
    return standin_generate.install(monkeypatch)


def sharp_model(moe=False):
    """Far from uniform, so that rounding weights shows."""
    model = micro_model(moe)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(12)
    return model


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "micro"
    sharp_model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def vllm_config(out, **overrides):
    return micro_config(out, **{"rollout": "vllm", **overrides})


def started(tmp_path, arm="qat", moe=False, **overrides):
    model = sharp_model(moe)
    stream = prepare_arm(model, arm)
    plan = arm_plan(model, arm)
    return model, stream, start_engine(model, plan, stop_ids(model, TOKENIZER), vllm_config(tmp_path, **overrides))


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean())


# What the engine holds


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_s_engine_starts_with_its_weights_and_gets_every_later_one(arm, moe, made, tmp_path):
    model, stream, engine = started(tmp_path, arm, moe)
    (llm,) = made

    def expected():
        """The checkpoint's tensors of the same weights, by another way."""
        copy = micro_model(moe)
        copy.load_state_dict(model.state_dict())
        if arm == "bf16":
            copy.save_pretrained(tmp_path / "expected")
            return standin_generate.load_file(tmp_path / "expected" / "model.safetensors")
        ignored = ("re:.*self_attn.*",) if arm == "qat-ffn" else ()
        config = nq.QATConfig(enable=True)
        plan_of = nq.QATConfig(enable=True, ignore_patterns=(*config.ignore_patterns, *ignored))
        nq.apply_qat(copy, plan_of)
        return dict(nq.packed_weights(copy))

    for version in (1, 2, 3):
        loaded = engine.load(stream())
        assert loaded.version == version and loaded.seconds > 0
        assert loaded.bytes == sum(t.numel() * t.element_size() for _, t in stream())
        held, want = dict(llm.worker.model.named_parameters()), expected()
        assert held.keys() == want.keys()
        for name, tensor in want.items():
            assert torch.equal(bits(held[name]), bits(tensor)), name
        move(model)
    engine.close()


@pytest.mark.parametrize("arm", ARMS)
def test_a_plan_says_what_of_an_arm_s_stream_is_packed(arm):
    model = micro_model(moe=True)
    stream = prepare_arm(model, arm)
    plan = arm_plan(model, arm)
    packed = {name.rpartition(".")[0] for name, _ in stream() if name.endswith(".weight_packed")}
    assert packed == {entry.name.removesuffix(".weight") for entry in plan.quantized}
    assert len(packed) > 3 or arm == "bf16"


def test_a_plan_with_nothing_quantized_keeps_every_tensor_and_its_names():
    plan = nq.QuantPlan.from_model(micro_model(moe=True), nq.QATConfig(enable=True))
    plain = plan.unquantized()
    assert plain.quantized == () and plain.checkpoint_slices == plan.checkpoint_slices
    assert {e.name for e in plain.skipped} == {e.name for e in (*plan.quantized, *plan.skipped)}
    plain.audit([])
    with pytest.raises(MismatchError, match=r"only there: model\.layers\.0\.self_attn\.q_proj"):
        plain.audit(["model.layers.0.self_attn.qkv_proj"])


def test_an_engine_that_quantizes_other_layers_is_refused_and_ended(made, tmp_path, monkeypatch):
    monkeypatch.setattr(standin_generate.Code, "quantized", lambda self, model: ["model.layers.0.mlp.down_proj"])
    with pytest.raises(MismatchError, match="quantized on one side only"):
        started(tmp_path)
    assert made[0].ended and not Path(made[0].model).exists()


# Sampling


@pytest.mark.parametrize("arm", ["bf16", "qat"])
def test_samples_carry_the_log_probabilities_of_their_tokens(arm, made, tmp_path):
    model, stream, engine = started(tmp_path, arm)
    engine.load(stream())
    groups = engine.generate(PROMPTS, samples=6, max_new_tokens=8, seed=3)
    assert [[sample.prompt for sample in group] for group in groups] == [[prompt] * 6 for prompt in PROMPTS]
    batch = collate([[Graded(sample, 0.0, True) for sample in group] for group in groups], pad=0)
    with torch.no_grad():
        trainer = response_logprobs(model, batch)
    assert batch.rollout_logprobs[batch.mask].std() > 0.5
    assert (trainer - batch.rollout_logprobs).abs()[batch.mask].max() < 0.2  # bf16, as in test_engine
    stops = stop_ids(model, TOKENIZER)
    for sample in (s for group in groups for s in group):
        assert len(sample.logprobs) == len(sample.response) <= 8
        assert not stops & set(sample.response[:-1])


def test_every_response_has_a_seed_of_its_own(made, tmp_path):
    _, stream, engine = started(tmp_path)
    engine.load(stream())
    groups = engine.generate([PROMPTS[0]] * 3, samples=4, max_new_tokens=6, seed=1)
    assert len({tuple(tuple(sample.response) for sample in group) for group in groups}) == 3
    assert engine.generate([PROMPTS[0]] * 3, samples=4, max_new_tokens=6, seed=1) == groups
    assert engine.generate([PROMPTS[0]] * 3, samples=4, max_new_tokens=6, seed=50) != groups


def test_a_response_that_vllm_broke_off_or_would_cut_short_is_an_error(made, tmp_path):
    _, stream, engine = started(tmp_path)
    engine.load(stream())
    with pytest.raises(UserError, match="a prompt of 60 tokens and a response of 5 do not fit into the 64"):
        engine.generate([[5] * 60, [5]], 2, 5, 0)
    engine.generate([[5] * 59], 2, 5, 0)
    made[0].finish_reason = "abort"
    with pytest.raises(MismatchError, match=r"before it was complete \(abort\)"):
        engine.generate(PROMPTS, 2, 5, 0)


def test_it_scores_responses_as_the_builtin_engine_does(made, tmp_path):
    model, stream, engine = started(tmp_path)
    engine.load(stream())
    samples = [s for group in engine.generate(PROMPTS, 3, 8, seed=1) for s in group]
    other = RolloutEngine(model.config, [])
    other.load(stream())
    for sample, ours, theirs in zip(samples, engine.score(samples), other.score(samples), strict=True):
        assert ours == pytest.approx(theirs, abs=0.05) and len(ours) == len(sample.response)


# How it is started


def test_vllm_is_started_with_what_the_run_says(made, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    _, _, engine = started(tmp_path, rollout_device="cuda:1", rollout_memory=0.45, rollout_kv_cache=0.5)
    (llm,) = made
    assert llm.kv_cache_memory_bytes == 2**29
    assert llm.worker_extension_cls == "nvfp4_qat.vllm.LiveWeights" and llm.logprobs_mode == "processed_logprobs"
    assert (llm.max_model_len, llm.max_num_seqs, llm.gpu_memory_utilization) == (64, 12, 0.45)
    assert llm.enable_sleep_mode is False and llm.generation_config == "vllm" and llm.skip_tokenizer_init
    assert llm.environment == {
        "CUDA_VISIBLE_DEVICES": "6", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }  # fmt: skip
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6" and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    engine.close()
    assert llm.ended and not Path(llm.model).exists()


def test_an_engine_starts_from_the_path_of_the_last_one_of_its_model(made, tmp_path, monkeypatch):
    """As vLLM keeps what it compiles by the path of the model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def path(*arguments):
        started(tmp_path, *arguments)[2].close()
        return made[-1].model

    first = path("qat")
    assert path("qat") == path("noqat") == first
    others = {path("bf16"), path("qat-ffn"), path("qat", True)}
    assert len(others) == 3 and first not in others
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_engines_of_a_model_at_a_time_start_from_paths_of_their_own(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engines = [started(tmp_path)[2] for _ in range(3)]
    paths = [Path(llm.model) for llm in made]
    assert len(set(paths)) == 3 and all((path / "config.json").is_file() for path in paths)
    engines[1].close()
    assert not paths[1].exists() and all((path / "config.json").is_file() for path in (paths[0], paths[2]))
    paths[1].mkdir()
    (paths[1] / "old.safetensors").touch()  # as a process leaves it that is killed
    again = started(tmp_path)[2]
    assert Path(made[-1].model) == paths[1] and not (paths[1] / "old.safetensors").exists()
    for engine in (engines[0], engines[2], again):
        engine.close()


def test_a_place_for_checkpoints_that_is_another_user_s_is_not_used(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / f"nvfp4-qat-{os.getuid()}").symlink_to(theirs)
    started(tmp_path)[2].close()
    assert not list(theirs.iterdir()) and made[0].ended


@pytest.mark.parametrize(("device", "number"), [(None, "0"), ("cuda:0", "0"), ("cuda:1", "1")])
def test_the_engine_s_process_sees_its_gpu_only(device, number, made, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started(tmp_path, rollout_device=device)[2].close()
    assert made[0].environment["CUDA_VISIBLE_DEVICES"] == number and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_vllm_that_does_not_start_is_one_line(made, tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("Engine core initialization failed.\nmore")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", lambda *a, **k: fail())
    with pytest.raises(UserError, match=r"vLLM did not start \(RuntimeError: Engine core init.*--rollout-memory") as e:
        started(tmp_path)
    assert "\n" not in str(e.value)


# The loop


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_engine_sleeps_while_the_trainer_computes_and_wakes_up_around_a_sync(level, made, tmp_path, saved_model):
    run_demo(vllm_config(tmp_path / "run", model=saved_model, arms=("qat",), steps=2, sleep=level, max_batches=1))
    (llm,) = made
    kept = {"sleep", "wake_up", "generate", "nvfp4_begin", "nvfp4_commit", "nvfp4_lost"}
    sync = [("nvfp4_begin",), ("sleep", 0), ("nvfp4_commit",), ("wake_up", "scheduling")]
    down = {0: [], 1: [("sleep", 1)], 2: [("nvfp4_lost",), ("sleep", 2)]}[level]
    around = [("wake_up", "weights"), *sync, ("wake_up", "kv_cache")] if level else sync
    step = [("generate", 3), *down, *around]
    assert [call for call in llm.calls if call[0] in kept] == [*sync, *step, *step]
    assert llm.ended and llm.enable_sleep_mode == (level > 0)


@pytest.mark.parametrize("level", [0, 2])
def test_a_run_reports_every_arm_with_its_syncs(level, made, tmp_path, saved_model):
    out = tmp_path / "run"
    arms = ("bf16", "noqat", "qat")
    overrides = {"model": saved_model, "arms": arms, "steps": 3, "lr": 1e-4}
    summary = run_demo(vllm_config(out, sleep=level, **overrides))
    k3 = {arm: entry["k3_kl_mean"] for arm, entry in summary["arms"].items()}
    assert k3["noqat"] > 5 * max(k3["qat"], k3["bf16"]) and k3["qat"] < 3 * k3["bf16"]
    builtin = run_demo(micro_config(tmp_path / "builtin", **overrides))
    for arm in arms:
        rows = [json.loads(line) for line in (out / f"metrics-{arm}.jsonl").read_text().splitlines()]
        assert [row["sync_version"] for row in rows] == [2, 3, 4]  # the first one before the first step
        assert all(row["sync_seconds"] <= row["time/sync"] for row in rows)
        assert any(row["groups_trained"] for row in rows)
        entry = summary["arms"][arm]
        assert entry["sync_bytes"] == builtin["arms"][arm]["sync_bytes"]
        assert entry["sync_version_last"] == 4 and entry["sync_seconds_median"] > 0
        assert "sync_version_last" not in builtin["arms"][arm]
    assert summary["versions"]["vllm"] == standin_generate.VERSION and summary["versions"]["gpu"] == "a GPU"
    where = {"sleep": level, "rollout_device": None, "rollout_memory": 0.3, "rollout_kv_cache": None}
    assert summary["engine"] == where
    assert summary["config"]["rollout"] == "vllm"
    page = (out / "report.html").read_text()
    for text in ("Seconds of a sync", "last version", "qat sync bytes", "<dt>rollout_memory</dt>"):
        assert text in page and text not in (tmp_path / "builtin" / "report.html").read_text()
    assert [llm.ended for llm in made] == [True] * 3


def test_an_interrupted_run_ends_its_engine_and_goes_on_with_another(made, tmp_path, saved_model, monkeypatch):
    cfg = vllm_config(tmp_path / "run", model=saved_model, arms=("qat",), steps=3)
    step = demo.train_arm.__globals__["train_step"]

    def interrupted(*args):
        if args[-1] == 1:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setitem(demo.train_arm.__globals__, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(cfg)
    assert made[0].ended
    monkeypatch.setitem(demo.train_arm.__globals__, "train_step", step)
    with pytest.raises(UserError, match="rollout: vllm then, builtin now"):
        run_demo(micro_config(cfg.out, model=saved_model, arms=("qat",), steps=3, resume=True))
    summary = run_demo(vllm_config(cfg.out, model=saved_model, arms=("qat",), steps=3, resume=True, sleep=1))
    assert summary["arms"]["qat"]["steps"] == 3 and len(made) == 2 and made[1].ended


# What cannot work


@pytest.mark.parametrize(
    ("gpus", "overrides", "message"),
    [
        (0, {}, "needs a CUDA device, and PyTorch finds none: leave --rollout at builtin"),
        (2, {"rollout_device": "cuda:2"}, "--rollout-device cuda:2 is none of the GPUs .* here: cuda:0, cuda:1"),
        (1, {"rollout_device": "gpu1"}, "--rollout-device gpu1 is none of the GPUs .* here: cuda:0"),
    ],
)
def test_a_machine_that_lacks_something_is_told_before_anything_is_written(
    gpus, overrides, message, tmp_path, monkeypatch, saved_model
):
    standin_generate.install(monkeypatch, gpus)
    with pytest.raises(UserError, match=message):
        run_demo(vllm_config(tmp_path / "run", model=saved_model, **overrides))
    assert not (tmp_path / "run").exists()


def test_without_vllm_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    with pytest.raises(UserError, match=re.escape("pip install 'nvfp4-qat[vllm,demo]'")):
        require_vllm(vllm_config(tmp_path))
    assert main(["demo", "--rollout", "vllm", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rollout": "sglang"}, "rollout must be one of builtin, vllm, got 'sglang'"),
        ({"rollout": "builtin", "sleep": 1}, "settings of vLLM: give --rollout vllm"),
        ({"rollout": "builtin", "rollout_device": "cuda:1"}, "settings of vLLM: give --rollout vllm"),
        ({"sleep": 3}, "sleep must be 0 .* got 3"),
        ({"rollout_memory": 0.0}, "from 0 to 1; got 0.0"),
        ({"rollout_memory": 1.5}, "from 0 to 1; got 1.5"),
        ({"sleep": 1, "rollout_device": "cuda:1"}, "which is on cuda:0, not on cuda:1: leave out"),
    ],
)
def test_settings_that_do_not_go_together(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        vllm_config(tmp_path, **overrides)


def test_a_stream_that_is_not_the_announced_one_is_refused(made, tmp_path):
    model, _, engine = started(tmp_path, "qat")
    with pytest.raises(MismatchError, match="was not announced"):
        engine.load(plain_weights(model))
