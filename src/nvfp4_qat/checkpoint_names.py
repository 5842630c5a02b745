"""Where each tensor of a model stands in its Hugging Face checkpoint.

transformers 5 keeps all experts of a layer in one 3-D parameter, while checkpoints (and engines) have one tensor per
expert and projection, sometimes under other names (Mixtral's `block_sparse_moe.experts.3.w1`). transformers itself
knows the way back: `revert_weight_conversion`. We do not write that knowledge down a second time but ask it: each
parameter is replaced by a small tensor in which every row holds its own number, and the numbers that come out under a
checkpoint name tell which expert and which rows the name stands for. The last dimension is cut to two columns, and
layers go through one after the other, so even a 671 B model takes a few seconds and little memory.
"""

from __future__ import annotations

import itertools
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLUMNS = 2
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class CheckpointSlice:
    """One tensor of a checkpoint, as a part of a model's tensor.

    Args:
        name: full tensor name in the checkpoint, such as "model.layers.0.mlp.experts.3.gate_proj.weight".
        index: expert, that is position along dim 0 of a 3-D parameter; None for the whole of it.
        rows: row range `[start, stop)` along dim -2; None for all rows.
    """

    name: str
    index: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of a model's tensor that this checkpoint tensor holds."""
        part = tensor if self.index is None else tensor[self.index]
        return part if self.rows is None else part[..., self.rows[0] : self.rows[1], :]


def transformers_model(module: nn.Module | None) -> PreTrainedModel | None:
    """Return `module` if it is a transformers model; imports transformers only if somebody already has."""
    if "transformers" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    return module if isinstance(module, PreTrainedModel) else None


def checkpoint_slices(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[CheckpointSlice, ...]]:
    """Map every tensor of a model to its tensors in the checkpoint.

    Args:
        model: the bare model, on any device (no data is read).
        shapes: its tensors' names, relative to `model`, and shapes.

    Returns:
        For each name its checkpoint tensors, in checkpoint order. Identity for a module that is no transformers model
        and for architectures whose checkpoint has the model's own layout.

    Raises:
        UserError: the checkpoint keeps a tensor in a form that is not a run of rows of it (transposed, permuted or
            merged).
    """
    hf_model = transformers_model(model)
    if hf_model is None:
        return {name: (CheckpointSlice(name),) for name in shapes}
    empty = {name for name, shape in shapes.items() if 0 in shape}
    found: dict[str, list[CheckpointSlice]] = {
        name: [CheckpointSlice(name)] if name in empty else [] for name in shapes
    }
    for names in _by_layer([name for name in shapes if name not in empty]):
        _convert_codes(hf_model, {name: shapes[name] for name in names}, found)
    return {name: tuple(slices) for name, slices in found.items()}


def _by_layer(names: Sequence[str]) -> Iterator[list[str]]:
    def layer(name: str) -> str:
        match = _LAYER.match(name)
        return match[1] if match else ""

    for _, group in itertools.groupby(sorted(names, key=layer), key=layer):
        yield list(group)


def _convert_codes(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], found: dict[str, list[CheckpointSlice]]
) -> None:
    codes: dict[str, Tensor] = {}
    starts = [0]
    for name, shape in shapes.items():
        small = (*shape[:-1], min(shape[-1], _COLUMNS)) if len(shape) > 1 else shape
        count = torch.Size(small).numel()
        codes[name] = torch.arange(starts[-1], starts[-1] + count).view(small)
        starts.append(starts[-1] + count)
    names = list(shapes)
    written = dict.fromkeys(names, 0)
    for target, part in _revert(model, codes).items():
        first = int(part.flatten()[0])
        origin = names[bisect_right(starts, first) - 1]
        piece = _locate(target, codes[origin], part, first - int(codes[origin].flatten()[0]))
        if piece is None:
            raise UserError(
                f"the checkpoint keeps {origin} in {target} transposed, permuted or merged with other tensors; "
                "this version can only write whole tensors, experts and runs of rows"
            )
        found[origin].append(piece)
        written[origin] += part.numel()
    lost = [name for name in names if written[name] != codes[name].numel()]
    if lost:
        raise UserError(f"transformers' conversion to checkpoint names loses a part of: {', '.join(lost)}")


def _locate(target: str, code: Tensor, part: Tensor, offset: int) -> CheckpointSlice | None:
    """Say which part of `code` is `part`, whose first element stands at `offset` of the flattened `code`."""
    if part.shape == code.shape and torch.equal(part, code):
        return CheckpointSlice(target)
    if code.ndim < 2 or part.ndim < 2 or part.shape[-1] != code.shape[-1]:
        return None
    row = offset // code.shape[-1] % code.shape[-2]
    height = part.shape[-2]
    rows = None if height == code.shape[-2] else (row, row + height)
    index = None
    if code.ndim == 3 and part.ndim == 2:
        index = offset // (code.shape[-1] * code.shape[-2])
    slice_ = CheckpointSlice(target, index, rows)
    located = slice_.of(code)
    return slice_ if located.shape == part.shape and torch.equal(located, part) else None


class _CodedModel:
    """The model as a conversion sees it, except that parameters have the shapes of their codes."""

    def __init__(self, model: PreTrainedModel, codes: Mapping[str, Tensor], own_conversions: bool) -> None:
        self._model = model
        self._codes = codes
        self._own_conversions = own_conversions

    def __getattr__(self, name: str) -> Any:
        if name == "_weight_conversions" and not self._own_conversions:
            return None
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return self._codes[name]


def _revert(model: PreTrainedModel, codes: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 a model had the layout of its checkpoint
        return codes
    try:
        return dict(revert_weight_conversion(_CodedModel(model, codes, True), dict(codes)))  # type: ignore[arg-type]
    except ValueError:
        # A model loaded from a quantized checkpoint remembers conversions that have no way back; the architecture's
        # own have.
        return dict(revert_weight_conversion(_CodedModel(model, codes, False), dict(codes)))  # type: ignore[arg-type]
