"""The list of tensors that an update of a model brings, and its form on the wire.

Weights travel as the model keeps them (`packed_weights` in the layout "fused"): one tensor for all experts of a layer,
not hundreds. What an engine and its checkpoints call the parts goes along, taken from the plan, so that no engine has
to know the model's own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .checkpoint_names import CheckpointSlice
from .errors import UserError
from .format import BLOCK
from .live_recipe import Incoming, Part
from .model_tensors import model_tensors
from .plan import QuantPlan
from .quantizer import output_slices, packed_names


def dtype_name(dtype: torch.dtype) -> str:
    """The name on the wire."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(d): d for d in (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.int8,
    torch.int32, torch.int64, torch.bool,
)}  # fmt: skip
"""Dtypes by their names on the wire."""


Known = dict[str, tuple[tuple[int, ...], torch.dtype, list["Incoming"]]]
"""By the name of a model's tensor: its shape, its stored dtype, and the entries that were made of these."""


def manifest(model: nn.Module, plan: QuantPlan, known: Known | None = None) -> list[Incoming]:
    """The tensors that ``packed_weights(model, layout="fused")`` gives.

    Args:
        model: the model the plan was made for, wrapped, sharded or not.
        plan: its plan.
        known: of the last manifest for this plan; its entries are used again, and new ones added.

    Returns:
        An entry for each, in the order of the stream as far as it is known.
    """
    known = {} if known is None else known
    found: dict[bool, list[Incoming]] = {False: [], True: []}
    for name, tensor in model_tensors(model, plan, meta=True, sharded=True).items():
        form = tuple(tensor.tensor.shape), tensor.stored_dtype
        if name not in known or known[name][:2] != form:
            known[name] = *form, list(_entries(plan, name, *form))
        found[name in plan] += known[name][2]
    return found[False] + found[True]


def _entries(plan: QuantPlan, name: str, shape: tuple[int, ...], stored: torch.dtype) -> Iterator[Incoming]:
    """What is sent of one of a model's tensors."""
    slices = plan.checkpoint_slices[name]
    (own,) = output_slices(plan, name, "fused")
    if name not in plan:
        yield Incoming(own.name, shape, stored, tuple(_parts(slices, rows=True)))
        return
    *leading, k = shape
    forms = (
        ((*leading, k // 2), torch.uint8),
        ((*leading, k // BLOCK), torch.float8_e4m3fn),
        ((shape[0] if plan[name].batch_dims else 1,), torch.float32),
    )
    for which, (form, dtype) in enumerate(forms):
        named = [CheckpointSlice(packed_names(s.name)[which], s.index, s.rows) for s in slices]
        yield Incoming(packed_names(own.name)[which], form, dtype, tuple(_parts(named, rows=which < 2)))


def _parts(slices: Sequence[CheckpointSlice], rows: bool) -> Iterator[Part]:
    """Checkpoint tensors as parts of one tensor: experts that follow each other are one part."""
    run: Part | None = None
    for s in sorted(slices, key=lambda s: (s.rows or (0, 0), s.index or 0)):
        template = s.name if s.index is None else _template(s.name, s.index)
        of = s.rows if rows else None
        if run is not None and s.index is not None and (run.name, run.rows) == (template, of):
            if s.index == run.first + run.count:
                run = Part(run.name, run.first, run.count + 1, run.rows)
                continue
        if run is not None:
            yield run
        run = Part(template, s.index or 0, 0 if s.index is None else 1, of)
    if run is not None:
        yield run


def _template(name: str, index: int) -> str:
    """A name with "{}" where it counts experts: the last number that is the expert's."""
    components = name.split(".")
    for i in reversed(range(len(components))):
        if components[i] == str(index):
            components[i] = "{}"
            return ".".join(components)
    raise UserError(f"{name} is expert {index} of a tensor, but its name does not say so")


def to_wire(incoming: Iterable[Incoming]) -> list[list[Any]]:
    """The list as plain lists, strings and numbers."""
    return [
        [
            entry.name,
            list(entry.shape),
            dtype_name(entry.dtype),
            [[p.name, p.first, p.count, None if p.rows is None else list(p.rows)] for p in entry.parts],
        ]
        for entry in incoming
    ]


def from_wire(wire: Iterable[Sequence[Any]]) -> list[Incoming]:
    """The inverse of `to_wire`.

    Raises:
        UserError: dtypes that are not known; lists all tensors that have one.
    """
    entries = list(wire)
    unknown = [f"{name} has the dtype {dtype!r}" for name, _, dtype, _ in entries if dtype not in DTYPES]
    if unknown:
        raise UserError(
            f"this engine's nvfp4-qat cannot take some of the tensors; nothing was changed: {'; '.join(unknown)}. "
            "Install the trainer's version where the engine runs"
        )
    return [
        Incoming(name, tuple(shape), DTYPES[dtype], tuple(_part(*part) for part in parts))
        for name, shape, dtype, parts in entries
    ]


def _part(name: str, first: int, count: int, rows: Sequence[int] | None) -> Part:
    return Part(name, first, count, None if rows is None else (rows[0], rows[1]))
