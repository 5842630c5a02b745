"""The data of the recipes, made of small files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

verl = pytest.importorskip("verl", reason="verl is not installed")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from helpers_recipes import bash, jsonl, load  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's
data = load("prepare_dapo_data")


def verl_rows(file: Path, prompts: Sequence[str], times: int, answer: str = "7") -> None:
    """A parquet file as the hub has it: every prompt several times."""
    rows = [
        {
            "data_source": "math_dapo", "prompt": [{"content": prompt, "role": "user"}], "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "u"},
        }
        for _ in range(times) for prompt in prompts
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    verl_rows(folder / "BytedTsinghua-SIA" / "DAPO-Math-17k" / "data" / "dapo-math-17k.parquet", ["a", "b", "c"], 100)
    verl_rows(folder / "aime-2024.parquet", [f"problem {i}" for i in range(30)], 32)
    exam = [{"problem": f"Find {i}.", "answer": str(i), "id": str(i)} for i in range(28)]
    exam += [{"problem": "x", "answer": "336^\\circ"}, {"problem": "y", "answer": 7}]
    jsonl(folder / "aime25" / "test.jsonl", exam)
    return folder


def test_data_is_made_once_each_prompt_once(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    always = ["--out", str(out), "--from-folder", str(downloads), "--accept-counts"]
    assert data.main(always) == 0
    assert "dapo-math-17k.parquet: 3 rows of 300 in BytedTsinghua-SIA/DAPO-Math-17k" in capsys.readouterr().out
    found = {name: pq.read_table(out / f"{name}.parquet").to_pylist() for name in data.SOURCES}
    assert [len(rows) for rows in found.values()] == [3, 30, 30]
    assert found["dapo-math-17k"][1] == {
        "data_source": "math_dapo", "prompt": [{"role": "user", "content": "b"}], "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 1, "source": "BytedTsinghua-SIA/DAPO-Math-17k"},
    }  # fmt: skip
    exam = found["aime-2025"]
    assert [row["reward_model"]["ground_truth"] for row in exam[-3:]] == ["27", "336", "7"]
    assert exam[5]["prompt"][0]["content"].split("\n\n")[1] == "Find 5."
    assert {row["data_source"] for row in exam} == {"aime2025"}
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert data.main(always) == 0 and {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert "was there" in capsys.readouterr().out


def test_verl_takes_the_data_and_grades_it(downloads: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.reward_score import default_compute_score

    data.main(["--out", str(tmp_path), "--from-folder", str(downloads), "--accept-counts"])
    files = [str(tmp_path / f"{name}.parquet") for name in data.SOURCES]
    options = {"filter_overlong_prompts": False, "cache_dir": str(tmp_path / "cache")}
    rows = RLHFDataset(files, tokenizer=None, config=OmegaConf.create(options))
    assert len(rows) == 63 and rows[62]["index"] == 29
    for row in (rows[0], rows[3], rows[62]):
        answer = row["reward_model"]["ground_truth"]
        assert default_compute_score(row["data_source"], f"Answer: {answer}", answer)["score"] == 1.0


def test_counts_are_checked_and_nothing_is_left_behind(
    downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    always = ["--out", str(out), "--from-folder", str(downloads)]
    assert data.main([*always, "--only", "aime-2024"]) == 0
    assert data.main(always) == 2
    assert "has 3 different prompts in 300 rows, expected were 17,398" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["aime-2024.parquet"]
    verl_rows(out / "dapo-math-17k.parquet", ["a"], 100)
    assert data.main(always) == 2 and "has 100 rows instead of 17,398" in capsys.readouterr().err
    (out / "dapo-math-17k.parquet").write_bytes(b"PAR1 half of it")
    assert data.main(always) == 2 and "is not a parquet file" in capsys.readouterr().err
    assert data.main([*always, "--accept-counts", "--overwrite"]) == 0
    assert pq.read_table(out / "dapo-math-17k.parquet").num_rows == 3


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.parquet"
    target.write_text("before")

    def full(table: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        data.write([], target)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"] and target.read_text() == "before"


def test_prompts_with_several_answers_are_counted(tmp_path: Path) -> None:
    verl_rows(tmp_path / "a.parquet", ["a", "b"], 2)
    verl_rows(tmp_path / "b.parquet", ["b", "c"], 1, answer="8")
    source = data.SOURCES["dapo-math-17k"]
    rows = [row for name in "ab" for row in data.rows_of(tmp_path / f"{name}.parquet", source)]
    kept, seen, conflicts = data.unique(iter(rows))
    assert [row["reward_model"]["ground_truth"] for row in kept] == ["7", "7", "8"]
    assert (seen, conflicts) == (6, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "x", "answer": "1000"}], "the answer '1000' is not a number from 0 to 999"),
        ([{"question": "x", "answer": "1"}], "KeyError('problem')"),
    ],
)
def test_damaged_files_are_named(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(tmp_path / "test.jsonl", rows)
    assert data.main(["--out", str(tmp_path), "--only", "aime-2025", "--from-folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "test.jsonl cannot be read as test.jsonl of math-ai/aime25" in error and message in error


def test_without_a_network_it_says_what_to_set(tmp_path: Path) -> None:
    done = bash("prepare_dapo_data.sh", DATA_DIR=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "could not be downloaded from http://127.0.0.1:9 (" in done.stderr
    assert "set HF_ENDPOINT to a mirror that this machine reaches, or give --from-folder" in done.stderr
    done = bash("prepare_dapo_data.sh", "--from-folder", str(tmp_path), DATA_DIR=str(tmp_path / "out"))
    assert done.returncode == 2 and "looked for data/dapo-math-17k.parquet, BytedTsinghua-SIA/DAPO" in done.stderr


def test_what_reads_parquet_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    done = bash("prepare_dapo_data.sh", PYTHONPATH=str(tmp_path), DATA_DIR=str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prepare_dapo_data needs pyarrow: pip install '.[verl]'\n"
    assert not (tmp_path / "data").exists()
