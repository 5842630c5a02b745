"""Experiments run from a file to a page, on a tiny model without a GPU; what they compute is checked otherwise."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import nvfp4_qat as nq
from nvfp4_qat.errors import UserError
from nvfp4_qat.models import load_model
from nvfp4_qat.reference import quantize
from nvfp4_qat.rl import plain_weights
from nvfp4_qat.runlog import load_kept

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

import figures  # noqa: E402
import measure  # noqa: E402
import pool  # noqa: E402
import run  # noqa: E402
import sections  # noqa: E402
from common import append  # noqa: E402
from experiment import Experiment, Run  # noqa: E402
from intervals import mean_of_runs, ratio_of_runs, ratio_of_sums  # noqa: E402
from rows import Results  # noqa: E402
from variants import VARIANTS, shared, sides, unclamped  # noqa: E402

CONFIG = """
model: tiny
seeds: [0]
settings: {steps: 2, keep_every: 1, eval_every: 1, eval_problems: 4, eval_samples: 2, prompts: 4, samples: 4,
           warmup_steps: 5, warmup_batch: 8, max_batches: 1, checkpoint_seconds: 0}
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
        # Packing the trainer's values again gives the same bytes; rounding by other rules does not.
        assert by["repacked", step]["k3_nvfp4"] == by["contract", step]["k3_nvfp4"]
        assert sum(by["requantized", step]["k3_nvfp4"]) > 5 * sum(by["contract", step]["k3_nvfp4"])
        assert sum(by["contract", step]["lengths"]) == by["contract", step]["tokens"]


def test_what_is_done_is_not_done_again(finished, capsys):
    files = [*(finished / "out").rglob("*.jsonl"), finished / "out" / "logs" / "warm-up.log"]  # no warm-up either
    before = {path: path.stat().st_mtime_ns for path in files}
    command = [str(finished / "dense.yaml"), "--out", str(finished / "out"), "--results", str(finished / "results")]
    assert run.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_run_is_ended_in_time_and_continued(finished, tmp_path, capsys):
    (tmp_path / "long.yaml").write_text(
        CONFIG.replace("steps: 2,", "steps: 100000,").replace("keep_every: 1", "keep_every: 0")
    )
    out = tmp_path / "out"
    shutil.copytree(finished / "out" / "cache", out / "cache")
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
    assert row["steps"] == len(rows)


