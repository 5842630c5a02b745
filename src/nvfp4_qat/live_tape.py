"""A layer's processing as a list of tensor operations, which can be done again without the Python code that chose them.

An engine's processing of a layer takes milliseconds of Python and of waiting for the device, for work that takes the
device microseconds. Its operations hardly ever depend on the weights, though. A `Recorder` notes them while the
engine's code runs (what PyTorch's dispatcher sees: views are not needed, what does not depend on the parameters is kept
as it is), and its `live_repeat.Tape` repeats them with new parameters. Where the code looked at a number, such as a
scale factor, the tape does so too: if the number is another one now, it says so, and the engine's own code has to run.

What the dispatcher does not see (a kernel launched by other means, a copy that Python reads on the host) would be
missing from a tape. Who uses one therefore compares it with the engine's code first, on weights that it was not
recorded with (`live_model`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .live_repeat import CannotRepeatError, Ref, Step, Tape, first_byte, form_of, leaves, memory_of

aten = torch.ops.aten

SCALAR = aten._local_scalar_dense.default
"""The question for a number."""

KEPT = 1 << 20
"""Bytes up to which a tensor that does not depend on the parameters is kept; larger ones are made anew."""

MOST = 5_000
"""Operations that a tape holds."""


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


class Recorder(TorchDispatchMode):
    """Notes what is done with parameters while it is active.

    Args:
        parameters: what processing starts from.
        changing: tensors that may have other values at another time, besides.
    """

    def __init__(self, parameters: Mapping[str, Tensor], changing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = {memory_of(p) for p in parameters.values()}
        self._changing = {memory_of(t) for t in changing} - own
        self._slots: list[_Slot] = []
        self._at: dict[int, int] = {}
        self._steps: list[Step] = []
        self._trouble: str | None = None
        self._names = {name: self._new(p, frozenset({name})) for name, p in parameters.items()}
        self._forms = {name: form_of(p) for name, p in parameters.items()}

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
        noted = self._without_masks if questions else self._steps
        steps, kept = self._needed(noted, {ref.slot for ref in refs}, questions)
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
        reads = frozenset(ref.slot for ref in leaves(noted, Ref))
        depends = frozenset[str]().union(*(self._slots[slot].depends for slot in reads))
        written = [self._ref(t).slot for t in _written(func, *given)]
        returned = list(leaves(out, Tensor))
        before = {memory_of(t) for t in leaves(given, Tensor)}
        fresh = [memory_of(t) not in before for t in returned]
        answers = list(leaves(out, (bool, int, float)))
        if depends:
            if any(t.device.type == "cpu" for t in returned) and any(
                t.device.type != "cpu" for t in leaves(given, Tensor)
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
        step = Step(func, *noted, reads, frozenset(written), makes)
        if depends and answers:
            if any(a != a for a in answers):
                raise CannotRepeatError("a number that is not one is looked at")
            step.answers, step.asks = answers, func is SCALAR
        if len(self._steps) >= MOST:
            raise CannotRepeatError(f"more than {MOST:,} operations")
        self._steps.append(step)

    def _new(self, t: Tensor, depends: frozenset[str], dynamic: bool = False) -> int:
        if any(size < 0 for size in t.stride()) or t.layout != torch.strided or t.is_meta:
            raise CannotRepeatError(f"a tensor of layout {t.layout} on {t.device}")
        slot = _Slot(StorageWeakRef(t.untyped_storage()), first_byte(t), form_of(t), depends, dynamic=dynamic)
        if not depends and t.nbytes <= KEPT:
            slot.kept = t.detach()
        self._slots.append(slot)
        self._at[memory_of(t)] = len(self._slots) - 1
        return len(self._slots) - 1

    def _ref(self, t: Tensor) -> Ref:
        memory = memory_of(t)
        found = self._at.get(memory)
        if found is None or self._slots[found].memory.expired():
            if memory in self._changing:
                raise CannotRepeatError("it uses a tensor whose values may change")
            found = self._new(t, frozenset())
            self._slots[found].kept, self._slots[found].outside = t.detach(), True
        slot = self._slots[found]
        if slot.whole == form_of(t) and slot.first == first_byte(t):
            return Ref(found)
        if slot.dynamic:
            raise CannotRepeatError("part of a tensor is taken whose size depends on the weights")
        return Ref(found, first_byte(t) - slot.first, tuple(t.shape), tuple(t.stride()), t.dtype)

    @cached_property
    def _without_masks(self) -> list[Step]:
        """The steps with ``x[mask].max()`` as a maximum over all of ``x``, for whose size nobody has to wait.

        Of numbers the largest is the largest in any order, but for zeros of two signs and what is not a number. So the
        tape also asks whether it is neither, nor nothing; then the engine's code runs.
        """
        made: dict[int, int] = {}
        steps: list[Step] = []
        for i, step in enumerate(self._steps):
            made.update((slot, i) for slot in step.makes if slot is not None)
            masked = self._masked(step, made, i)
            if masked is None:
                steps.append(step)
                continue
            (largest,), asked = step.makes, len(self._slots)
            assert largest is not None
            self._slots.append(replace(self._slots[largest], dynamic=False))
            reads = frozenset(ref.slot for ref in masked)
            steps.append(Step(masked_max, masked, {}, reads, frozenset(), [largest]))
            steps.append(Step(is_ordinary, (Ref(largest),), {}, frozenset({largest}), frozenset(), [asked]))
            question = Step(SCALAR, (Ref(asked),), {}, frozenset({asked}), frozenset(), [], [True], True)
            steps.append(question)
        return steps

    def _masked(self, step: Step, made: Mapping[int, int], end: int) -> tuple[Ref, Ref] | None:
        """``x`` and ``mask``, if a step is the maximum of ``x[mask]`` and both are still what they were."""
        if step.function is not aten.max.default or step.options or step.arguments[0].size is not None:
            return None
        begin = made.get(step.arguments[0].slot)
        index = None if begin is None else self._steps[begin]
        if index is None or index.function is not aten.index.Tensor or len(index.arguments[1]) != 1:
            return None
        x, mask = index.arguments[0], index.arguments[1][0]
        (size, dtype), (mask_size, mask_dtype) = (self._seen(ref) for ref in (x, mask))
        if size != mask_size or mask_dtype is not torch.bool or not dtype.is_floating_point:
            return None
        assert begin is not None
        between = frozenset[int]().union(*(other.writes for other in self._steps[begin + 1 : end]))
        return None if between & {x.slot, mask.slot, step.arguments[0].slot} else (x, mask)

    def _seen(self, ref: Ref) -> tuple[Any, torch.dtype]:
        whole = self._slots[ref.slot].whole
        return (whole[0], whole[2]) if ref.size is None or ref.dtype is None else (ref.size, ref.dtype)

    def _needed(self, noted: Sequence[Step], wanted: set[int], questions: bool) -> tuple[list[Step], dict[int, Tensor]]:
        """The steps that outputs and questions hang on, and the tensors that are kept."""
        steps: list[Step] = []
        kept: dict[int, Tensor] = {}
        ended: set[int] = set()
        needed = set(wanted)
        ended |= needed  # results are there until the end
        for step in reversed(noted):
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


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """``x[mask].max()``, -inf of nothing."""
    return x.masked_fill(~mask, -torch.inf).max()


def is_ordinary(largest: Tensor) -> Tensor:
    """Whether a maximum has one form only."""
    return torch.isfinite(largest) & (largest != 0)


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
        return any(t.dtype in (torch.bool, torch.uint8) for t in leaves(args[1], Tensor))
    return torch.Tag.dynamic_output_shape in func.tags


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from leaves(value, Tensor)
