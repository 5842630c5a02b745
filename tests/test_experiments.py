"""Experiments run from a file to a page, on a tiny model without a GPU; what they compute is checked otherwise."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_rows import write
from safetensors.torch import load_file, save_file

from nvfp4_qat.errors import UserError
from nvfp4_qat.tensor_digest import digest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

import figures  # noqa: E402
import measure  # noqa: E402
import pool  # noqa: E402
import run  # noqa: E402
import sections  # noqa: E402
from collect import collect, sharing_file  # noqa: E402
from experiment import Experiment, Run  # noqa: E402
from rows import Results  # noqa: E402
from section_contract import VARIANT_WORDS  # noqa: E402
from variants import VARIANTS  # noqa: E402
from words import MODELS  # noqa: E402

CONFIG = """
model: tiny
seeds: [0]
settings: {steps: 2, keep_every: 1, eval_every: 1, eval_problems: 4, eval_samples: 2, prompts: 4, samples: 4,
           warmup_steps: 0, max_batches: 1, checkpoint_seconds: 0}
runs:
  bf16: {arm: bf16}
  qat: {arm: qat}
paired: [qat]
variants: qat
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of an experiment that was run from its command line, and of its results."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "dense.yaml").write_text(CONFIG)
    command = [str(folder / "dense.yaml"), "--out", str(folder / "out"), "--results", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PROBLEMS", "SAMPLES", "EVALUATED", "EVALUATED_SAMPLES"):
            patch.setattr(measure, name, 3)
        # In this process, so that the numbers above hold; the other steps are processes of their own.
        patch.setattr(run.Pool, "finish", finished_here(run.Pool.finish))
        assert run.main(command) == 0
    return folder


def finished_here(finish):
    def finished(pool, tasks, say):
        if all(task.script.name == "measure.py" for task in tasks):
            return all(measure.main(task.arguments) == 0 for task in tasks)
        return finish(pool, tasks, say)

    return finished


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_experiment_runs_from_a_file_to_rows(finished):
    results = finished / "results" / "dense"
    assert [row["run"] for row in read(results / "runs.jsonl")] == ["bf16-s0", "qat-s0"]
    metrics = read(results / "metrics.jsonl")
    assert [(row["run"], row["step"]) for row in metrics] == [(r, s) for r in ("bf16-s0", "qat-s0") for s in (0, 1)]
    assert all("eval/accuracy" in row for row in metrics) and "eval_end/accuracy" in metrics[-1]
    measured = read(results / "measured.jsonl")
    paired = [(row["variant"], row["step"]) for row in measured if row["kind"] == "paired"]
    assert sorted(paired) == sorted((variant, step) for variant in VARIANTS for step in (0, 1, 2))
    assert {row["run"] for row in measured if row["kind"] == "evaluation"} == {"bf16-s0", "qat-s0"}
    by = {(row["variant"], row["step"]): row for row in measured if row["kind"] == "paired"}
    for step in (0, 1, 2):
        # Packing the trainer's values again gives the same values; rounding by other rules does not.
        assert by["repacked", step]["k3_nvfp4"] == by["contract", step]["k3_nvfp4"]
        assert sum(by["requantized", step]["k3_nvfp4"]) > 5 * sum(by["contract", step]["k3_nvfp4"])
        assert sum(by["contract", step]["lengths"]) == by["contract", step]["tokens"]
        per_response = ("k3_bf16_sampled", "lengths_bf16", "k3_engines", "apart")
        assert all(len(by["contract", step][column]) == 9 for column in per_response)
        for variant in VARIANTS:
            trainer, engine = (any(by[variant, step]["differs"][side].values()) for side in ("trainer", "engine"))
            assert trainer == (variant in ("amax", "unfused")), variant
            if variant != "repacked":
                assert engine == (variant in ("amax", "unfused", "requantized", "rounded-twice")), variant
        # A group's largest value may be rounded to below a power of two: then scales move, and no value.
        assert by["repacked", step]["differs"]["engine"]["values"] == 0
    # Of the weights that all runs begin with there is one evaluation, of those after the last step one a run.
    evaluated = [(row["run"], row["step"], row["precision"]) for row in measured if row["kind"] == "evaluation"]
    assert sorted(evaluated) == [
        (run, step, precision)
        for run, step in (("bf16-s0", 0), ("bf16-s0", 2), ("qat-s0", 2))
        for precision in ("bf16", "nvfp4")
    ]
    assert all(len(row["right"]) == 3 for row in measured if row["kind"] == "evaluation")
    assert all(row["commit"] and row["date"] and row["versions"] and row["gpu"] is None for row in measured)


def test_weights_that_runs_begin_with_are_measured_once(finished):
    experiment = Experiment.load(finished / "dense.yaml")
    both = replace(experiment, seeds=(0, 1))
    out = finished / "two-seeds"
    for seed in both.seeds:
        shutil.copytree(finished / "out" / "qat-s0", out / f"qat-s{seed}")
    first, other = (list(measure._rows(both, out, Run("qat", seed))) for seed in both.seeds)
    assert {row["step"] for row in first} == {0, 1, 2} and {row["step"] for row in other} == {1, 2}


def test_what_was_recorded_when_things_ran_is_collected(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    path = out / "qat-s0" / "summary.json"
    then = [{"commit": "then", "date": "2020-01-02", "gpu": "a GPU", "versions": {"vllm": "0.1"}}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "circumstances": then}))
    collect(Experiment.load(finished / "dense.yaml"), out, tmp_path / "results")
    bf16, qat = read(tmp_path / "results" / "runs.jsonl")
    assert qat["circumstances"] == then and len(bf16["circumstances"]) == 1 and "commit" not in qat


