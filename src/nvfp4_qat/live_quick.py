"""Quicker ways to process a layer than its engine's own code, each proved on the layer before it is used.

The first update of a layer is processed by the engine's code, and noted (`live_tape`), or done besides by a faster
routine that `EngineCode.quicker` has for it. The second is done both ways, and so are made-up parameters that differ
everywhere, since weights of two updates hardly do. Only if both ways give the same bits is the quick one used from the
third update on, by a CUDA graph where there is one (`live_graphs`). It is given up for good when they differ. When a
number that the engine's code looks at has become another one, such as a scale factor, that update goes the long way and
is noted anew; who takes a quick way is told of that by the device, so as not to wait for it at each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .live_graphs import Graphs, from_tape
from .live_recipe import EngineCode
from .live_repeat import CannotRepeatError, Tape, same_bits
from .live_tape import Recorder
from .live_twin import Change, Path, Twin, tensors

logger = logging.getLogger(__name__)

Parameters = Mapping[str, nn.Parameter]
Routine = Callable[[Parameters], dict[str, Tensor]]
Attempt = Callable[[Parameters], list[Change]]


@dataclass
class Part:
    """What of a layer's processing hangs on some of its parameters alone.

    Args:
        tape: takes these.
        live: tensors that its results go to.
    """

    tape: Tape
    live: Sequence[Tensor]


@dataclass
class _Way:
    """A tape, and where its results go."""

    tape: Tape
    targets: Sequence[tuple[Path, Tensor]]
    parts: dict[str, Part]
    """By packed parameter, what hangs on it alone; under "" what hangs on none. Empty: they are mixed."""
    proved: bool = False


class Made(NamedTuple):
    """What a quick way gives.

    Args:
        changes: valid until the next quick way is gone.
        same: bool ``[]`` on the device; if False, they are worth nothing. None: they are right.
    """

    changes: list[Change]
    same: Tensor | None


class Quick:
    """The quick ways of a model's layers.

    Args:
        code: the engine's.
        graphs: repeat what they can.
    """

    def __init__(self, code: EngineCode, graphs: Graphs) -> None:
        self._code, self.graphs = code, graphs
        self._ways: dict[str, _Way | None] = {}
        """By layer; None: there is none."""
        self.taken = 0
        """How often a quick way was taken."""

    @property
    def proved(self) -> int:
        """How many layers have a quick way."""
        return sum(way is not None and way.proved for way in self._ways.values())

    @property
    def refused(self) -> list[str]:
        """Layers that are always processed by the engine's own code."""
        return sorted(name for name, way in self._ways.items() if way is None)

    def parts(self, name: str) -> Mapping[str, Part]:
        """A layer's processing in parts, if it has a proved quick way that falls into some.

        Returns:
            By the name of each packed parameter the part that repacks it, which looks at no numbers; under "" what
            is made from all other parameters. Empty: there is no such way.
        """
        way = self._ways.get(name)
        return {} if way is None or not way.proved else way.parts

    def changes(self, name: str, layer: nn.Module, parameters: Parameters, alone: bool = True) -> Made | None:
        """What processing would change, if there is a proved quick way and it can be gone.

        Args:
            name: of the layer.
            layer: the live one.
            parameters: loaded; they stay as they are, as the engine's code may have to process them yet.
            alone: whether the result is used before the next one is asked for.
        """
        way = self._ways.get(name)
        if way is None or not way.proved:
            return None
        if not self.in_place(name, layer):
            del self._ways[name]
            return None
        new = (self.graphs.run if alone else from_tape)(way.tape, parameters)
        if new is None:
            del self._ways[name]
            return None
        self.taken += 1
        changes = [Change(path, live, t) for (path, live), t in zip(way.targets, new.results, strict=True)]
        return Made(changes, new.same)

    def in_place(self, name: str, layer: nn.Module) -> bool:
        """Whether what a layer's quick way gives would still go to where the layer has it."""
        way = self._ways.get(name)
        return way is not None and all(_same_place(_found(layer, path), live) for path, live in way.targets)

    def missed(self, name: str) -> None:
        """A number was another one: the quick way that was taken did not lead anywhere."""
        self.taken -= 1
        self._ways.pop(name, None)

    def watched(
        self,
        name: str,
        layer: nn.Module,
        twin: Twin,
        parameters: Parameters,
        loaded: Parameters,
        process: Callable[[], list[Change]],
        attempt: Attempt,
        alone: bool = True,
    ) -> list[Change]:
        """Process as the engine does, and learn from it.

        Args:
            name: of the layer.
            layer: the live one.
            twin: to be processed.
            parameters: of the twin; processing may give them other memory.
            loaded: the same, which keep their form.
            process: does so, and says what changes.
            attempt: does so with other parameters on another twin, for nothing but to see what would change.
            alone: whether no other layer has one of the parameters; else processing must not write into them, or the
                other layer would be processed with what this one left.
        """
        if name not in self._ways:
            return self._learned(name, layer, twin, parameters, process, alone)
        way = self._ways[name]
        if way is None:
            return process()
        before = _repeated(way.tape, parameters)
        if before is None:
            return self._learned(name, layer, twin, parameters, process, alone)
        changes = process()
        if _covers(way.targets, before, changes) and _with_others(way, loaded, attempt):
            way.proved = True
        else:
            self._give_up(name, "it gives other bits than the engine's code")
        return changes

    def _learned(
        self,
        name: str,
        layer: nn.Module,
        twin: Twin,
        parameters: Parameters,
        process: Callable[[], list[Change]],
        alone: bool,
    ) -> list[Change]:
        own = {id(p) for p in parameters.values()}
        packed = {name for name, p in parameters.items() if p.dtype is torch.uint8}  # before processing changes them
        others = [t for t in tensors(twin.layer, self._code.ours, scratch=True).values() if id(t) not in own]
        recorder = Recorder(parameters, others)
        routine = self._code.quicker(layer)
        if routine is None:
            with recorder:
                changes = process()
            targets, new = [(c.path, c.live) for c in changes], [c.new for c in changes]
        else:
            targets, new = self._tried(routine, layer, recorder, parameters)
            changes = process()
            if not _covers(targets, new, changes):
                self._give_up(name, "a faster routine gives other bits than the engine's code")
                return changes
        try:
            tape = recorder.tape(new)
            if tape.changes_parameters and not alone:
                raise CannotRepeatError("it writes into a parameter that another layer has too")
            parts = {} if tape.changes_parameters else _parts(recorder, targets, new, packed)
            self._ways[name] = _Way(tape, targets, parts)
        except CannotRepeatError as error:
            self._give_up(name, str(error))
        return changes

    @staticmethod
    def _tried(
        routine: Routine, layer: nn.Module, recorder: Recorder, parameters: Parameters
    ) -> tuple[list[tuple[Path, Tensor]], list[Tensor]]:
        """Where a routine's results go, and these; nothing if it is not for this layer."""
        try:
            with torch.no_grad(), recorder:
                results = routine(parameters)
        except Exception as error:  # whatever an engine's code raises for what it was not made for
            logger.info("a faster routine failed: %s", error)
            return [], []
        live = {(name,): _found(layer, (name,)) for name in results}
        return [(path, t) for path, t in live.items() if t is not None], [
            results[path[0]] for path, t in live.items() if t is not None
        ]

    def _give_up(self, name: str, reason: str) -> None:
        self._ways[name] = None
        logger.info("%s is always processed by the engine's own code: %s", name, reason)


