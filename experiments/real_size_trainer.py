"""A trainer of real size with random weights: made where its shards are, and taken apart in time and memory.

**Made.** No rank ever holds the model: it is built on the meta device, prepared (`apply_qat`) and sharded
(`fully_shard` of every decoder layer) there, and then each rank allocates its shards on its GPU and fills them. The
weights differ with the number of ranks.

**Scales.** Weights have a standard deviation of 0.02, what ends in the residual stream that over sqrt(2 x layers), and
embeddings one of 1: then what sets tokens apart is not drowned by what attention gives all of them alike, and
different tokens go to different experts. Routers have 1 / sqrt(width), so that their logits are about normal.
`Experts` counts where tokens go.

**Taken apart.** `Parts.divided` waits for all ranks and GPUs between the phases, which whole steps
(`arms.Trainer.step`) do not: the sum of the phases is above the time of a step. Memory is counted per phase, as are the
bytes of what is held: masters, optimizer state, packed shards, and gradients when all are there. What one unit takes
when it is gathered is seen by gathering it alone (`gathered`). Activations are not told apart at a peak:
``beyond_held`` is all that a phase takes at most beside what is held between steps; what is gathered is in it, and in
backward gradients. What ``after_forward`` has more than ``before``, less the root, which stays gathered, is what is
kept for backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from arms import Trainer, shard
from common import Row, Stopwatch, Traffic, World
from real_size_scores import Loss
from shapes import MODELS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import nvfp4_qat as nq
from nvfp4_qat.fsdp import plain_tensor
from nvfp4_qat.gather import gather_of
from nvfp4_qat.model_tensors import model_tensors
from nvfp4_qat.naming import canonical_name
from nvfp4_qat.sharded_stream import reshard, whole_tensors
from nvfp4_qat.shipped_configs import shipped, shipped_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("pack", "forward", "backward", "clip", "optimizer")

STD = 0.02


def configuration(name: str, layers: int | None) -> Any:
    """The configuration of a shipped model, or of a small one of the benchmarks with experts.

    Args:
        name: of `shipped_configs.shipped`, or a key of `shapes.MODELS`.
        layers: decoder layers; None: as many as it has.
    """
    if name in shipped():
        config: Any = shipped_config(name)
    else:
        from transformers import Qwen3MoeConfig

        kind, shape, count = MODELS[name]
        assert kind == "moe"
        config = Qwen3MoeConfig(
            **shape, norm_topk_prob=True, num_hidden_layers=count, max_position_embeddings=4096,
            tie_word_embeddings=False,
        )  # fmt: skip
    config.num_hidden_layers = layers or config.num_hidden_layers
    return config


def on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration without data."""
    from transformers import AutoModelForCausalLM

    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def make(config: Any, arm: str, masters: str, world: World, seed: int) -> tuple[nn.Module, nq.QuantPlan]:
    """A sharded model of random weights whose forward is that of `real_size_scores.Loss`; and the plan of its engine.

    Args:
        config: of the model.
        arm: "nvfp4": gather mode. "bf16": without QAT.
        masters: dtype of the parameters, a key of `DTYPES`.
        world: with a mesh.
        seed: of the weights.
    """
    dtype, quantized = DTYPES[masters], nq.QATConfig(enable=True)
    model: Any = on_meta(config, dtype)
    if arm == "nvfp4":
        plan = nq.apply_qat(model, quantized, gather="nvfp4")
    else:
        plan = nq.QuantPlan.from_model(model, quantized).unquantized()
    # Changed afterwards: transformers reads the source of a model's module to learn what the model supports.
    model.__class__ = type(f"{type(model).__name__}Loss", (Loss, type(model)), {})
    shard(model, dtype, world.mesh, checkpointing=True)
    model.to_empty(device=world.device)
    initialize(model, seed + world.rank)
    return model.train(), plan


@torch.no_grad()
def initialize(model: Any, seed: int) -> None:
    """Fill this rank's shards, and the buffers, of a model that has memory and no data yet."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    generators: dict[torch.device, torch.Generator] = {}
    for raw, parameter in model.named_parameters():
        name, local = canonical_name(raw), local_part(parameter)
        if parameter.ndim == 1:
            local.fill_(1.0)
            continue
        device = local.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        local.normal_(0.0, deviation(name, layers, width), generator=generator)
    rotary = model.model.rotary_emb
    for name, computed in type(rotary)(model.config).named_buffers():
        rotary.get_buffer(name).copy_(computed)
    others = [name for name, _ in model.named_buffers() if not name.startswith("model.rotary_emb.")]
    if others:
        raise RuntimeError(f"nothing fills these buffers: {', '.join(others)}")


def deviation(name: str, layers: int, width: int) -> float:
    """The standard deviation of a weight, by its canonical name."""
    if name.endswith("embed_tokens.weight"):
        return 1.0
    if name.endswith(".mlp.gate.weight"):
        return 1 / math.sqrt(width)
    into_stream = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
    return STD / math.sqrt(2 * layers) if name.endswith(into_stream) else STD


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as a plain one in the same memory."""
    plain = plain_tensor(tensor.detach())
    return plain.to_local() if isinstance(plain, DTensor) else plain


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Of this rank's parts."""
    return sum(local_part(t).nbytes for t in tensors if t is not None)


