"""Math problems as verl reads them: one parquet file to train on and two to evaluate with, each prompt once.

=====================  ====================================  =============================  ==========================
file                   from                                  has                            becomes
=====================  ====================================  =============================  ==========================
dapo-math-17k.parquet  BytedTsinghua-SIA/DAPO-Math-17k       1,791,700 rows, each prompt    17,398 prompts, "math_dapo"
                                                             about 100 times
aime-2024.parquet      BytedTsinghua-SIA/AIME-2024           960 rows, each 32 times        30 problems, "aime2024"
aime-2025.parquet      math-ai/aime25, ``test.jsonl``        columns problem, answer, id    30 problems, "aime2025"
=====================  ====================================  =============================  ==========================

The last column has the number of rows, which is checked, and the ``data_source``: verl grades all three with
``math_dapo`` and reports each by itself. AIME 2025 is put into the words that the other two already have.

A file appears whole or not at all, and one that is there with the right number of rows is left alone. Without a
network, ``--from-folder`` takes downloaded files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    print("prepare_dapo_data needs pyarrow: pip install '.[verl]'", file=sys.stderr)
    raise SystemExit(2) from None

Row = dict[str, Any]

SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int64()), ("source", pa.string())])),
    ]
)

QUESTION = "\n\n".join(
    (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.",
        "{problem}",
        'Remember to put your answer on its own line after "Answer:".',
    )
)
"""The words around a problem in DAPO-Math-17k and AIME-2024, whose rows come with them."""

AIME_ANSWER = re.compile(r"\s*\$?0*(\d{1,3})(?:\^\\circ|\^\{\\circ\})?\$?\s*")
"""A number from 0 to 999; some files write the degrees of an angle behind it."""


class DataError(Exception):
    """What is wrong with the data or the command, in a sentence that says what to do."""


@dataclass(frozen=True)
class Source:
    """Where a file comes from.

    Args:
        repository: dataset on the hub.
        file: in the repository.
        rows: of the finished file.
        data_source: what verl chooses the grading by, and groups validation by.
    """

    repository: str
    file: str
    rows: int
    data_source: str


SOURCES = {
    "dapo-math-17k": Source("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet", 17_398, "math_dapo"),
    "aime-2024": Source("BytedTsinghua-SIA/AIME-2024", "data/aime-2024.parquet", 30, "aime2024"),
    "aime-2025": Source("math-ai/aime25", "test.jsonl", 30, "aime2025"),
}


def main(argv: list[str] | None = None) -> int:
    """Make what is missing; the exit code is 2 if something could not be made."""
    parser = argparse.ArgumentParser(description="Make the data of the recipes as parquet files for verl.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the parquet files go")
    parser.add_argument("--only", action="append", choices=SOURCES, metavar="NAME", help=f"of {', '.join(SOURCES)}")
    parser.add_argument(
        "--from-folder", type=Path, metavar="DIR", help="downloaded files: DIR/FILE, DIR/REPOSITORY/FILE or DIR/NAME.*"
    )
    parser.add_argument("--overwrite", action="store_true", help="make files again that are there")
    parser.add_argument("--accept-counts", action="store_true", help="take any number of rows")
    args = parser.parse_args(argv)
    try:
        for name in args.only or SOURCES:
            print(prepare(name, args.out, args.from_folder, args.overwrite, args.accept_counts), flush=True)
    except (DataError, OSError) as error:
        print(f"prepare_dapo_data: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(
    name: str, out: Path, from_folder: Path | None = None, overwrite: bool = False, accept_counts: bool = False
) -> str:
    """Make one file, unless it is there.

    Args:
        name: of `SOURCES`.
        out: folder of the file.
        from_folder: where downloaded files are; None downloads them.
        overwrite: make it although it is there.
        accept_counts: do not compare the number of rows.

    Returns:
        A line that says what was done.

    Raises:
        DataError: the file could not be made; nothing is left behind.
    """
    source, target = SOURCES[name], out / f"{name}.parquet"
    if target.exists() and not overwrite:
        found = _rows_of(target)
        if found != source.rows and not accept_counts:
            raise DataError(
                f"{target} has {found:,} rows instead of {source.rows:,}: it was not made by this script, or of other "
                "data; give --overwrite, or another --out"
            )
        return f"{target}: {found:,} rows, was there"
    file = download(source) if from_folder is None else local_file(name, from_folder)
    kept, seen, conflicts = unique(rows_of(file, source))
    if len(kept) != source.rows and not accept_counts:
        raise DataError(
            f"{file} has {len(kept):,} different prompts in {seen:,} rows, expected were {source.rows:,}: is it "
            f"{source.file} of {source.repository}? --accept-counts takes it as it is"
        )
    write(kept, target)
    note = f"; {conflicts:,} prompts have several answers, the first was kept" if conflicts else ""
    return f"{target}: {len(kept):,} rows of {seen:,} in {source.repository}{note}"


def download(source: Source) -> Path:
    """A source's file, from the hub or its cache.

    Raises:
        DataError: it could not be had.
    """
    from huggingface_hub import constants, hf_hub_download

    try:
        return Path(hf_hub_download(source.repository, source.file, repo_type="dataset"))
    except Exception as error:  # the hub's client raises its own, httpx's, requests' and OSError
        raise DataError(
            f"{source.repository} could not be downloaded from {constants.ENDPOINT} ({type(error).__name__}): set "
            f"HF_ENDPOINT to a mirror that this machine reaches, or give --from-folder with its {source.file}"
        ) from error


def local_file(name: str, folder: Path) -> Path:
    """A source's file among downloaded ones.

    Raises:
        DataError: it is not there; says where it was looked for.
    """
    source = SOURCES[name]
    places = [
        folder / source.file,
        folder / source.repository / source.file,
        folder / source.repository.split("/")[1] / source.file,
        folder / f"{name}{Path(source.file).suffix}",
    ]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place.relative_to(folder)) for place in places)
    raise DataError(f"{folder} has no file of {source.repository}; looked for {looked}")


def rows_of(file: Path, source: Source) -> Iterator[tuple[str, str, Row]]:
    """A source's rows as ``(prompt, answer, row of ours without its index)``.

    Raises:
        DataError: the file is damaged or has other columns.
    """
    try:
        yield from (_problems if file.suffix == ".jsonl" else _verl_rows)(file, source)
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:  # ArrowInvalid, a missing column, not JSON
        raise DataError(f"{file} cannot be read as {source.file} of {source.repository}: {error!r}") from error


def _verl_rows(file: Path, source: Source) -> Iterator[tuple[str, str, Row]]:
    """Rows that already have verl's columns."""
    columns = ["prompt", "ability", "reward_model"]
    for batch in pq.ParquetFile(file).iter_batches(columns=columns):
        prompts, abilities, rewards = (batch.column(name).to_pylist() for name in columns)
        for messages, ability, reward in zip(prompts, abilities, rewards, strict=True):
            answer = reward["ground_truth"]
            row = _row(source, [{"role": m["role"], "content": m["content"]} for m in messages], ability, answer)
            yield "\0".join(m["content"] for m in messages), answer, row


