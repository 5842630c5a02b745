"""A whole run: directory, warm-up, summary, report, interruption."""

import importlib.util
import json
import math
import subprocess

import pytest
import torch
from helpers_rl import TOKENIZER, EvenFirst, micro_config, micro_model, without_timings

from nvfp4_qat import demo
from nvfp4_qat.demo import run_demo, summarize_arm
from nvfp4_qat.demo_config import ARMS, PRESETS, DemoConfig
from nvfp4_qat.engine import RolloutEngine
from nvfp4_qat.errors import UserError
from nvfp4_qat.machine import CODE, available_cores, commit
from nvfp4_qat.models import MADE
from nvfp4_qat.rl import plain_weights
from nvfp4_qat.tasks import SortDigits
from nvfp4_qat.warmup import HELD_OUT, LOOK_EVERY, warm_up


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "micro"
    micro_model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def easy_task(monkeypatch):
    monkeypatch.setattr(demo, "make_task", lambda spec, model: EvenFirst())


def rows_of(out, arm):
    return [json.loads(line) for line in (out / f"metrics-{arm}.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_a_reader_looks_for(tmp_path, saved_model):
    out = tmp_path / "new" / "run"
    summary = run_demo(micro_config(out, model=saved_model, arms=("bf16", "noqat", "qat")))
    assert json.loads((out / "summary.json").read_text()) == summary
    for name in ("report.html", "curves.png", "config.json"):
        assert (out / name).stat().st_size > 0
    assert not list(out.glob("checkpoint*")) + list(out.glob(".*"))
    assert summary["steps"] == 4
    assert summary["task"] == "even-first"
    assert list(summary["arms"]) == ["bf16", "noqat", "qat"]
    assert summary["seconds"] > 0
    assert {"torch", "python", "nvfp4-qat"} <= summary["versions"].keys()
    assert "interrupted" not in summary
    assert summary["threads"] == available_cores()
    for arm, entry in summary["arms"].items():
        rows = rows_of(out, arm)
        assert len(rows) == entry["steps"] == 4
        assert list((out / "tensorboard" / arm).glob("events.*"))
        assert entry["k3_kl_mean"] == pytest.approx(sum(r["rollout_corr/k3_kl"] for r in rows) / 4)
        assert entry["kl_mean"] == pytest.approx(sum(r["rollout_corr/kl"] for r in rows) / 4)
        assert entry["sync_bytes"] == rows[-1]["sync_bytes"]
        assert entry["reward_first"] == rows[0]["reward"]
        assert entry["reward_last"] == rows[-1]["reward"]
        for row in rows:
            assert all(math.isfinite(value) for value in row.values())
    text = (out / "summary.json").read_text() + (out / "config.json").read_text()
    assert str(tmp_path / "new") not in text


def test_events_hold_the_metrics(tmp_path, saved_model):
    out = tmp_path / "run"
    run_demo(micro_config(out, model=saved_model, arms=("qat",), steps=2))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard" / "qat"))
    events.Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    assert rewards == [(row["step"], pytest.approx(row["reward"])) for row in rows_of(out, "qat")]
    assert "flips/codes" in events.Tags()["scalars"]


def test_ctrl_c_leaves_a_report_and_resume_finishes_the_run(tmp_path, saved_model, monkeypatch):
    whole = micro_config(tmp_path / "whole", model=saved_model, arms=("bf16", "qat"))
    run_demo(whole)
    cut = micro_config(tmp_path / "cut", model=saved_model, arms=("bf16", "qat"))
    step = demo.train_arm.__globals__["train_step"]
    calls = []

    def interrupted_step(*args):
        calls.append(args[-1])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setitem(demo.train_arm.__globals__, "train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        run_demo(cut)
    monkeypatch.undo()
    monkeypatch.setattr(demo, "make_task", lambda spec, model: EvenFirst())
    assert calls == [0, 1, 2, 3, 0, 1, 2]
    partial = json.loads((cut.out / "summary.json").read_text())
    assert partial["interrupted"] is True
    assert {arm: entry["steps"] for arm, entry in partial["arms"].items()} == {"bf16": 4, "qat": 2}
    assert "not complete" in (cut.out / "report.html").read_text()

    with pytest.raises(UserError, match="--resume"):
        run_demo(cut)
    resumed = micro_config(cut.out, model=saved_model, arms=("bf16", "qat"), resume=True)
    summary = run_demo(resumed)
    assert "interrupted" not in summary
    # Looked at again, elsewhere, nothing is computed; what was told when it was stays.
    monkeypatch.setattr(demo, "circumstances", lambda device: {"commit": "another"})
    assert run_demo(resumed)["circumstances"] == summary["circumstances"] == partial["circumstances"]
    for arm in ("bf16", "qat"):
        same = [[without_timings(row) for row in rows_of(run.out, arm)] for run in (whole, cut)]
        assert same[0] == same[1]
    assert summary["seconds"] > 0


def test_a_piece_of_a_run_that_was_killed_is_told_too(tmp_path, saved_model, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        if args[-1] == 2:
            raise Killed
        return step(*args)

    step = demo.train_arm.__globals__["train_step"]
    cfg = micro_config(tmp_path / "run", model=saved_model, arms=("qat",), checkpoint_seconds=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.train_arm.__globals__, "train_step", killed)
        patch.setattr(demo, "circumstances", lambda device: {"commit": "one"})
        with pytest.raises(Killed):
            run_demo(cfg)
    left = json.loads((cfg.out / "summary.json").read_text())
    assert left["circumstances"] == [{"commit": "one"}] and left["interrupted"] is True
    assert left["config"] and left["starting_weights"]
    monkeypatch.setattr(demo, "circumstances", lambda device: {"commit": "other"})
    summary = run_demo(micro_config(cfg.out, model=saved_model, arms=("qat",), resume=True))
    assert summary["circumstances"] == [{"commit": "one"}, {"commit": "other"}] and "interrupted" not in summary


def test_resume_may_add_arms_but_not_change_settings(tmp_path, saved_model, monkeypatch):
    out = tmp_path / "run"
    run_demo(micro_config(out, model=saved_model, arms=("bf16",), steps=1))
    with pytest.raises(UserError, match="lr: 0.001 then, 0.002 now"):
        run_demo(micro_config(out, model=saved_model, arms=("bf16",), steps=1, lr=2e-3, resume=True))
    (first,) = json.loads((out / "summary.json").read_text())["circumstances"]
    assert first["gpu"] is None and "torch" in first["versions"] and first["date"] > "2026"
    monkeypatch.setattr(demo, "circumstances", lambda device: {"commit": "another"})
    summary = run_demo(micro_config(out, model=saved_model, arms=("qat",), steps=1, resume=True))
    assert list(summary["arms"]) == ["bf16", "qat"]
    assert summary["circumstances"] == [first, {"commit": "another"}]  # of each piece of the run


def test_directories_that_are_not_ours(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        run_demo(micro_config(tmp_path / "file"))
    with pytest.raises(UserError, match="not empty"):
        run_demo(micro_config(tmp_path))
    with pytest.raises(UserError, match="no run to resume"):
        run_demo(micro_config(tmp_path, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_model_or_task_leaves_no_directory(tmp_path, monkeypatch):
    def unknown(spec, model):
        raise UserError("unknown task")

    with pytest.raises(UserError, match="no model directory"):
        run_demo(micro_config(tmp_path / "a", model="/no/such/model"))
    monkeypatch.setattr(demo, "make_task", unknown)
    with pytest.raises(UserError, match="unknown task"):
        run_demo(micro_config(tmp_path / "b"))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_noticed_before_anything_else(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    with pytest.raises(UserError, match="needs matplotlib: pip install"):
        run_demo(micro_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_warm_up_learns_and_is_cached(tmp_path):
    losses = {}

    def warmed(name, **overrides):
        cfg = micro_config(
            tmp_path, warmup_steps=30, warmup_batch=32, warmup_lr=5e-3, cache=tmp_path / "cache", **overrides
        )
        model = micro_model()
        losses[name] = []
        trained = warm_up(model, TOKENIZER, SortDigits(2), cfg, lambda step, loss: losses[name].append(loss))
        return trained, model.state_dict()

    first, again, other = warmed("first"), warmed("again"), warmed("other", seed=1)
    assert (first[0], again[0], other[0]) == (True, False, True)
    assert losses["again"] == []
    assert losses["first"][-1] < 0.8 * losses["first"][0]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for name, tensor in first[1].items():
        assert torch.equal(tensor, again[1][name]), name
    assert not all(torch.equal(tensor, other[1][name]) for name, tensor in first[1].items())


def test_a_warm_up_ends_when_answers_are_right_often_enough(tmp_path):
    steps = []
    settings = {"warmup_steps": 400, "warmup_batch": 32, "warmup_lr": 5e-3, "cache": tmp_path / "cache"}
    model, task = micro_model(), SortDigits(1)
    cfg = micro_config(tmp_path, warmup_until=0.1, **settings)
    assert warm_up(model, TOKENIZER, task, cfg, lambda step, loss: steps.append(step))
    assert len(steps) < 400 and len(steps) % LOOK_EVERY == 0
    key = f"held-out/{cfg.weights_seed}"
    problems = task.problems(HELD_OUT, key)
    engine = RolloutEngine(model.config, [TOKENIZER.eos_token_id])
    engine.load(plain_weights(model))
    answers = engine.generate([TOKENIZER(p.prompt).input_ids for p in problems], 8, 3, seed=0)
    right = [
        TOKENIZER.decode(s.response) == p.answer + TOKENIZER.eos_token
        for p, group in zip(problems, answers, strict=True)
        for s in group
    ]
    assert sum(right) / len(right) > 0.07  # the chance was computed, this is sampled
    assert not warm_up(micro_model(), TOKENIZER, task, cfg, lambda step, loss: steps.append(step))


def test_the_model_has_a_seed_of_its_own(tmp_path):
    assert micro_config(tmp_path, seed=3).weights_seed == 3
    assert micro_config(tmp_path, seed=3, model_seed=0).weights_seed == 0


def test_summary_by_hand():
    rows = [
        {
            "reward": reward, "accuracy": 0.5, "rollout_corr/k3_kl": 0.1 * i, "rollout_corr/kl": 0.0, "sync_bytes": i,
            "rollout_corr/logprob_abs_diff": 1.0, "time/step": 2.0,
        }
        for i, reward in enumerate([1.0, 3.0, 9.0, 9.0, 9.0, 9.0, 4.0, 8.0])
    ]  # fmt: skip
    summary = summarize_arm(rows, 8)
    assert summary["reward_first"] == 2.0
    assert summary["reward_first_se"] == 1.0  # standard deviation √2, two steps
    assert summary["reward_last"] == 6.0
    assert summary["reward_last_se"] == 2.0
    assert summary["reward_rise_in_standard_errors"] == pytest.approx(4 / math.sqrt(5))
    assert summary["k3_kl_mean"] == pytest.approx(0.35)
    assert summary["sync_bytes"] == 7
    assert summary["seconds"] == 16.0
    assert summarize_arm(rows[:1], 8)["reward_rise_in_standard_errors"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"arms": ("bf16", "int4")}, "arms must be"),
        ({"arms": ()}, "arms must be"),
        ({"arms": ("qat", "qat")}, "each once"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"tis": -1.0}, "tis must be positive"),
        ({"prompts": math.nan}, "prompts must be at least"),
        ({"warmup_until": 1.0}, "warmup_until is a chance"),
        ({"eval_every": -1}, "eval_every must be at least 0"),
    ],
)
def test_settings_are_checked(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        DemoConfig(tmp_path, **overrides)


def test_every_model_has_settings(tmp_path):
    for model in (*PRESETS, "some/model"):
        cfg = DemoConfig.for_model(model, tmp_path, seed=3)
        assert cfg.seed == 3
        assert set(cfg.arms) <= set(ARMS)
        assert (cfg.warmup_steps > 0) == (model in MADE)


def test_cores_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_cores() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert available_cores() >= 1


def test_two_processes_do_not_work_in_one_directory(tmp_path, saved_model, monkeypatch):
    cfg = micro_config(tmp_path / "run", model=saved_model, arms=("bf16",), steps=1)
    said = []

    def second(*args):
        with pytest.raises(UserError, match="another process is at work on .*run: wait until it has ended"):
            run_demo(micro_config(cfg.out, model=saved_model, arms=("qat",), steps=1, resume=True))
        said.append(1)
        return train(*args)

    train = demo.train_arm
    monkeypatch.setattr(demo, "train_arm", second)
    run_demo(cfg)
    monkeypatch.setattr(demo, "train_arm", train)
    assert said and list(run_demo(micro_config(cfg.out, model=saved_model, steps=1, resume=True))["arms"])
    assert not list(cfg.out.glob("*lock*")) + list(cfg.out.glob(".*"))


def test_a_commit_is_told_with_a_mark_where_code_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("NVFP4_QAT_COMMIT", "told")
    assert commit(tmp_path) == "told"
    monkeypatch.delenv("NVFP4_QAT_COMMIT")
    assert commit(tmp_path) is None

    def git(*arguments):
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *own, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    for folder in (*CODE, "experiments/results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    head = git("rev-parse", "HEAD")[:10]
    assert commit(tmp_path) == head
    (tmp_path / "experiments/results/file").write_text("rows")
    (tmp_path / "README").write_text("text")
    assert commit(tmp_path) == head  # neither is code
    (tmp_path / "experiments/file").write_text("b")
    assert commit(tmp_path) == f"{head}+"
    monkeypatch.setenv("NVFP4_QAT_COMMIT", "told")
    assert commit(tmp_path) == "told"
