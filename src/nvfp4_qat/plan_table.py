"""`str(plan)`: a table a person can read, with repeated layers in one line."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from .entries import QuantizedTensor, SkippedTensor
from .format import BITS_PER_WEIGHT
from .naming import fold, split_leaf, template

if TYPE_CHECKING:
    from .plan import QuantPlan

Entry = TypeVar("Entry", QuantizedTensor, SkippedTensor)


def render(plan: QuantPlan) -> str:
    """Return the table of a plan: 4-bit weights with their groups, the others with the reason, and totals."""
    quantized = _rows(plan.quantized, lambda entry: template(entry.group), _sharing)
    skipped = _rows(plan.skipped, lambda entry: template(entry.reason), lambda entry: template(entry.reason))
    count = sum(math.prod(entry.shape) for entry in plan.quantized)
    packed = sum(packed_bytes(entry) for entry in plan.quantized)
    before, after = 2 * plan.parameters, 2 * (plan.parameters - count) + packed
    header = [("in NVFP4", "shape", "", "global scale")]
    between = [("", "", "", ""), ("in bf16", "shape", "", "because")]
    table = align([*header, *quantized, *(between if skipped else []), *skipped])
    summary = (
        f"{len(plan.quantized)} of {len(plan.quantized) + len(plan.skipped)} weights in NVFP4 "
        f"({plan.config.mode}, global scale {plan.config.global_scale}): {100 * count / plan.parameters:.1f} % of "
        f"{short(plan.parameters)} parameters; {_size(before)} in bf16 become {_size(after)}"
    )
    return "\n".join([*table, "", summary])


def _rows(
    entries: Iterable[Entry], key: Callable[[Entry], Hashable], last: Callable[[Entry], str]
) -> list[tuple[str, str, str, str]]:
    similar: dict[Hashable, list[Entry]] = defaultdict(list)
    for entry in entries:
        similar[template(entry.name), entry.shape, key(entry)].append(entry)
    rows = []
    for group in similar.values():
        name = fold([entry.name for entry in group]).removesuffix(".weight")
        rows.append((name, str(list(group[0].shape)), f"× {len(group)}", last(group[0])))
    return rows


def _sharing(entry: QuantizedTensor) -> str:
    if entry.kind == "experts":
        return "one per expert"
    return "" if entry.group == entry.module else f"shared in {split_leaf(entry.group)[1]}"


def align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def packed_bytes(entry: QuantizedTensor) -> int:
    """Codes, block scales and one float32 for each checkpoint tensor."""
    return int(math.prod(entry.shape) * BITS_PER_WEIGHT / 8) + 4 * len(entry.checkpoint)


def short(number: float) -> str:
    return _scaled(number, 4, ("", " K", " M", " B", " T"))


def _size(number: float) -> str:
    return _scaled(number, 3, (" B", " KB", " MB", " GB", " TB"))


def _scaled(number: float, digits: int, units: Sequence[str]) -> str:
    steps = min(len(units) - 1, max(0, math.floor(math.log10(number) / 3))) if number >= 1 else 0
    return f"{number / 1000**steps:.{digits}g}{units[steps]}"
