"""NVFP4 quantization-aware training: trainer, rollout engine and checkpoint use the same 4-bit bytes."""
from .config import QATConfig
from .core import apply_qat, qat_plan, refresh
from .errors import MismatchError, StaleWeightsError, UserError
from .experts import QATExperts
from .linear import QATLinear
from .metrics import rollout_metrics
from .ops import PackedNVFP4, amax, fake_quantize, global_scale, quantize
from .plan import QuantPlan

__version__ = "0.1.0"

__all__ = [
    "MismatchError",
    "PackedNVFP4",
    "QATConfig",
    "QATExperts",
    "QATLinear",
    "QuantPlan",
    "StaleWeightsError",
    "UserError",
    "amax",
    "apply_qat",
    "fake_quantize",
    "global_scale",
    "qat_plan",
    "quantize",
    "refresh",
    "rollout_metrics",
]
