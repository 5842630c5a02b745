"""Files that a resumed run finds damaged: one error, which says how to go on, and going on that way works."""

import json

import pytest
import torch
from helpers_rl import TOKENIZER, EvenFirst, micro_config, micro_model

from nvfp4_qat import demo
from nvfp4_qat.demo import run_demo
from nvfp4_qat.errors import UserError
from nvfp4_qat.models import LoadedModel

DAMAGES = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "list": lambda path: path.write_text("[]") if path.suffix == ".json" else torch.save([1], path),
    "other keys": lambda path: torch.save({"a": 1}, path),
    "hollow": lambda path: path.write_bytes(path.read_bytes().replace(b"data.pkl", b"date.pkl")),
}
TEXTS = ("torn", "empty", "no text", "list")


@pytest.fixture(autouse=True)
def small_and_easy(monkeypatch):
    load = lambda spec, seed=0: LoadedModel(micro_model(seed=seed), TOKENIZER, "micro", "")  # noqa: E731
    monkeypatch.setattr(demo, "load_model", load)
    task = EvenFirst()  # the same in all runs: what it is called is part of the name of a warm-up's file
    monkeypatch.setattr(demo, "write_report", lambda out: None)
    monkeypatch.setattr(demo, "make_task", lambda spec, model: task)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run that was warmed up and has made one step of two, with the settings that continue it."""
    settings = {"arms": ("qat",), "steps": 2, "warmup_steps": 2, "warmup_batch": 4, "cache": tmp_path / "cache"}
    cfg = micro_config(tmp_path / "run", resume=True, **settings)
    with monkeypatch.context() as patch:

        def stop(bar, row):
            raise KeyboardInterrupt

        patch.setattr(demo._Bar, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_demo(cfg)
    return cfg


def refused(cfg, path, damages):
    """What is said of a file in each of its damaged states, in which it is left."""
    whole, said = path.read_bytes(), []
    for damage in damages:
        path.write_bytes(whole)
        DAMAGES[damage](path)
        left = path.read_bytes()
        with pytest.raises(UserError) as caught:
            run_demo(cfg)
        assert left == path.read_bytes() != whole
        said.append(str(caught.value))
    assert not [text for text in said if str(path) not in text or "\n" in text]
    return said


def test_settings(interrupted):
    for text in refused(interrupted, interrupted.out / "config.json", TEXTS):
        assert "config.json is damaged (" in text and text.endswith("start again in another directory")


def test_a_summary(interrupted):
    path = interrupted.out / "summary.json"
    assert all("delete it; the metrics alone will do" in text for text in refused(interrupted, path, TEXTS))
    path.unlink()
    assert run_demo(interrupted)["arms"]["qat"]["steps"] == 2


def test_a_checkpoint(interrupted):
    path, metrics = interrupted.out / "checkpoint-qat.pt", interrupted.out / "metrics-qat.jsonl"
    before = metrics.read_bytes()
    for text in refused(interrupted, path, DAMAGES):
        assert "checkpoint-qat.pt is damaged (" in text and text.endswith("delete it; the arm begins anew")
    assert metrics.read_bytes() == before and before.count(b"\n") == 1
    path.unlink()
    assert run_demo(interrupted)["arms"]["qat"]["steps"] == 2


def test_a_warm_up(interrupted):
    (path,) = interrupted.cache.iterdir()
    for text in refused(interrupted, path, DAMAGES):
        assert "is damaged (" in text and text.endswith("delete it; the warm-up is made again")
    began = json.loads((interrupted.out / "config.json").read_text())["starting_weights"]
    path.unlink()
    assert run_demo(interrupted)["starting_weights"] == began
