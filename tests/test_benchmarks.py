"""The benchmarks run, on tiny models without a GPU; rows have one schema; the page is that of the committed rows."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"

ENVIRONMENT = {
    "gpu": str,
    "torch": str,
    "triton": str,
    "transformers": str,
    "date": str,
    "commit": str,
    "settings": dict,
}
SCHEMAS = {
    "step": {
        "arm": str, "model": str, "layers": int, "parameters": int, "gpus": int, "sharding": str, "tokens": int,
        "sequence": int, "micro_batches": int, "masters": str, "checkpointing": bool, "clip": float, "link": str,
        "link_gb_s": (float, type(None)), "steps": int, "hold": str, "ms": float, "ms_samples": list, "ratio": float,
        "ratio_samples": list, "loss": float, "peak_bytes": (int, type(None)), "reserved_bytes": (int, type(None)),
        "gathered_bytes": int, "reduced_bytes": int, "alloc_retries": int, "check": str, **ENVIRONMENT,
    },
    "modules": {
        "layer": str, "model": str, "shapes": list, "tokens": int, "variant": str, "calls": int, "us": float,
        "us_samples": list, "ratio": float, "ratio_samples": list, "held_bytes": (int, type(None)), "weight_bytes": int,
        **ENVIRONMENT,
    },
    "sync": {
        "method": str, "layout": str, "ranks": str, "model": str, "layers": int, "masters": str, "gpus": int,
        "link": str, "link_gb_s": (float, type(None)), "seconds": float, "seconds_samples": list, "ratio": float,
        "ratio_samples": list, "stream_bytes": int, "received_bytes": int, "extra_bytes": (int, type(None)),
        "check": str, **ENVIRONMENT,
    },
}  # fmt: skip
"""What every row has besides "benchmark"."""

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


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The files of benchmarks/ import each other by name, as they do when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


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


def check_schema(row: dict) -> None:
    schema = SCHEMAS[row["benchmark"]]
    optional = {"nccl", "device_us", "device_us_samples", "device_ratio", "device_ratio_samples"}
    assert set(row) - {"benchmark"} - optional == set(schema), row
    for key, kind in schema.items():
        assert isinstance(row[key], kind), (key, row[key])
    for key in (key for key in row if key.endswith("_samples")):
        median = row[key.removesuffix("_samples")]
        assert row[key] and min(row[key]) <= median <= max(row[key])


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


REPORT = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","smsp__issue_active.avg.pct_of_peak_sustained_active",\
"sm__warps_active.avg.pct_of_peak_sustained_active","launch__waves_per_multiprocessor"
"","","us","Mbyte","byte","%","%","%",""
""".replace("\\\n", "")


def test_counters_become_rows_and_a_table(tmp_path):
    pytest.importorskip("triton")
    from counters import KERNELS, SHAPES, rows
    from kernel_tables import counter_section

    line = '"{}","_kernel","21.5","33.554432","1,000.5","81.3","40","90","3.9"\n'
    report = REPORT + "".join(line.format(i) for i in range(len(SHAPES) * len(KERNELS)))
    first, *rest = rows(report)
    assert (first["kernel"], first["name"], first["us"]) == ("fake quantize", "4096 x 4096", 21.5)
    assert (first["read_bytes"], first["written_bytes"], first["issue_percent"]) == (33554432.0, 1000.5, 40.0)
    assert len(rest) == 11
    with pytest.raises(RuntimeError, match="12 kernels were to be profiled, ncu shows 1"):
        list(rows(REPORT + line.format(0)))
    with pytest.raises(RuntimeError, match="ncu shows 0"):
        list(rows("==ERROR== no permission"))
    table = counter_section([{**first, "gpu": "NVIDIA H200"}]).table
    assert "| H200 | 4096×4096 | fake quantize | 21.5 | 0.500 | 81 % | 40 % | 90 % | 3.9 |" in table


def test_a_reload_stands_beside_the_syncs_of_its_run():
    from rollout_tables import rollout

    def row(commit: str, method: str, **more: object) -> dict[str, object]:
        named = {"model": "Qwen3-8B", "layers": 36, "masters": "fp32", "transport": "direct", "vllm": "0.24.0"}
        return {**named, "gpu": "NVIDIA H200", "commit": commit, "method": method, **more}

    def synced(commit: str, seconds: float) -> dict[str, object]:
        times = {"seconds": seconds, "seconds_samples": [seconds], "first_seconds": 3.0}
        return row(commit, "everything", **times, bytes=10**9, extra_bytes=10**6)

    times = {"reload_seconds": 0.6, "reload_seconds_samples": [0.5, 0.7]}
    reload = row("a", "reload", **times, reload_tensors_that_differ=[])
    cells = rollout([synced("a", 0.1), reload]).table.splitlines()[2].split(" | ")
    assert cells[2:4] == ["everything", "0.100 (0.100–0.100)"] and cells[7] == "0.600 (0.500–0.700)"
    cells = rollout([reload, synced("b", 0.2)]).table.splitlines()[2].split(" | ")
    assert cells[3] == "0.200 (0.200–0.200)" and cells[7] == "–"  # that reload was another run's
    assert "differ" not in rollout([synced("a", 0.1), reload]).text
    names = [f"model.layers.{i}.mlp.experts.{name}_input_global_scale" for i in range(2) for name in ("w13", "w2")]
    told = rollout([synced("a", 0.1), {**reload, "reload_tensors_that_differ": names}]).text
    assert "`w13_input_global_scale` and `w2_input_global_scale` differ from what a sync left: scales of act" in told
    told = rollout([synced("a", 0.1), {**reload, "reload_tensors_that_differ": [*names[:1], "lm_head.weight"]}]).text
    assert told.endswith(" `w13_input_global_scale` and `weight` differ from what a sync left.")


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


def test_rows_that_do_not_count():
    from row_tools import grouped, usable

    good = {"gpu": "NVIDIA H200", "date": "2026-01-01 00:00", "check": "ok"}
    bad = [{**good, "gpu": "CPU"}, {**good, "check": "the loss is that of bf16"}, {**good, "date": None}]
    assert usable([*bad, good]) == [good]
    twice = [{"gpu": "a", "arm": "bf16", "ms": 1}, {"gpu": "a", "arm": "bf16", "ms": 2}]
    assert grouped(twice, ["gpu"], "arm") == {("a",): {"bf16": twice[1]}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_committed_rows_have_the_schema(name):
    file = BENCHMARKS / "results" / f"{name}.jsonl"
    for row in read(file) if file.exists() else []:
        check_schema(row)
        assert row["gpu"] != "CPU", "a dry run was committed"


def test_the_page_is_that_of_the_committed_rows():
    from page import updated
    from plots import FOLDER
    from tables import sections

    made, page = sections(), PAGE.read_text(encoding="utf-8")
    assert updated(page, made, FOLDER) == page, "run: python benchmarks/plots.py"
    pictures = {section.picture.file for section in made if section.picture is not None}
    assert {file.name for file in (PAGE.parent / FOLDER).glob("*")} == pictures


def test_the_page_s_commands_are_right():
    commands = re.findall(r"^(?:\w+=\S+ )?(?:torchrun|python) .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        words = [word for word in shlex.split(command) if "=" not in word]
        program, *words = words
        if program == "torchrun":
            assert words[0] == "--nproc_per_node" and words[1].isdigit()
            words = words[2:]
        script, *arguments = words
        assert (ROOT / script).exists()
        module = importlib.import_module(Path(script).stem)
        if hasattr(module, "build_parser"):
            module.build_parser().parse_args(arguments)