def _with_others(way: _Way, parameters: Parameters, attempt: Attempt) -> bool:
    """Whether a quick way gives the bits of the engine's code with made-up parameters too."""
    if not all(p.is_contiguous() for p in parameters.values()):
        return False
    for few in (False, True):
        made_up = {name: _made_up(p, few) for name, p in parameters.items()}
        new = _repeated(way.tape, made_up)
        if new is None:
            continue  # a number that the code looks at is another one for these
        try:
            changes = attempt(made_up)
        except Exception as error:  # whatever an engine's code raises for numbers that it does not expect
            logger.info("made-up parameters failed: %s", error)
            continue
        return _covers(way.targets, new, changes)
    return False


def _made_up(p: nn.Parameter, few: bool) -> nn.Parameter:
    """Random codes; of numbers the same in another order, half of them halved, so that the largest stays what it is.

    Args:
        few: whether float32 numbers, which are global scales, stay as they are.
    """
    g = torch.Generator(p.device).manual_seed(0)
    made: Any = p.detach().clone()
    if p.dtype is torch.uint8:
        made.random_(0, 256, generator=g)
    elif p.dtype.is_floating_point and not (few and p.dtype is torch.float32):
        flat = made.view(-1)
        flat.copy_(
            flat.view(_SAME_SIZE[p.element_size()])[torch.randperm(p.numel(), generator=g, device=p.device)].view(
                p.dtype
            )
        )
        half = torch.rand(p.numel(), generator=g, device=p.device) < 0.5
        wide = flat.float()
        flat.copy_(torch.where(half & (wide != wide.max()), wide / 2, wide).to(p.dtype))
    made.__class__, made.__dict__ = p.__class__, dict(p.__dict__)
    found: nn.Parameter = made
    return found


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _parts(
    recorder: Recorder, targets: Sequence[tuple[Path, Tensor]], new: Sequence[Tensor], packed: set[str]
) -> dict[str, Part]:
    of: dict[str, list[int]] = {name: [] for name in (*sorted(packed), "")}
    for i, t in enumerate(new):
        needed = recorder.depends(t)
        if needed & packed and len(needed) > 1:
            return {}
        of[next(iter(needed)) if needed & packed else ""].append(i)
    return {
        name: Part(
            recorder.tape([new[i] for i in chosen], questions=not name, part=True), [targets[i][1] for i in chosen]
        )
        for name, chosen in of.items()
    }


def _covers(targets: Iterable[tuple[Path, Tensor]], new: Sequence[Tensor], changes: Iterable[Change]) -> bool:
    """Whether results are those of the engine's code; what is not among them must not change at all."""
    quick = {(live.data_ptr(), live.shape): t for (_, live), t in zip(targets, new, strict=True)}
    left = set(quick)
    for change in changes:
        place = (change.live.data_ptr(), change.live.shape)
        left.discard(place)
        if not same_bits(quick.get(place, change.live), change.new):
            return False
    return not left


def _repeated(tape: Tape, parameters: Parameters) -> list[Tensor] | None:
    found = from_tape(tape, parameters)
    return None if found is None or found.same is not None and not bool(found.same) else found.results


def _same_place(found: Any, live: Tensor) -> bool:
    return isinstance(found, Tensor) and (found.data_ptr(), found.dtype) == (live.data_ptr(), live.dtype)


def _found(layer: nn.Module, path: Path) -> Any:
    """What is at a path now."""
    value: Any = layer
    for name in path:
        if isinstance(value, nn.Module):
            value = next(
                (d[name] for d in (value._parameters, value._buffers, value._modules, value.__dict__) if name in d),
                None,
            )
        elif isinstance(value, Mapping):
            value = next((v for k, v in value.items() if str(k) == name), None)
        elif isinstance(value, (list, tuple)):
            value = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
        else:
            value = getattr(value, name, None)
        if value is None:
            return None
    return value
