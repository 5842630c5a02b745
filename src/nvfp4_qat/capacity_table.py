"""`capacity`'s numbers for a model and a setup: as a table, as JSON, and whether they fit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import nn

from .capacity import (
    ACTIVATION_BYTES,
    ARMS,
    ENGINE_ACTIVATION_BYTES,
    LOSS_BYTES,
    LOSS_ROWS,
    Setup,
    cache_tokens,
    forward_gather_bytes,
    host_bytes,
    rollout_memory,
    step_gather_bytes,
    sync_bytes,
    training_memory,
    training_moments,
)
from .capacity_shape import ModelShape, model_shape
from .engine_memory import GIB, PRECISIONS, EngineSettings
from .errors import UserError
from .plan import QuantPlan
from .plan_table import align, short

TIGHT = 0.1
"""Share of a GPU: a trainer that leaves less is "tight". `capacity` is off by some percent and does not count all."""

TRAINING_ROWS = {
    "masters": "masters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "packed_shards": "packed shards",
    "kept": "packed whole model, kept",
    "gathered": "gathered blocks",
    "reduced": "gradients being reduced",
    "activations": "activations (estimate)",
    "engine": "sleeping engine (estimate)",
}
"""Rows of `capacity.training_moments`, and what the table calls them."""

ROLLOUT_ROWS = {
    "trainer": "masters, optimizer, packed shards",
    "weights": "weights",
    "activations": "activations (estimate)",
    "engine": "graphs and the rest (estimate)",
    "kv_cache": "left for the KV cache",
}
"""Rows of `capacity.rollout_memory`, and what the table calls them."""


@dataclass(frozen=True)
class Capacity:
    """A model on a setup.

    Args:
        model: its name.
        shape: its structure.
        setup: what it runs on.

    Raises:
        UserError: engines of ``tensor_parallel`` GPUs cannot divide the model.
    """

    model: str
    shape: ModelShape
    setup: Setup

    @classmethod
    def of(cls, name: str, model: nn.Module, plan: QuantPlan, setup: Setup) -> Capacity:
        """Read a model, on the meta device or not, and its plan."""
        return cls(name, model_shape(model, plan), setup)

    def __post_init__(self) -> None:
        parts, shape = self.setup.tensor_parallel, self.shape
        if shape.heads % parts:
            raise UserError(
                f"{shape.heads} attention heads of {self.model} cannot be divided among {parts} GPUs of an engine"
            )
        if shape.kv_heads % parts and parts % shape.kv_heads:
            raise UserError(
                f"{shape.kv_heads} key-value heads of {self.model} cannot be divided among {parts} GPUs of an engine"
            )

    @cached_property
    def training(self) -> Mapping[str, tuple[str, Mapping[str, float]]]:
        """By arm: the fullest moment of a step, and its rows."""
        return {arm: training_memory(self.shape, self.setup, arm) for arm in ARMS}

    @cached_property
    def rollout(self) -> Mapping[str, Mapping[str, float]]:
        """By precision of the engines: the rows."""
        return {name: rollout_memory(self.shape, self.setup, name == "nvfp4") for name in PRECISIONS}

    def trains(self, arm: str) -> str:
        """ "fits", "tight" (less than `TIGHT` is left) or "does not fit"."""
        left = 1 - sum(self.training[arm][1].values()) / (self.setup.gpu_memory * GIB)
        return "does not fit" if left < 0 else "tight" if left < TIGHT else "fits"

    def samples(self, precision: str) -> str:
        """ "fits", or why not."""
        rows = self.rollout[precision]
        if rows["kv_cache"] <= 0:
            return "no room for a KV cache"
        return "does not fit" if sum(rows.values()) > self.setup.gpu_memory * GIB else "fits"

    def as_dict(self) -> dict[str, Any]:
        """Everything, in bytes; the rows are defined in `capacity`."""
        shape, setup, ranks = self.shape, self.setup, self.setup.training
        training = {
            arm: {"moment": moment, **_whole(rows), "verdict": self.trains(arm)}
            for arm, (moment, rows) in self.training.items()
        }
        rollout = {
            name: {
                **_whole(rows),
                "kv_cache_tokens": cache_tokens(shape, setup, rows["kv_cache"]),
                "verdict": self.samples(name),
            }
            for name, rows in self.rollout.items()
        }
        return {
            "setup": {**asdict(setup), "mode": setup.mode, "utilization": setup.share},
            "blocks": len(shape.blocks),
            "training": training,
            "host_bytes_per_node": host_bytes(shape, setup),
            "rollout": rollout,
            "engines": setup.sampling // setup.tensor_parallel,
            "gathered_per_rank_and_forward": {
                name: round(forward_gather_bytes(shape, ranks, name == "nvfp4")) for name in PRECISIONS
            },
            "gathered_per_rank_and_step": {arm: round(step_gather_bytes(shape, ranks, arm)) for arm in ARMS},
            "sync": {name: round(sync_bytes(shape, name == "nvfp4")) for name in PRECISIONS},
        }

    def table(self) -> str:
        """What `as_dict` says, for a person."""
        shape, setup = self.shape, self.setup
        four_bit = sum(w.elements for unit in shape.units for w in unit.weights if w.entry is not None)
        engines = setup.sampling // setup.tensor_parallel
        lines = [
            f"{self.model}: {short(shape.elements)} parameters in {len(shape.blocks)} blocks, "
            f"{100 * four_bit / shape.elements:.1f} % in NVFP4",
            f"{setup.gpus} GPUs of {setup.gpu_memory:g} GiB in {setup.nodes} node{'s' * (setup.nodes > 1)}: "
            f"{setup.training} train, {setup.sampling} sample ({setup.mode}) in {engines} "
            f"engine{'s' * (engines > 1)} of {setup.tensor_parallel}",
            "",
        ]
        head = f"training, {setup.masters} masters, {setup.tokens} tokens"
        fullest = {arm: rows for arm, (_, rows) in self.training.items()}
        table = [(f"GiB a GPU: {head}", *ARMS), *_memory(TRAINING_ROWS, fullest)]
        table.append(("at the fullest moment", *(_gib(sum(rows.values())) for rows in fullest.values())))
        table.append(("", *(self.trains(arm) for arm in ARMS)))
        lines += _columns(table)
        lines += [f"fullest: {', '.join(f'{arm} in the {moment}' for arm, (moment, _) in self.training.items())}", ""]
        table = [(f"GiB a GPU: rollout, utilization {setup.share:g}", *PRECISIONS)]
        table += _memory(ROLLOUT_ROWS, self.rollout)
        table.append(("together", *(_gib(sum(rows.values())) for rows in self.rollout.values())))
        table.append(("", *(self.samples(name) for name in PRECISIONS)))
        held = [cache_tokens(shape, setup, rows["kv_cache"]) for rows in self.rollout.values()]
        table.append(("tokens in an engine's KV cache", *(f"{n:,}" for n in held)))
        lines += [*_columns(table), ""]
        lines += _columns([
            ("GB that travel", *PRECISIONS, "kept"),
            ("all-gather, per rank and forward", *(
                _gb(forward_gather_bytes(shape, setup.training, name == "nvfp4")) for name in PRECISIONS
            ), ""),
            ("all-gather, per rank and step", *(_gb(step_gather_bytes(shape, setup.training, arm)) for arm in ARMS)),
            ("sync, to each engine", *(_gb(sync_bytes(shape, name == "nvfp4")) for name in PRECISIONS), ""),
        ])  # fmt: skip
        if setup.offload:
            lines.append(f"host memory of a node for what is offloaded: {_gib(host_bytes(shape, setup))} GiB")
        return "\n".join([*lines, "", *self._notes()])

    def _notes(self) -> list[str]:
        moments = training_moments(self.shape, self.setup, "bf16")
        most = max(rows["activations"] for _, rows in moments)
        widths = max(block.widths for block in self.shape.blocks)
        notes = [
            f"Estimated: activations. In training, where every block is checkpointed, at most {_gib(most)} GiB: 2 B x "
            f"tokens x hidden width for each block, and {ACTIVATION_BYTES} B x tokens x {widths:,} (inputs and outputs "
            f"of its linear layers) for the one at work or {LOSS_BYTES} B x {LOSS_ROWS} tokens x vocabulary for a "
            f"piece of the loss. In an engine {ENGINE_ACTIVATION_BYTES} B x {EngineSettings().batched_tokens} tokens "
            f"x {widths:,}, divided among its GPUs.",
            "Not counted: fragmentation, and the trainer's CUDA context and NCCL buffers; so less than "
            f"{100 * TIGHT:.0f} % left is called tight.",
        ]
        over = [name for name in PRECISIONS if self.samples(name) == "does not fit"]
        if over:
            room = 1 - max(self.rollout[name]["trainer"] for name in over) / (self.setup.gpu_memory * GIB)
            share = math.floor(100 * room) / 100
            way = f"--utilization {share:.2f} or less, " if share > 0 else ""
            notes.append(f"Rollout does not fit beside the trainer's state: {way}--offload, or more GPUs.")
        return [line for note in notes for line in textwrap.wrap(note, 110)]


def _memory(titles: Mapping[str, str], columns: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """A line for each row that is not 0 everywhere."""
    return [
        (title, *(_gib(rows[name]) for rows in columns.values()))
        for name, title in titles.items()
        if any(rows[name] for rows in columns.values())
    ]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned; all but the first column to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = max(widths[0], 44)
    return align([
        (row[0].ljust(widths[0]), *(c.rjust(max(w, 8)) for c, w in zip(row[1:], widths[1:], strict=True)))
        for row in rows
    ])  # fmt: skip


def _whole(rows: Mapping[str, float]) -> dict[str, int]:
    """The rows and their sum, in whole bytes."""
    return {**{name: round(value) for name, value in rows.items()}, "total": round(sum(rows.values()))}


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f}"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"
