"""verl's replay buffer, asked more often whether all answers are there (``trainer.v1.sampler.custom_sampler``).

verl looks every two seconds, which is most of what a small model's generation takes. Nothing else is changed.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

SECONDS = 0.1


class OftenAsked(ReplayBuffer):  # type: ignore[misc]
    """A buffer of verl's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"poll_interval": SECONDS, **options})
