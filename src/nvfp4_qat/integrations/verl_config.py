"""verl's two `qat` blocks as one: both places mean the same, and what contradicts itself stops before anything starts.

verl has ``actor_rollout_ref.actor.qat``, which its documentation names and nothing reads, and
``actor_rollout_ref.actor.fsdp_config.qat``, which workers read and the rollout inherits. A key that is set in one of
them counts; set to different values in both it is an error. The rollout's own block, ``actor_rollout_ref.rollout.qat``,
is a reference to the second one; set to anything else it may not say anything else.

What verl's blocks have no key for, the JSON at ``quantization_config_path`` may say, under "nvfp4_qat".
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import ModuleType
from typing import Any

from ..config import QATConfig
from ..errors import UserError

PLACES = ("actor_rollout_ref.actor.qat", "actor_rollout_ref.actor.fsdp_config.qat")
EMPTY: tuple[dict[str, Any], ...] = ({}, {"_target_": "verl.workers.config.QATEngineConfig"})
"""What stands there where a configuration has left it out."""

ROLLOUT = "actor_rollout_ref.rollout.qat"
DEFAULTS: dict[str, Any] = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for field in fields(QATConfig)
    if field.name != "global_scale" and field.default is not MISSING
} | {"activation_observer": "static_minmax"}
"""The keys that both of verl's blocks have, and their defaults there."""

STRATEGIES = ("fsdp", "fsdp2")
BACKENDS = ("naive", "nccl", "nixl")
"""Of verl's checkpoint engines, those that carry tensors of any dtype as they are, in their order."""

ENGINE = ("hf_overrides", "quantization", "load_format", "worker_extension_cls")
"""Arguments of vLLM that are ours."""

DTYPE = "bfloat16"
"""In which trainer and rollout compute."""

SECTION = "nvfp4_qat"


