"""Tapes of equal layers as one CUDA graph, which the host launches once instead of operation by operation.

A model has few kinds of layers: those whose tapes have the same `live_repeat.Tape.signature`. The second time that one
of a kind is to be repeated, its tape is captured. From then on parameters are copied to where the graph reads them, and
its results are valid until the next graph runs, so they must be copied away before.

What is captured must not make the host wait: a trial under CUDA's synchronization checks finds that out first, because
a capture that fails may leave PyTorch's random number generator unusable. Then the first run of a graph is compared
with the tape's, bit by bit. A kind that fails at any of this is repeated from its tapes for good.

Memory: graphs run one after the other, so all of them take what they need in between from one pool, and read their
parameters from one piece of memory if it is large enough. Kinds with more than `LARGEST` bytes of parameters are not
captured, as their operations take the device longer than the host, and none is once `MOST` bytes are held.
"""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .live_repeat import Repeated, Tape, same_bits

logger = logging.getLogger(__name__)

LARGEST = 1 << 27
"""Bytes of a layer's parameters."""

MOST = 1 << 29
"""Bytes that all graphs may hold before the last one is made."""

ALIGNMENT = 256
"""Bytes; parameters begin at multiples of it."""

Run = Callable[[], Any]


class Capture(Protocol):
    """Makes graphs; tests have one that needs no GPU."""

    nbytes: int
    """Bytes of GPU memory that its graphs hold."""

    def clear(self) -> None:
        """None of its graphs is there any more."""

    def trial(self, run: Run) -> None:
        """Run something once as a graph would; raises if the host waits in it."""

    def graph(self, run: Run) -> tuple[Run, Any]:
        """Capture something; what repeats it, and what it returned, which a repetition fills anew."""


