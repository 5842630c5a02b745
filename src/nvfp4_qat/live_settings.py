"""Settings of an engine with which live weights would be wrong without a sign of it: its workers refuse to begin."""

from __future__ import annotations

from typing import Any

import torch

from .errors import MismatchError


def check_settings(worker: Any) -> None:
    """Look at a worker's configuration; what it does not tell is taken to be right.

    Args:
        worker: of vLLM, with its configuration in ``vllm_config``.

    Raises:
        MismatchError: with everything that is wrong.
    """
    config, wrong = getattr(worker, "vllm_config", None), []
    dtype = getattr(getattr(config, "model_config", None), "dtype", torch.bfloat16)
    if dtype != torch.bfloat16:
        wrong.append(
            f"it computes in {str(dtype).removeprefix('torch.')}, while the trainer computes in bfloat16 and sends "
            'what is not 4-bit so: start vLLM with dtype="bfloat16"'
        )
    if getattr(getattr(config, "parallel_config", None), "enable_eplb", False):
        wrong.append(
            "it moves experts to other places by their load (enable_eplb), and an update would put each where it was "
            "at the start while the router looks for it elsewhere: start vLLM without enable_eplb"
        )
    if wrong:
        raise MismatchError(f"this engine cannot take live weights: {'; '.join(wrong)}")