def plain_stream(model: nn.Module, plan: nq.QuantPlan) -> Iterator[tuple[str, Tensor]]:
    """All weights in full and in the dtype that an engine holds, none of them quantized; every rank takes part."""
    reshard(model)
    yield from whole_tensors(model_tensors(model, plan, sharded=True), None)


class Parts(Trainer):
    """A trainer whose steps can be taken apart.

    Args:
        model: of `make`.
        masters: a key of `DTYPES`.
        world: that trains.
        clip: largest norm of the gradient.
    """

    def __init__(self, model: nn.Module, masters: str, world: World, clip: float) -> None:
        super().__init__(model, DTYPES[masters], sharded=True, clip=clip)
        self.world, self.packs = world, gather_of(model) is not None

    def divided(self, batch: Tensor) -> tuple[dict[str, float], Row, float]:
        """A step, phase by phase.

        Returns:
            Seconds of each phase; bytes of what is held and at the peak of each phase, on the GPU that needs most; and
            the loss.
        """
        world = self.world
        seconds: dict[str, float] = {}
        memory: Row = {"before_bytes": world.allocated()}

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            world.reset_peak()
            with Stopwatch(world) as watch:
                yield
            seconds[name] = watch.seconds
            memory[f"{name}_peak_bytes"], memory[f"after_{name}_bytes"] = world.peak(), world.allocated()

        if self.packs:
            with phase("pack"):
                nq.refresh(self.model)
        with phase("forward"):
            loss = self.model(batch)
        with phase("backward"):
            loss.backward()
        gradients = nbytes(p.grad for p in self.model.parameters())
        with phase("clip"):
            self._clip()
        with phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        memory |= {**self.held(), "gradients_bytes": gradients}
        kept = sum(self.held().values())
        for name in ("forward", "backward"):
            memory[f"{name}_beyond_held_bytes"] = max(memory[f"{name}_peak_bytes"] - kept, 0)
        most = world.largest(*memory.values())
        return seconds, {name: int(v) for name, v in zip(memory, most, strict=True)}, float(loss.detach())

    def held(self) -> Row:
        """Bytes that this rank holds between steps."""
        states = (v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
        gather = gather_of(self.model)
        units = [] if gather is None else [unit.packed for unit in gather.units]
        return {
            "masters_bytes": nbytes(self.model.parameters()),
            "optimizer_bytes": nbytes(states),
            "packed_shards_bytes": sum(unit.memory.nbytes for unit in units),
        }

    def gathered(self) -> Row:
        """What gathering one decoder layer, and the rest of the model, takes: bytes held and received."""
        if self.packs:
            nq.refresh(self.model)
        model: Any = self.model
        layers = model.model.layers
        found: Row = {}
        for name, unit in (("block", layers[len(layers) // 2]), ("root", model)):
            self.world.wait()
            before = self.world.allocated()
            self.world.reset_peak()
            with Traffic(self.world) as traffic:
                unit.unshard()
            self.world.wait()
            found[f"{name}_held_bytes"] = self.world.allocated() - before
            found[f"{name}_peak_bytes"] = self.world.peak() - before
            found[f"{name}_received_bytes"] = traffic.gathered
            unit.reshard()
        most = self.world.largest(*found.values())
        return {name: int(value) for name, value in zip(found, most, strict=True)}

    def traffic(self, batch: Tensor) -> Row:
        """Bytes that a rank receives in a step, in gathers and in reductions."""
        with Traffic(self.world) as traffic:
            self.step([batch])
        gathered, reduced = self.world.largest(traffic.gathered, traffic.reduced)
        return {"gathered_bytes": int(gathered), "reduced_bytes": int(reduced)}


class Experts:
    """Counts how many tokens go to each expert while it is entered; recomputation counts again."""

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
        self._counts: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Experts:
        self._handles = [router.register_forward_hook(self._note) for router in self._routers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, router: Any, _: Any, output: Any) -> None:
        count = torch.bincount(output[2].detach().flatten(), minlength=router.num_experts)
        self._counts[id(router)] = self._counts.get(id(router), 0) + count

    def row(self) -> Row:
        """Of this rank: the share of experts with a token, in the layer where it is least; the largest load of an
        expert as a multiple of the mean, in the layer where it is largest."""
        counts = torch.stack(list(self._counts.values())).double()
        return {
            "layers": len(counts),
            "used_share": round(float((counts > 0).double().mean(1).min()), 4),
            "largest_load": round(float((counts.amax(1) / counts.mean(1)).max()), 2),
        }
