"""`TokenVersions`: which weights made each token of a response that an update may have come into the middle of.

An engine's workers say at every update how many tokens each request in flight had (`live_in_flight`). The tokens up to
there were made by the version before it. A request that was in flight at no update had one version throughout, but
which one only time tells: when its tokens came, or what its caller knows.

What cannot be known is raised, never guessed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

from .errors import UserError
from .live_in_flight import UPDATES

Version = int | None
"""None: of the weights that the engine was started with."""

UNKNOWN: EllipsisType = ...


@dataclass
class _Request:
    """What is known of a request that was in flight at an update.

    Args:
        after: what the last update that found it brought.
        last: the number of that update.
        spans: up to which token which version; ascending.
    """

    after: Version
    last: int
    spans: list[tuple[int, Version | EllipsisType]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.spans[-1][0] if self.spans else 0


@dataclass(frozen=True)
class _Update:
    number: int
    version: Version
    before: Version
    at: float
    complete: bool
    """Whether no request in flight was missed."""
    why: str


class TokenVersions:
    """Of the requests of one engine.

    Args:
        name: of the engine, in messages.
    """

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget all: the engine was started anew."""
        with self._lock:
            self._requests: dict[str, _Request] = {}
            self._updates: list[_Update] = []

    @property
    def newest(self) -> Version:
        """The version of the last update that was taken."""
        return self._updates[-1].version if self._updates else None

    def take(self, workers: Sequence[Mapping[str, Any]], scheduled: Mapping[str, int] | None = None) -> None:
        """Take what workers say of updates that were not taken yet.

        Args:
            workers: the answers of `vllm.LiveWeights.nvfp4_updates`. Tokens are counted by the one of the highest rank,
                as in a pipeline the last stage samples. When an update was, says that of the lowest: it is on the
                machine of the scheduler, by whose clock tokens come.
            scheduled: of the last of them, what the scheduler says (`live_in_flight.scheduled`).
        """
        ranks = sorted(workers, key=lambda worker: int(worker["rank"]))
        updates = ranks[-1]["updates"] if ranks else []
        at = {update["version"]: update["at"] for update in (ranks[0]["updates"] if ranks else [])}
        with self._lock:
            for update in updates:
                told = {**update, "at": at.get(update["version"], update["at"])}
                self._take(told, scheduled if update is updates[-1] else None)

    def of(
        self,
        request: str,
        count: int,
        choice: int = 0,
        times: tuple[float, float] | None = None,
        ended: Version | EllipsisType = UNKNOWN,
    ) -> list[Version]:
        """The version that made each token of a response.

        Args:
            request: its id, as the caller knows it.
            count: of its tokens.
            choice: which of the responses to this request.
            times: when its first and its last token came, by the engine's ``time.monotonic``; None: not known.
            ended: the engine's version when the response ended; left out: not known.

        Raises:
            UserError: it cannot be told.
        """
        with self._lock:
            known = self._find(request, choice)
            spans = [] if known is None else [(end, version) for end, version in known.spans if end < count]
            if known is not None and known.count >= count:
                spans.append((count, next(version for end, version in known.spans if end >= count)))
            elif count:
                rest = self._never_seen(request, times, ended) if known is None else self._rest(known, times, ended)
                spans.append((count, rest))
        found: list[Version] = []
        for end, version in spans:
            if isinstance(version, EllipsisType):
                raise UserError(
                    f"which version made the tokens {len(found)} to {end - 1} of {request!r} is not known: "
                    f"{self._name} was updated while it did not list this request{self._why()}"
                )
            found += [version] * (end - len(found))
        return found

    def _take(self, told: Mapping[str, Any], scheduled: Mapping[str, int] | None) -> None:
        before: Version = told["before"]
        number = self._updates[-1].number + 1 if self._updates else 0
        gap = before != self.newest  # another trainer's updates, more than the workers remember
        tokens: dict[str, Sequence[int]] = dict(told["tokens"] or {})
        tokens.update({name: (count, count) for name, count in (scheduled or {}).items()})
        complete = told["tokens"] is not None and (told["preempted"] or scheduled is not None)
        all_before = not gap and (not self._updates or self._updates[-1].complete)
        for name, (count, taken_up) in tokens.items():
            known = self._requests.get(name)
            if known is None or count < known.count:  # the id is used again
                known = self._requests[name] = _Request(told["version"], number)
                sure = all_before or (not gap and taken_up == 0)
            else:
                sure = not gap and (known.last == number - 1 or taken_up <= known.count)
            if count > known.count:
                known.spans.append((count, before if sure else UNKNOWN))
            known.after, known.last = told["version"], number
        self._updates.append(_Update(number, told["version"], before, told["at"], complete and not gap, told["why"]))
        del self._updates[:-UPDATES]
        self._requests = {name: r for name, r in self._requests.items() if r.last > number - UPDATES}

    def _find(self, request: str, choice: int) -> _Request | None:
        """A request by its caller's id.

        vLLM appends eight random hexadecimal digits to an id, and puts the number of a choice in front of it where
        there are several. ``/v1/completions`` appends the number of the prompt, which is that of the choice too where
        each prompt has one.
        """
        first = re.escape(request)
        forms = [rf"{choice}_{first}"] + ([first] if choice == 0 else [])
        if request.startswith("cmpl-"):
            forms += [rf"{choice}_{first}-0", rf"{first}-{choice}"]
        pattern = re.compile(rf"(?:{'|'.join(forms)})(?:-[0-9a-f]{{8}})?")
        found = [name for name in self._requests if pattern.fullmatch(name)]
        if len(found) > 1:
            raise UserError(
                f"{self._name} had several requests {request!r} lately ({', '.join(sorted(found))}): give each an id "
                "of its own"
            )
        return self._requests[found[0]] if found else None

    def _rest(
        self, known: _Request, times: tuple[float, float] | None, ended: Version | EllipsisType
    ) -> Version | EllipsisType:
        """What made the tokens after the last update that found a request."""
        later = [update for update in self._updates if update.number > known.last]
        if not later or later[0].complete:
            return known.after
        last = ended if times is None else self._at(times[1])
        return known.after if last == known.after else UNKNOWN

    def _never_seen(
        self, request: str, times: tuple[float, float] | None, ended: Version | EllipsisType
    ) -> Version | EllipsisType:
        """What made the tokens of a request that was in flight at no update that is remembered."""
        if not self._updates:
            return None
        if times is not None:
            first, last = map(self._at, times)
            return last if first == last else UNKNOWN
        if isinstance(ended, EllipsisType):
            raise UserError(
                f"{request!r} was in flight at none of the last {len(self._updates)} updates of {self._name}, so one "
                "version made all of its tokens, but its id does not tell which: say which version the engine had when "
                f"the response ended, with ended={self._why()}"
            )
        oldest = self._updates[0]
        if ended not in {update.version for update in self._updates} and not (oldest.number == 0 and ended is None):
            raise UserError(
                f"what {self._name} had in flight when it got or left version {ended} is not known: it has had "
                f"{oldest.version} to {self.newest} since, and only {UPDATES} updates are remembered"
            )
        return ended

    def _at(self, moment: float) -> Version | EllipsisType:
        """The version that an engine had at a moment."""
        earlier = [update for update in self._updates if update.at <= moment]
        if earlier:
            return earlier[-1].version
        return None if self._updates[0].before is None else UNKNOWN  # there may have been others before it

    def _why(self) -> str:
        """Behind an error, what workers said."""
        reasons = dict.fromkeys(update.why for update in self._updates if update.why)
        return f" ({'; '.join(reasons)})" if reasons else ""


def response(output: Any, choice: int) -> tuple[str, int, tuple[float, float] | None]:
    """What a `vllm.RequestOutput` tells of one of its responses: id, number of tokens, and when they came.

    Raises:
        UserError: it is no such output, or lacks this choice.
    """
    try:
        completions = {completion.index: completion for completion in output.outputs}
        request, tokens = str(output.request_id), completions[choice].token_ids
    except (AttributeError, KeyError):
        raise UserError(
            f"{type(output).__name__} is no RequestOutput of vLLM with a choice {choice}: give that, or the id of a "
            "request and how many tokens came"
        ) from None
    # Those of several choices are in one place, each overwriting the others'.
    stats = getattr(output, "metrics", None) if len(completions) == 1 else None
    first, last = (getattr(stats, name, 0.0) or 0.0 for name in ("first_token_ts", "last_token_ts"))
    return request, len(tokens), (first, last) if 0 < first <= last else None
