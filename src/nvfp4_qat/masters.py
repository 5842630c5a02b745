"""AdamW for a bf16 model: fp32 masters in the optimizer, rounded copies in the model.

At the learning rates of RL an update is far below the spacing of bf16 numbers, so a bf16 weight that is updated
directly stands still. Mixed-precision trainers keep fp32 masters and compute with their bf16 rounding; this is that in
one file for one process. The rounding is also the first rule of NVFP4 here (its input is always bf16), so what
`nvfp4_qat.packed_weights` packs from the model's parameters is what it would pack from the masters.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on fp32 masters; the model's own parameters are kept at the masters' rounded values.

    A model whose parameters are bf16 computes, and is packed, from exactly these rounded values.

    Args:
        params: the model's parameters, of any dtype.
        lr: learning rate; `set_lr` changes it.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(list(params), {})
        self._params: list[nn.Parameter] = self.param_groups[0]["params"]
        self.masters = [p.detach().float().clone() for p in self._params]
        self._adamw = torch.optim.AdamW(
            self.masters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95), foreach=False, fused=True
        )

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next step on."""
        self._adamw.param_groups[0]["lr"] = lr

    def accumulate(self) -> None:
        """Add the parameters' gradients to the masters' in fp32 and clear them; call it after each backward."""
        for master, parameter in zip(self.masters, self._params, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale the accumulated gradient down to this norm; returns the norm it had. Not finite: RuntimeError."""
        return float(nn.utils.clip_grad_norm_(self.masters, max_norm, error_if_nonfinite=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the accumulated gradient."""
        self._adamw.step()
        self._adamw.zero_grad()
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """Masters and AdamW's moments (not copied)."""
        return {"masters": self.masters, "adamw": self._adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Continue from a `state_dict`; sets the model's parameters too."""
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self._adamw.load_state_dict(state["adamw"])
        self._publish()

    def _publish(self) -> None:
        for master, parameter in zip(self.masters, self._params, strict=True):
            parameter.copy_(master)
