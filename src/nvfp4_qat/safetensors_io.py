"""Safetensors files written and read one tensor at a time.

The safetensors library writes a file from tensors that all exist at once, and refuses a damaged file without saying
which tensor is hurt. Exporting a model must hold one layer, and verifying it must name every difference. Hence the
format here::

    8 bytes    little endian: length of the header
    header     JSON, padded with spaces to a multiple of 8: {name: {"dtype", "shape", "data_offsets": [start, stop]}}
    data       the tensors, without gaps; offsets count from the end of the header

All of it follows from names, dtypes and shapes, so `ShardWriter` writes the headers first and then each tensor in its
place, in whatever order the tensors come. Inside a file they are sorted by element size, largest first, so that each
starts at a multiple of its element size: readers that map the file into memory rely on it.

Source: https://huggingface.co/docs/safetensors; ``model.safetensors.index.json`` as transformers writes it.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

CHUNK = 1 << 24
"""Bytes read at a time where a whole tensor is not needed."""


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{DTYPE_NAMES.get(self.dtype, self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``spec.nbytes`` bytes at ``start``, counted from the beginning of the file."""

    spec: TensorSpec
    path: Path
    start: int

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        data = torch.empty(self.spec.nbytes, dtype=torch.uint8)
        with FileIO(self.path) as file:
            file.seek(self.start)
            _fill(file, data)
        return data.view(self.spec.dtype).reshape(self.spec.shape)

    def chunks(self) -> Iterator[Tensor]:
        """The tensor's bytes as uint8 tensors of at most `CHUNK` bytes; each is overwritten by the next."""
        buffer = torch.empty(min(CHUNK, self.spec.nbytes), dtype=torch.uint8)
        with FileIO(self.path) as file:
            file.seek(self.start)
            for done in range(0, self.spec.nbytes, CHUNK):
                piece = buffer[: self.spec.nbytes - done]
                _fill(file, piece)
                yield piece


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as a flat uint8 CPU tensor; a view where the tensor is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class Checksum:
    """BLAKE2b, 16 bytes, of data that comes in pieces (uint8 on the CPU)."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def update(self, piece: Tensor) -> None:
        self._digest.update(piece.numpy().data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _fill(file: FileIO, data: Tensor) -> None:
    """Read until ``data`` is full: Linux reads at most 2 GiB at a time."""
    view = data.numpy().data
    while view:
        got = file.readinto(view)
        if not got:
            raise OSError(f"{file.name!r} ended {len(view)} bytes too early")
        view = view[got:]


def _write(file: FileIO, data: memoryview) -> None:
    """Write until nothing is left: Linux writes at most 2 GiB at a time."""
    while data:
        data = data[file.write(data) :]


def check_storable(specs: Iterable[TensorSpec]) -> None:
    """Raise `UserError` if tensors are of a dtype that is not written, a complex one for instance."""
    bad = [f"{spec.name} ({spec.dtype})" for spec in specs if spec.dtype not in DTYPE_NAMES]
    if bad:
        raise UserError(
            f"a checkpoint cannot hold tensors of these dtypes: {', '.join(bad)}. Register such a buffer with "
            "persistent=False, or store its parts (torch.view_as_real)."
        )


def distribute(specs: Iterable[TensorSpec], shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Distribute tensors over files, in order, each at most ``shard_bytes`` large unless one tensor alone is larger.

    Returns:
        File name → its tensors in file order. A file that is the only one is called ``model.safetensors``.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    for group in groups:
        group.sort(key=lambda spec: -spec.dtype.itemsize)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def header(specs: Iterable[TensorSpec]) -> bytes:
    """The first bytes of a file that holds these tensors in this order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.nbytes]
        table[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        offset += spec.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes the tensors of a checkpoint as they come, in any order, holding none of them.

    Args:
        directory: an existing directory.
        specs: every tensor that will be written.
        shard_bytes: largest file.

    A ``with`` block that ends without an exception calls `close`. After an exception the directory holds unusable
    files, which are the caller's to remove. Nothing is flushed to the disk here.
    """

    def __init__(self, directory: Path, specs: Iterable[TensorSpec], shard_bytes: int) -> None:
        self._directory = directory
        self._places: dict[str, tuple[TensorSpec, str, int]] = {}
        self._files: dict[str, FileIO] = {}
        self.checksums: dict[str, str] = {}
        """Of the tensors written so far, by name."""
        try:
            for filename, members in distribute(specs, shard_bytes).items():
                self._files[filename] = file = FileIO(directory / filename, "w")
                head = header(members)
                _write(file, memoryview(head))
                offset = len(head)
                for spec in members:
                    if spec.name in self._places:
                        raise ValueError(f"{spec.name} is announced twice")
                    self._places[spec.name] = (spec, filename, offset)
                    offset += spec.nbytes
        except BaseException:
            self._close_files()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into its place.

        Raises:
            ValueError: a tensor that was not announced, has another dtype or shape, or comes twice.
        """
        spec, filename, offset = self._places.get(name, (None, "", 0))
        found = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        if found != spec:
            raise ValueError(f"{name} is {found}, announced as {spec}")
        if name in self.checksums:
            raise ValueError(f"{name} comes twice")
        data, digest, file = as_bytes(tensor), Checksum(), self._files[filename]
        digest.update(data)
        file.seek(offset)
        _write(file, data.numpy().data)
        self.checksums[name] = digest.hexdigest()

    def close(self) -> None:
        """Write the index and close all files.

        Raises:
            ValueError: names every tensor that was announced and not written.
        """
        self._close_files()
        missing = [name for name in self._places if name not in self.checksums]
        if missing:
            raise ValueError(f"announced and not written: {', '.join(missing)}")
        if len(self._files) > 1:
            total = sum(spec.nbytes for spec, _, _ in self._places.values())
            weight_map = {name: filename for name, (_, filename, _) in self._places.items()}
            write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write a JSON object whose nested objects, which may have an entry for every tensor, have one line an entry."""

    def entries(table: dict[str, object], indent: str) -> str:
        return f",\n{indent}".join(f"{json.dumps(key)}: {json.dumps(item)}" for key, item in table.items())

    lines = []
    for key, item in value.items():
        text = f"{{\n  {entries(item, '  ')}\n }}" if isinstance(item, dict) else json.dumps(item)
        lines.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@dataclass(frozen=True)
class Scan:
    """What the headers of a checkpoint say.

    Args:
        tensors: by name, those whose bytes are all there.
        problems: name of a tensor or file → what is wrong with it.
    """

    tensors: dict[str, StoredTensor]
    problems: dict[str, list[str]]


def scan(directory: Path) -> Scan:
    """Read the headers of all files of a checkpoint and check everything that needs no data.

    That is: the index and the files agree; headers parse; dtypes are known; offsets match shapes, leave no gap and stay
    inside the file; no name comes twice.
    """
    result = Scan({}, {})
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    index = _read_index(directory, files, result)
    for filename in files:
        for name, complaint in _scan_file(directory / filename, result.tensors):
            result.problems.setdefault(name, []).append(complaint)
    for name, filename in index.items():
        stored = result.tensors.get(name)
        if stored is None and name not in result.problems:
            result.problems[name] = [f"missing: {INDEX} places it in {filename}"]
        elif stored is not None and stored.path.name != filename:
            result.problems.setdefault(name, []).append(f"in {stored.path.name}, {INDEX} places it in {filename}")
    if index:
        for name in result.tensors.keys() - index.keys():
            result.problems.setdefault(name, []).append(f"extra: {INDEX} does not name it")
    return result


def _read_index(directory: Path, files: list[str], result: Scan) -> dict[str, str]:
    """The index, tensor → file; empty if the checkpoint is one file and needs none."""
    path = directory / INDEX
    if not path.exists():
        if files != [SINGLE]:
            found = f"the directory has {', '.join(files)}" if files else f"and so is {SINGLE}"
            result.problems[INDEX] = [f"missing, {found}"]
        return {}
    try:
        index = {str(name): str(filename) for name, filename in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        result.problems[INDEX] = [f"not a readable index: {error}"]
        return {}
    named = set(index.values())
    result.problems.update({filename: [f"missing: {INDEX} names it"] for filename in sorted(named - set(files))})
    result.problems.update({name: [f"extra: {INDEX} does not name it"] for name in files if name not in named})
    return index


def _scan_file(path: Path, tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    """Add a file's sound tensors to ``tensors``; yield (name, complaint) for everything else."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            yield path.name, "truncated inside its header, or no safetensors file"
            return
        text = file.read(length)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                repeated.append(key)
            table[key] = value
        return table

    try:
        table = json.loads(text, object_pairs_hook=unique)
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        ranges = sorted((*(int(offset) for offset in entry["data_offsets"]), name) for name, entry in entries.items())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        yield path.name, f"its header is not valid: {error}"
        return
    for key in repeated:
        yield path.name, f"its header names {key} twice"
    base, end = 8 + length, 0
    for start, stop, name in ranges:
        complaints = list(_check_entry(entries[name], start, stop, end))
        if base + stop > size:
            complaints.append(f"truncated: {max(0, size - base - start)} of {stop - start} bytes are in {path.name}")
        if name in tensors:
            complaints.append(f"in {tensors[name].path.name} and in {path.name}")
        elif not complaints:
            spec = TensorSpec(name, DTYPES[entries[name]["dtype"]], tuple(entries[name]["shape"]))
            tensors[name] = StoredTensor(spec, path, base + start)
        yield from ((name, complaint) for complaint in complaints)
        end = stop
    if base + end < size:
        yield path.name, f"{size - base - end} bytes follow its last tensor"


def _check_entry(entry: dict[str, Any], start: int, stop: int, end: int) -> Iterator[str]:
    """What is wrong with one entry of a header; ``end`` is where the tensor before it ends."""
    dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
    if start != end:
        yield f"starts at offset {start}, the tensor before it ends at {end}"
    if dtype is None:
        yield f"unknown dtype {entry.get('dtype')!r}"
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        yield f"bad shape {shape!r}"
    elif dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
        yield f"has {stop - start} bytes, {entry['dtype']} {shape} needs {math.prod(shape) * dtype.itemsize}"
