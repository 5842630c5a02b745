"""NVFP4 quantization-aware training: trainer, rollout engine and checkpoint use the same 4-bit bytes.

The names below are imported when they are first used, so that ``import nvfp4_qat`` and ``nvfp4-qat --help`` are
immediate. None of them imports transformers, compressed-tensors or an engine before it needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
    from .config import QATConfig
    from .core import apply_qat, qat_plan, refresh
    from .errors import MismatchError, StaleWeightsError, UserError
    from .experts import QATExperts
    from .linear import QATLinear
    from .live_options import RolloutOptions
    from .metrics import rollout_metrics
    from .ops import PackedNVFP4, amax, fake_quantize, global_scale, quantize
    from .plan import QuantPlan
    from .quantizer import QATQuantizer, packed_weights
    from .rollout import Rollout, SyncReport

__version__ = "0.1.0"

_HOME = {
    "checkpoint": ("load_checkpoint", "save_checkpoint", "verify_checkpoint"),
    "config": ("QATConfig",),
    "core": ("apply_qat", "qat_plan", "refresh"),
    "errors": ("MismatchError", "StaleWeightsError", "UserError"),
    "experts": ("QATExperts",),
    "linear": ("QATLinear",),
    "live_options": ("RolloutOptions",),
    "metrics": ("rollout_metrics",),
    "ops": ("PackedNVFP4", "amax", "fake_quantize", "global_scale", "quantize"),
    "plan": ("QuantPlan",),
    "quantizer": ("QATQuantizer", "packed_weights"),
    "rollout": ("Rollout", "SyncReport"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "MismatchError",
    "PackedNVFP4",
    "QATConfig",
    "QATExperts",
    "QATLinear",
    "QATQuantizer",
    "QuantPlan",
    "Rollout",
    "RolloutOptions",
    "StaleWeightsError",
    "SyncReport",
    "UserError",
    "amax",
    "apply_qat",
    "fake_quantize",
    "global_scale",
    "load_checkpoint",
    "packed_weights",
    "qat_plan",
    "quantize",
    "refresh",
    "rollout_metrics",
    "save_checkpoint",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
