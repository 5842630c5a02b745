"""`RolloutOptions`: how engines are connected and updated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import UserError
from .live_buckets import BUCKET
from .live_engines import TIMEOUT, InFlight

Transport = Literal["auto", "direct", "shared", "broadcast"]


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """The keyword arguments of `Rollout.connect`.

    Args:
        in_flight: what a sync does with requests that are being answered: "abort" ends them, "keep" lets them go on
            with the new weights, their context computed anew.
        transport: how tensors travel: "direct" to workers of this process, "shared" to those of this machine,
            "broadcast" to any, by NCCL. "auto" takes the first that works.
        bucket_bytes: tensors are sent in buckets of this size, of which there are two.
        timeout: seconds that an engine may take for one step.
        address: of this machine, as the workers reach it, for "broadcast" and for engines with
            ``weight_transfer_config``; by default found out.
        changes: send only what changed since the last sync to engines that have that. The trainer keeps a copy of the
            packed weights for it, and engines about a ninth of theirs.

    Raises:
        UserError: one of them is none of what is allowed.
    """

    in_flight: InFlight = "abort"
    transport: Transport = "auto"
    bucket_bytes: int = BUCKET
    timeout: float = TIMEOUT
    address: str | None = None
    changes: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("in_flight", self.in_flight, get_args(InFlight)),
            ("transport", self.transport, get_args(Transport)),
        ):
            if value not in allowed:
                raise UserError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
        if self.bucket_bytes <= 0 or self.timeout <= 0:
            raise UserError(f"bucket_bytes={self.bucket_bytes} and timeout={self.timeout} must both be positive")
