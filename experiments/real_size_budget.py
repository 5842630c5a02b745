"""What a GPU is expected to hold at the fullest moments of a round, before anything is started.

Rows and formulas are those of `nvfp4_qat.capacity`; what it does not count, or counts for one engine on one GPU, is
added here as estimates of its own: CUDA contexts and NCCL buffers of both sides, and the buckets of a sync. Moments:

``train``      the fullest one of a step (`training_memory`) beside the engine, which sleeps or does not
``sync``       masters and optimizer state, the engine's weights, the buckets that these come in, one gathered unit
``generate``   masters and optimizer state, the engine's weights, KV cache and activations
``hand over``  as ``sync``, with the whole stream gathered before

Nothing is chosen here: a budget that does not fit ends the run before it starts, and says which options need less.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from common import World
from real_size_trainer import configuration, on_meta
from torch import nn

import nvfp4_qat as nq
from nvfp4_qat import QuantPlan
from nvfp4_qat.capacity import (
    ENGINE_ACTIVATION_BYTES,
    Setup,
    engine_weights,
    forward_gather_bytes,
    step_gather_bytes,
    sync_bytes,
    training_memory,
)
from nvfp4_qat.capacity_shape import BF16, ModelShape, model_shape
from nvfp4_qat.engine_memory import GIB

ASLEEP = 3 * GIB
"""What a worker of an engine has asleep too: CUDA context, NCCL, CUDA graphs, work space. An estimate."""

CONTEXTS = 2 * GIB
"""The trainer's CUDA contexts (rank 0 has one on every GPU) and NCCL buffers. An estimate."""

MARGIN = 4 * GIB
"""Has to be left for fragmentation of PyTorch's allocator."""


@dataclass(frozen=True)
class Budget:
    """Bytes of a GPU, by moment and row.

    Args:
        total: what the GPU has.
        moments: name → rows → bytes.
        traffic: bytes that a rank receives, or that are sent to the engine.
    """

    total: float
    moments: Mapping[str, Mapping[str, float]]
    traffic: Mapping[str, float]

    @classmethod
    def of(
        cls, model: nn.Module, plan: QuantPlan, arm: str, setup: Setup, engine: bool, sleep: int, kv: int, batch: int
    ) -> Budget:
        """Compute it.

        Args:
            model: bare, on the meta device.
            plan: what is 4-bit in the arm "nvfp4".
            arm: "nvfp4" or "bf16", of trainer and engine.
            setup: GPUs, masters, tokens.
            engine: whether there is one.
            sleep: its level while the trainer computes; 0: it stays awake.
            kv: bytes of its KV cache on a GPU.
            batch: most tokens of one of its forwards.
        """
        shape, packed = model_shape(model, plan), arm == "nvfp4"
        moment, rows = training_memory(shape, setup, arm)
        resident = {name: rows[name] for name in ("masters", "optimizer", "packed_shards")}
        weights = engine_weights(shape, packed, setup.tensor_parallel)
        awake = {
            "engine weights": weights,
            "engine KV cache": kv,
            "engine activations": ENGINE_ACTIVATION_BYTES * batch * _widest(shape) / setup.tensor_parallel,
        }
        fixed = {"contexts and NCCL": CONTEXTS, "engine, asleep too": ASLEEP if engine else 0}
        moments = {f"train ({moment})": {**rows, "engine": 0, **fixed, **(awake if engine and not sleep else {})}}
        if engine:
            buckets = {"buckets": 2 * _largest(shape, packed), "gathered": _gathered(shape, packed)}
            moments["sync"] = {**resident, "engine weights": weights, **buckets, **fixed}
            moments["generate"] = {**resident, **awake, **fixed}
            if packed:
                held = {**buckets, "gathered": sync_bytes(shape, packed)}
                moments["hand over"] = {**resident, **(awake if not sleep else {"engine weights": weights}), **held}
                moments["hand over"] |= fixed
        ranks = setup.training
        traffic = {
            "all-gather of a block": shape.blocks[0].received(ranks, packed),
            "all-gathers of a forward": forward_gather_bytes(shape, ranks, packed),
            "all-gathers of a step": step_gather_bytes(shape, ranks, arm),
            "sync": sync_bytes(shape, packed),
        }
        return cls(setup.gpu_memory * GIB, moments, traffic)

    @property
    def left(self) -> float:
        """Bytes that nobody takes in the fullest moment."""
        return self.total - max(sum(rows.values()) for rows in self.moments.values())

    @property
    def fits(self) -> bool:
        return self.left >= MARGIN

    def row(self) -> dict[str, Any]:
        """For a file of results, in whole bytes."""
        return {
            "total_bytes": round(self.total),
            "left_bytes": round(self.left),
            "moments": {name: {k: round(v) for k, v in rows.items() if v} for name, rows in self.moments.items()},
            "traffic_bytes": {name: round(value) for name, value in self.traffic.items()},
        }

    def table(self) -> str:
        """For a person to read, GiB of a GPU."""
        names = list(dict.fromkeys(name for rows in self.moments.values() for name, value in rows.items() if value))
        lines = [["GiB of a GPU, expected", *self.moments]]
        for name in names:
            lines.append([name, *(f"{rows.get(name, 0) / GIB:.2f}" for rows in self.moments.values())])
        lines.append(["together", *(f"{sum(rows.values()) / GIB:.2f}" for rows in self.moments.values())])
        lines.append([f"left of {self.total / GIB:.2f}", *(
            f"{(self.total - sum(rows.values())) / GIB:.2f}" for rows in self.moments.values()
        )])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        table += [f"{name}: {value / 1e9:.3f} GB" for name, value in self.traffic.items()]
        return "\n".join(table)

    def refusal(self) -> str:
        """Why it does not fit, and what would need less."""
        return (
            f"less than {MARGIN / GIB:g} GiB of a GPU would be left ({self.left / GIB:.2f}): --masters bf16 halves "
            "masters, gradients and optimizer state; --sleep 1 or 2 frees the engine's weights and KV cache while the "
            "trainer computes; --kv-gib, --batched-tokens and --tokens take less; --over-budget tries it all the same"
        )


