"""The benchmarks run, on tiny models without a GPU; rows have one schema, and become a page with pictures."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_benchmarks import BENCHMARKS, check_schema, importable, read

_importable = pytest.fixture(scope="module", autouse=True)(importable)

TOGETHER = """
import sys
sys.path.insert(0, {benchmarks!r})
import bench_step, bench_sync, common

def main():
    small = ["--repeats", "1", "--out"]
    status = 0
    for model, masters, tokens in (("tiny", "bf16", ["16", "32"]), ("tiny-moe", "fp32", ["32"])):
        step = ["--model", model, "--masters", masters, "--tokens", *tokens, "--sequence", "16", "--micro-batches", "2"]
        status |= bench_step.main([*step, "--steps", "1", "--warmup", "2", *small, {step!r}])
        status |= bench_sync.main(["--model", model, *small, {sync!r}])
    return status

common.run(main)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Rows of one process."""
    out = tmp_path_factory.mktemp("alone")
    step = ["--model", "tiny", "--tokens", "16", "--repeats", "1", "--steps", "1", "--warmup", "2"]
    profile = ["--hold", "one", "--profile", str(out / "trace")]
    assert importlib.import_module("bench_step").main([*step, *profile, "--out", str(out / "step.jsonl")]) == 0
    modules = ["--tiny", "--tokens", "16", "--repeats", "2", "--out", str(out / "modules.jsonl")]
    assert importlib.import_module("bench_modules").main(modules) == 0
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """Rows of two processes."""
    out = tmp_path_factory.mktemp("together")
    script = out / "both.py"
    files = {"step": str(out / "step.jsonl"), "sync": str(out / "sync.jsonl")}
    script.write_text(TOGETHER.format(benchmarks=str(BENCHMARKS), **files), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launch, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return out


def test_rows_of_the_hosts_part(tmp_path):
    small = ["--layers", "1", "--repeats", "2", "--steps", "1", "--out", str(tmp_path / "host.jsonl")]
    command = [sys.executable, str(BENCHMARKS / "bench_host.py"), *small, "--profile", str(tmp_path / "profile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    rows = read(tmp_path / "host.jsonl")
    for row in rows:
        check_schema(row)
    assert [row["arm"] for row in rows] == ["bf16", "gather", "keep", "bf16 again"]
    assert {row["ranks"] for row in rows} == {4} and rows[0]["ratio"] == 1 and all(row["ms"] > 0 for row in rows)
    files = sorted(file.name for file in (tmp_path / "profile").iterdir())
    assert files == ["narrow-bf16.prof", "narrow-gather.prof", "narrow-keep.prof"]


def test_rows_of_one_process(alone):
    step, modules = read(alone / "step.jsonl"), read(alone / "modules.jsonl")
    for row in step + modules:
        check_schema(row)
    assert [row["arm"] for row in step] == ["bf16", "module", "requantize", "bf16 again"]
    assert all(row["check"] == "ok" and row["gathered_bytes"] == 0 for row in step)
    losses = {row["arm"]: row["loss"] for row in step}
    assert losses["module"] != losses["bf16"] == losses["bf16 again"]
    assert {row["layer"] for row in modules} == {"q, o", "k, v", "gate, up", "down", "experts"}
    assert {row["variant"] for row in modules} == {"bf16", "module", "module, packing", "requantize"}
    traces = sorted(file.name for file in (alone / "trace").iterdir())
    assert len(traces) == 6 and "On the host:" in (alone / "trace" / traces[1]).read_text(encoding="utf-8")


def test_rows_of_two_processes(together):
    step, sync = read(together / "step.jsonl"), read(together / "sync.jsonl")
    for row in step + sync:
        check_schema(row)
    assert len(step) == 3 * 6 and len(sync) == 2 * 8
    assert all(row["check"] == "ok" for row in step + sync)


def test_gather_mode_gathers_four_and_a_half_bits(together):
    from shapes import MODELS, make_model

    import nvfp4_qat as nq

    for name in ("tiny", "tiny-moe"):
        model = make_model(name, MODELS[name][2], *_cpu())
        plan = nq.QuantPlan.from_model(model, nq.QATConfig())
        elements = sum(model.get_parameter(entry.name).numel() for entry in plan.quantized)
        everything = sum(p.numel() for p in model.parameters())
        rows = [row for row in read(together / "step.jsonl") if row["model"] == name]
        gathered = {row["arm"]: row["gathered_bytes"] for row in rows}
        assert gathered["bf16"] == gathered["module"] == gathered["requantize"]
        # Two micro-batches gather the layers in forward and in backward; half of it comes from the other rank.
        saved = 2 * 2 * elements * (2 - 4.5 / 8) / 2
        assert gathered["bf16"] - gathered["gather"] == pytest.approx(saved, rel=0.02)  # padding to 16 bytes
        kept = elements * (2 * 2 * 2 - 4.5 / 8) / 2  # only the first of these gathers brings packed weights
        assert gathered["bf16"] - gathered["keep"] == pytest.approx(kept, rel=0.02)
        rows = [row for row in read(together / "sync.jsonl") if row["model"] == name]
        streams = {(row["method"], row["layout"], row["ranks"]): row for row in rows}
        for method in ("bf16, full_tensor()", "bf16, unshard()"):
            row = streams[method, "fused", "all"]
            assert row["stream_bytes"] == 2 * everything
            assert row["received_bytes"] == pytest.approx(everything, rel=0.01)
        quantized = streams["full_tensor(), quantize", "checkpoint", "all"]
        packed = streams["packed_weights", "checkpoint", "all"]
        assert packed["stream_bytes"] == quantized["stream_bytes"]
        assert packed["received_bytes"] < 0.6 * quantized["received_bytes"]


def _cpu():
    import torch

    return torch.bfloat16, torch.device("cpu")


def test_a_wrong_start_is_refused(monkeypatch, capsys):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    bench_step, bench_sync = importlib.import_module("bench_step"), importlib.import_module("bench_sync")
    for main, arguments, hint in (
        (bench_step.main, ["--slow-link"], "NCCL_P2P_DISABLE=1 torchrun"),
        (bench_step.main, ["--arms", "bf16", "gather"], "torchrun"),
        (bench_step.main, ["--fsdp"], "torchrun"),
        (bench_step.main, ["--warmup", "1"], "at least 2"),
        (bench_sync.main, [], "torchrun"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and hint in capsys.readouterr().err


def test_an_arm_that_does_not_do_what_it_claims_is_told():
    from bench_step import Arm, check
    from common import World

    world = World(0, 2, _cpu()[1], None)
    arms = {name: Arm(name, "bf16", None, world, {}) for name in ("bf16", "gather", "module")}
    arms["bf16"].loss, arms["gather"].loss, arms["module"].loss = 1.0, 2.0, 2.0
    arms["bf16"].gathered, arms["gather"].gathered = 100, 28
    assert [check(arm, arms, world) for arm in arms.values()] == ["ok"] * 3
    arms["gather"].loss = 2.5
    assert "in module mode 2.0" in check(arms["gather"], arms, world)
    arms["gather"].loss = arms["module"].loss = 1.0
    assert "nothing was quantized" in check(arms["module"], arms, world)
    arms["gather"].loss = arms["module"].loss = 2.0
    arms["gather"].gathered = 100
    assert "as many bytes" in check(arms["gather"], arms, world)


def test_a_trace_is_summed_up():
    from step_profile import summarize

    kernels = [("gemm", 0, 100), ("gemm", 150, 100), ("ncclAllGather", 50, 150), ("copy", 300, 10)]
    text = summarize([{"name": name, "ts": start, "dur": length} for name, start, length in kernels])
    assert "span 0.31 ms; busy 0.26 ms; idle 0.05 ms, of it 0.05 ms in 1 gaps" in text
    assert "computing 0.21 ms; communicating 0.15 ms, of it not hidden 0.05 ms" in text
    assert re.search(r"0\.200\s+64\.5\s+2\s+100\.0\s+gemm", text)


def as_if_measured(out: Path, *sources: Path) -> Path:
    """The rows of dry runs with what only a GPU gives filled in."""
    out.mkdir()
    for file in (file for source in sources for file in source.glob("*.jsonl")):
        with (out / file.name).open("a", encoding="utf-8") as rows:
            for row in read(file):
                row |= {"gpu": "NVIDIA H200", "nccl": "2.28.9"}
                if row["benchmark"] == "step":
                    row |= {"peak_bytes": 10**10, "link": "p2p", "link_gb_s": 190.2}
                if row["benchmark"] == "sync":
                    row |= {"extra_bytes": 10**8, "link": "p2p"}
                if row["benchmark"] == "modules":
                    row["held_bytes"] = 4096
                    if row["variant"] != "module, packing":
                        row |= {f"device_{key}": row[key] for key in ("us", "us_samples", "ratio", "ratio_samples")}
                rows.write(json.dumps(row) + "\n")
    return out


def kernel_rows(out: Path) -> None:
    """Rows as `bench_kernels` writes them, which needs a GPU; the numbers mean nothing."""
    where = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-01 00:00", "commit": "0"}

    def row(case: str, name: str, ratios: dict[str, float], **rest) -> dict:
        ratios = {"copy": 1.0, **ratios, "copy again": 1.002}
        return {
            "case": case, "name": name, "us_p10_p50_p90": {n: [99 * r, 100 * r, 102 * r] for n, r in ratios.items()},
            "times_a_copy": ratios, "repeats": dict.fromkeys(ratios, 30), **rest, **where,
        }  # fmt: skip

    floors = {"fake quantize": 1.0, "quantize": 0.641, "dequantize": 0.641, "amax": 0.5}
    ours = {"fake quantize": 1.02, "quantize": 0.7, "dequantize": 0.68, "amax": 0.51}
    rows = [
        row("one", "4096 x 4096", {**ours, "torch amax": 1.08, "plain PyTorch": 35.0}, floors=floors),
        row("many", "Qwen3-8B", {"amax": 0.51, "quantize one by one": 1.2, "quantize": 0.7}, floors=floors,
            host_us={"amax": 11.0, "quantize": 12.0}),
        *(row("unpack", "Qwen3-8B layer", {"dequantize": 0.68}, floors=floors, ranks=n) for n in (1, 2)),
        row("peers", "4096 x 4096", {"fake quantize": 1.02, "verl": 1.65, "compressed-tensors": 40.0}, floors=floors,
            versions={"verl": "0.9.1", "compressed-tensors": "0.20.0"}),
    ]  # fmt: skip
    text = "".join(json.dumps(r) + "\n" for r in [{"gpu": "an older schema, without a date"}, *rows])
    (out / "kernels.jsonl").write_text(text, encoding="utf-8")


def empty_page(folder: Path) -> Path:
    from page import BEGIN, END, SCRIPT

    folder.mkdir(exist_ok=True)
    (folder / "performance.md").write_text(f"# Title\n{BEGIN.format(SCRIPT)}\nold\n{END}\nThe end.\n", encoding="utf-8")
    return folder


def test_the_page_and_its_pictures_are_made_of_rows(alone, together, tmp_path):
    from plots import write

    results, docs = as_if_measured(tmp_path / "results", alone, together), empty_page(tmp_path / "docs")
    kernel_rows(results)
    files = write(results, docs)
    drawn = ["kernels.png", "peers.png", "step.png", "memory.png", "modules.png", "sync.png"]
    assert [file.name for file in files] == ["performance.md", *drawn]
    for file in files[1:]:
        data = file.read_bytes()
        width = int.from_bytes(data[16:20], "big")
        assert data.startswith(b"\x89PNG") and 1350 <= width <= 1450
    page = (docs / "performance.md").read_text(encoding="utf-8")
    assert page.startswith("# Title\n") and page.endswith("The end.\n") and "old" not in page
    for title in (
        "A training step",
        "Memory and traffic of a step",
        "Module mode, one layer",
        "Weights for the rollout",
    ):
        assert f"## {title}" in page
    (row,) = [r for r in read(together / "step.jsonl") if (r["model"], r["masters"], r["tokens"], r["arm"]) == PICKED]
    low, high = min(row["ratio_samples"]), max(row["ratio_samples"])
    assert f"{row['ratio']:.3f} ({low:.3f}–{high:.3f})" in page
    assert "2 × H200, direct link (190 GB/s)" in page
    assert "0.700 (0.693–0.714)" in page and "one launch a weight 1.20" in page and "verl 0.9.1" in page


PICKED = ("tiny-moe", "fp32", 32, "gather")


def test_what_has_no_rows_is_left_out(together, tmp_path):
    from plots import write

    results, docs = as_if_measured(tmp_path / "results", together), empty_page(tmp_path / "docs")
    (results / "step.jsonl").unlink()
    (docs / "performance").mkdir()
    (docs / "performance" / "step.png").write_bytes(b"of an earlier run")
    assert [file.name for file in write(results, docs)] == ["performance.md", "sync.png"]
    assert not (docs / "performance" / "step.png").exists()
    (results / "sync.jsonl").unlink()
    write(results, docs)
    assert "No rows have been committed yet." in (docs / "performance.md").read_text(encoding="utf-8")