@pytest.mark.parametrize(("pieces", "expected"), [([3], 3), ([2, 2], 2), ([3, 1], None), ([None], None), ([], None)])
def test_runs_say_how_many_shared_their_gpu(finished, tmp_path, pieces, expected):
    out = tmp_path / "out"
    shutil.copytree(finished / "out" / "qat-s0", out / "qat-s0")
    write(sharing_file(out, "qat-s0"), [{"runs_on_gpu": count} for count in pieces])
    collect(Experiment.load(finished / "dense.yaml"), out, tmp_path / "results")
    (row,) = read(tmp_path / "results" / "runs.jsonl")
    assert row["runs_on_gpu"] == expected


def test_what_a_run_notes_of_its_gpu_belongs_to_its_own_pieces(tmp_path, monkeypatch):
    file = tmp_path / "logs" / "a-s0.gpu.jsonl"

    def noted(count, begun):
        monkeypatch.setenv(pool.SHARED, count)
        run._note_sharing(file, begun)
        return [row["runs_on_gpu"] for row in read(file)]

    assert noted("3", True) == [None, 3]  # an earlier piece has noted nothing
    assert noted("2", False) == [2] and noted("2", True) == [2, 2] and noted("", True) == [2, 2, None]


def test_measured_rows_are_replaced_one_by_one_and_by_the_newest(finished, tmp_path):
    experiment = Experiment.load(finished / "dense.yaml")
    before = read(finished / "results" / "dense" / "measured.jsonl")
    write(tmp_path / "results" / "measured.jsonl", before)
    out = tmp_path / "out"
    out.mkdir()
    (row,) = (r for r in before if r["kind"] == "evaluation" and r["run"] == "qat-s0" and r["precision"] == "bf16")
    write(out / "measured-evaluation-s0.jsonl", [{**row, "right": [1]}, {**row, "right": [2]}])
    collect(experiment, out, tmp_path / "results")
    after = read(tmp_path / "results" / "measured.jsonl")
    assert len(after) == len(before) and [r for r in after if r not in before] == [{**row, "right": [2]}]


def test_measured_rows_go_with_the_run_that_they_are_of(finished, tmp_path):
    """One that is made again has other weights, and there is nothing to measure the old ones on."""
    experiment = Experiment.load(finished / "dense.yaml")
    results = tmp_path / "results"
    shutil.copytree(finished / "results" / "dense", results)
    before = read(results / "measured.jsonl")
    out = tmp_path / "out"
    shutil.copytree(finished / "out" / "qat-s0", out / "qat-s0")
    collect(experiment, out, results)  # the same run, measured elsewhere
    assert read(results / "measured.jsonl") == before
    rows = read(out / "qat-s0" / "metrics-qat.jsonl")
    write(out / "qat-s0" / "metrics-qat.jsonl", [{**rows[0], "time/step": 1.5}, *rows[1:]])
    collect(experiment, out, results)
    assert read(results / "measured.jsonl") == [row for row in before if row["run"] == "bf16-s0"]
    assert {row["run"] for row in read(results / "metrics.jsonl")} == {"bf16-s0", "qat-s0"}


