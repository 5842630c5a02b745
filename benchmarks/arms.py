"""The arms of the step benchmark: what is done to the model, and one training step.

``bf16``        nothing: what QAT is compared with.
``gather``      ``apply_qat(model, config, gather="nvfp4")``: FSDP2 gathers packed weights.
``module``      ``apply_qat(model, config)``: QATLinear and QATExperts.
``requantize``  what QAT without this package does: every read of a weight, in forward and again where activation
                checkpointing recomputes, takes the amax of the whole weight and fake-quantizes it; autograd keeps the
                result. It runs on this package's kernels and never waits for the device (no check of the weights).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

import nvfp4_qat as nq
from nvfp4_qat import ops, reference

ARMS = ("bf16", "gather", "keep", "module", "requantize")
GATHERING = {"gather", "keep"}
"""Those in gather mode; "keep" gathers once per optimizer step."""


LEARNING_RATE = 1e-6
"""As in reinforcement learning of language models."""


def apply_arm(arm: str, model: nn.Module) -> None:
    """Turn a bf16 model into that of the arm, in place; before `shard`."""
    config = nq.QATConfig(enable=True)
    if arm in GATHERING:
        nq.apply_qat(model, config, gather="nvfp4", keep_gathered=arm == "keep")
    elif arm == "module":
        nq.apply_qat(model, config)
    elif arm == "requantize":
        for entry in nq.QuantPlan.from_model(model, config).quantized:
            module = model.get_submodule(entry.module)
            parametrize.register_parametrization(module, entry.param, Requantize(entry.batch_dims))
    elif arm != "bf16":
        raise SystemExit(f"unknown arm {arm!r}: use {', '.join(ARMS)}")


class Requantize(nn.Module):
    """A parametrization: the weight through NVFP4, computed anew at every read; gradients pass straight through."""

    def __init__(self, batch_dims: int) -> None:
        super().__init__()
        self.batch_dims = batch_dims

    def forward(self, w: Tensor) -> Tensor:
        return nq.fake_quantize(w, reference.global_scale(ops.amax(w, self.batch_dims)))


def shard(model: nn.Module, masters: torch.dtype, mesh: DeviceMesh | None, checkpointing: bool) -> None:
    """Activation checkpointing and FSDP2 around every decoder layer, FSDP2 around the rest.

    Args:
        model: on its device, after `apply_arm`.
        masters: dtype of the parameters; float32 is gathered as bfloat16 and its gradients are reduced in float32.
        mesh: one dimension; None leaves the model unsharded.
        checkpointing: recompute each decoder layer in backward.
    """
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = MixedPrecisionPolicy() if masters == torch.bfloat16 else mixed
    layers: Any = model.model.layers  # type: ignore[union-attr]
    for i, layer in enumerate(layers):
        if checkpointing:
            layers[i] = checkpoint_wrapper(layer, preserve_rng_state=False)  # there is no dropout
        if mesh is not None:
            fully_shard(layers[i], mesh=mesh, mp_policy=policy)
    if mesh is not None:
        fully_shard(model, mesh=mesh, mp_policy=policy)


class Trainer:
    """A model and its optimizer; `step` is all that happens between two batches.

    Args:
        model: what `shard` left.
        masters: dtype of its parameters; float32 without sharding trains under autocast.
        clip: largest norm of the gradient; 0 does not clip.
    """

    def __init__(self, model: nn.Module, masters: torch.dtype, sharded: bool, clip: float) -> None:
        self.model, self.clip, self.sharded = model, clip, sharded
        self.autocast = masters == torch.float32 and not sharded
        self.device = next(model.parameters()).device.type
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def step(self, micro_batches: list[Tensor]) -> Tensor:
        """Forward, backward, clipping and AdamW; returns the mean loss without waiting for it."""
        losses = []
        for i, batch in enumerate(micro_batches):
            if self.sharded and len(micro_batches) > 1:  # gradients are reduced once, after the last one
                self.model.set_requires_gradient_sync(i == len(micro_batches) - 1)  # type: ignore[operator]
            with self._precision():
                loss = self.model(batch) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        if self.clip:
            self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16) if self.autocast else nullcontext()

    def _clip(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