@dataclass(frozen=True)
class Options:
    """What verl's blocks have no key for.

    Args:
        gather: with FSDP2, "nvfp4" (FSDP2 gathers packed weights) or "module" (as FSDP1 and DDP have it).
        keep_gathered: in gather mode, gather packed weights once per optimizer step.
        global_scale: see `QATConfig`.
        train: whether the trainer computes with the 4-bit weights that the rollout samples from; False trains in bf16
            and rounds for the rollout only, as a comparison.
    """

    gather: str = "nvfp4"
    keep_gathered: bool = False
    global_scale: str = "pow2"
    train: bool = True

    def __post_init__(self) -> None:
        if self.gather not in ("nvfp4", "module"):
            raise UserError(f'{SECTION}.gather must be "nvfp4" or "module", not {self.gather!r}')
        for name in ("keep_gathered", "train"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{SECTION}.{name} must be true or false, not {getattr(self, name)!r}")

    @classmethod
    def of(cls, path: str | None) -> Options:
        """Those that a JSON file says, or the defaults."""
        if path is None:
            return cls()
        with open(path, encoding="utf-8") as file:
            section = json.load(file).get(SECTION, {})
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(section) - set(known))
        if unknown:
            raise UserError(f"{path}: {SECTION} has the unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**section)


def plain(block: Any) -> dict[str, Any]:
    """A block of a configuration as a dict: of OmegaConf, a dataclass of verl's, or a mapping."""
    if hasattr(block, "_metadata"):
        from omegaconf import OmegaConf

        block = OmegaConf.to_container(block, resolve=True)
    if not isinstance(block, Mapping):
        block = {field.name: getattr(block, field.name) for field in fields(block)}
    return {k: v for k, v in block.items() if k != "_target_" and not k.startswith("_")}


def config_of(block: Any) -> tuple[QATConfig, Options]:
    """What a block says.

    Raises:
        UserError: unknown keys, or values that are not supported.
    """
    values = plain(block)
    path = values.get("quantization_config_path")
    config = QATConfig.from_dict(values)
    options = Options.of(path) if config.enable else Options()
    if options.global_scale != config.global_scale:
        config = QATConfig.from_dict({**values, "global_scale": options.global_scale})
    return config, options


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The block that two blocks say together.

    Raises:
        UserError: a key has different values in both, neither being the default; or is unknown.
    """
    found = {}
    for key, default in DEFAULTS.items():
        a, b = (block.get(key, default) for block in (first, second))
        if a != b and default not in (a, b):
            raise UserError(f"{PLACES[0]}.{key} is {a!r} and {PLACES[1]}.{key} is {b!r}: keep one of the two")
        found[key] = b if a == default else a
    unknown = sorted({*first, *second} - DEFAULTS.keys())
    if unknown:
        raise UserError(
            f"{' and '.join(PLACES)} have no key {', '.join(unknown)}; known keys: {', '.join(DEFAULTS)}. More can be "
            f'said under "{SECTION}" in the JSON at quantization_config_path'
        )
    return found


def settle(config: Any) -> QATConfig | None:
    """Make both blocks of a run's configuration say the same, and check what QAT needs of the rest.

    Args:
        config: verl's whole configuration (a DictConfig); changed in place.

    Returns:
        What is asked for; None: QAT is off.

    Raises:
        UserError: the blocks contradict each other or the rest; names the keys.
    """
    from omegaconf import OmegaConf, open_dict

    actor = config.actor_rollout_ref.actor
    blocks = [OmegaConf.select(config, place) for place in PLACES]
    said = [{} if block is None else plain(block) for block in blocks]
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    follows = "qat" in rollout and OmegaConf.is_interpolation(rollout, "qat")
    own = {} if follows or rollout.get("qat") is None else plain(rollout.qat)
    if not any(block.get("enable") for block in said):
        if own.get("enable") and actor.strategy in STRATEGIES:
            raise UserError(f"{ROLLOUT}.enable is true alone: set {PLACES[0]}.enable=True, which the rollout follows")
        return None
    found = merged(*said)
    wrong = []
    if not follows and (own.get("enable") is not True or any(found.get(k, k) != v for k, v in own.items())):
        wrong.append(
            f"rollout.qat is set to {own or None}, which is not what actor.qat says: do not set it, the rollout "
            "follows the actor"
        )
    if found["quantization_config_path"] is not None:  # workers may start in another directory
        found["quantization_config_path"] = os.path.abspath(found["quantization_config_path"])
    qat, _ = config_of(found)
    if actor.strategy not in STRATEGIES:
        wrong.append(f"actor.strategy is {actor.strategy}: QAT is there for {' and '.join(STRATEGIES)}")
    if rollout.name != "vllm":
        wrong.append(f"rollout.name is {rollout.name}: 4-bit rollouts are there for vllm")
    if rollout.get("dtype", DTYPE) != DTYPE:
        wrong.append(f"rollout.dtype is {rollout.dtype}: leave it at {DTYPE}, in which the weights are sent")
    if OmegaConf.select(actor, "fsdp_config.dtype") == "float16":
        wrong.append(f"actor.fsdp_config.dtype is float16, but the rollout computes in {DTYPE}: leave it at that")
    if rollout.get("quantization") is not None:
        wrong.append(f"rollout.quantization is {rollout.quantization}: leave it at null, QAT sets it")
    if "dummy" not in str(rollout.get("load_format", "dummy")):
        wrong.append(
            f"rollout.load_format is {rollout.load_format}: leave it at dummy, the engine gets its weights from the "
            "trainer before the first sample"
        )
    backend = OmegaConf.select(rollout, "checkpoint_engine.backend") or "naive"
    if backend not in BACKENDS:
        wrong.append(
            f"rollout.checkpoint_engine.backend is {backend}, which sends all as bf16: use {', '.join(BACKENDS)}"
        )
    adapters = (OmegaConf.select(model, "lora.rank") or 0) + (OmegaConf.select(model, "lora_rank") or 0)
    if adapters and backend != "naive":
        wrong.append(
            f"rollout.checkpoint_engine.backend is {backend}, which leaves out adapters that are not merged: use naive"
        )
    given = OmegaConf.select(rollout, "engine_kwargs.vllm") or {}
    wrong += [
        f"rollout.engine_kwargs.vllm.{name} is set: QAT sets it" for name in ENGINE if given.get(name) is not None
    ]
    if (given.get("dtype") or DTYPE) != DTYPE:
        wrong.append(f"rollout.engine_kwargs.vllm.dtype is {given['dtype']}: leave it out, it must be {DTYPE}")
    if given.get("enable_eplb"):
        wrong.append("rollout.engine_kwargs.vllm.enable_eplb is true: weights cannot follow experts that move")
    if OmegaConf.select(model, "mtp.enable_rollout"):
        wrong.append("model.mtp.enable_rollout is true: draft models get no 4-bit weights; leave it at false")
    if OmegaConf.select(model, "lora.merge"):
        wrong.append("model.lora.merge is true: adapters cannot be merged into 4-bit weights; leave it at false")
    if wrong:
        raise UserError("with QAT this configuration cannot run:\n  " + "\n  ".join(wrong))
    for place, empty in zip(PLACES, EMPTY, strict=True):
        if OmegaConf.select(config, place) is None:
            OmegaConf.update(config, place, empty, force_add=True)
        for key, value in found.items():
            with open_dict(OmegaConf.select(config, place)):
                OmegaConf.update(config, f"{place}.{key}", value, merge=False)
    if not follows:
        OmegaConf.update(config, ROLLOUT, found, merge=False)
    return qat


def install(module: ModuleType) -> None:
    """Settle the configuration where verl validates it (``verl.utils.config``)."""
    validate = module.validate_config

    @functools.wraps(validate)
    def validated(config: Any, *arguments: Any, **options: Any) -> Any:
        qat = settle(config)
        if qat is not None:
            from .verl import versions

            print(f"nvfp4-qat: QAT is on, {qat.mode}, all layers but {', '.join(qat.ignore_patterns)} ({versions()})")
        return validate(config, *arguments, **options)

    module.validate_config = validated  # type: ignore[attr-defined]


def install_in_main(module: ModuleType) -> None:
    """Settle it also for programs that start a run without validating (``verl.trainer.main_ppo``)."""
    run = module.run_ppo

    @functools.wraps(run)
    def settled(config: Any, *arguments: Any, **options: Any) -> Any:
        settle(config)
        return run(config, *arguments, **options)

    module.run_ppo = settled  # type: ignore[attr-defined]


def install_in_workers(module: ModuleType) -> None:
    """Notice in workers that nobody has settled the configuration (``verl.workers.config.actor``)."""
    made = module.FSDPActorConfig.__post_init__

    @functools.wraps(made)
    def checked(self: Any) -> None:
        made(self)
        first, second = plain(self.qat), plain(self.fsdp_config.qat)
        if first.get("enable") and not second.get("enable"):
            raise UserError(
                f"{PLACES[0]}.enable is true and {PLACES[1]}.enable is not: the plugin of nvfp4-qat was not active "
                "where the run was started, so the rollout would not be in 4 bits. Install nvfp4-qat there; a program "
                "of your own that starts verl's trainer calls nvfp4_qat.integrations.verl_config.settle(config) first"
            )
        if second.get("enable"):
            merged(first, second)

    module.FSDPActorConfig.__post_init__ = checked