def test_a_run_that_fails_is_named_with_the_end_of_its_log(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(CONFIG.replace("model: tiny", "model: /nowhere"))
    assert run.main([str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "warm-up failed" in message and "no model directory /nowhere" in message


def test_the_page_is_made_of_rows(finished, tmp_path):
    results = Results("dense", finished / "results")
    assert results.names() == ["bf16", "qat"] and results.keys("qat") == ["qat-s0"]
    made = {section.title: section for section in sections.sections(finished / "results")}
    assert list(made) == [
        "Experiment 1: with and without QAT",
        "Experiment 2: all layers or FFN only",
        "The mismatch that 4-bit kernels add",
        "What the contract buys",
    ]
    comparison = made["Experiment 1: with and without QAT"]
    kl = np.mean(
        [row["rollout_corr/k3_kl"] for row in read(finished / "results/dense/metrics.jsonl") if row["run"] == "qat-s0"]
    )
    mantissa = f"{kl:.2e}".split("e")[0]
    assert f"| qat | 1 × 2 | {mantissa}·10" in comparison.table
    figures.draw_curves(results, results.names(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000


def test_sections_of_single_files(tmp_path):
    where = {"gpu": "NVIDIA H200", "torch": "2.11.0", "date": "2026-01-02 03:04"}
    row = {
        "quantizer": "ours", "package": "nvfp4-qat", "version": "0.1.0", "global_scale": "fusion group",
        "weight_error": 0.009, "bits_per_weight": 4.5005, "perplexity": 1.5, "kl": 2e-3, "kl_ratio": 1.0,
        "kl_ratio_95": [1.0, 1.0], "model": "small", "sequences": 4, "tokens": 1234, **where,
    }  # fmt: skip
    append(tmp_path / "quantizers.jsonl", [row])
    about = {"model": "Qwen/X", "gpus": 4, "masters": "fp32", "tokens": 4096, "vllm": "0.24.0", **where}
    workers = [{"weights_loaded": 4 << 30, "kv_cache": 1 << 30, "graphs": 1 << 20}, {}]
    workers[1] = {**workers[0], "weights_loaded": 5 << 30}
    append(tmp_path / "real_size.jsonl", [
        {"arm": "nvfp4", "what": "steps", "round": 1, "seconds": 9.0, **about},
        {"arm": "nvfp4", "what": "steps", "round": 2, "seconds": 2.5, **about},
        {"arm": "bf16", "what": "steps", "round": 1, "seconds": 3.0, **about},
        {"arm": "nvfp4", "what": "generate", "tokens_per_second": 12345.0, "workers": workers, **about},
    ])  # fmt: skip
    quality, size = sections.sections(tmp_path)
    assert "| small | ours (0.1.0) | fusion group | 0.900 % | 1.5000 |" in quality.table
    assert "4 right answers (1,234 tokens)" in quality.text
    assert "| a whole step | 3.00 s | 2.50 s |" in size.table and "| tokens a second | – | 12,345 |" in size.table
    assert "| engine: weights | – | 5.37 GB |" in size.table


def test_weights_of_another_model_are_refused(tmp_path):
    model = load_model("tiny").model
    weights = dict(plain_weights(model))
    load_kept(model, weights)
    weights["model.layers.9.mlp.up_proj.weight"] = weights.pop("model.norm.weight")
    with pytest.raises(nq.MismatchError, match="missing or unknown: model.norm.weight, model.layers.9"):
        load_kept(model, weights)


def test_the_page_is_that_of_the_committed_rows():
    from page import updated

    page = (ROOT / "docs" / figures.PAGE).read_text(encoding="utf-8")
    made = sections.sections()
    assert updated(page, made, figures.FOLDER, "experiments/figures.py") == page, "run: python experiments/figures.py"
    pictures = {section.picture.file for section in made if section.picture is not None}
    assert {file.name for file in (ROOT / "docs" / figures.FOLDER).glob("*")} == pictures


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_files_are_right(path, tmp_path):
    experiment = Experiment.load(path)
    for chosen in experiment.chosen(None, None):
        cfg = experiment.config(chosen, tmp_path)
        assert cfg.rollout == "vllm" and cfg.rollout_kv_cache and cfg.seed == chosen.seed
    assert set(sections.MODELS) >= {experiment.name}


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


# --- variants --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["linear", "experts"])
def group(request):
    torch.manual_seed(0)
    if request.param == "experts":
        return [torch.randn(4, 32, 64).bfloat16() * 0.05 * torch.tensor([1, 2, 4, 9.0]).view(4, 1, 1).bfloat16()]
    return [torch.randn(48, 64).bfloat16() * scale for scale in (0.05, 0.2, 0.01)]


@pytest.mark.parametrize("name", ["amax", "unfused", "unclamped"])
def test_both_sides_hold_the_same_in_these_variants(group, name):
    values, sent = VARIANTS[name].sides(group)
    assert all(torch.equal(v, s.dequantize()) for v, s in zip(values, sent, strict=True))


def test_variants_do_what_their_names_say(group):
    contract = shared("pow2")(group)
    for value, w in zip(VARIANTS["contract"].sides(group)[1], group, strict=True):
        g = nq.global_scale(torch.stack([nq.amax(x, x.ndim - 2) for x in group]).amax(0))
        codes, scale = quantize(w, g)
        assert torch.equal(value.packed, codes) and torch.equal(value.scale.view(torch.uint8), scale.view(torch.uint8))
    same = [torch.equal(a.packed, b.packed) for a, b in zip(unclamped(group), contract, strict=True)]
    assert all(same)  # no block scale is below the bound here
    small = [w.clone() for w in group]
    small[0][..., 0, -1] = nq.amax(group[0], group[0].ndim - 2)  # so that the global scale stays
    small[0][..., :16] *= 2.0**-15
    small[0][..., 16:32] = 0
    ours, theirs = shared("pow2")(small)[0], unclamped(small)[0]
    assert (ours.scale.float() >= 2.0**-6).all() and (theirs.scale.float()[..., 0] < 2.0**-6).all()
    assert torch.equal(ours.packed[..., 16:], theirs.packed[..., 16:])
    error = [(p.dequantize() - small[0])[..., :16].float().square().sum() for p in (ours, theirs)]
    assert error[1] < error[0]
    scales = {float(p.global_scale.reshape(-1)[0]) for p in VARIANTS["unfused"].sides(group)[1]}
    assert len(scales) == len(group)
    values, sent = VARIANTS["requantized"].sides(group)
    assert not torch.equal(values[0], sent[0].dequantize())
    values, sent = VARIANTS["repacked"].sides(group)
    assert all(torch.equal(v, s.dequantize()) for v, s in zip(values, sent, strict=True))


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_the_contract_s_stream_is_the_one_of_packed_weights(model):
    loaded = load_model(model).model
    masters = {name: tensor.clone() for name, tensor in loaded.state_dict().items() if name != "lm_head.weight"}
    plan = nq.QuantPlan.from_model(loaded, nq.QATConfig(enable=True))
    made = dict(sides(masters, plan, VARIANTS["contract"]).stream())
    nq.apply_qat(loaded, nq.QATConfig(enable=True))
    expected = dict(nq.packed_weights(loaded, layout="fused"))
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype and made[name].shape == tensor.shape, name
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name


# --- intervals -------------------------------------------------------------------------------------------------------


def test_ratios_of_sums_by_another_route():
    draw = np.random.default_rng(3)
    below = draw.exponential(size=4000)
    above = 1.1 * below + draw.normal(scale=0.2, size=4000)
    found = ratio_of_sums(above, below)
    assert found.value == pytest.approx(above.sum() / below.sum())
    # The delta method: the ratio's variance from the residuals.
    error = np.sqrt(np.var(above - found.value * below) / len(below)) / below.mean()
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.bound95 < found.high
    assert ratio_of_sums(above, below) == found  # the same page again


def test_means_of_runs():
    draw = np.random.default_rng(4)
    noise = draw.normal(size=4000)
    curve = np.convolve(noise, np.ones(4) / 4, "valid") + 2.0  # neighbours are alike
    found = mean_of_runs([curve])
    naive = 2 * 1.96 * curve.std() / np.sqrt(len(curve))
    assert found.value == pytest.approx(curve.mean())
    assert found.high - found.low > 1.5 * naive  # what drawing step by step would give
    twice = ratio_of_runs([2 * curve], [curve])
    assert twice.low < 2.0 < twice.high and twice.overlaps(twice)
    apart = mean_of_runs([np.ones(50), np.full(50, 3.0)])
    assert (apart.value, apart.low, apart.high) == (2.0, 1.0, 3.0)  # seeds are drawn, too
