"""Configurations of common models, so that what needs only the architecture works without a network.

They are the ``config.json`` files published with the models, in ``model_configs/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "model_configs"
PUBLISHERS = {"Qwen": "Qwen", "meta-llama": "Llama"}
"""What the names of their models begin with."""


def shipped() -> list[str]:
    """The names of the models, without their publisher."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def hub_ids() -> list[str]:
    """The names of the models, as the hub has them."""
    return [
        f"{publisher}/{name}" for name in shipped() for publisher, first in PUBLISHERS.items() if name.startswith(first)
    ]


def shipped_config(spec: str) -> Any | None:
    """The configuration of a model.

    Args:
        spec: a hub id such as ``Qwen/Qwen3-8B``, or a name of `shipped`.

    Returns:
        What ``transformers.AutoConfig.from_pretrained`` returns; None if it is not among `shipped`.
    """
    publisher, _, name = spec.rpartition("/")
    if name not in shipped() or (publisher and not name.startswith(PUBLISHERS.get(publisher, "/"))):
        return None
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(FOLDER / f"{name}.json")