def _widest(shape: ModelShape) -> int:
    return max(block.widths for block in shape.blocks)


def _largest(shape: ModelShape, packed: bool) -> float:
    """Bytes of the largest tensor that is sent: a bucket holds it."""
    sizes = [
        w.elements / 2 if packed and w.entry is not None else BF16 * w.elements
        for unit in shape.units
        for w in unit.weights
    ]
    return max(*sizes, 1 << 28)


def _gathered(shape: ModelShape, packed: bool) -> float:
    """Bytes of the largest unit as it is gathered for the stream, and once more as whole tensors."""
    return 2 * max(block.packed + block.rest if packed else BF16 * block.elements for block in shape.blocks)


class Bare(NamedTuple):
    """A model without data, and its plan."""

    model: Any
    plan: nq.QuantPlan

    @classmethod
    def of(cls, args: argparse.Namespace) -> Bare:
        model = on_meta(configuration(args.model, args.layers), torch.bfloat16)
        return cls(model, nq.QuantPlan.from_model(model, nq.QATConfig(enable=True)))


def expected(args: argparse.Namespace, world: World, bare: Bare) -> Budget:
    """The budget of a run with the arguments of ``real_size.py``."""
    cuda = world.device.type == "cuda"
    total = torch.cuda.mem_get_info(world.device)[1] / GIB if cuda else args.gpu_gib
    setup = Setup(
        gpus=world.size, gpu_memory=total, masters=args.masters, tokens=args.tokens,
        tensor_parallel=args.tensor_parallel or world.size,
    )  # fmt: skip
    kv, engine = round(args.kv_gib * GIB), args.engine == "vllm"
    return Budget.of(*bare, args.arm, setup, engine, args.sleep, kv, args.batched_tokens)
