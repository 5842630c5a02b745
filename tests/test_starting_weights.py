"""Arms are compared only where they began from the same weights."""

import json
import shutil

import pytest
import torch
from helpers_rl import TOKENIZER, EvenFirst, micro_config, micro_model

from nvfp4_qat import demo, starting_weights, warmup
from nvfp4_qat.demo import run_demo
from nvfp4_qat.errors import UserError
from nvfp4_qat.models import LoadedModel
from nvfp4_qat.starting_weights import Start, check_same


@pytest.fixture(autouse=True)
def small_and_easy(monkeypatch):
    load = lambda spec, seed=0: LoadedModel(micro_model(seed=seed), TOKENIZER, "micro", "")  # noqa: E731
    monkeypatch.setattr(demo, "load_model", load)
    task = EvenFirst()  # the same in all runs: what it is called is part of the name of a warm-up's file
    monkeypatch.setattr(demo, "make_task", lambda spec, model: task)


def config(tmp_path, arm, **overrides):
    settings = {"steps": 1, "warmup_steps": 3, "warmup_batch": 4, "cache": tmp_path / "cache", "resume": True}
    return micro_config(tmp_path / "run", arms=(arm,), **{**settings, **overrides})


def on_another_machine(monkeypatch):
    """Versions are part of the name of a warm-up's file."""
    monkeypatch.setattr(warmup, "versions", lambda: {"torch": "0.0"})


def test_a_run_says_which_weights_it_began_from(tmp_path):
    summary = run_demo(config(tmp_path, "bf16"))
    (file,) = (tmp_path / "cache").iterdir()
    began = micro_model()
    began.load_state_dict(torch.load(file, weights_only=True))
    start = Start.read(tmp_path / "run")
    assert start == Start.of(began, file) and start != Start.of(micro_model(), file)
    assert summary["starting_weights"] == {"sha256": start.sha256, "file": file.name}
    run_demo(config(tmp_path, "qat"))
    assert Start.read(tmp_path / "run") == start
    assert Start.read(tmp_path / "nothing") is None


def test_an_arm_does_not_begin_from_another_machine_s_weights(tmp_path, monkeypatch):
    run_demo(config(tmp_path, "bf16"))
    before = (tmp_path / "run" / "config.json").read_text()
    on_another_machine(monkeypatch)
    trained = []
    monkeypatch.setattr(starting_weights, "warm_up", lambda *args: trained.append(args))
    with pytest.raises(UserError, match=r"to begin from differ \(\w{12}: .*run; not made yet: now\): .*, or copy "):
        run_demo(config(tmp_path, "qat"))
    assert not trained  # said before minutes are spent on weights of no use
    assert (tmp_path / "run" / "config.json").read_text() == before
    summary = run_demo(config(tmp_path, "bf16"))  # there is nothing to begin
    assert list(summary["arms"]) == ["bf16"] and not trained


def test_what_the_message_says_mends_it(tmp_path, monkeypatch):
    run_demo(config(tmp_path, "bf16"))
    with monkeypatch.context() as patch:
        on_another_machine(patch)
        with pytest.raises(UserError) as caught:
            run_demo(config(tmp_path, "qat"))
        _, _, files = str(caught.value).partition("or copy ")
        old, new = files.partition(", or begin")[0].split(" to ")
        shutil.copy(old, new)
        assert list(run_demo(config(tmp_path, "qat"))["arms"]) == ["bf16", "qat"]


def test_a_warm_up_that_was_made_again_and_came_out_differently(tmp_path):
    run_demo(config(tmp_path, "bf16"))
    (file,) = (tmp_path / "cache").iterdir()
    torch.save(micro_model(seed=5).state_dict(), file)
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match=r"differ \(\w{12}: .*run; \w{12}: now\): .* was made again"):
        run_demo(config(tmp_path, "qat"))
    assert (tmp_path / "run" / "config.json").read_text() == before
    assert not (tmp_path / "run" / "metrics-qat.jsonl").exists()
    file.unlink()
    run_demo(config(tmp_path, "qat"))  # made again with the same result


def test_a_model_whose_files_changed(tmp_path, monkeypatch):
    run_demo(config(tmp_path, "bf16", warmup_steps=0))
    monkeypatch.setattr(demo, "load_model", lambda spec, seed: LoadedModel(micro_model(seed=9), TOKENIZER, "", ""))
    with pytest.raises(UserError, match="the model's files have changed"):
        run_demo(config(tmp_path, "qat", warmup_steps=0))


def test_a_run_that_does_not_say_is_not_continued(tmp_path):
    run_demo(config(tmp_path, "bf16"))
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["starting_weights"]
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="does not say which weights its arms began from"):
        run_demo(config(tmp_path, "qat"))


def test_equal_weights_are_equal_whatever_they_are_called():
    check_same({"a": Start("1", "x.pt"), "b": Start("1", "y.pt"), "c": Start("1", None)}, None)
