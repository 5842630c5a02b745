"""Names: one canonical form for every module and parameter, and the one meaning of an ignore pattern.

Training wrappers put their own components into names (PEFT, DDP, FSDP, torch.compile, activation checkpointing).
`canonical_name` takes them out, so a plan built from the wrapped model, from the bare model and from its meta-device
twin speak of the same layers, and a pattern means the same whichever wrapper is outermost.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .errors import UserError

_ANYWHERE = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module"}
)
_LEADING = (("base_model", "model"), ("module",))
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$|\W)|^\d+(?=\.)")


@functools.lru_cache(maxsize=1 << 17)  # asked for every name of a model several times in a sync
def canonical_name(name: str) -> str:
    """Return `name` without the components that training wrappers insert.

    Args:
        name: a module, parameter or buffer name as `named_modules()` or `state_dict()` of a wrapped model gives it.

    Returns:
        The name in the bare model. The wrapper module itself becomes the module it wraps; the root becomes "".
    """
    parts = [part for part in name.split(".") if part and part not in _ANYWHERE]
    stripped = True
    while stripped:
        stripped = False
        for prefix in _LEADING:
            if tuple(parts[: len(prefix)]) == prefix:
                parts, stripped = parts[len(prefix) :], True
    return ".".join(parts)


def join(*parts: str) -> str:
    """Join name components with dots, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def split_leaf(name: str) -> tuple[str, str]:
    """Return the parent's name and the last component ("" and the name itself at the top level)."""
    parent, _, leaf = name.rpartition(".")
    return parent, leaf


@dataclass(frozen=True)
class Pattern:
    """One entry of `ignore_patterns`.

    Args:
        text: `re:RX` matches a module name if `re.match(RX, name)` does (as in compressed-tensors and vLLM); anything
            else matches a whole dotted component or run of components, never part of one.

    Raises:
        UserError: the text is empty or RX is no regular expression.
    """

    text: str
    _regex: re.Pattern[str] | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not self.text or self.text == "re:":
            raise UserError("an ignore pattern is empty; remove it (an empty pattern would match every layer or none)")
        if self.text.startswith("re:"):
            try:
                object.__setattr__(self, "_regex", re.compile(self.text[3:]))
            except re.error as error:
                raise UserError(f"ignore pattern {self.text!r} is not a regular expression: {error}") from None

    def matches(self, name: str) -> bool:
        """Tell whether the pattern matches this module name."""
        if self._regex is not None:
            return self._regex.match(name) is not None
        return f".{self.text}." in f".{name}."


def template(text: str) -> str:
    """Return `text` with every numeric name component replaced by `*`, so that repeated layers compare equal."""
    return _INDEX.sub("*", text)


def indices(name: str) -> tuple[int, ...]:
    """Return the numeric components that `template` replaced, in order."""
    return tuple(int(index) for index in _INDEX.findall(name))


def ranges(numbers: Iterable[int]) -> str:
    """Format a set of numbers in little space: `7`, `{0..35}`, `{0..2,5}`; beyond three runs `{0..2,4..6,…,44..46}`."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    if len(texts) > 3:
        texts = [*texts[:2], "…", texts[-1]]
    return texts[0] if len(ordered) == 1 else "{" + ",".join(texts) + "}"


def fold(names: Sequence[str]) -> str:
    """Write several names that share one `template` as one: `model.layers.{0..35}.self_attn.q_proj`."""
    columns = list(zip(*(indices(name) for name in names), strict=True))
    pieces = template(names[0]).split("*")
    filled = [piece + ranges(column) for piece, column in zip(pieces[:-1], columns, strict=True)]
    return "".join(filled) + pieces[-1]
