"""Where a vLLM finds the checkpoint that it starts from: under the same path each time, for the same model.

vLLM keeps what it compiles, graphs and Triton kernels alike, under a name that follows from its settings, and the
model's path is one of them (`ModelConfig.compute_hash`, vLLM 0.24). From a random path it finds nothing that an earlier
start left, and compiles for half a minute and more.

A path is one process's at a time, as vLLM does not write all of these files in one piece: engines that start side by
side have paths of their own, numbered, and the lowest free one is taken. The lock on it ends with the process, however
that ends; what a killed one left behind is taken away by the next.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .plan import QuantPlan

MOST = 256
"""Engines of the same model at a time; any more start from random paths."""


def start_word(config: Any, plan: QuantPlan) -> str:
    """What of a model decides which graphs an engine has, in a word.

    Args:
        config: the transformers configuration.
        plan: what of it is 4-bit.
    """
    quantization = plan.quantization_config() if plan.quantized else None
    told = json.dumps([config.to_dict(), quantization], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


@contextlib.contextmanager
def start_folder(word: str) -> Iterator[Path]:
    """A folder that is to be made, and is gone at the end.

    Args:
        word: of what is to be in it.
    """
    with contextlib.ExitStack() as held:
        place = _place(word, held)
        if place is None:
            place = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="nvfp4-qat-")))
        folder = place / "start"
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        yield folder


def _place(word: str, held: contextlib.ExitStack) -> Path | None:
    """The first place that is free, locked; None: there is none where this user could lock one."""
    root = Path(tempfile.gettempdir()).resolve() / f"nvfp4-qat-{os.getuid()}"
    with contextlib.suppress(OSError):
        root.mkdir(mode=0o700, exist_ok=True)
        if root.is_symlink() or root.stat().st_uid != os.getuid():
            return None  # somebody else's
        for number in range(MOST):
            place = root / f"{word}-{number}"
            place.mkdir(exist_ok=True)
            descriptor = os.open(place, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            except OSError:
                os.close(descriptor)
                raise
            held.callback(os.close, descriptor)
            return place
    return None
