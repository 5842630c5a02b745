"""A layer's processing as a list of tensor operations, which can be done again without the Python code that chose them.

An engine's processing of a layer takes milliseconds of Python and of waiting for the device, for work that takes the
device microseconds. Its operations hardly ever depend on the weights, though. A `Tape` notes them while the engine's
code runs (what PyTorch's dispatcher sees: views are not needed, what does not depend on the parameters is kept as it
is), and repeats them with new parameters. Where the code looked at a number, such as a scale factor, the tape does so
too: if the number is another one now, `Tape.repeat` says so, and the engine's own code has to run.

What the dispatcher does not see (a kernel launched by other means, a copy that Python reads on the host) would be
missing from a tape. Who uses one therefore compares it with the engine's code first, on weights that it was not
recorded with (`live_model`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

KEPT = 1 << 20
"""Bytes up to which a tensor that does not depend on the parameters is kept; larger ones are made anew."""

MOST = 5_000
"""Operations that a tape holds."""


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
class _Slot:
    """A piece of memory while a tape is recorded."""

    memory: StorageWeakRef
    first: int
    """Byte of its storage where the tensor begins."""
    whole: tuple[Any, ...]
    """Form of the tensor that was made."""
    depends: frozenset[str]
    """Parameters that what is in it was made from."""
    kept: Tensor | None = None
    """It itself, where it does not depend on the parameters."""
    outside: bool = False
    """Whether it was there before, and is no parameter."""
    written: bool = False
    """Whether something was written into it after it was made."""
    dynamic: bool = False
    """Whether its size depends on numbers."""


@dataclass
class _Step:
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


class Recorder(TorchDispatchMode):
    """Notes what is done with parameters while it is active.

    Args:
        parameters: what processing starts from.
        changing: tensors that may have other values at another time, besides.
    """

    def __init__(self, parameters: Mapping[str, Tensor], changing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = {_memory(p) for p in parameters.values()}
        self._changing = {_memory(t) for t in changing} - own
        self._slots: list[_Slot] = []
        self._at: dict[int, int] = {}
        self._steps: list[_Step] = []
        self._trouble: str | None = None
        self._names = {name: self._new(p, frozenset({name})) for name, p in parameters.items()}
        self._forms = {name: _form(p) for name, p in parameters.items()}

    def depends(self, t: Tensor) -> frozenset[str]:
        """The parameters that a tensor was made from."""
        return self._slots[self._ref(t).slot].depends

    def tape(self, outputs: Sequence[Tensor], questions: bool = True, part: bool = False) -> Tape:
        """What was noted.

        Args:
            outputs: results to be made anew, all still there.
            questions: whether numbers that the code looks at are compared; without, only what the results hang on is
                done, as if they were what they were.
            part: whether the tape takes only the parameters that it uses.

        Raises:
            CannotRepeatError: with the reason.
        """
        if self._trouble is not None:
            raise CannotRepeatError(self._trouble)
        refs = [self._ref(t) for t in outputs]
        steps, kept = self._needed({ref.slot for ref in refs}, questions)
        names = self._names
        if part:
            used = {ref.slot for ref in refs}.union(*(step.reads for step in steps))
            names = {name: slot for name, slot in names.items() if slot in used}
        return Tape(names, {name: self._forms[name] for name in names}, steps, refs, kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._trouble is not None:
            return func(*args, **kwargs)
        out = None
        try:
            noted = _mapped(args, self._ref), _mapped(kwargs, self._ref)  # first: it may change their form
            out = func(*args, **kwargs)
            self._note(func, (args, kwargs), noted, out)
        except CannotRepeatError as error:
            self._trouble = f"{func}: {error}"
        return func(*args, **kwargs) if out is None else out

    def _note(self, func: Any, given: Any, noted: tuple[Any, Any], out: Any) -> None:
        reads = frozenset(ref.slot for ref in _leaves(noted, Ref))
        depends = frozenset[str]().union(*(self._slots[slot].depends for slot in reads))
        written = [self._ref(t).slot for t in _written(func, *given)]
        returned = list(_leaves(out, Tensor))
        before = {_memory(t) for t in _leaves(given, Tensor)}
        fresh = [_memory(t) not in before for t in returned]
        answers = list(_leaves(out, (bool, int, float)))
        if depends:
            if any(t.device.type == "cpu" for t in returned) and any(
                t.device.type != "cpu" for t in _leaves(given, Tensor)
            ):
                raise CannotRepeatError("the host reads what depends on the weights")
            if any(self._slots[slot].outside for slot in written):
                raise CannotRepeatError("it writes into a tensor that was there before")
        if not (any(fresh) or written or (answers and depends)):
            return  # a view
        for slot in written:
            self._slots[slot].written = True
            self._slots[slot].depends |= depends
        dynamic = bool(depends) and _dynamic(func, given[0])
        makes = [self._new(t, depends, dynamic) if new else None for t, new in zip(returned, fresh, strict=True)]
        step = _Step(func, *noted, reads, frozenset(written), makes)
        if depends and answers:
            if any(a != a for a in answers):
                raise CannotRepeatError("a number that is not one is looked at")
            step.answers, step.asks = answers, func is aten._local_scalar_dense.default
        if len(self._steps) >= MOST:
            raise CannotRepeatError(f"more than {MOST:,} operations")
        self._steps.append(step)

    def _new(self, t: Tensor, depends: frozenset[str], dynamic: bool = False) -> int:
        if any(size < 0 for size in t.stride()) or t.layout != torch.strided or t.is_meta:
            raise CannotRepeatError(f"a tensor of layout {t.layout} on {t.device}")
        slot = _Slot(StorageWeakRef(t.untyped_storage()), _first(t), _form(t), depends, dynamic=dynamic)
        if not depends and t.nbytes <= KEPT:
            slot.kept = t.detach()
        self._slots.append(slot)
        self._at[_memory(t)] = len(self._slots) - 1
        return len(self._slots) - 1

    def _ref(self, t: Tensor) -> Ref:
        memory = _memory(t)
        found = self._at.get(memory)
        if found is None or self._slots[found].memory.expired():
            if memory in self._changing:
                raise CannotRepeatError("it uses a tensor whose values may change")
            found = self._new(t, frozenset())
            self._slots[found].kept, self._slots[found].outside = t.detach(), True
        slot = self._slots[found]
        if slot.whole == _form(t) and slot.first == _first(t):
            return Ref(found)
        if slot.dynamic:
            raise CannotRepeatError("part of a tensor is taken whose size depends on the weights")
        return Ref(found, _first(t) - slot.first, tuple(t.shape), tuple(t.stride()), t.dtype)

    def _needed(self, wanted: set[int], questions: bool) -> tuple[list[_Step], dict[int, Tensor]]:
        """The steps that outputs and questions hang on, and the tensors that are kept."""
        steps: list[_Step] = []
        kept: dict[int, Tensor] = {}
        ended: set[int] = set()
        needed = set(wanted)
        ended |= needed  # results are there until the end
        for step in reversed(self._steps):
            made = {slot for slot in step.makes if slot is not None}
            if not (step.answers and questions or (made | step.writes) & needed):
                continue
            if made and not step.writes and all(self._fixed(slot) for slot in made):
                continue
            steps.append(step)
            used = step.reads | made
            steps[-1] = replace(step, ends=tuple(sorted(slot for slot in used if slot not in ended)))
            ended |= used
            needed |= step.reads
        for number in needed:
            slot = self._slots[number]
            if slot.outside or self._fixed(number):
                if slot.kept is None:
                    raise CannotRepeatError("a tensor is needed that is gone")
                kept[number] = slot.kept
        steps.reverse()
        return [replace(step, ends=tuple(slot for slot in step.ends if slot not in kept)) for step in steps], kept

    def _fixed(self, number: int) -> bool:
        slot = self._slots[number]
        return slot.kept is not None and not slot.depends and not slot.written


class Tape:
    """What a `Recorder` noted.

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
        steps: Sequence[_Step],
        outputs: Sequence[Ref],
        kept: Mapping[int, Tensor],
    ) -> None:
        self._names, self._forms, self._steps = names, forms, steps
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

    def repeat(self, parameters: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Do it again.

        Args:
            parameters: new ones, in the form of those it was recorded with.

        Returns:
            The results in the order of the recorded ones; None: a number that the code looks at is another one.
        """
        values: list[Any] = list(self._kept)
        for name, slot in self._names.items():
            plain = parameters[name].detach() if name in parameters else None
            if plain is None or _form(plain) != self._forms[name]:
                return None
            values[slot] = plain
        if len(parameters) != len(self._names):
            return None
        asked: list[Tensor] = []
        with torch.no_grad():
            for step in self._program:
                arguments, options = step.given(values)
                if step.asks:
                    asked.append(arguments[0].to(torch.float64, copy=True))
                else:
                    out = step.function(*arguments, **options)
                    if step.answers and [*_leaves(out, (bool, int, float))] != step.answers:
                        return None
                    if step.single:
                        values[step.makes[0]] = out
                    else:
                        for slot, made in zip(step.makes, _leaves(out, Tensor), strict=True):
                            if slot is not None:
                                values[slot] = made
                    del out
                del arguments, options
                for slot in step.ends:
                    values[slot] = None
            if asked and not self._as_expected(asked):
                return None
            return [output(values) for output in self._results]

    def _as_expected(self, asked: Sequence[Tensor]) -> bool:
        found = torch.stack([t.reshape(()) for t in asked])
        if self._expected is None:
            numbers = [float(step.answers[0]) for step in self._steps if step.asks]
            self._expected = torch.tensor(numbers, dtype=torch.float64, device=found.device)
        return torch.equal(found, self._expected)


class _Ready:
    """A step whose arguments are looked up without looking for them in nested lists."""

    __slots__ = ("answers", "arguments", "asks", "ends", "function", "makes", "named", "options", "places", "single")

    def __init__(self, step: _Step) -> None:
        self.function, self.answers, self.asks = step.function, step.answers, step.asks
        self.makes: list[Any] = step.makes
        self.ends = step.ends
        self.single = len(step.makes) == 1 and step.makes[0] is not None and _returns_one(step.function)
        """Whether it returns a tensor, which is new, and nothing else."""
        self.arguments: list[Any] = list(step.arguments)
        self.options = dict(step.options)
        self.places = [(i, _getter(a)) for i, a in enumerate(step.arguments) if any(_leaves(a, Ref))]
        self.named = [(key, _getter(a)) for key, a in step.options.items() if any(_leaves(a, Ref))]

    def given(self, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Its arguments, with tensors by slot."""
        arguments = self.arguments.copy()
        for i, value in self.places:
            arguments[i] = value(values)
        return arguments, {**self.options, **{key: value(values) for key, value in self.named}}


def _returns_one(function: Any) -> bool:
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
    start = (_first(t) + ref.start) // ref.dtype.itemsize
    return torch.empty(0, dtype=ref.dtype, device=t.device).set_(t.untyped_storage(), start, ref.size, ref.stride)


def _first(t: Tensor) -> int:
    return int(t.storage_offset()) * t.element_size()


def _form(t: Tensor) -> tuple[Any, ...]:
    return (tuple(t.shape), tuple(t.stride()), t.dtype, t.device)


def _memory(t: Tensor) -> int:
    cdata: int = t.untyped_storage()._cdata
    return cdata


def _leaves(tree: Any, kinds: Any) -> Iterator[Any]:
    """What is of some kinds in nested lists; a `Ref` is not looked into."""
    if isinstance(tree, kinds):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value, kinds)
    elif isinstance(tree, (list, tuple)) and not isinstance(tree, Ref):
        for value in tree:
            yield from _leaves(value, kinds)


def _mapped(tree: Any, change: Callable[[Tensor], Ref]) -> Any:
    """With a `Ref` in place of every tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    return type(tree)(_mapped(value, change) for value in tree) if isinstance(tree, (list, tuple)) else tree


def _dynamic(func: Any, args: Any) -> bool:
    """Whether the size of a result hangs on numbers; of an index only a mask's does."""
    if func is aten.index.Tensor:
        return any(t.dtype in (torch.bool, torch.uint8) for t in _leaves(args[1], Tensor))
    return torch.Tag.dynamic_output_shape in func.tags


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from _leaves(value, Tensor)
