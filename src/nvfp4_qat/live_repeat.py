"""A list of tensor operations with the numbers that were looked at between them: what `live_tape` notes, done again.

What is looked at is not waited for: `Tape.run` gives the results and, on the device, whether every number is the one
that it was. Who uses the results finds out later, for many tapes at once, and processes by the engine's own code what
was made with another number. Tapes of equal layers have the same `Tape.signature`, so that one CUDA graph does for all
of them (`live_graphs`).
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ref(NamedTuple):
    """A view of a tensor that exists while a tape runs.

    Args:
        slot: which tensor.
        start: byte at which the view begins, counted from that tensor's first.
        size, stride, dtype: of the view; None: the tensor itself.
    """

    slot: int
    start: int = 0
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


@dataclass
class Step:
    """An operation. Arguments hold `Ref` in place of tensors."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    makes: list[int | None]
    """For each tensor that it returns its slot; None: it is one of the arguments."""
    answers: list[Any] = field(default_factory=list)
    """What it returned besides tensors, if that depends on the parameters."""
    asks: bool = False
    """Whether it is the question for a number: not done, the number is compared at the end."""
    ends: tuple[int, ...] = ()
    """Slots that nothing needs afterwards."""


class CannotRepeatError(Exception):
    """Processing did something that a tape cannot hold."""


class Repeated(NamedTuple):
    """What a repetition gives.

    Args:
        results: in the order of the recorded ones.
        same: bool ``[]`` on the device: whether the numbers that the code looks at are those of the recording. Else
            the results are worth nothing. None: it looks at none.
    """

    results: list[Tensor]
    same: Tensor | None


class Tape:
    """What a `live_tape.Recorder` noted.

    Args:
        names: the slots of the parameters.
        forms: shapes, strides and dtypes of the parameters.
        steps: in order.
        outputs: results.
        kept: tensors that do not depend on the parameters.
    """

    def __init__(
        self,
        names: Mapping[str, int],
        forms: Mapping[str, tuple[Any, ...]],
        steps: Sequence[Step],
        outputs: Sequence[Ref],
        kept: Mapping[int, Tensor],
    ) -> None:
        self._names, self._forms, self._steps, self._outputs = names, forms, steps, list(outputs)
        slots = [*names.values(), *kept, *(ref.slot for ref in outputs)]
        slots += [slot for step in steps for slot in (*step.reads, *step.makes) if slot is not None]
        self._kept = [kept.get(slot) for slot in range(max(slots, default=-1) + 1)]
        self._program = [_Ready(step) for step in steps]
        self._results = [_getter(ref) for ref in outputs]
        self.changes_parameters = any(step.writes & set(names.values()) for step in steps)
        """Whether a repetition writes into the parameters that it is given."""
        self._expected: Tensor | None = None

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that it takes."""
        return {name: form[0] for name, form in self._forms.items()}

    @property
    def waits(self) -> bool:
        """Whether a repetition has operations that answer the host at once."""
        return any(step.answers and not step.asks for step in self._program)

    @property
    def nbytes(self) -> int:
        """Of the parameters that it takes."""
        return sum(math.prod(form[0]) * form[2].itemsize for form in self._forms.values())

    def repeat(self, parameters: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Do it again, and wait for the answers.

        Args:
            parameters: new ones, in the form of those it was recorded with.

        Returns:
            The results in the order of the recorded ones; None: a number that the code looks at is another one.
        """
        found = self.run(parameters)
        return None if found is None or found.same is not None and not bool(found.same) else found.results

    def takes(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether parameters are those that it takes, in their form."""
        return parameters.keys() == self._forms.keys() and all(
            form_of(parameters[name]) == form for name, form in self._forms.items()
        )

    def run(self, parameters: Mapping[str, Tensor]) -> Repeated | None:
        """Do it again; whether the numbers are the same is said on the device.

        Args:
            parameters: see `repeat`.

        Returns:
            None: they have another form, or a number that could not wait is another one.
        """
        if not self.takes(parameters):
            return None
        values: list[Any] = list(self._kept)
        for name, slot in self._names.items():
            values[slot] = parameters[name].detach()
        asked: list[Tensor] = []
        with torch.no_grad():
            for step in self._program:
                arguments, options = step.given(values)
                if step.asks:
                    asked.append(arguments[0].to(torch.float64, copy=True))
                else:
                    out = step.function(*arguments, **options)
                    if step.answers and [*leaves(out, (bool, int, float))] != step.answers:
                        return None
                    if step.single:
                        values[step.makes[0]] = out
                    else:
                        for slot, made in zip(step.makes, leaves(out, Tensor), strict=True):
                            if slot is not None:
                                values[slot] = made
                    del out
                del arguments, options
                for slot in step.ends:
                    values[slot] = None
            return Repeated([output(values) for output in self._results], self._as_expected(asked))

    def _as_expected(self, asked: Sequence[Tensor]) -> Tensor | None:
        if not asked:
            return None
        found = torch.stack([t.reshape(()) for t in asked])
        if self._expected is None:
            numbers = [float(step.answers[0]) for step in self._steps if step.asks]
            self._expected = torch.tensor(numbers, dtype=torch.float64, device=found.device)
        return (found == self._expected).all()

    def signature(self) -> Hashable | None:
        """Equal for tapes that do the same with parameters of the same form; None: that cannot be said.

        What is kept counts by its value if nobody else has its memory, and else by where it is.
        """
        numbers: dict[int, int] = {}
        devices = {form[3].type for form in self._forms.values()}

        def plain(value: Any) -> Hashable:
            if isinstance(value, Ref):
                return (numbers.setdefault(value.slot, len(numbers)), *value[1:])
            if isinstance(value, dict):
                return tuple((key, plain(value[key])) for key in sorted(value))
            if isinstance(value, (list, tuple)):
                return (type(value), *map(plain, value))
            return type(value), value.hex() if isinstance(value, float) else value

        try:
            said: list[Hashable] = [plain({name: Ref(slot) for name, slot in self._names.items()})]
            said += [plain({name: list(form) for name, form in self._forms.items()})]
            for step in self._steps:
                made = [None if slot is None else Ref(slot) for slot in step.makes]
                said.append((step.function, *map(plain, (step.arguments, step.options, made, step.answers, step.asks))))
            said.append(plain(self._outputs))
            for slot, number in numbers.items():
                t = self._kept[slot]
                if t is not None:
                    said.append((number, form_of(t), _identity(t, devices)))
            found = tuple(said)
            hash(found)
        except (TypeError, _UnknownError):
            return None
        return found


class _UnknownError(Exception):
    """Nothing says what a tensor holds later on."""


def _identity(t: Tensor, devices: set[str]) -> Hashable:
    """What is in a tensor that is kept; where it is, if others might change it there.

    Args:
        devices: where graphs read memory; of other tensors they have a value for good.
    """
    alone = _users(t) <= _users(torch.empty(1))
    if alone and t.nbytes <= 1 << 20:
        data = t.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        return hashlib.sha256(data).hexdigest()
    if t.device.type not in devices:
        raise _UnknownError
    return memory_of(t), t.storage_offset()


def _users(t: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(memory_of(t))
    return count


class _Ready:
    """A step whose arguments are looked up without looking for them in nested lists."""

    __slots__ = ("answers", "arguments", "asks", "ends", "function", "makes", "named", "options", "places", "single")

    def __init__(self, step: Step) -> None:
        self.function, self.answers, self.asks = step.function, step.answers, step.asks
        self.makes: list[Any] = step.makes
        self.ends = step.ends
        self.single = len(step.makes) == 1 and step.makes[0] is not None and _returns_one(step.function)
        """Whether it returns a tensor, which is new, and nothing else."""
        self.arguments: list[Any] = list(step.arguments)
        self.options = dict(step.options)
        self.places = [(i, _getter(a)) for i, a in enumerate(step.arguments) if any(leaves(a, Ref))]
        self.named = [(key, _getter(a)) for key, a in step.options.items() if any(leaves(a, Ref))]

    def given(self, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Its arguments, with tensors by slot."""
        arguments = self.arguments.copy()
        for i, value in self.places:
            arguments[i] = value(values)
        return arguments, {**self.options, **{key: value(values) for key, value in self.named}}


def _returns_one(function: Any) -> bool:
    if not hasattr(function, "_schema"):  # one of ours
        return True
    returns = function._schema.returns
    return len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)