def _problems(file: Path, source: Source) -> Iterator[tuple[str, str, Row]]:
    """Rows with a problem and its answer."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        found = json.loads(line)
        matched = AIME_ANSWER.fullmatch(str(found["answer"]))
        if matched is None:
            raise ValueError(f"the answer {found['answer']!r} is not a number from 0 to 999")
        content = QUESTION.replace("{problem}", found["problem"].strip())
        yield content, matched[1], _row(source, [{"role": "user", "content": content}], "math", matched[1])


def _row(source: Source, prompt: list[dict[str, str]], ability: str, answer: str) -> Row:
    if not answer or not prompt:
        raise ValueError("a row has no prompt or no answer")
    return {
        "data_source": source.data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"source": source.repository},
    }


def unique(rows: Iterator[tuple[str, str, Row]]) -> tuple[list[Row], int, int]:
    """The first row of each prompt, in order.

    Returns:
        The rows with their index, how many there were, and how many prompts have rows with different answers.
    """
    kept: dict[str, Row] = {}
    seen, conflicts = 0, set()
    for prompt, answer, row in rows:
        seen += 1
        first = kept.setdefault(prompt, row)
        if first["reward_model"]["ground_truth"] != answer:
            conflicts.add(prompt)
    for index, row in enumerate(kept.values()):
        row["extra_info"]["index"] = index
    return list(kept.values()), seen, len(conflicts)


def write(rows: list[Row], target: Path) -> None:
    """Write rows to a parquet file, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _rows_of(target: Path) -> int:
    try:
        rows: int = pq.ParquetFile(target).metadata.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{target} is not a parquet file ({error}): give --overwrite, or another --out") from error
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