def test_runs_with_other_seeds_than_the_file_s_are_collected(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "out" / "qat-s0", out / "qat-s7")
    collect(Experiment.load(finished / "dense.yaml"), out, tmp_path / "results", [Run("qat", 7)])
    assert [(row["run"], row["seed"]) for row in read(tmp_path / "results" / "runs.jsonl")] == [("qat-s7", 7)]


def test_weights_that_are_gone_before_they_were_measured_are_told(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "out", tmp_path / "out")
    monkeypatch.setattr(run.Pool, "finish", lambda *_: True)
    command = [str(finished / "dense.yaml"), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    for name in ("bf16", "qat"):
        shutil.rmtree(tmp_path / "out" / f"{name}-s0" / f"weights-{name}")
    assert run.main(command) == 0  # they have been measured
    measure.measured_file(tmp_path / "out", 0, "paired").unlink()
    assert run.main(command) == 2
    assert capsys.readouterr().err.startswith(
        "error: qat-s0: not measured, and the weights after the last step are not"
    )
    measure.measured_file(tmp_path / "out", 0, "evaluation").unlink()
    assert run.main(command) == 2 and "error: bf16-s0, qat-s0: not measured" in capsys.readouterr().err
    assert (tmp_path / "results" / "dense" / "runs.jsonl").exists()


def test_what_is_done_is_not_done_again(finished, capsys):
    files = [*(finished / "out").rglob("*.jsonl"), *(finished / "out" / "logs").iterdir()]
    assert "warm-up.log" not in {path.name for path in files}  # none was asked for
    before = {path: path.stat().st_mtime_ns for path in files}
    command = [str(finished / "dense.yaml"), "--out", str(finished / "out"), "--results", str(finished / "results")]
    assert run.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_weights_that_were_made_again_are_measured_again(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    experiment = Experiment.load(finished / "dense.yaml")
    rows = [row for kind in measure.KINDS for row in read(measure.measured_file(out, 0, kind))]
    by = {}
    for row in rows:
        by.setdefault((row["run"], row["step"]), set()).add(row["weights"])
    assert all(len(words) == 1 for words in by.values())
    assert by["qat-s0", 2] == {digest(load_file(out / "qat-s0" / "weights-qat" / "step-2.safetensors"))[:16]}
    todo = []
    monkeypatch.setattr(measure, "_measure", lambda experiment, out, found: todo.extend(row for _, row in found))
    measure.measure(experiment, out, experiment.chosen(None, None))
    assert not todo
    kept = out / "qat-s0" / "weights-qat"
    other = load_file(kept / "step-2.safetensors")
    other["model.norm.weight"] += 1
    save_file(other, kept / "step-2.safetensors")
    measure.measure(experiment, out, experiment.chosen(None, None))
    assert {(row["run"], row["step"]) for row in todo} == {("qat-s0", 2)}
    assert {row["kind"] for row in todo} == {"paired", "evaluation"} and len(todo) == 2 + len(VARIANTS)
    # A row that was measured before, and one of the present weights behind it: nothing is left to do for that one.
    again = next(row for row in rows if (row["kind"], row["run"], row["step"]) == ("paired", "qat-s0", 2))
    now = digest(other)[:16]
    with measure.measured_file(out, 0, "paired").open("a") as file:
        file.write(json.dumps({**again, "weights": now}) + "\n")
    count = len(todo)
    todo.clear()
    measure.measure(experiment, out, experiment.chosen(None, None))
    assert len(todo) == count - 1
    collect(experiment, out, tmp_path / "results")
    newest = [row for row in read(tmp_path / "results" / "measured.jsonl") if row["kind"] == "paired"]
    assert len(newest) == 3 * len(VARIANTS) and {**again, "weights": now} in newest and again not in newest


def test_an_evaluation_that_was_torn_is_made_up_for(finished, tmp_path, monkeypatch):
    """One precision's row was there when the process was killed, and of the next one a part."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    experiment, todo = Experiment.load(finished / "dense.yaml"), []
    file = measure.measured_file(out, 0, "evaluation")
    *whole, last = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole) + last[: len(last) // 2])
    monkeypatch.setattr(measure, "_measure", lambda experiment, out, found: todo.extend(row for _, row in found))
    measure.measure(experiment, out, experiment.chosen(None, None))
    missing = json.loads(last)
    (row,) = todo
    assert {key: row[key] for key in ("kind", "run", "step", "precision")} == {
        key: missing[key] for key in ("kind", "run", "step", "precision")
    }


def test_a_run_is_ended_in_time_and_continued(tmp_path, capsys):
    (tmp_path / "long.yaml").write_text(
        CONFIG.replace("steps: 2,", "steps: 100000,").replace("keep_every: 1", "keep_every: 0")
    )
    out = tmp_path / "out"
    metrics = out / "bf16-s0" / "metrics-bf16.jsonl"

    class Clock:
        """The time is up when there is a row, however fast this machine is."""

        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic():
            return time.monotonic() + (1e6 if metrics.exists() and metrics.read_text() else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "time", Clock)
        command = [str(tmp_path / "long.yaml"), "--out", str(out), "--runs", "bf16", "--minutes", "100"]
        assert run.main([*command, "--results", str(tmp_path / "results")]) == run.UNFINISHED
    rows = read(metrics)
    assert rows and json.loads((out / "bf16-s0" / "summary.json").read_text())["interrupted"] is True
    assert (out / "bf16-s0" / "checkpoint-bf16.pt").exists()
    (row,) = read(tmp_path / "results" / "long" / "runs.jsonl")  # what there is has been collected
    assert row["steps"] == len(rows) and row["runs_on_gpu"] is None  # there is no GPU


def test_a_run_that_fails_is_named_with_the_end_of_its_log(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(
        CONFIG.replace("model: tiny", "model: /nowhere").replace("warmup_steps: 0", "warmup_steps: 5")
    )
    assert run.main([str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "warm-up failed" in message and "no model directory /nowhere" in message


def test_the_page_is_made_of_rows(finished, tmp_path):
    results = Results("dense", finished / "results")
    assert results.names() == ["bf16", "qat"] and results.keys("qat") == {0: "qat-s0"}
    made = {section.title: section for section in sections.sections(finished / "results")}
    assert list(made) == [
        "What was claimed, what came out",
        "Experiment 1: with and without QAT",
        "Experiment 2: all layers or FFN only",
        "Accuracy as served",
        "The mismatch that 4-bit kernels add",
        "What the contract buys",
    ]
    comparison = made["Experiment 1: with and without QAT"]
    kl = np.mean(
        [row["rollout_corr/k3_kl"] for row in read(finished / "results/dense/metrics.jsonl") if row["run"] == "qat-s0"]
    )
    mantissa = f"{kl:.2e}".split("e")[0]
    assert f"| QAT | 1 × 2 | {mantissa}·10" in comparison.table
    buys = {row.split(" | ")[1]: row for row in made["What the contract buys"].table.splitlines()}
    assert "| nothing | nothing | – | – | no difference on these weights |" in buys[VARIANT_WORDS["unclamped"]]
    assert "global scales: all" in buys[VARIANT_WORDS["amax"]]
    figures.draw_curves(results, results.names(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_files_are_right(path, tmp_path):
    experiment = Experiment.load(path)
    for chosen in experiment.chosen(None, None):
        cfg = experiment.config(chosen, tmp_path)
        assert cfg.rollout == "vllm" and cfg.rollout_kv_cache and cfg.seed == chosen.seed
        measured = chosen.name in (*experiment.paired, experiment.variants)
        assert cfg.keep_every == (20 if measured else cfg.steps)  # what nobody measures would fill a disk
    assert set(MODELS) >= {experiment.name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: tiny", "runs: a file says"),
        ("runs: {a: {arm: qat}}\nmodel: tiny\nrun: 1", "run: a file says"),
        ("model: tiny\nruns: {a: {arm: qta}}", "a: arm is 'qta': one of bf16"),
        ("model: tiny\nruns: {a: {arm: qat, lrr: 1}}", "a: lrr is no setting"),
        ("model: tiny\nruns: {a: {arm: qat}}\nsettings: {seed: 1}", "settings: seed is no setting"),
        ("model: tiny\nruns: {a: {arm: qat}}\npaired: [b]", "b is none of its runs: a"),
        ("model: [", "cannot read"),
    ],
)
def test_a_file_that_is_wrong_says_how(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Experiment.load(path)


def test_gpus_are_those_that_the_command_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert run._gpus() == ["5", "7"]


def test_runs_are_chosen_by_name_and_seed(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: tiny\nseeds: [0, 3]\nruns: {a: {arm: qat}, b: {arm: bf16}}")
    experiment = Experiment.load(path)
    assert experiment.chosen(None, None) == [Run("a", 0), Run("b", 0), Run("a", 3), Run("b", 3)]
    assert experiment.chosen(("b",), (7,)) == [Run("b", 7)]
    with pytest.raises(UserError, match="no run c in x: a, b"):
        experiment.chosen(("c",), None)
