"""What of a worker's memory sleeps, noted where vLLM's worker goes to sleep and wakes up, whoever asks for it.

That may be a trainer that no longer is, or vLLM's own `LLM.sleep` and `LLM.wake_up` around a sync. What no update
brings is kept before level 2 discards it (`live_sleep`), and an update that goes on is given up. Nothing is raised, as
that may do harm in a worker (`live_started`): where keeping fails, later updates are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError

MEMORY = frozenset({"weights", "kv_cache"})
"""What vLLM can wake up on its own."""


@dataclass
class Asleep:
    """Of one worker.

    Args:
        parts: those of `MEMORY` that sleep.
        lost: why what no update brings was not kept before it was discarded; None: it was.
    """

    parts: set[str] = field(default_factory=set)
    lost: str | None = None

    def check(self) -> None:
        """Refuse to look at weights that are not there.

        Raises:
            UserError: they sleep, or cannot become whole.
        """
        if self.lost is not None:
            raise UserError(
                f"what no update brings was not kept when this engine went to sleep ({self.lost}): start it anew"
            )
        if "weights" in self.parts:
            raise UserError("this engine's weights sleep: call wake_up(['weights']) first")


def of(worker: Any) -> Asleep:
    """What of a worker sleeps."""
    found: Asleep = worker.__dict__.setdefault("_nvfp4_asleep", Asleep())
    return found


def watch(worker: Any) -> None:
    """From now on take note when a worker goes to sleep and wakes up."""
    for call in (sleep, wake_up):
        if hasattr(type(worker), call.__name__):  # an extension may not define what workers have
            setattr(worker, call.__name__, functools.partial(call, worker))


def sleep(worker: Any, level: int = 1, **options: Any) -> Any:
    """Sleep as vLLM's worker does."""
    asleep = of(worker)
    if "weights" not in asleep.parts:
        answer = worker._nvfp4_sleeps(level)
        asleep.lost = asleep.lost or (answer.get("error") if level == 2 else None)
    asleep.parts |= MEMORY
    return type(worker).sleep(worker, level, **options)


def wake_up(worker: Any, tags: Sequence[str] | None = None) -> Any:
    """Wake up as vLLM's worker does; of all of its memory, what still sleeps, as vLLM would map the rest again."""
    asleep = of(worker)
    if tags is None and asleep.parts:
        tags = None if asleep.parts == MEMORY else sorted(asleep.parts)
    result = type(worker).wake_up(worker, tags)
    asleep.parts -= MEMORY if tags is None else set(tags)
    return result
