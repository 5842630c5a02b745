"""One process at a time: a lock on a directory or a file that is worked in.

It is the kernel's lock (`flock`) on the thing itself, or on a file beside one that is still to be made. It ends with
the process that holds it, however that ends, and leaves nothing behind (a killed one at most the empty file).
"""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a directory or a file that exists.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work on {path}: wait until it has ended, or end it") from None
        except OSError as error:  # some network file systems
            warnings.warn(f"{path} cannot be locked ({error}): see to it that nothing else works on it", stacklevel=3)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold the name of a file that is to be made, after whoever holds it: it may be there then.

    Where locks do not work (some network file systems) nobody waits.
    """
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is(lock, descriptor):
                continue  # the one before has taken it away
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
