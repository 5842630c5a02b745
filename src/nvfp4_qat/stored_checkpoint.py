"""A checkpoint on disk: what it must hold, what it says it holds, and the record by which it can be checked on its own.

Beside what transformers and vLLM read (``config.json``, safetensors shards and their index), a checkpoint has
``nvfp4_qat.json``: the QAT settings it was written with, and the dtype, shape and checksum of every tensor. Safetensors
files have no checksums of their own; with this record a changed byte is found without the model, and named.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import QATConfig
from .errors import MismatchError, UserError
from .format import BLOCK
from .model_tensors import keep_in_fp32, model_tensors
from .plan import CheckpointSlice, QuantPlan
from .quantizer import packed_names
from .safetensors_io import DTYPE_NAMES, DTYPES, Scan, TensorSpec, scan, write_json

RECORD = "nvfp4_qat.json"
CONFIG = "config.json"
_VERSION = 1
_SETTINGS = ("mode", "group_size", "ignore_patterns", "global_scale")


def expected_tensors(model: nn.Module, plan: QuantPlan) -> Iterator[TensorSpec]:
    """Every tensor of a model's checkpoint, in the order of the model; no data is read, so a model without will do."""
    for name, entry in model_tensors(model, plan, meta=True, sharded=True).items():
        shape = torch.empty(entry.tensor.shape, device="meta")
        for part in plan.checkpoint_slices[name]:
            if name in plan:
                yield from _packed_specs(part, shape)
            else:
                yield TensorSpec(part.name, entry.stored_dtype, tuple(part.of(shape).shape))


def _packed_specs(part: CheckpointSlice, shape: Tensor) -> Iterator[TensorSpec]:
    *rows, width = part.of(shape).shape
    codes, scale, global_scale = packed_names(part.name)
    yield TensorSpec(codes, torch.uint8, (*rows, width // 2))
    yield TensorSpec(scale, torch.float8_e4m3fn, (*rows, width // BLOCK))
    yield TensorSpec(global_scale, torch.float32, (1,))


def write_record(directory: Path, plan: QuantPlan, specs: Iterable[TensorSpec], checksums: dict[str, str]) -> None:
    """Write ``nvfp4_qat.json``.

    Args:
        directory: of the checkpoint.
        plan: what it was written by.
        specs: all its tensors.
        checksums: by tensor; see `nvfp4_qat.safetensors_io.Checksum`.
    """
    record: dict[str, object] = {
        "version": _VERSION,
        "qat": {key: getattr(plan.config, key) for key in _SETTINGS},
        "quantization_config": _json_checksum(plan.quantization_config()),
        "tensors": {s.name: [DTYPE_NAMES[s.dtype], s.shape, checksums[s.name]] for s in specs},
    }
    write_json(directory / RECORD, record)


def _json_checksum(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class StoredCheckpoint:
    """An existing checkpoint, its headers read and its record at hand.

    Args:
        path: its directory.
        scan: its tensors, and everything that was found wrong so far, by name of a tensor or file.
        settings: the QAT settings it was written with.
        recorded: the tensors as the record has them.
        checksums: theirs.
        config: the parsed ``config.json``.
    """

    path: Path
    scan: Scan
    settings: QATConfig
    recorded: tuple[TensorSpec, ...]
    checksums: dict[str, str]
    config: dict[str, Any]

    def complain(self, name: str, what: str) -> None:
        """Note a problem with a tensor or file."""
        self.scan.problems.setdefault(name, []).append(what)

    def compare(self, expected: Iterable[TensorSpec], source: str, plain_dtypes: bool = True) -> None:
        """Note what is missing, extra, or of another shape or dtype.

        Args:
            expected: all tensors that must be there.
            source: who expects them, for messages.
            plain_dtypes: whether the dtypes of unquantized tensors count; a checkpoint may keep some in fp32.
        """
        names = set()
        for spec in expected:
            names.add(spec.name)
            stored = self.scan.tensors.get(spec.name)
            if stored is None:
                if spec.name not in self.scan.problems:
                    self.complain(spec.name, f"missing: {source} has it as {spec}")
                continue
            dtype_counts = plain_dtypes or spec.dtype.itemsize == 1 or spec.name.endswith("weight_global_scale")
            if stored.spec.shape != spec.shape or (dtype_counts and stored.spec.dtype != spec.dtype):
                self.complain(spec.name, f"is {stored.spec}, {source} has it as {spec}")
        for name in self.scan.tensors.keys() - names:
            self.complain(name, f"extra: {source} does not have it")

    def raise_problems(self) -> None:
        """Raise `MismatchError` with everything noted, if there is anything."""
        problems = self.scan.problems
        if problems:
            lines = [f"{name}: {'; '.join(problems[name])}" for name in sorted(problems)]
            count = "1 difference" if len(lines) == 1 else f"{len(lines)} differences"
            raise MismatchError("\n  ".join([f"{self.path}: {count}", *lines]))


def open_checkpoint(path: str | Path) -> StoredCheckpoint:
    """Read everything about a checkpoint but the data of its tensors.

    Returns:
        The checkpoint; what its headers, index, record and ``config.json`` disagree about is among its problems.

    Raises:
        UserError: the directory is not a checkpoint that `save_checkpoint` wrote.
        MismatchError: its record or ``config.json`` is damaged.
    """
    path = Path(path)
    for filename in (CONFIG, RECORD):
        if not (path / filename).is_file():
            raise UserError(f"{path} has no {filename}: give the directory of a checkpoint that save_checkpoint wrote")
    record, config = _read_json(path / RECORD), _read_json(path / CONFIG)
    if record.get("version") != _VERSION:
        raise UserError(f"{path / RECORD} has version {record.get('version')!r}, this release reads {_VERSION}: update")
    try:
        settings = QATConfig.from_dict({**record["qat"], "enable": True})
        checksum = record["quantization_config"]
        recorded = tuple(TensorSpec(n, DTYPES[dtype], tuple(s)) for n, (dtype, s, _) in record["tensors"].items())
        checksums = {name: str(entry[2]) for name, entry in record["tensors"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MismatchError(f"{path / RECORD}: damaged: {error!r}") from None
    checkpoint = StoredCheckpoint(path, scan(path), settings, recorded, checksums, config)
    if _json_checksum(config.get("quantization_config")) != checksum:
        checkpoint.complain(CONFIG, "its quantization_config is not the one the checkpoint was written with")
    return checkpoint


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise MismatchError(f"{path}: damaged: {error}") from None
    if not isinstance(value, dict):
        raise MismatchError(f"{path}: damaged: it holds no JSON object")
    return value


def build_model(path: Path, device: str) -> Any:
    """Build the bf16 model that a checkpoint's ``config.json`` describes, its weights undefined.

    Args:
        path: directory of the checkpoint.
        device: "cpu", or "meta" for a model without memory.

    Raises:
        UserError: transformers is missing, or does not know the architecture.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise UserError(f"without model= this needs transformers 5: pip install 'nvfp4-qat[hf]' ({error})") from None
    try:
        config = AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # a plain model is wanted, whose weights are filled in here
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, OSError) as error:
        raise UserError(f"transformers cannot build the model of {path / CONFIG}: {error}; pass model=") from error
    model.tie_weights()
    keep_in_fp32(model)
    return model
