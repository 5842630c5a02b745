"""`verify_checkpoint`: every byte of a checkpoint, compared with its record and with the model it came from."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .core import qat_plan
from .format import E4M3_MAX, E4M3_MIN_NORMAL, MAX_EXPONENT, MIN_EXPONENT
from .plan import QuantPlan
from .quantizer import packed_names, packed_weights
from .safetensors_io import Checksum, as_bytes
from .stored_checkpoint import CONFIG, RECORD, StoredCheckpoint, build_model, expected_tensors, open_checkpoint

_SMALLEST, _LARGEST = (
    int(torch.tensor(scale).to(torch.float8_e4m3fn).view(torch.uint8)) for scale in (E4M3_MIN_NORMAL, E4M3_MAX)
)
"""Positive E4M3 numbers sort as their bytes do, and negative ones and NaN come after them."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_checkpoint` went through.

    Args:
        tensors: tensors read, which are all.
        quantized: 4-bit weights among them (three tensors each), experts counted one by one.
        nbytes: size of their data.
        against_model: whether every byte was compared with a model's, and not only with the checkpoint's own record.
    """

    tensors: int
    quantized: int
    nbytes: int
    against_model: bool


def verify_checkpoint(path: str | os.PathLike[str], model: nn.Module | None = None) -> VerifyReport:
    """Read every tensor of a checkpoint and check all that can be checked.

    Headers, offsets, sizes, index and record agree; the tensors are those of the architecture, with the right shapes
    and dtypes; every checksum holds; block scales are normal E4M3 numbers; global scales are finite, positive, equal
    within a fusion group and, under the policy ``pow2``, powers of two. With a model its weights are packed again and
    every byte is compared.

    Args:
        path: a directory that `save_checkpoint` wrote.
        model: the model it was written from, after `apply_qat`. None takes the architecture from ``config.json``.

    Returns:
        What was checked.

    Raises:
        UserError: not such a directory; `apply_qat` was not called on the model.
        MismatchError: names every tensor and file that differs, and says how.
    """
    checkpoint = open_checkpoint(Path(path))
    stream: Iterator[tuple[str, Tensor]] = iter(())
    if model is None:
        architecture = build_model(checkpoint.path, "meta")
        plan = QuantPlan.from_model(architecture, checkpoint.settings)
        expected = expected_tensors(architecture, plan)
    else:
        plan = qat_plan(model)
        expected = expected_tensors(model, plan)
        stream = packed_weights(model)
        _compare_settings(checkpoint, plan)
    checkpoint.compare(checkpoint.recorded, RECORD)
    checkpoint.compare(expected, "the model" if model is not None else CONFIG, plain_dtypes=model is not None)
    rest = dict(checkpoint.scan.tensors)
    for name, tensor in stream:
        if rest.pop(name, None) is not None:
            _check_data(checkpoint, name, tensor)
    for name in rest:
        _check_data(checkpoint, name, None)
    _check_groups(checkpoint, plan)
    checkpoint.raise_problems()
    stored = checkpoint.scan.tensors
    quantized = sum(name.endswith("weight_packed") for name in stored)
    return VerifyReport(len(stored), quantized, sum(s.spec.nbytes for s in stored.values()), model is not None)


def _compare_settings(checkpoint: StoredCheckpoint, plan: QuantPlan) -> None:
    written, now = checkpoint.settings.global_scale, plan.config.global_scale
    if written != now:
        checkpoint.complain(RECORD, f"the checkpoint was written with global_scale={written!r}, the model has {now!r}")
    found, wanted = checkpoint.config.get("quantization_config"), json.loads(json.dumps(plan.quantization_config()))
    if found != wanted:
        found = found if isinstance(found, dict) else {}
        keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        checkpoint.complain(CONFIG, f"its quantization_config differs from the model's in {', '.join(keys)}")


def _check_data(checkpoint: StoredCheckpoint, name: str, fresh: Tensor | None) -> None:
    """Read one tensor and check its bytes: by checksum, by what they may be, and against ``fresh``."""
    stored = checkpoint.scan.tensors[name]
    comparable = fresh is not None and (fresh.dtype, fresh.shape) == (stored.spec.dtype, stored.spec.shape)
    wanted = as_bytes(fresh) if fresh is not None and comparable else None
    digest, differing, bad_scales = Checksum(), _Positions(), _Positions()
    done = 0
    for piece in stored.chunks():
        digest.update(piece)
        if wanted is not None:
            differing.add(piece != wanted[done : done + len(piece)], done)
        if name.endswith("weight_scale"):
            bad_scales.add((piece < _SMALLEST) | (piece > _LARGEST), done)
        done += len(piece)
    if name in checkpoint.checksums and digest.hexdigest() != checkpoint.checksums[name]:
        checkpoint.complain(name, "its data changed since it was written (checksum)")
    if differing:
        checkpoint.complain(name, f"{differing} of {done} bytes differ from the model")
    if bad_scales:
        checkpoint.complain(name, f"{bad_scales} of {done} block scales are no positive normal E4M3 numbers")
    if name.endswith("weight_global_scale") and stored.spec.dtype == torch.float32:
        for divisor in stored.read().tolist():
            _check_divisor(checkpoint, name, divisor)


def _check_divisor(checkpoint: StoredCheckpoint, name: str, divisor: float) -> None:
    if not (math.isfinite(divisor) and divisor > 0):
        checkpoint.complain(name, f"{divisor} is no finite positive number")
        return
    mantissa, exponent = math.frexp(divisor)  # a power of two has the mantissa 1/2
    if checkpoint.settings.global_scale == "pow2" and mantissa != 0.5:
        checkpoint.complain(name, f"{divisor} is no power of two")
    if not 2.0**-MAX_EXPONENT <= divisor <= 2.0**-MIN_EXPONENT:
        checkpoint.complain(name, f"{divisor} is out of the range of 2^{-MAX_EXPONENT} to 2^{-MIN_EXPONENT}")


def _check_groups(checkpoint: StoredCheckpoint, plan: QuantPlan) -> None:
    """Note groups whose members (expert by expert) have different global scales and no problem that explains it."""
    for group, members in plan.groups().items():
        divisors: dict[int | None, dict[str, float]] = defaultdict(dict)
        for member in members:
            for part in member.checkpoint:
                name = packed_names(part.name)[2]
                stored = checkpoint.scan.tensors.get(name)
                if stored is not None and stored.spec.nbytes == 4:
                    divisors[part.index][name] = stored.read().view(torch.float32).item()
        for found in divisors.values():
            if len(set(found.values())) > 1 and not found.keys() & checkpoint.scan.problems.keys():
                for name, divisor in found.items():
                    checkpoint.complain(name, f"{divisor}, but the fusion group {group} shares one global scale")


class _Positions:
    """How many elements of a tensor seen in pieces are marked, and where the first is."""

    def __init__(self) -> None:
        self._count, self._first = 0, -1

    def add(self, marked: Tensor, offset: int) -> None:
        count = int(marked.count_nonzero())
        if count and not self._count:
            self._first = offset + int(marked.to(torch.uint8).argmax())
        self._count += count

    def __bool__(self) -> bool:
        return self._count > 0

    def __str__(self) -> str:
        return f"{self._count} (the first at byte {self._first})"
