"""Which weights runs began from: a digest in ``config.json``, so that nothing is compared that began differently.

Settings do not tell. Weights that were warmed up follow from the GPU, the number of threads and the versions too (their
file in the cache is named by all of these), and a model's own files may change.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .damaged import read_object
from .demo_config import DemoConfig
from .errors import UserError
from .models import LoadedModel
from .rl import plain_weights, trainer_device
from .tasks import Task
from .tensor_digest import digest
from .warmup import warm_up, warmup_file

KEY = "starting_weights"
"""Of ``config.json``."""


@dataclass(frozen=True)
class Start:
    """The weights that a run begins from.

    Args:
        sha256: of all of them (`nvfp4_qat.tensor_digest`).
        file: the name of the warm-up's result in the cache; None without a warm-up.
    """

    sha256: str
    file: str | None

    @classmethod
    def of(cls, model: nn.Module, file: Path | None) -> "Start":
        """Of a model that is loaded and warmed up."""
        return cls(digest(dict(plain_weights(model))), file.name if file else None)

    @classmethod
    def read(cls, folder: Path) -> "Start | None":
        """Of the run in a directory; None where it has not come that far, or there is none."""
        saved = read_config(folder).get(KEY)
        return None if saved is None else cls(**saved)

    def entry(self) -> dict[str, Any]:
        """What ``config.json`` holds of it."""
        return {KEY: asdict(self)}


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` of the run in a directory holds; nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "config.json"
    mend = f"without it nobody knows what the run in {folder} was begun with, so start again in another directory"
    return read_object(path, mend) if path.is_file() else {}


def check_same(starts: Mapping[str, Start], file: Path | None) -> None:
    """See that runs begin from the same weights.

    Args:
        starts: by what a message is to call them, the earlier ones first.
        file: of the latest one's warm-up; None without one.

    Raises:
        UserError: they do not; the message says which do, and how they could.
    """
    by = dict[str, list[str]]()
    for name, start in starts.items():
        by.setdefault(start.sha256, []).append(name)
    if len(by) < 2:
        return
    files = list(dict.fromkeys(file.parent / start.file for start in starts.values() if file and start.file))
    said = "; ".join(f"{sha256[:12]}: {', '.join(names)}" for sha256, names in by.items())
    if len(files) > 1:
        why = "they were warmed up on another GPU, with other versions or another number of threads"
        mend = f"copy {files[0]} to {files[1]}"
    elif files:
        why = f"{files[0]} was made again, with another result"
        mend = "bring back the first one"
    else:
        why = "the model's files have changed"
        mend = "bring back the first ones"
    raise UserError(
        f"weights to begin from differ ({said}): {why}. Go on where it was begun, or {mend}, or begin in another "
        "directory; what began from other weights cannot be compared"
    )


def begin(
    cfg: DemoConfig,
    loaded: LoadedModel,
    task: Task,
    earlier: Mapping[str, Start],
    progress: Callable[[int, float], None],
) -> Start:
    """Bring a model to the weights that a run begins from, and see that earlier runs did, too.

    Args:
        cfg: the run's.
        loaded: what `load_model` gives for it; changed in place.
        task: the run's.
        earlier: see `check_same`.
        progress: see `warm_up`.

    Raises:
        UserError: they began from others.
    """
    device = trainer_device(cfg)
    file = warmup_file(cfg, task, loaded.model, device) if cfg.warmup_steps else None
    if file is not None and not file.is_file() and any(start.file != file.name for start in earlier.values()):
        check_same({**earlier, "now": Start("not made yet", file.name)}, file)  # before minutes are spent for nothing
    warm_up(loaded.model, loaded.tokenizer, task, cfg, progress, device)
    start = Start.of(loaded.model, file)
    check_same({**earlier, "now": start}, file)
    return start