class CudaCapture:
    """Graphs of a CUDA device in a pool of memory that all of them share.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool, self.nbytes = device, torch.cuda.graph_pool_handle(), 0
        self._side = torch.cuda.Stream(device)

    def clear(self) -> None:
        self._pool, self.nbytes = torch.cuda.graph_pool_handle(), 0

    def trial(self, run: Run) -> None:
        before = torch.cuda.get_sync_debug_mode()
        with self._aside():
            _set_sync_debug_mode("error")
            try:
                run()
            finally:
                _set_sync_debug_mode(before)

    def graph(self, run: Run) -> tuple[Run, Any]:
        # Not `torch.cuda.graph`: it collects all of Python's garbage first, which takes longer than a whole sync.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize()
                before = torch.cuda.memory_reserved()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.stream(self._side):
                    graph.capture_begin(self._pool, capture_error_mode="thread_local")
                    try:
                        made = run()
                    finally:
                        graph.capture_end()
                self.nbytes += max(0, torch.cuda.memory_reserved() - before)
        finally:
            if collects:
                gc.enable()
        return graph.replay, made

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that captures, after what is queued on the current one, which goes on after that."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                yield
        finally:
            current.wait_stream(self._side)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says once that it does not see everything
        torch.cuda.set_sync_debug_mode(mode)


@dataclass
class _Kind:
    """Tapes that do the same."""

    uses: int = 0
    tape: Tape | None = None
    """Whose graph it is; it holds what the graph reads besides parameters."""
    inputs: Mapping[str, Tensor] | None = None
    replay: Run | None = None
    made: Repeated | None = None
    refused: bool = False


class Graphs:
    """Repeats tapes, by graphs where there are some.

    Args:
        device: of the parameters.
        capture: makes graphs; None: what there is for the device, which on a CPU is nothing.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        self._device = device
        self._capture = CudaCapture(device) if capture is None and device.type == "cuda" else capture
        self._kinds: dict[Hashable, _Kind] = {}
        self._of: weakref.WeakKeyDictionary[Tape, _Kind] = weakref.WeakKeyDictionary()
        self._memory: list[Tensor] = []
        """What parameters are copied to; several pieces if a larger one was needed later."""

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(kind.replay is not None for kind in self._kinds.values())

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that they hold."""
        return sum(t.nbytes for t in self._memory) + (0 if self._capture is None else self._capture.nbytes)

    def clear(self) -> None:
        """Free all of them; those that are needed again are made again."""
        self._kinds.clear()
        self._of.clear()
        self._memory.clear()
        if self._capture is not None:
            self._capture.clear()

    def run(self, tape: Tape, parameters: Mapping[str, Tensor]) -> Repeated | None:
        """`Tape.run`, which leaves the parameters as they are.

        Returns:
            Results that are valid until the next call.
        """
        kind = self._kind(tape)
        if kind is None or not tape.takes(parameters):
            return from_tape(tape, parameters)
        kind.uses += 1
        if kind.replay is None:
            if kind.uses < 2 or kind.refused or self.nbytes > MOST:
                return from_tape(tape, parameters)
            return self._captured(kind, tape, parameters)
        return _again(kind, parameters)

    def _kind(self, tape: Tape) -> _Kind | None:
        if self._capture is None:
            return None
        kind = self._of.get(tape)
        if kind is None:
            possible = tape.nbytes <= LARGEST and not tape.waits and len(tape) > 0
            signature = tape.signature() if possible else None
            kind = _Kind(refused=True) if signature is None else self._kinds.setdefault(signature, _Kind())
            self._of[tape] = kind
        return kind

    def _captured(self, kind: _Kind, tape: Tape, parameters: Mapping[str, Tensor]) -> Repeated | None:
        """Make a kind's graph. The results are those of the tape."""
        assert self._capture is not None
        found = from_tape(tape, parameters)
        if found is None:
            return None
        with torch.inference_mode(False):
            inputs = self._inputs(parameters)

        def run() -> Repeated | None:
            return tape.run(inputs)

        try:
            self._capture.trial(run)
            replay, made = self._capture.graph(run)
            trial = _Kind(1, tape, inputs, replay, made)
            if not _same(found, _again(trial, parameters)):
                raise RuntimeError("it gives other bits than the operations one by one")
        except Exception as error:  # whatever CUDA says about operations that cannot be captured
            kind.refused = True
            logger.info("layers of a kind are repeated operation by operation: %s", error)
        else:
            kind.tape, kind.inputs, kind.replay, kind.made = tape, inputs, replay, made
        return found

    def _inputs(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors like the parameters, in memory that other graphs use too."""
        at, size = {}, 0
        for name, p in parameters.items():
            at[name] = size
            size += -(-_extent(p) // ALIGNMENT) * ALIGNMENT
        memory = next((t for t in self._memory if t.numel() >= size), None)
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._memory.append(memory)
        inputs = {}
        for name, p in parameters.items():
            view = torch.empty(0, dtype=p.dtype, device=self._device)
            start = at[name] // p.element_size()
            inputs[name] = view.set_(memory.untyped_storage(), start, p.shape, p.stride())
        with torch.no_grad():
            for name, p in parameters.items():
                inputs[name].copy_(p)
        return inputs


def _again(kind: _Kind, parameters: Mapping[str, Tensor]) -> Repeated:
    assert kind.inputs is not None and kind.replay is not None and kind.made is not None
    with torch.no_grad():
        for name, held in kind.inputs.items():
            held.copy_(parameters[name].detach())
        kind.replay()
        same = kind.made.same
        return Repeated(kind.made.results, None if same is None else same.clone())


def from_tape(tape: Tape, parameters: Mapping[str, Tensor]) -> Repeated | None:
    """`Tape.run`, which leaves the parameters as they are: the engine's code may need them afterwards."""
    if tape.changes_parameters:
        parameters = {name: p.detach().clone() for name, p in parameters.items()}
    return tape.run(parameters)


def _same(a: Repeated, b: Repeated) -> bool:
    """Whether two repetitions gave the same bits."""
    pairs = zip([*a.results, *_flag(a)], [*b.results, *_flag(b)], strict=True)
    return all(same_bits(x, y) for x, y in pairs)


def _flag(repeated: Repeated) -> list[Tensor]:
    return [] if repeated.same is None else [repeated.same]


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (
        (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size() if t.numel() else 0
    )
