"""vLLM's side of live weights: what its workers answer.

Start vLLM with ``worker_extension_cls="nvfp4_qat.vllm.LiveWeights"``; nothing of vLLM is patched. Each worker then
answers the calls below (``collective_rpc``), which `nvfp4_qat.Rollout` makes. From vLLM 0.26 `live_transfer` takes the
same calls as a weight-transfer engine. Arguments and answers are lists, strings and numbers, so they cross process
borders as JSON and without pickled code; tensors are handed over in the same process, in memory that both processes
map, or by a broadcast.

An update is ``begin``, any number of loads, ``commit``. It has a name that its sender made up: what a sender that was
given up still sends belongs to no update and is refused, so weights of two senders never mix.

A call never raises, because what a worker raises may end the engine: it answers ``{"error": ...}``, and the caller
raises.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import live_asleep
from .errors import UserError
from .live_broadcast import Group, meet
from .live_buckets import Places, tensors_in
from .live_changes import Layout
from .live_dummy import load_model
from .live_engines import release
from .live_memory import Shared, device_name, machine, process
from .live_started import place
from .live_worker import State, WorkerCode

SUPPORTED = ((0, 15), (0, 33))
"""The first and the last minor release of vLLM that this was tried with; docs/vllm.md says how."""

PROTOCOL = 6
"""Of the calls: both sides must have the same."""

logger = logging.getLogger(__name__)


def _answers(call: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(call)
    def answer(self: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            return {"ok": call(self, *arguments, **options)}
        except Exception as error:
            logger.exception("%s failed", call.__name__)
            return {"error": str(error), "kind": type(error).__name__}

    return answer


class LiveWeights:
    """Calls that take new weights, mixed into vLLM's worker.

    Each answers ``{"ok": …}``, or ``{"error": message, "kind": name of the exception}``.
    """

    def __new__(cls, *_: object, **__: object) -> Any:
        instance: Any = super().__new__(cls)
        if hasattr(cls, "load_model"):  # an extension may not define what workers have
            instance.load_model = functools.partial(load_model, instance)
        live_asleep.watch(instance)
        return instance

    def _nvfp4_model(self) -> nn.Module:
        worker: Any = self
        found: nn.Module = worker.model_runner.get_model()
        return found

    def _nvfp4_leave(self) -> None:
        """Give up the update that goes on, if there is one, and leave the trainer's group."""
        state: State | None = self.__dict__.get("_nvfp4_state")
        if state is not None:
            state.give_up()
            state.leave()

    def _nvfp4_code(self, model: nn.Module, device: torch.device) -> WorkerCode:
        from .live_vllm import VllmCode

        worker: Any = self
        return VllmCode(model, worker.vllm_config, device)

    @_answers
    def nvfp4_hello(self) -> dict[str, Any]:
        """Who and where this worker is, and what of its model is 4-bit."""
        _supported(_version("vllm"))
        state, worker = _state(self), self
        return {
            "protocol": PROTOCOL,
            "package": _version("nvfp4-qat"),
            "vllm": _version("vllm"),
            "rank": int(getattr(worker, "rank", 0)),
            "machine": machine(),
            "process": process(),
            "device": device_name(state.live.device),
            **place(getattr(worker, "vllm_config", None)),
            "quantized": state.code.quantized(state.live.model),
            **state.status(),
        }

    @_answers
    def nvfp4_status(self) -> dict[str, Any]:
        """Which weights this worker has; see `State.status`."""
        return _state(self).status()

    @_answers
    def nvfp4_begin(
        self,
        update: str,
        version: int,
        incoming: Sequence[Sequence[Any]],
        remember: bool = False,
        base: str | None = None,
    ) -> dict[str, Any]:
        """Start an update; one that was going on is given up. Nothing live is touched.

        Args:
            update: a name for it.
            version: of the weights that will come; larger than the last one that was committed.
            incoming: the manifest (`live_manifest.to_wire`).
            remember: whether later updates may bring only what changed.
            base: only changes since this update will come, which must be the last that the worker completed; None:
                everything.

        Returns:
            Under "drifted" the layers that somebody altered since, which will be asked for whole.
        """
        state = _state(self)
        state.asleep.check()
        if state.version is not None and version <= state.version:
            raise UserError(
                f"version {version} is not newer than {state.version}, which this engine has: weights go one way. "
                "Another trainer may be sending to it; a new Rollout asks for its version"
            )
        state.forget()
        state.watch()
        entries = state.announced(incoming)
        drifted: list[str] = []
        if base is None:
            state.live.begin(entries, remember)
        elif base != state.completed:
            raise UserError(
                f"changes since update {base} do not fit this worker, whose version {state.version} is of the update "
                f"{state.completed}"
            )
        else:
            state.live.begin_changes(entries)
            state.changing, drifted = Layout(entries), state.live.drifted
        state.update, state.coming = update, version
        return {"drifted": drifted, **state.status()}

    @_answers
    def nvfp4_load(self, update: str, named: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
        """Take tensors of this process."""
        state = _state(self)
        state.expect(update)
        return state.load(named)

    @_answers
    def nvfp4_load_shared(self, update: str, buffers: Sequence[tuple[str, Shared]], places: Places) -> dict[str, Any]:
        """Take tensors out of memory of another process; when this answers the memory may be used again.

        Args:
            update: its name.
            buffers: device names, and the buffer on each (`live_memory.share`).
            places: what lies where in the buffer.
        """
        state = _state(self)
        state.expect(update)
        return state.load(tensors_in(state.opened(buffers), places))

    @_answers
    def nvfp4_join(
        self, name: str, address: str, port: int, ranks: Mapping[str, int], timeout: float
    ) -> dict[str, Any]:
        """Meet the trainer in a group of processes, and leave the one before; see `live_broadcast`.

        Args:
            name: of the group.
            address, port: of the trainer's store.
            ranks: of all workers, by instance.
            timeout: seconds that a step may take.
        """
        state = _state(self)
        state.leave()
        store = meet(address, port, timeout)
        state.group = Group(store, ranks[state.instance], len(ranks) + 1, state.live.device, timeout)
        state.group_name = name
        return state.status()

    @_answers
    def nvfp4_load_broadcast(self, update: str, group: str, nbytes: int, places: Places) -> dict[str, Any]:
        """Take tensors out of a buffer that the trainer broadcasts.

        Args:
            update: its name.
            group: name of that in which the trainer broadcasts; in another one the sizes would not fit.
            nbytes: of the buffer.
            places: what lies where in the buffer.
        """
        state = _state(self)
        state.expect(update)
        if state.group is None or state.group_name != group:
            raise UserError("this worker is not in a group with the trainer, or left it after an error")
        try:
            buffer = state.received(state.group, nbytes)
        except OSError:
            state.leave()
            raise
        return state.load(tensors_in(buffer, places))

    @_answers
    def nvfp4_change(self, update: str) -> dict[str, Any]:
        """Make the changes that have come; the answer names under "needed" the tensors that must come whole."""
        state = _state(self)
        state.expect(update)
        return {"needed": sorted(state.change()), **state.status()}

    @_answers
    def nvfp4_expect_whole(self, update: str, names: Sequence[str]) -> dict[str, Any]:
        """Tensors that come whole although only changes were announced: some worker needs them."""
        state = _state(self)
        state.expect(update)
        state.live.expect_whole(names)
        return state.status()

    @_answers
    def nvfp4_commit(self, update: str) -> dict[str, Any]:
        """End an update for which everything has come."""
        state = _state(self)
        state.expect(update)
        state.live.commit()
        state.finished()
        state.notes.take(self, state.version, state.coming)
        state.version, state.completed, state.stale = state.coming, state.update, True
        state.extra_bytes = state.watched()
        state.forget()
        return state.status()

    @_answers
    def nvfp4_go_on(self, completed: str | None) -> dict[str, Any]:
        """Take note that the engine's caches were reset since an update, after which it is to go on.

        Args:
            completed: the name of that update; if there is another one now, its sender lets the engine go on.
        """
        state = _state(self)
        updating = state.update is not None and state.comparison is None
        if updating or state.completed != completed:
            raise UserError("another update began meanwhile: the engine goes on when that has ended")
        state.stale = False
        return state.status()

    @_answers
    def nvfp4_updates(self, since: int | None) -> dict[str, Any]:
        """What updates after a version found in flight; see `live_in_flight.Notes.since`."""
        return {"rank": int(getattr(self, "rank", 0)), "updates": _state(self).notes.since(since)}

    @_answers
    def nvfp4_abandon(self, update: str) -> dict[str, Any]:
        """Give up an update, if it is the one that goes on; what it has written stays."""
        state = _state(self)
        if state.update == update:
            state.give_up()
        return state.status()

    @_answers
    def nvfp4_verify(self) -> dict[str, Any]:
        """Which layers are not what the last complete update left, and the checksum of each; see `live_checks`."""
        state = _state(self)
        state.asleep.check()
        drifted, checksums = state.live.checks.compared() if state.live.whole else ([], {})
        layout = state.live.checks.layout()
        return {"drifted": drifted, "checksums": checksums, "layout": layout, **state.status()}

    @_answers
    def nvfp4_compare(self, update: str, version: int, incoming: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Start a comparison of the weights with others, which then come by loads; nothing live is touched.

        Args:
            update: a name for it.
            version: that the worker must have.
            incoming: as for an update.
        """
        state = _state(self)
        state.asleep.check()
        if state.update is not None:
            raise UserError("an update goes on: weights are compared when it has ended")
        if state.version != version:
            raise UserError(f"version {version} is to be compared, and this worker has {state.version}")
        state.comparison = state.live.comparison(state.announced(incoming))
        state.update = update
        return state.status()

    @_answers
    def nvfp4_compared(self, update: str) -> dict[str, Any]:
        """End a comparison for which everything has come; under "different" the layers that are."""
        state = _state(self)
        state.expect(update)
        if state.comparison is None:
            raise UserError("this is an update, not a comparison")
        different = state.comparison.different()
        state.forget()
        return {"different": different, **state.status()}

    @_answers
    def nvfp4_lost(self) -> dict[str, Any]:
        """The weights are about to go, as when sleeping at level 2: only a complete update brings them back."""
        state = _state(self)
        if "weights" not in state.asleep.parts:  # else vLLM leaves them as they are
            state.live.keep()
        return state.status()

    @_answers
    def nvfp4_wake_up(self, tags: Sequence[str]) -> dict[str, Any]:
        """Wake up a part of the memory while the scheduler rests, which vLLM before 0.24 would let go on."""
        state, worker = _state(self), self
        if wanted := sorted(state.asleep.parts.intersection(tags)):
            live_asleep.wake_up(worker, wanted)
        return state.status()

    def _nvfp4_sleeps(self, level: int) -> dict[str, Any]:
        """What is to be done before the worker sleeps, of its own accord or not; answers like a call."""
        answer = self.nvfp4_lost() if level == 2 else self.nvfp4_status()  # makes its state while there are weights
        state: State | None = self.__dict__.get("_nvfp4_state")
        if state is not None:
            state.give_up()
        return answer


def _supported(found: str | None) -> None:
    """Refuse a vLLM that this was never tried with."""
    number = release(found)
    if number is None:
        return  # built from source without a version: whoever does so knows
    if not SUPPORTED[0] <= number <= SUPPORTED[1]:
        first, last = (".".join(map(str, version)) for version in SUPPORTED)
        raise UserError(
            f"vLLM {found} is not supported: live weights were tried with {first} to {last}; install one of these, or "
            "a newer nvfp4-qat"
        )


def _state(worker: Any) -> State:
    state = worker.__dict__.get("_nvfp4_state")
    if state is None:
        state = worker.__dict__["_nvfp4_state"] = State(worker)
    found: State = state
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
