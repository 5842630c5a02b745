"""What a training run with rollouts would take of each GPU, from the model's configuration and its `QuantPlan` alone.

`nvfp4-qat plan --gpus` prints it (`capacity_table`). Nothing is measured here, no weight exists; the formulas are held
against measured runs by ``tests/test_capacity.py``, which says how far off they are.

**Training** is FSDP2 as in ``docs/distributed.md``: every decoder block is a unit, what is in no block (embedding, last
norm, head) is the *root* unit; activation checkpointing of every block; AdamW. Memory is counted at every moment of a
step at which it could be fullest (`training_moments`), because gradients grow while checkpoints shrink. Three arms:

=========  ============================================================================================================
``bf16``   FSDP2 gathers bf16 weights
``nvfp4``  gather mode: FSDP2 gathers packed weights, which are unpacked to bf16
``kept``   the same with ``keep_gathered=True``: what was gathered stays until the optimizer's step
=========  ============================================================================================================

**Rollout** is tensor-parallel engines like vLLM's (`rollout_memory`). *Colocated* they sleep at level 2 while the
trainer computes on the same GPUs, so training and rollout are two sums that must fit one after the other; masters,
optimizer state and packed shards stay on the GPU in both unless they are offloaded. *Separate* engines have GPUs of
their own.

Bytes of 4-bit weights are those of the plan's tensors; activations of trainer and engine are estimates, in rows of
their own. Not counted: fragmentation of PyTorch's allocator, and the trainer's CUDA context and NCCL buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .capacity_shape import BF16, ModelShape, Unit
from .engine_memory import GIB, EngineSettings
from .errors import UserError

ARMS = ("bf16", "nvfp4", "kept")
"""How a trainer gathers weights."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2}

LOSS_ROWS = 2048
"""Tokens whose logits exist at a time: the loss is computed in pieces, each recomputed in backward."""

LOSS_BYTES = 12
"""Per token of a piece and word of the vocabulary: log-probabilities, their gradient and that of the logits, fp32."""

ACTIVATION_BYTES = 4
"""Per token and input or output of a linear layer in the block that is recomputed: its value and as much again for
what norms, activation functions and attention keep, and for gradients. An estimate."""

ENGINE_ACTIVATION_BYTES = 2
"""The same of an engine, which keeps no gradients. An estimate, 28 % above the one measured
(``benchmarks/results/engine_memory.jsonl``)."""

ENGINE_FIXED_BYTES = GIB
"""An engine's CUDA graphs, CUDA context and the like, which sleeping does not free. An estimate; measured: 0.92 GiB
(CUDA graphs and non-torch memory in ``benchmarks/results/engine_memory.jsonl``)."""

UTILIZATION = {"colocated": 0.5, "separate": 0.9}
"""Share of a GPU's memory that an engine takes where none is given."""


@dataclass(frozen=True)
class Setup:
    """What the model is to run on.

    Args:
        gpus: of the whole run. nodes: they are in.
        gpu_memory: of one GPU, GiB.
        masters: dtype of the parameters that the optimizer updates, "fp32" or "bf16"; gradients and AdamW's two
            averages have the same, as FSDP2 and `torch.optim` make them.
        tokens: per GPU in a forward.
        tensor_parallel: GPUs of an engine.
        offload: masters, gradients and optimizer state are in host memory (FSDP2's ``CPUOffloadPolicy``).
        rollout_gpus: of ``gpus``, those that only sample; 0: colocated.
        utilization: share of a GPU's memory that an engine takes; None: `UTILIZATION`.

    Raises:
        UserError: numbers that cannot be, or do not divide each other.
    """

    gpus: int
    nodes: int = 1
    gpu_memory: float = 141.0
    masters: str = "fp32"
    tokens: int = 8192
    tensor_parallel: int = 1
    offload: bool = False
    rollout_gpus: int = 0
    utilization: float | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes", "tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.gpus % self.nodes:
            raise UserError(f"{self.gpus} GPUs cannot be divided among {self.nodes} nodes: give a multiple")
        if self.masters not in DTYPE_BYTES:
            raise UserError(f"masters are fp32 or bf16, not {self.masters}")
        if not 0 <= self.rollout_gpus < self.gpus:
            raise UserError(f"{self.rollout_gpus} of {self.gpus} GPUs for rollout leave none to train on")
        if self.sampling % self.tensor_parallel:
            raise UserError(f"{self.sampling} rollout GPUs cannot be divided into engines of {self.tensor_parallel}")
        if not 0 < self.share <= 1:
            raise UserError(f"utilization is a share of the GPU's memory, above 0 and at most 1, not {self.share:g}")
        if not 0 < self.gpu_memory < math.inf:
            raise UserError(f"a GPU's memory is a positive number of GiB, not {self.gpu_memory:g}")

    @property
    def mode(self) -> str:
        return "separate" if self.rollout_gpus else "colocated"

    @property
    def training(self) -> int:
        """GPUs that the trainer shards over."""
        return self.gpus - self.rollout_gpus

    @property
    def sampling(self) -> int:
        """GPUs that engines run on."""
        return self.rollout_gpus or self.gpus

    @property
    def share(self) -> float:
        return UTILIZATION[self.mode] if self.utilization is None else self.utilization

    @property
    def master_bytes(self) -> int:
        return DTYPE_BYTES[self.masters]


