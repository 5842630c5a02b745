"""What a run or a warm-up has written, read back: a file that cannot be read is one `UserError` that says how to go on.

Files are replaced atomically (`nvfp4_qat.runlog`), so no kill damages them. Full disks, copies that were broken off and
editors do.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import UserError


def read_object(path: Path, mend: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: it exists.
        mend: what to do where it is damaged, in the imperative.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise _damaged(path, str(error), mend) from None
    if not isinstance(found, dict):
        raise _damaged(path, "no JSON object", mend)
    return found


def read_saved(path: Path, keys: set[str], mend: str) -> dict[str, Any]:
    """The mapping in a file of `nvfp4_qat.runlog.save_file`, its tensors on the CPU.

    Args:
        path: it exists.
        keys: what it holds, at least.
        mend: as in `read_object`.

    Raises:
        UserError: it is damaged.
    """
    if not zipfile.is_zipfile(path):  # torch.load would take it for a file of its old format
        raise _damaged(path, "no whole file of torch.save", mend)
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path, str(error).partition("\n")[0], mend) from None
    if not isinstance(found, dict) or not found.keys() >= keys:
        raise _damaged(path, f"without {', '.join(sorted(keys))}", mend)
    return found


def _damaged(path: Path, reason: str, mend: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): {mend}")
