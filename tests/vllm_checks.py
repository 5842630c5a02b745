"""A vLLM worker that also tells what its tensors hold, for GPU tests of engines in processes of their own."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from nvfp4_qat.live_twin import tensors
from nvfp4_qat.vllm import LiveWeights

CHECKED = "vllm_checks.Checked"


def weights(model: nn.Module, ours: Any) -> dict[str, torch.Tensor]:
    """Every tensor that an engine's model computes with, by where it was found."""
    return {
        f"{name} {'.'.join(path)}": t
        for name, layer in model.named_modules()
        for path, t in tensors(layer, ours).items()
        if "kv_cache" not in path and "input_global_scale" not in path[-1]
    }


def digest(t: torch.Tensor) -> str:
    data = t.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.sha256(f"{t.dtype} {list(t.shape)}".encode() + data).hexdigest()[:16]


class Checked(LiveWeights):
    def checked_digests(self) -> dict[str, str]:
        worker: Any = self
        model = worker.model_runner.get_model()
        from nvfp4_qat.live_vllm import VllmCode

        code = VllmCode(model, worker.vllm_config, torch.device(worker.device))
        return {name: digest(t) for name, t in weights(model, code.ours).items()}