def training_moments(shape: ModelShape, setup: Setup, arm: str) -> Iterator[tuple[str, dict[str, float]]]:
    """What a GPU holds at the moments of a training step that may be the fullest.

    Args:
        shape: of the model.
        setup: what it runs on.
        arm: one of `ARMS`.

    Yields:
        The moment's name and bytes by row. ``m`` is the bytes of a master, ``N`` the GPUs that train; a shard is the
        longest one (`Weight.shard`).

        masters: ``m`` times the shard of all parameters; 0 offloaded.
        optimizer: twice that, AdamW's averages; 0 offloaded.
        gradients: ``m`` times the shards of the units whose gradients have been reduced by then; 0 offloaded.
        packed_shards: 4.5 bits for each 4-bit weight of the shard; offloaded, also the longest block's masters, which
            are copied to the GPU one unit at a time to be packed. Not in arm bf16.
        kept: 4.5 bits for each 4-bit weight of the model, in arm kept.
        gathered: 2 bytes for each parameter of the root, which stays gathered through backward, and of the block at
            work; and the next block, gathered in advance: in bf16, or its packed bytes (arm kept: nothing but what is
            not 4-bit).
        reduced: gradients in full: 2 bytes for each parameter of the block at work, and of the head's, which wait for
            the root's turn; ``m`` bytes for each parameter of a unit in a reduce-scatter's input, that of the unit
            before staying until this one's.
        activations: the estimate. 2 bytes for each token and hidden channel of every block not yet gone back through
            (checkpoints); for the block at work `ACTIVATION_BYTES` for each token and `Unit.widths`; in the loss
            `LOSS_BYTES` for each word and each token of a piece of at most `LOSS_ROWS`.
        engine: what a sleeping engine does not free (`ENGINE_FIXED_BYTES`), colocated.
    """
    ranks, m, tokens, count = setup.training, setup.master_bytes, setup.tokens, len(shape.blocks)
    held = 0 if setup.offload else m
    shard = sum(unit.shard(ranks) for unit in shape.units)
    always = {"masters": held * shard, "gradients": 0, "optimizer": 2 * held * shard, "packed_shards": 0.0, "kept": 0.0}
    if arm != "bf16":
        always["packed_shards"] = sum(unit.packed_shard(ranks) for unit in shape.units)
        if setup.offload:
            always["packed_shards"] += m * max(block.shard(ranks) for block in shape.blocks)
    if arm == "kept":
        always["kept"] = sum(unit.packed for unit in shape.units)
    engine = 0 if setup.rollout_gpus else ENGINE_FIXED_BYTES

    def moment(gathered: float, reduced: float, activations: float, done: int) -> dict[str, float]:
        """``done``: blocks whose gradients are sharded, counted from the last; beyond them all, the root's too."""
        gradients = held * sum(unit.shard(ranks) for unit in (shape.root, *shape.blocks)[count + 1 - done :])
        rows = {"gathered": gathered, "reduced": reduced, "activations": activations, "engine": engine}
        return {**always, "gradients": gradients, **rows}

    checkpoint = BF16 * tokens * shape.hidden
    root, head = BF16 * shape.root.elements, BF16 * shape.hidden * shape.vocabulary
    # The head's gradient is there while the pieces after the first are computed.
    pieces = head if tokens > LOSS_ROWS else 0
    yield "loss", moment(root, pieces, count * checkpoint + LOSS_BYTES * min(tokens, LOSS_ROWS) * shape.vocabulary, 0)
    for at in reversed(range(count)):
        block, done = shape.blocks[at], count - 1 - at
        here, ahead = BF16 * block.elements, _gathered_ahead(shape.blocks[at - 1], arm) if at else 0.0
        before = m * shape.blocks[at + 1].elements if done else 0
        activations = (at + 1) * checkpoint + ACTIVATION_BYTES * tokens * block.widths
        yield f"backward of block {at}", moment(root + here + ahead, head + here + before, activations, done)
        reduced = head + here + m * block.elements + before
        yield f"reduction of block {at}", moment(root + ahead, reduced, (at + 1) * checkpoint, done + 1)
    reduced = root + m * (shape.root.elements + shape.blocks[0].elements)
    yield "reduction of the rest", moment(0, reduced, 0, count)
    yield "optimizer step", moment(0, 0, 0, count + 1)


