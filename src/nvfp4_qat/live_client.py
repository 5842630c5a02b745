"""`Client`: one engine as the trainer knows it, and the calls of an update to it.

What an engine's workers say is checked here: that they have the extension and speak this version's protocol, that all
of them are at one version, that they quantize what the plan says, and that none of them reports an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import MismatchError, UserError
from .live_engines import Engine, InFlight, release
from .live_replies import BACKEND, Transfer
from .live_started import Started
from .live_tokens import TokenVersions
from .plan import QuantPlan

EXTENSION = "nvfp4_qat.vllm.LiveWeights"

NO_CONNECTOR = (0, 24)
"""The minor release of vLLM from which to reset a KV connector that is not there counts as done."""

RESTS_ASLEEP = (0, 24)
"""That from which the scheduler rests until all memory is awake; 0.20.2 was read to go on with the first wake-up."""


class Client:
    """An engine, and what its workers said.

    Args:
        engine: connected; it may be another one behind the same address later on.
        plan: what it is to quantize.
        in_flight: what syncs do with requests that are being answered.
        address: of this machine, as the workers reach it; None: found out.

    Raises:
        UserError: the engine was not started for live weights, or cannot be paused.
        MismatchError: another version of this package is there, or it quantizes other layers.
    """

    def __init__(
        self, engine: Engine, plan: QuantPlan, in_flight: InFlight = "abort", address: str | None = None
    ) -> None:
        self.engine, self.plan, self._in_flight = engine, plan, in_flight
        self._transfer = Transfer(engine, address)
        self._way: Engine | Transfer = engine
        """How calls get to the workers."""
        self._started: Started | None = None
        self.workers: list[dict[str, Any]] = []
        """What each worker said of itself."""
        self.restarted = False
        """Whether it was started anew since its last complete update from here."""
        self.tokens = TokenVersions(engine.name)
        self.drifted: list[str] = []
        """Layers that somebody had altered when the last update of changes began."""
        self.doubtful = False
        """Whether its weights were found to be others than they must be, so that the next update must bring all."""
        self.greet()

    @property
    def version(self) -> int | None:
        """Of the weights that all workers had when last asked; None: those of the start, or of several versions."""
        versions = {worker["version"] if worker["whole"] else None for worker in self.workers}
        return versions.pop() if len(versions) == 1 else None

    @property
    def newest(self) -> int:
        """The largest version that a worker ever completed."""
        return max(worker["version"] or 0 for worker in self.workers)

    def greet(self) -> None:
        """Get to know the workers, and compare what they really hold in 4 bits with the plan."""
        from .vllm import PROTOCOL

        workers = self._checked("nvfp4_hello", self._hello())
        others = sorted({str(worker.get("package")) for worker in workers if worker.get("protocol") != PROTOCOL})
        if others:
            raise MismatchError(
                f"{self.engine.name} has nvfp4-qat {', '.join(others)}, which cannot talk to this version: install the "
                "same version on both sides"
            )
        if (sharing := max(worker["sharing"] for worker in workers)) > 1:
            raise UserError(
                f"{self.engine.name} is one of {sharing} data-parallel engines of a model with experts, each of which "
                "computes some experts for all, so they would have to be updated as one; that is not supported: start "
                "each without data_parallel_size (tensor_parallel_size and enable_expert_parallel may be used)"
            )
        self.engine.suits(workers[0]["vllm"], self._in_flight)
        self._audit(workers)
        self.restarted = bool(self.workers) and _instances(self.workers) != _instances(workers)
        if self.restarted:
            self.tokens.clear()
        self.workers = workers
        self._take_updates()

    def _hello(self) -> list[dict[str, Any]]:
        """What the workers say, by the extension or by the weight-transfer engine, whichever the engine has."""
        started = self._started = self.engine.started()
        if started is not None:
            self._suits(started)
        with_backend = started is not None and started.extension != EXTENSION and started.backend == BACKEND
        self._way = self._transfer if with_backend else self.engine
        try:
            answers = self._way.call("nvfp4_hello")
        except (UserError, OSError):
            raise
        except Exception as error:  # in vLLM's words: the method is not there
            raise self._not_for_live_weights(f"{type(error).__name__}: {error}") from error
        if not answers or not all(isinstance(answer, dict) for answer in answers):
            raise self._not_for_live_weights(f"it answered {str(answers)[:200]}")
        return answers

    def _suits(self, started: Started) -> None:
        """Refuse an engine whose workers do not take calls, before any is made; see `live_started`."""
        if not started.extension and started.backend != BACKEND:
            backend = "" if started.backend is None else f", and with the weight-transfer backend {started.backend!r}"
            raise self._not_for_live_weights(f"it was started without a worker extension{backend}")
        if started.sleeps and started.extension != EXTENSION and started.backend == BACKEND:
            raise UserError(
                f"{self.engine.name} has enable_sleep_mode, and a weight-transfer engine does not see when it sleeps: "
                f'start it with worker_extension_cls="{EXTENSION}" instead of weight_transfer_config'
            )
        if started.replicas > 1:
            raise UserError(
                f"{self.engine.name} has {started.replicas} replicas (data_parallel_size), and calls bring the answers "
                "of the first one only: start a server for each, without data_parallel_size, and connect a list of them"
            )

    def _not_for_live_weights(self, reason: str) -> UserError:
        return UserError(
            f"{self.engine.name} does not take live weights ({reason}): start vLLM with "
            f'worker_extension_cls="{EXTENSION}" (vllm serve --worker-extension-cls {EXTENSION}), or from vLLM 0.26 '
            f'with weight_transfer_config={{"backend": "{BACKEND}"}}, and install nvfp4-qat where its workers run'
        )

    def _audit(self, workers: list[dict[str, Any]]) -> None:
        """Compare what the engine really holds in 4 bits with the plan."""
        try:
            self.plan.audit({name for worker in workers for name in worker["quantized"]})
        except MismatchError as error:
            raise MismatchError(f"{self.engine.name} (there) and the plan (here) differ; {error}") from None

    def refresh(self) -> None:
        """Ask for the engine's version; one that was started anew is got to know anew."""
        try:
            answers = self._way.call("nvfp4_status")
        except (UserError, OSError):
            raise
        except Exception:  # a new engine without the extension: the greeting says so
            answers = []
        if _instances(a["ok"] for a in answers if isinstance(a, dict) and "ok" in a) != _instances(self.workers):
            self.greet()
        else:
            self._note(self._checked("nvfp4_status", answers))
            if self.newest != (self.tokens.newest or 0):  # by another trainer
                self._take_updates()

    def call(self, method: str, *arguments: Any) -> list[dict[str, Any]]:
        """Call every worker; raise what any of them reports."""
        return self._checked(method, self._way.call(method, *arguments))

    def begin(
        self, update: str, version: int, wire: list[list[Any]], remember: bool = False, base: str | None = None
    ) -> None:
        """Announce an update; the engine goes on answering with what it has."""
        self._awake()
        answers = self.call("nvfp4_begin", update, version, wire, remember, base)
        self.drifted = sorted({layer for answer in answers for layer in answer["drifted"]})

    def has(self, update: str | None) -> bool:
        """Whether the engine has just the weights of this update, and remembers what changes since it need."""
        if update is None or self.version is None or self.doubtful:
            return False
        return all(w.get("completed") == update and w.get("remembers") for w in self.workers)

    def change(self, update: str) -> list[str]:
        """Have the changes made that were sent; names of tensors that must be sent whole."""
        needed = sorted({name for answer in self.call("nvfp4_change", update) for name in answer["needed"]})
        if needed:
            self.call("nvfp4_expect_whole", update, needed)
        return needed

    def pause(self, in_flight: InFlight) -> None:
        """Have the engine answer nothing."""
        self.engine.pause(in_flight)

    def commit(self, update: str, version: int) -> None:
        """Complete an update, and only if every worker has all of it let the engine go on."""
        self._note(self.call("nvfp4_commit", update))
        if self.version != version:
            raise MismatchError(f"its workers have versions {[w['version'] for w in self.workers]}, not all {version}")
        self._take_updates(self.engine.scheduled())
        self._reset(update)
        if not (self._asleep and self._goes_on_early):
            self.engine.resume()
        self.restarted = self.doubtful = False

    def _reset(self, update: str | None) -> None:
        """Have the engine forget what the weights before an update computed; nothing else may let it go on."""
        self.engine.reset_cache(self._connector)
        self._note(self.call("nvfp4_go_on", update))

    @property
    def _connector(self) -> bool:
        """Whether a KV connector is to be reset too. Where there is none, vLLM before 0.24 calls that a failure."""
        return not self._older(NO_CONNECTOR) if self._started is None else self._started.connector

    @property
    def _goes_on_early(self) -> bool:
        """Whether the scheduler would go on although some of the engine's memory sleeps."""
        return self._older(RESTS_ASLEEP)

    def _older(self, than: tuple[int, int]) -> bool:
        return (release(self.workers[0]["vllm"]) or than) < than

    def _take_updates(self, scheduled: Mapping[str, int] | None = None) -> None:
        """Take note of what was in flight at updates; before an engine goes on, so that no response comes earlier."""
        self.tokens.take(self.call("nvfp4_updates", self.tokens.newest), scheduled)

    def verify(self) -> list[dict[str, Any]]:
        """What each worker says of its weights; `vllm.LiveWeights.nvfp4_verify`.

        Raises:
            UserError: the weights are asleep, incomplete, or those that the engine was started with.
        """
        self.refresh()
        self._awake()
        if not all(worker["whole"] for worker in self.workers):
            raise UserError(f"{self.engine.name} has incomplete weights: sync before you verify")
        if self.version is None:
            raise UserError(f"{self.engine.name} has the weights that it was started with: sync before you verify")
        return self.call("nvfp4_verify")

    def abandon(self, update: str) -> None:
        """Let the workers free what belongs to an update, if they can be reached."""
        with contextlib.suppress(Exception):
            self._note(self.call("nvfp4_abandon", update))

    def sleep(self, level: int) -> None:
        """Free the engine's GPU memory; at level 2 its weights are gone."""
        if level == 2:
            self._note(self.call("nvfp4_lost"))
        self.engine.sleep(level)

    def wake_up(self, tags: Sequence[str] | None) -> None:
        """Give the engine its memory again; with the last of it the scheduler goes on, so its weights must be whole."""
        self.refresh()
        left = set() if tags is None else self._asleep - set(tags)
        if not left:
            self._may_go_on()
        if not self._goes_on_early:
            self.engine.wake_up(tags)
        elif left:
            self.call("nvfp4_wake_up", sorted(tags or ()))
        else:
            self.engine.wake_up(None)  # of what was woken up by that call it does not know

    @property
    def _asleep(self) -> set[str]:
        """What of its memory sleeps, by whomever it was put to sleep, when last asked."""
        return {part for worker in self.workers for part in worker["asleep"]}

    def _awake(self) -> None:
        if "weights" in self._asleep:
            raise UserError(
                f"{self.engine.name} sleeps, and its weights with it: call wake_up first, with ['weights'] for a sync"
            )

    def _may_go_on(self) -> None:
        """Refuse to let the engine answer from a mixture, and have it forget old results that it may still hold."""
        if any(worker["updating"] for worker in self.workers):
            raise UserError(
                f"{self.engine.name} would go on in the middle of an update: let it end, or sync if its sender is gone"
            )
        if not all(worker["whole"] for worker in self.workers):
            raise UserError(
                f"{self.engine.name} would go on with incomplete weights: call wake_up(['weights']) and sync first, "
                "and only then wake up the rest"
            )
        if any(worker["stale"] for worker in self.workers):
            self._reset(self.workers[0]["completed"])

    def close(self) -> None:
        """Listen to no worker any more, until the next call."""
        self._transfer.close()

    def _note(self, answers: list[dict[str, Any]]) -> None:
        status = {answer["instance"]: answer for answer in answers}
        for worker in self.workers:
            worker.update(status.get(worker["instance"], {}))

    def _checked(self, method: str, answers: list[Any]) -> list[dict[str, Any]]:
        errors: dict[str, None] = {}
        for answer in answers:
            if not isinstance(answer, dict) or not ({"ok", "error"} & answer.keys()):
                errors[f"{method} was answered with {str(answer)[:200]}"] = None
            elif "error" in answer:
                errors[f"{answer['error']} ({answer.get('kind')})"] = None
        if errors:
            raise MismatchError("; ".join(errors))
        return [answer["ok"] for answer in answers]


def _instances(workers: Iterable[dict[str, Any]]) -> set[str]:
    return {worker["instance"] for worker in workers}
