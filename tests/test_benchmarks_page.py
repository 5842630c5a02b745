"""The page of the benchmarks: that of the committed rows, with commands that parse, and tables made of known rows."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from helpers_benchmarks import BENCHMARKS, ROOT, SCHEMAS, check_schema, importable, read

_importable = pytest.fixture(scope="module", autouse=True)(importable)
PAGE = ROOT / "docs" / "performance.md"

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