def _gathered_ahead(block: Unit, arm: str) -> float:
    return {"bf16": BF16 * block.elements, "nvfp4": block.packed + block.rest, "kept": block.rest}[arm]


def training_memory(shape: ModelShape, setup: Setup, arm: str) -> tuple[str, dict[str, float]]:
    """The fullest of `training_moments`: its name and its rows."""
    return max(training_moments(shape, setup, arm), key=lambda item: sum(item[1].values()))


def host_bytes(shape: ModelShape, setup: Setup) -> int:
    """Offloaded masters, gradients and AdamW's two averages in the memory of a node: 4 shards for each of its GPUs."""
    shard = sum(unit.shard(setup.training) for unit in shape.units)
    return 4 * setup.master_bytes * shard * setup.gpus // setup.nodes if setup.offload else 0


def engine_weights(shape: ModelShape, packed: bool, tensor_parallel: int = 1) -> float:
    """Bytes of an engine's weights on one of its GPUs: as they are sent, divided as `Weight.parts` says."""
    return sum(
        (w.nbytes if packed else BF16 * w.elements) / min(tensor_parallel, w.parts or tensor_parallel)
        for unit in shape.units
        for w in unit.weights
    )


def rollout_memory(shape: ModelShape, setup: Setup, packed: bool) -> dict[str, float]:
    """What a GPU holds while engines sample.

    Args:
        shape: of the model.
        setup: what it runs on.
        packed: engines with NVFP4 weights, and a trainer that gathers them; else both bf16.

    Returns:
        Bytes by row.

        trainer: its masters, optimizer state and packed shards, if they share the GPU.
        weights: `engine_weights`.
        activations: the estimate. `ENGINE_ACTIVATION_BYTES` for each input and output of a block's linear layers, on
            this GPU, and each token of the largest forward (`EngineSettings.batched_tokens`).
        engine: `ENGINE_FIXED_BYTES`.
        kv_cache: what these three leave of the engine's share of the GPU; below 0: it does not start.
    """
    rows = {"trainer": 0.0}
    if not setup.rollout_gpus:
        _, training = training_memory(shape, setup, "nvfp4" if packed else "bf16")
        rows["trainer"] = training["masters"] + training["optimizer"] + training["packed_shards"]
    widest = max(block.widths for block in shape.blocks)
    rows["weights"] = engine_weights(shape, packed, setup.tensor_parallel)
    tokens = EngineSettings().batched_tokens
    rows["activations"] = ENGINE_ACTIVATION_BYTES * tokens * widest / setup.tensor_parallel
    rows["engine"] = ENGINE_FIXED_BYTES
    rows["kv_cache"] = setup.share * setup.gpu_memory * GIB - sum(rows.values()) + rows["trainer"]
    return rows


def cache_tokens(shape: ModelShape, setup: Setup, cache: float) -> int:
    """Tokens that an engine's KV cache holds, from its bytes on one GPU; a head is on as many GPUs as it must be."""
    heads = max(1, shape.kv_heads // setup.tensor_parallel)
    return max(0, int(cache // (shape.kv_bytes // shape.kv_heads * heads)))


def forward_gather_bytes(shape: ModelShape, ranks: int, packed: bool) -> float:
    """Bytes that a rank receives while every unit is gathered once (`Unit.received`): one forward."""
    return sum(unit.received(ranks, packed) for unit in shape.units)


def step_gather_bytes(shape: ModelShape, ranks: int, arm: str) -> float:
    """The same of a training step of one micro-batch: blocks are gathered in forward and again in backward."""
    forward = forward_gather_bytes(shape, ranks, arm != "bf16")
    again = sum(
        unit.received(ranks, arm != "bf16") - (arm == "kept") * (ranks - 1) * unit.packed_shard(ranks)
        for unit in shape.blocks
    )
    return forward + again


def sync_bytes(shape: ModelShape, packed: bool) -> float:
    """Bytes of the stream that an engine is sent: all parameters in bf16, or `Weight.nbytes` of each."""
    return sum(w.nbytes if packed else BF16 * w.elements for unit in shape.units for w in unit.weights)
