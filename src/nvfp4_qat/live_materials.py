"""Parameters without data (meta) given memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def materialized(meta: Tensor, device: torch.device) -> nn.Parameter:
    """A parameter of the same class and attributes as one without data, with memory that is not initialized."""
    data = torch.empty_strided(tuple(meta.shape), tuple(meta.stride()), dtype=meta.dtype, device=device)
    parameter: Any = nn.Parameter(data, requires_grad=False)
    parameter.__class__ = meta.__class__
    parameter.__dict__.update(meta.__dict__)
    found: nn.Parameter = parameter
    return found
