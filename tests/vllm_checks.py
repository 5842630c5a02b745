"""A vLLM worker that also tells what its tensors hold, for GPU tests of engines in processes of their own."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from nvfp4_qat.live_twin import tensors
from nvfp4_qat.vllm import LiveWeights

CHECKED = "vllm_checks.Checked"
WATCHED = "vllm_checks.Watched"


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


class Watched(Checked):
    """Notes before every forward what all tensors of the model are."""

    def watched_start(self) -> None:
        runner = self.model_runner
        original, self.watched_forwards = runner.execute_model, {}

        def execute(scheduled: Any, *arguments: Any, **options: Any) -> Any:
            if scheduled.total_num_scheduled_tokens:
                now = self.watched_now()
                self.watched_forwards[now] = self.watched_forwards.get(now, 0) + 1
            return original(scheduled, *arguments, **options)

        runner.execute_model = execute

    def watched_now(self) -> str:
        """Which weights the model has: a checksum of each tensor, and of these."""
        model = self.model_runner.get_model()
        found = self.__dict__.setdefault("_watched", {})
        if not found:
            from nvfp4_qat.live_vllm import VllmCode

            code = VllmCode(model, self.vllm_config, torch.device(self.device))
            found.update(weights(model, code.ours))
        sums = []
        for t in found.values():
            data = t.detach().contiguous().reshape(-1).view(torch.uint8)
            sums.append((data.to(torch.int64) * (torch.arange(len(data), device=t.device) % 8191 + 1)).sum())
        numbers = torch.stack(sums).tolist()
        return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]

    def watched_seen(self) -> dict[str, int]:
        """How many forwards had which weights."""
        return dict(self.watched_forwards)
