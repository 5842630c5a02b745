"""Sockets of a run's own, for verl runs beside each other; verl imports this (``VERL_USE_EXTERNAL_MODULES``).

verl gives weights to vLLM through a Unix socket in ``/tmp``, whose name holds the number of the Ray job, so that jobs
on one machine have different ones. Jobs are numbered in each cluster from one, though: runs with clusters of their own
all meet at the same socket, where an engine may take another run's weights. Here sockets lie in the folder that the
variable `FOLDER` names.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from nvfp4_qat.integrations.import_hooks import when_imported

FOLDER = "VERL_SOCKETS"
SHARED = "ipc:///tmp/"


def own(handle: str) -> str:
    """The address of a socket with the run's folder instead of the shared one."""
    return handle.replace(SHARED, f"ipc://{os.environ[FOLDER]}/", 1)


def install(module: ModuleType) -> None:
    """Let both ends have it (``verl.workers.rollout.vllm_rollout.bucketed_weight_transfer``)."""
    for end in (module.BucketedWeightSender, module.BucketedWeightReceiver):
        end.__init__ = _apart(end.__init__)


def _apart(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def made(self: Any, zmq_handle: str, *arguments: Any, **options: Any) -> None:
        original(self, own(zmq_handle), *arguments, **options)

    return made


if FOLDER in os.environ:
    when_imported("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", install)
