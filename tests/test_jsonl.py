"""Files of rows that were left in the middle of a line."""

import json

import pytest

from nvfp4_qat.errors import UserError
from nvfp4_qat.jsonl import append_rows, read_rows
from nvfp4_qat.runlog import ArmLog


@pytest.mark.parametrize(
    ("left", "there"),
    [
        ('{"step": 0}\n{"step": 1, "rew', [{"step": 0}]),
        ('{"step": 0}\n{"a": {"b": 1}', [{"step": 0}]),  # ends like a row
        ('{"step": 0}\n{"step": 1}', [{"step": 0}, {"step": 1}]),  # nothing but the line's end is missing
        ('{"st', []),
        ("", []),
        (None, []),
    ],
)
def test_what_is_appended_to_a_torn_line_can_be_read(tmp_path, left, there):
    path = tmp_path / "new" / "rows.jsonl"
    if left is not None:
        path.parent.mkdir()
        path.write_text(left)
    assert read_rows(path) == there
    append_rows(path, [{"step": 7}, {"step": 8}])
    assert read_rows(path) == [*there, {"step": 7}, {"step": 8}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_rows(path)


@pytest.mark.parametrize("line", ['{"step": 1, "rew', "[1]", "\udc80"])
def test_any_other_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "metrics-qat.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line.encode(errors="surrogateescape") + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics-qat.jsonl, line 2 is not a JSON object"):
        read_rows(path)
    with pytest.raises(UserError, match="line 2"):  # and a run does not begin again without a word
        ArmLog(tmp_path, "qat", 0.0)
