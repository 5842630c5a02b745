"""`QuantPlan`: the one list of what is 4-bit, in which group and under which checkpoint name, and what is not and why.

Training, export, sync and the engine's `ignore` list all read the same plan, so no two sides match patterns for
themselves. It is built from a live model or from one on the meta device; no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from .architectures import EXPERT_PROJECTIONS, engine_expert_names, is_numbered_expert
from .audit import compare_coverage
from .checkpoint_names import CheckpointSlice
from .config import QATConfig
from .decisions import decide
from .entries import QuantizedTensor, SkippedTensor
from .errors import UserError
from .inventory import take_inventory
from .naming import canonical_name, join, split_leaf
from .plan_table import render

__all__ = ["CheckpointSlice", "QuantPlan", "QuantizedTensor", "SkippedTensor", "canonical_name"]


@dataclass(frozen=True)
class QuantPlan:
    """What is 4-bit and what is not, for one model and one config.

    Args:
        config: the config it was made with.
        quantized: the 4-bit weights, in module order.
        skipped: every other weight of two or more dimensions, with the reason.
        checkpoint_slices: canonical name to checkpoint tensors, for every tensor that a checkpoint stores. A second
            name of a tied parameter, and what an adapter method added, is not stored and absent.
        parameters: number of elements of all stored parameters.
        head: canonical name of the module that makes the logits, where known.
    """

    config: QATConfig
    quantized: tuple[QuantizedTensor, ...]
    skipped: tuple[SkippedTensor, ...]
    checkpoint_slices: Mapping[str, tuple[CheckpointSlice, ...]]
    parameters: int
    head: str | None = None

    @classmethod
    def from_model(cls, model: nn.Module, config: QATConfig) -> QuantPlan:
        """Decide for every weight of a model.

        Args:
            model: bare or wrapped (PEFT, DDP, FSDP2, torch.compile, activation checkpointing), on any device, meta too.
            config: what to ignore. `enable` does not matter here.

        Returns:
            The plan.

        Raises:
            UserError: the config is none; a pattern splits a fusion group; a tied output head would be quantized, or
                holds data of its own; nothing is left to quantize; the model's checkpoint has a layout that cannot be
                written.

        Warns:
            UserWarning: a pattern that is not one of the defaults matches no weight.
        """
        QATConfig.check(config)
        inventory = take_inventory(model)
        if (problem := inventory.tie_problem()) is not None:
            raise UserError(problem)
        quantized, skipped, slices = decide(inventory, config)
        return cls(config, quantized, skipped, slices, inventory.parameters, inventory.head)

    def __getitem__(self, name: str) -> QuantizedTensor:
        """Return the entry of a 4-bit weight by its parameter name, wrapped or canonical."""
        return self._by_name[canonical_name(name)]

    def __contains__(self, name: str) -> bool:
        """Tell whether the parameter of this name, wrapped or canonical, is 4-bit."""
        return canonical_name(name) in self._by_name

    def __str__(self) -> str:
        return render(self)

    @cached_property
    def _by_name(self) -> dict[str, QuantizedTensor]:
        return {entry.name: entry for entry in self.quantized}

    def unquantized(self) -> QuantPlan:
        """Return the plan of the same model with nothing in 4 bits: what an engine in bf16 holds."""
        reason = "nothing is to be 4-bit"
        left = tuple(
            SkippedTensor(e.name, e.module, e.shape, reason, e.kind, None if e.batch_dims else e.group)
            for e in self.quantized
        )
        return replace(self, quantized=(), skipped=(*self.skipped, *left))

    def groups(self) -> dict[str, tuple[QuantizedTensor, ...]]:
        """Return the fusion groups: group id to members, both in module order."""
        groups: dict[str, list[QuantizedTensor]] = {}
        for entry in self.quantized:
            groups.setdefault(entry.group, []).append(entry)
        return {group: tuple(members) for group, members in groups.items()}

    def checkpoint_modules(self, name: str) -> tuple[str, ...]:
        """Return the modules that a parameter belongs to in the checkpoint.

        Args:
            name: canonical parameter name, quantized or not.

        Returns:
            Module names: one per expert and projection for experts, else usually one. A parameter that is not stored
            (tied) is answered with its canonical module.
        """
        slices = self.checkpoint_slices.get(name, (CheckpointSlice(name),))
        return tuple(split_leaf(slice_.name)[0] for slice_ in slices)

    def ignore_list(self) -> tuple[str, ...]:
        """Return what goes into the `ignore` of a compressed-tensors config: explicit names, nothing to interpret.

        Returns:
            The modules that stay unquantized, as the checkpoint names them, embeddings excepted (no reader takes them
            for linear layers). Readers have names of their own, which are added where they differ: transformers looks
            for its own module names, vLLM for `experts.N.{gate,up,down}_proj` and for the name of a layer it fused.
        """
        names: dict[str, None] = {}
        for entry in self.skipped:
            if entry.kind in ("embedding", "adapter"):
                continue
            modules = self.checkpoint_modules(entry.name)
            if entry.kind == "experts":
                # Experts that the checkpoint keeps in one tensor have no names there, but an engine asks for them.
                numbered = modules if is_numbered_expert(modules[0]) else _numbered(entry)
                names.update(dict.fromkeys((*modules, *numbered)))
            else:
                names.update(dict.fromkeys((*modules, entry.module)))
                if entry.group is not None and entry.group != entry.module:
                    names[join(split_leaf(modules[0])[0], split_leaf(entry.group)[1])] = None
            for module in modules:
                names.update(dict.fromkeys(engine_expert_names(module)))
        return tuple(names)

    def targets(self) -> tuple[str, ...]:
        """Return the `targets` of a compressed-tensors config: "Linear", and a quantized output head by name.

        vLLM does not count its output head as linear, so a 4-bit one must be named.
        """
        heads = [m for e in self.quantized if e.module == self.head for m in self.checkpoint_modules(e.name)]
        return ("Linear", *heads)

    def quantization_config(self) -> dict[str, Any]:
        """Return the `quantization_config` for the `config.json` of this plan's checkpoint."""
        return self.config.to_compressed_tensors(self.ignore_list(), self.targets())

    def audit(self, names: Iterable[str]) -> None:
        """Check that another side quantizes exactly the layers of this plan.

        Args:
            names: the modules that are really quantized there, in any style: canonical, as in the checkpoint, or as an
                engine fuses them (`…self_attn.qkv_proj`, `…mlp.experts`); parameter names will do too.

        Raises:
            MismatchError: lists every layer that is quantized on one side only.
        """
        compare_coverage(self, names)


def _numbered(entry: SkippedTensor) -> list[str]:
    """Return the engines' names for experts of which all are in one tensor; a bias has none of its own."""
    if len(entry.shape) != 3:
        return []
    return [join(entry.module, str(index), part) for index in range(entry.shape[0]) for part in EXPERT_PROJECTIONS]