def _getter(tree: Any) -> Callable[[list[Any]], Any]:
    """Takes a value with `Ref` in place of tensors from a list of tensors by slot."""
    if isinstance(tree, Ref):
        slot, ref = tree.slot, tree
        return operator.itemgetter(slot) if ref.size is None else lambda values: _view(values[slot], ref)
    if isinstance(tree, dict):
        named = {key: _getter(value) for key, value in tree.items()}
        return lambda values: {key: value(values) for key, value in named.items()}
    if isinstance(tree, (list, tuple)):
        kind, parts = type(tree), [_getter(value) for value in tree]
        return lambda values: kind(part(values) for part in parts)
    return lambda values: tree


def _view(t: Tensor, ref: Ref) -> Tensor:
    assert ref.size is not None and ref.dtype is not None
    if t.dtype is ref.dtype:
        return t.as_strided(ref.size, ref.stride, int(t.storage_offset()) + ref.start // ref.dtype.itemsize)
    start = (first_byte(t) + ref.start) // ref.dtype.itemsize
    return torch.empty(0, dtype=ref.dtype, device=t.device).set_(t.untyped_storage(), start, ref.size, ref.stride)


def first_byte(t: Tensor) -> int:
    return int(t.storage_offset()) * t.element_size()


def form_of(t: Tensor) -> tuple[Any, ...]:
    return (tuple(t.shape), tuple(t.stride()), t.dtype, t.device)


def memory_of(t: Tensor) -> int:
    cdata: int = t.untyped_storage()._cdata
    return cdata


def leaves(tree: Any, kinds: Any) -> Iterator[Any]:
    """What is of some kinds in nested lists; a `Ref` is not looked into."""
    if isinstance(tree, kinds):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value, kinds)
    elif isinstance(tree, (list, tuple)) and not isinstance(tree, Ref):
        for value in tree:
            yield from leaves(value, kinds)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    lines = (t.detach().contiguous().as_strided((t.numel(),), (1,)) for t in (a, b))
    return torch.equal(*(line.view(torch.uint8) for line in lines))
