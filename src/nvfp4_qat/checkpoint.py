"""Checkpoints in the compressed-tensors format ``nvfp4-pack-quantized``, written from a training model and read back.

Writing holds one fusion group in memory beside the model, and a checkpoint appears whole or not at all: it is written
to a hidden directory beside its destination, flushed to the disk and renamed. Whatever goes wrong before, a full disk
or Ctrl-C included, leaves nothing behind.
"""

import contextlib
import copy
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_names import transformers_model
from .core import qat_plan
from .errors import UserError
from .inventory import take_inventory
from .model_tensors import is_fully_sharded, model_tensors
from .ops import PackedNVFP4
from .plan import QuantPlan
from .quantizer import packed_names, packed_weights
from .safetensors_io import ShardWriter, TensorSpec, check_storable
from .stored_checkpoint import StoredCheckpoint, build_model, expected_tensors, open_checkpoint, write_record
from .verify import verify_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint", "verify_checkpoint"]

SHARD_BYTES = 5_000_000_000
"""Largest file unless one tensor is larger; what transformers takes, too."""


def save_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], tokenizer: Any = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model's packed weights as a checkpoint that vLLM, transformers and compressed-tensors read.

    Beside the model it needs memory for one fusion group's packed weights, or for one unquantized tensor rounded to
    bf16.

    Args:
        model: a transformers model after `apply_qat`, bare or wrapped; adapters on it are left out. In a DDP run call
            this on one rank. With FSDP2 call it on every rank: rank 0 writes, and all ranks return or raise together.
        path: a directory that does not exist or is empty.
        tokenizer: saved beside the weights if given.
        shard_bytes: largest size of one safetensors file.

    Raises:
        UserError: `apply_qat` was not called; the model is not a transformers model, or sharded by FSDP1; NaN or Inf in
            a weight; a tensor of a dtype that is not written (complex); the directory is not empty; the disk is full or
            cannot be written to. Nothing is left behind.
        StaleWeightsError: training has used old packed copies; see `nvfp4_qat.core.pack_from_masters`.
    """
    plan = qat_plan(model)
    bare = transformers_model(take_inventory(model).model)
    if bare is None:
        raise UserError(f"a checkpoint needs a transformers model with its config, not {type(model).__name__}")
    specs = list(expected_tensors(model, plan))
    check_storable(specs)

    def write(weights: Iterator[tuple[str, Tensor]]) -> None:
        _write(Path(path), bare, plan, specs, weights, tokenizer, shard_bytes)

    if is_fully_sharded(model):
        from .sharded_stream import on_rank_zero  # needs torch.distributed

        on_rank_zero(packed_weights(model, ranks=0), write)
    else:
        write(packed_weights(model))


def _write(
    path: Path,
    bare: Any,
    plan: QuantPlan,
    specs: list[TensorSpec],
    weights: Iterator[tuple[str, Tensor]],
    tokenizer: Any,
    shard_bytes: int,
) -> None:
    with _appearing_whole(path, sum(spec.nbytes for spec in specs)) as directory:
        with ShardWriter(directory, specs, shard_bytes) as writer:
            for name, tensor in weights:
                writer.write(name, tensor)
        write_record(directory, plan, specs, writer.checksums)
        _write_config(directory, bare, plan)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)


def _write_config(directory: Path, model: Any, plan: QuantPlan) -> None:
    config = copy.deepcopy(model.config)
    # fully_shard derives a class of its own from the model's.
    own = (c for c in type(model).__mro__ if all(base.__name__ != "FSDPModule" for base in c.__mro__))
    config.architectures = [next(own).__name__]
    config.dtype = torch.bfloat16
    config.quantization_config = plan.quantization_config()
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        # Not save_pretrained: it refuses settings that transformers itself loads, and they are none of our business.
        model.generation_config.to_json_file(directory / "generation_config.json")


@contextlib.contextmanager
def _appearing_whole(path: Path, size: int) -> Iterator[Path]:
    """A directory to write to that becomes ``path`` if all goes well, and vanishes otherwise.

    Args:
        path: where it will be; must not exist, or be an empty directory.
        size: bytes it will need at least.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty directory: choose another one, or remove it first")
    if path.is_mount():
        raise UserError(f"{path} is a mount point, which nothing can be renamed to: choose a new directory inside it")
    created = [parent for parent in path.parents if not parent.exists()]
    directory = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        try:
            directory.mkdir(parents=True)
            free = shutil.disk_usage(directory).free
            if free < size:
                raise UserError(f"no space for {path}: it needs {_readable(size)}, {_readable(free)} are free")
            yield directory
            _flush(directory)
            directory.rename(path)  # onto an empty directory this is as atomic as onto nothing
        except BaseException:  # KeyboardInterrupt too
            shutil.rmtree(directory, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. It needs {_readable(size)}. Nothing was left behind."
        ) from error
    _flush_one(path.parent)


def _readable(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _flush(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            _flush_one(Path(root) / name)
        _flush_one(Path(root))


def _flush_one(path: Path) -> None:
    """Wait until a file's data, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """Read a checkpoint back into a bf16 model that holds the dequantized weights, to the bit those the trainer used.

    For fused experts this is the way: transformers 5.23 leaves out their global scale when it decompresses.

    Args:
        path: a directory that `save_checkpoint` wrote.
        model: the model to fill, of the same architecture, on any device; its dtypes stay. None builds a plain
            transformers model on the CPU, in eval mode.

    Returns:
        The model.

    Raises:
        UserError: not such a directory, or transformers cannot build the model.
        MismatchError: tensors are missing, extra, truncated, or of another dtype or shape; a given model is unchanged
            then. Checksums are `verify_checkpoint`'s to compare.
    """
    checkpoint = open_checkpoint(Path(path))
    target = build_model(checkpoint.path, "cpu").eval() if model is None else model
    plan = QuantPlan.from_model(target, checkpoint.settings)
    checkpoint.compare(checkpoint.recorded, "its record")
    checkpoint.compare(expected_tensors(target, plan), "the model", plain_dtypes=False)
    checkpoint.raise_problems()
    with torch.no_grad():
        for name, entry in model_tensors(target, plan).items():
            for part in plan.checkpoint_slices[name]:
                part.of(entry.tensor).copy_(_read(checkpoint, part.name, packed=name in plan))
    return target


def _read(checkpoint: StoredCheckpoint, name: str, packed: bool) -> Tensor:
    stored = checkpoint.scan.tensors
    if not packed:
        return stored[name].read()
    codes, scale, divisor = (stored[part].read() for part in packed_names(name))
    return PackedNVFP4(codes, scale, divisor.reshape(()).reciprocal()).dequantize()
