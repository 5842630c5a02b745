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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from .engine_memory import GIB, EngineSettings
from .entries import QuantizedTensor
from .errors import UserError
from .format import BITS_PER_WEIGHT
from .plan import QuantPlan
from .plan_table import packed_bytes

ARMS = ("bf16", "nvfp4", "kept")
"""How a trainer gathers weights."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2}

BF16 = 2
"""Bytes of what is gathered and computed with."""

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


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape, its plan entry where it is 4-bit, and how engines divide it.

    ``parts`` is the most tensor-parallel ranks it is divided among: 1 for norms and routers, which each holds whole;
    the number of key-value heads for their projections; None: any number.
    """

    shape: tuple[int, ...]
    entry: QuantizedTensor | None
    parts: int | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """In a packed stream, a checkpoint or an engine: 4.5 bits a weight and the global scales, else bf16."""
        return BF16 * self.elements if self.entry is None else packed_bytes(self.entry)

    def shard(self, ranks: int) -> int:
        """Elements of the longest shard: FSDP2 divides the first dimension, whatever is left goes to the first."""
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    ``widths`` is the sum of inputs and outputs of its linear layers for one token; experts count once for each that a
    token goes to.
    """

    weights: tuple[Weight, ...]
    widths: int

    @cached_property
    def elements(self) -> int:
        return sum(w.elements for w in self.weights)

    @cached_property
    def packed(self) -> float:
        """Bytes of its 4-bit weights without global scales, which do not travel in training."""
        return sum(w.elements for w in self.weights if w.entry is not None) * BITS_PER_WEIGHT / 8

    @cached_property
    def rest(self) -> int:
        """Bytes in bf16 of what is not 4-bit."""
        return BF16 * sum(w.elements for w in self.weights if w.entry is None)

    def shard(self, ranks: int) -> int:
        return sum(w.shard(ranks) for w in self.weights)

    def packed_shard(self, ranks: int) -> float:
        return sum(w.shard(ranks) for w in self.weights if w.entry is not None) * BITS_PER_WEIGHT / 8

    def received(self, ranks: int, packed: bool) -> float:
        """Bytes that a rank gets from the others in one all-gather: ``ranks - 1`` shards, packed or all in bf16."""
        whole = BF16 * self.shard(ranks)
        four_bit = BF16 * sum(w.shard(ranks) for w in self.weights if w.entry is not None)
        return (ranks - 1) * (whole - four_bit + self.packed_shard(ranks) if packed else whole)


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need of a model.

    Args:
        blocks: decoder blocks, in order. root: everything else.
        hidden: width between blocks. vocabulary: words of the head.
        heads, kv_heads, head_dim: of attention.
    """

    blocks: tuple[Unit, ...]
    root: Unit
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    plan: QuantPlan = field(repr=False)

    @property
    def units(self) -> tuple[Unit, ...]:
        return (*self.blocks, self.root)

    @property
    def elements(self) -> int:
        return sum(unit.elements for unit in self.units)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token in the KV cache of an engine on one GPU: keys and values of every block, bf16."""
        return 2 * len(self.blocks) * self.kv_heads * self.head_dim * BF16


def model_shape(model: nn.Module, plan: QuantPlan) -> ModelShape:
    """Read a model's structure.

    Args:
        model: bare, as transformers builds it; the meta device will do.
        plan: its plan.

    Raises:
        UserError: no list of blocks in it, or attention of another kind than keys and values for every token.
    """
    config: Any = model.config
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "kv_lora_rank", None):
        raise UserError(f"memory of {', '.join(sorted(kinds)) or 'latent attention'} is not planned for yet")
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder blocks, which FSDP2 would gather one by one")
    prefix, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    routers = {entry.name for entry in plan.skipped if entry.kind == "router"}
    members: list[list[Weight]] = [[] for _ in range(len(found) + 1)]
    widths = [0] * len(members)
    for name, parameter in model.named_parameters():
        at = int(name[len(prefix) + 1 :].split(".")[0]) if name.startswith(f"{prefix}.") else -1
        shape = tuple(parameter.shape)
        whole = len(shape) < 2 or name in routers
        kv = name.rpartition(".")[0].endswith((".k_proj", ".v_proj"))
        entry = plan[name] if name in plan else None
        members[at].append(Weight(shape, entry, 1 if whole else kv_heads if kv else None))
        widths[at] += (0, 0, sum(shape), experts * sum(shape[1:]))[min(len(shape), 3)]
    *blocks, root = (Unit(tuple(weights), width) for weights, width in zip(members, widths, strict=True))
    return ModelShape(
        tuple(blocks), root, int(config.hidden_size), int(config.vocab_size), heads, kv_heads,
        int(getattr(config, "head_dim", None) or config.hidden_size // heads), plan,
    )  # fmt: skip


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
