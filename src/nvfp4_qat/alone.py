"""One process at a time: a lock on a directory or a file that is worked in.

It is the kernel's lock (`flock`) on the thing itself. It ends with the process that holds it, however that ends, and
leaves nothing behind.
"""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
