"""Rows in a file that grows: one JSON object a line, appended as soon as it is known.

A writer that is killed leaves a torn last line. Readers pass over it, and the next writer takes it away first, as what
is appended to it would become a line that nobody can read. Anywhere else such a line is an error.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; none where there is no file.

    Raises:
        UserError: a line is not JSON, or no object, and it is not a last one that was torn.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _row(line)
            if row is None:
                raise UserError(f"{path}, line {number} is not a JSON object; delete the line and try again")
            rows.append(row)
    torn = _row(last)
    return rows if torn is None else [*rows, torn]


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made with its directory where it is missing; they are on the disk afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _mend(path: Path) -> None:
    """Let a file end with a whole line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        whole, _, last = file.read().rpartition(b"\n")
        if _row(last) is not None:  # nothing but its end is missing
            file.write(b"\n")
        else:
            file.truncate(len(whole) + 1 if whole else 0)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not even text
        return None
    return row if isinstance(row, dict) else None
