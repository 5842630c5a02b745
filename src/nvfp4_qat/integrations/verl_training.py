"""verl's FSDP workers: the model is prepared before FSDP wraps it, and what the rollout gets is packed.

With the strategy ``fsdp2`` FSDP gathers packed weights (gather mode), with ``fsdp`` modules quantize what FSDP has
gathered (module mode). For a comparison the model may be left as it is, and rounded for the rollout only. The engine's
other work, such as offloading, clipping, checkpoints, stays verl's. Scales are not to be invalidated after a step:
changed weights are noticed.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core import apply_qat
from ..errors import UserError
from ..live_manifest import manifest
from ..live_recipe import Incoming
from ..metrics import FlipTracker
from ..plan import QuantPlan
from ..quantizer import QATQuantizer, packed_weights
from .verl_config import config_of
from .verl_stream import announced

SAMPLED = 1 << 26
"""Bytes of packed codes that a rank remembers, the first of each weight, to count how many change."""


class Training:
    """What QAT adds to one of verl's engines.

    Args:
        engine: verl's `FSDPEngine`, whose model is not wrapped yet.
        module: the model.

    Raises:
        UserError: the configuration cannot be trained in 4 bits; nothing was changed.
    """

    def __init__(self, engine: Any, module: nn.Module) -> None:
        self._engine = engine
        config, options = config_of(engine._qat_config)
        self.strategy: str = engine.engine_config.strategy
        if self.strategy not in ("fsdp", "fsdp2"):
            raise UserError(f"QAT is there for the strategies fsdp and fsdp2, not for {self.strategy}")
        if engine.model_config.lora.get("merge", False):
            raise UserError("adapters cannot be merged into 4-bit weights: leave model.lora.merge at false")
        gather = "nvfp4" if self.strategy == "fsdp2" and options.gather == "nvfp4" else None
        keep, self._trains = options.keep_gathered and gather is not None, options.train
        if self._trains:
            self.plan: QuantPlan = apply_qat(module, config, gather=gather, keep_gathered=keep)
        else:
            self.plan = QuantPlan.from_model(module, config)
        self.entries: list[Incoming] = manifest(module, self.plan)
        self._sent = 0
        self._seconds = 0.0
        self._flips = FlipTracker()
        self.stepped = True
        """Whether an optimizer's step came after the last stream."""
        self._sample = SAMPLED // len(self.plan.quantized)
        if engine.rank == 0:
            mode = f"{self.strategy}, {'gather' if gather else 'module'} mode"
            how = f"training in 4 bits ({mode})" if self._trains else "training in bf16, 4 bits for the rollout only"
            print(f"nvfp4-qat: {how}: {coverage(self.plan)}", flush=True)

    def stream(self, module: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The packed weights with their announcement; every rank has to take all of it.

        Args:
            module: the model, wrapped.
            device: of this rank.
        """
        start, sent = time.perf_counter(), 0
        self._move(device)
        sampled = []
        try:
            full = self.strategy == "fsdp" or not self._trains
            packed = self._full(module, device) if full else packed_weights(module, layout="fused")
            for name, tensor in announced(self.entries, packed, device):
                sent += tensor.nbytes
                if name.endswith("weight_packed"):
                    sampled.append((name, tensor.view(-1)[: self._sample].clone()))
                yield name, tensor
            if self.stepped:  # else the same weights are sent once more
                self._flips.count(sampled)
                self.stepped = False
        finally:
            if self._engine._is_offload_param:
                self._engine.to("cpu", model=True, optimizer=False, grad=False)
        self._sent, self._seconds = sent, time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Of the last stream, under the names that verl logs."""
        quantized = sum(math.prod(entry.shape) for entry in self.plan.quantized)
        rate = self._flips.rate
        flips = {} if rate is None else {"qat/flip_rate": rate.codes_changed / max(rate.codes, 1)}
        return flips | {
            "qat/sync_bytes": float(self._sent),
            "qat/stream_seconds": self._seconds,
            "qat/coverage": quantized / max(self.plan.parameters, 1),
        }

    def _move(self, device: torch.device) -> None:
        """Bring offloaded shards to the GPU, where they are packed; a policy of FSDP2 moves them itself."""
        if self._engine._is_offload_param and not self._engine._uses_fsdp2_cpu_offload_policy:
            self._engine.to(device.type, model=True, optimizer=False, grad=False)

    def _full(self, module: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """What FSDP1 has, gathered tensor by tensor and packed."""
        dtypes = {entry.name: entry.dtype for entry in self.entries}
        quantizer = QATQuantizer(self.plan.config, self.plan, layout="fused")

        def whole() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in module.state_dict().items():
                tensor = tensor.to(device)
                yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

        for name, tensor in quantizer.quantize(whole()):
            yield name, tensor.to(dtypes.get(name, tensor.dtype))


def coverage(plan: QuantPlan) -> str:
    """What of a model is 4-bit, in a line."""
    quantized = sum(math.prod(entry.shape) for entry in plan.quantized)
    share = 100 * quantized / max(plan.parameters, 1)
    weights = f"{len(plan.quantized)} weights in {len(plan.groups())} fusion groups"
    return f"{weights}, {quantized:,} parameters, {share:.1f} % of all parameters"


def training_of(engine: Any) -> Training | None:
    """What an engine trains with; None: it does not train in 4 bits."""
    found: Training | None = engine.__dict__.get("_nvfp4_training")
    return found


def install(module: ModuleType) -> None:
    """Replace what `FSDPEngine` does with QAT (``verl.workers.engine.fsdp.transformer_impl``)."""
    engine_class = module.FSDPEngine
    engine_class._apply_qat = _apply_qat
    engine_class.get_per_tensor_param = _streaming(engine_class.get_per_tensor_param)
    for name in ("get_per_tensor_param_shard", "get_per_tensor_param_delta_shard", "prime_delta_snapshots"):
        if hasattr(engine_class, name):
            setattr(engine_class, name, _refused(getattr(engine_class, name)))
    engine_class.optimizer_step = _without_scales(engine_class.optimizer_step)
    engine_class.train_batch = _with_metrics(engine_class.train_batch)


def _apply_qat(engine: Any, module: nn.Module) -> nn.Module:
    engine._nvfp4_training = Training(engine, module)
    return module


def _streaming(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_per_tensor_param(
        engine: Any, layered_summon: bool = False, base_sync_done: bool = False, **options: Any
    ) -> Any:
        training = training_of(engine)
        if training is None:
            if engine._qat_enabled and not engine.engine_config.forward_only:
                raise UserError("QAT is enabled, but this model was not prepared by nvfp4-qat: nothing was sent")
            return original(engine, layered_summon=layered_summon, base_sync_done=base_sync_done, **options)
        model = getattr(engine.module, "_fsdp_wrapped_module", engine.module)
        adapters = hasattr(model, "peft_config")
        if adapters and base_sync_done:
            with _off(engine):
                return original(engine, layered_summon=layered_summon, base_sync_done=True, **options)
        peft = model.peft_config["default"].to_dict() if adapters else None
        return training.stream(engine.module, _device()), peft

    return get_per_tensor_param


def _refused(original: Callable[..., Any]) -> Callable[..., Any]:
    """What would send weights that are not packed."""

    @functools.wraps(original)
    def refused(engine: Any, *arguments: Any, **options: Any) -> Any:
        if training_of(engine) is not None:
            raise UserError(
                "this way of sending weights takes bf16 shards, and the engine holds 4-bit weights: use "
                "rollout.checkpoint_engine.backend=naive, nccl or nixl"
            )
        return original(engine, *arguments, **options)

    return refused


def _without_scales(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl forgets scales of layers of its own after a step; there are none."""

    @functools.wraps(original)
    def optimizer_step(engine: Any, *arguments: Any, **options: Any) -> Any:
        training = training_of(engine)
        if training is not None:
            training.stepped = True
        with _off(engine):
            return original(engine, *arguments, **options)

    return optimizer_step


def _with_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train_batch(engine: Any, *arguments: Any, **options: Any) -> Any:
        outputs = original(engine, *arguments, **options)
        training = training_of(engine)
        if training is not None and engine.is_mp_src_rank_with_outputs():
            # Lists, as verl has a number for each micro-batch.
            outputs["metrics"].update({name: [value] for name, value in training.metrics().items()})
        return outputs

    return train_batch


class _off:
    """Let verl's code pass over its own QAT."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._before = engine, engine._qat_enabled

    def __enter__(self) -> None:
        self._engine._qat_enabled = False

    def __exit__(self, *_: object) -> None:
        self._engine._qat_enabled = self._before


def _device() -> torch.device:
    """This rank's device, as verl has it."""
    from verl.utils.device import get_device_id, get_device_name

    name, index = get_device_name(), get_device_id()
    return torch.device(name, index) if isinstance(index, int) and name != "cpu" else torch.device(name)


def install_names(module: ModuleType) -> None:
    """Leave "qat/…" as it is where verl puts a role before the names of metrics (``verl.utils.py_functional``)."""
    rename = module.rename_dict

    @functools.wraps(rename)
    def renamed(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        ours = {name: value for name, value in data.items() if name.startswith("qat/")}
        found: dict[str, Any] = rename({n: v for n, v in data.items() if n not in ours}, prefix)
        return found | ours

    module.rename_dict = renamed  # type: ignore[attr-defined]
