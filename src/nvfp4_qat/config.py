"""`QATConfig`: what the user says about 4-bit training. Needs no torch.

The field names and defaults are those of verl's `qat` block, so a recipe's YAML loads unchanged. The same object
writes the `quantization_config` of a checkpoint's `config.json`; which layers it covers comes from the plan, as
explicit names.

Sources: compressed-tensors `QuantizationConfig` (format `nvfp4-pack-quantized`); verl's actor configuration.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .format import BLOCK, POLICIES
from .naming import Pattern

CHECKPOINT_FORMAT = "nvfp4-pack-quantized"
MODES = ("w4a16",)
DEFAULT_IGNORE_PATTERNS = ("lm_head", "embed_tokens", "re:.*mlp.gate$")

_YAML_PLACES = ("actor_rollout_ref.actor.qat", "actor_rollout_ref.actor.fsdp_config.qat", "qat")
# verl writes these into the same block. They choose how *activations* are quantized, which w4a16 does not do.
_ACTIVATION_KEYS = frozenset({"_target_", "activation_observer"})
_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "dynamic": False,
}


@dataclass(frozen=True)
class QATConfig:
    """How to train in NVFP4, and which layers to leave alone.

    Args:
        enable: whether to train in 4 bits at all; False leaves a model as it is.
        mode: "w4a16", 4-bit weights and 16-bit activations.
        group_size: values that share a block scale; NVFP4 has 16.
        ignore_patterns: layers to keep in bf16; `re:RX` is `re.match` on the module name, a plain pattern matches whole
            dotted components.
        quantization_config_path: a compressed-tensors JSON to base the checkpoint's `quantization_config` on, relative
            to the working directory; None builds it from this config.
        global_scale: "pow2" (trainer and kernel weights equal to the bit) or "amax".

    Raises:
        UserError: a value has the wrong type or is not supported; the JSON is missing or contradicts this config.
    """

    enable: bool = False
    mode: str = "w4a16"
    group_size: int = BLOCK
    ignore_patterns: tuple[str, ...] = DEFAULT_IGNORE_PATTERNS
    quantization_config_path: str | None = None
    global_scale: str = "pow2"

    def __post_init__(self) -> None:
        if not isinstance(self.enable, bool):
            raise UserError(f"enable must be true or false, got {self.enable!r}")
        if self.mode not in MODES:
            if str(self.mode).lower() == "w4a4":
                raise UserError('mode "w4a4" (4-bit activations) is not there yet; use mode "w4a16"')
            raise UserError(f'mode must be "w4a16", got {self.mode!r}')
        if type(self.group_size) is not int or self.group_size != BLOCK:
            raise UserError(f"group_size must be {BLOCK}, the block of NVFP4, got {self.group_size!r}")
        if self.global_scale not in POLICIES:
            raise UserError(f"global_scale must be one of {', '.join(POLICIES)}, got {self.global_scale!r}")
        object.__setattr__(self, "ignore_patterns", _strings("ignore_patterns", self.ignore_patterns))
        for text in self.ignore_patterns:
            Pattern(text)
        path = self.quantization_config_path
        if path is not None:
            if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
                raise UserError(f"quantization_config_path must be a path or null, got {path!r}")
            object.__setattr__(self, "quantization_config_path", os.fspath(path))
            # A disabled block often names a file of another machine (it is verl's default): look only when it matters.
            if self.enable:
                self._external()

    @classmethod
    def check(cls, config: object) -> None:
        """Raise `UserError` for what is not a `QATConfig`."""
        if isinstance(config, Mapping):
            raise UserError(f"config must be a QATConfig: nvfp4_qat.QATConfig(**{dict(config)})")
        if not isinstance(config, cls):
            raise UserError(
                f"config must be a QATConfig, not {type(config).__name__}: nvfp4_qat.QATConfig(enable=True)"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QATConfig:
        """Build a config from a mapping, such as a parsed YAML block.

        Args:
            values: the fields to set; the rest keep their defaults. verl's `activation_observer` is accepted: it has no
                meaning without activation quantization.

        Returns:
            The checked config.

        Raises:
            UserError: an unknown key, or a bad value.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"a QAT config must be a mapping of keys to values, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = [str(key) for key in values if key not in known and key not in _ACTIVATION_KEYS]
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(
                f"unknown QAT config key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}{hint}; "
                f"known keys: {', '.join(known)}"
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> QATConfig:
        """Read a config from a YAML file.

        Args:
            path: a file that holds an `actor_rollout_ref.actor.qat` block (or
                `actor_rollout_ref.actor.fsdp_config.qat`, where newer verl releases read it), a `qat` block, or the
                fields themselves. A `quantization_config_path` that does not exist from the working directory is tried
                beside the file.

        Returns:
            The checked config.

        Raises:
            UserError: the file cannot be read, holds no such block, or holds two that differ.
        """
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{os.fspath(path)} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(document, Mapping):
            raise UserError(
                f"{os.fspath(path)} holds no mapping; expected a block at one of: {', '.join(_YAML_PLACES)}"
            )
        blocks = {place: block for place in _YAML_PLACES if (block := _lookup(document, place)) is not None}
        if not blocks:
            if not set(document) & {field.name for field in fields(cls)}:
                raise UserError(f"{os.fspath(path)} holds no QAT block; expected one at: {', '.join(_YAML_PLACES)}")
            blocks = {"the file": document}
        configs = {
            place: cls.from_dict(_beside(block, Path(path).parent) if isinstance(block, Mapping) else block)
            for place, block in blocks.items()
        }
        first, *others = configs
        for other in others:
            differing = [
                f.name for f in fields(cls) if getattr(configs[first], f.name) != getattr(configs[other], f.name)
            ]
            if differing:
                keys = ", ".join(differing)
                raise UserError(f"{os.fspath(path)}: {first} and {other} differ in {keys}; keep one of the two blocks")
        return configs[first]

    def to_compressed_tensors(self, ignore: Sequence[str], targets: Sequence[str] = ("Linear",)) -> dict[str, Any]:
        """Return the `quantization_config` that a checkpoint's `config.json` holds.

        Args:
            ignore: module names, as in the checkpoint, that stay unquantized; from `QuantPlan.ignore_list()`.
            targets: what is quantized apart from `ignore`: "Linear", and the names of quantized layers that an engine
            does
                not count as linear (`lm_head`); from `QuantPlan.targets()`.

        Returns:
            A new dict as compressed-tensors, transformers and vLLM read it.

        Raises:
            UserError: `quantization_config_path` cannot be read or contradicts this config.
        """
        if self.quantization_config_path is None:
            document: dict[str, Any] = {
                "quant_method": "compressed-tensors",
                "format": CHECKPOINT_FORMAT,
                "quantization_status": "compressed",
                "config_groups": {
                    "group_0": {"weights": {**_WEIGHTS, "observer": "minmax"}, "input_activations": None},
                },
                "kv_cache_scheme": None,
            }
        else:
            document = self._external()
            document.pop("nvfp4_qat", None)  # for the verl plugin, and nothing that an engine knows
            document.update(
                quant_method="compressed-tensors", format=CHECKPOINT_FORMAT, quantization_status="compressed"
            )
        (group,) = document["config_groups"].values()
        group.update(targets=list(targets), format=CHECKPOINT_FORMAT, output_activations=None)
        document["ignore"] = list(ignore)
        return document

    def _external(self) -> dict[str, Any]:
        """Read and check the JSON at `quantization_config_path`."""
        path = Path(str(self.quantization_config_path))
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"quantization_config_path: cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"quantization_config_path: {path} is not JSON: {error}") from None
        problems = _contradictions(document, self.ignore_patterns)
        if problems:
            raise UserError(f"quantization_config_path: {path} does not describe this config: " + "; ".join(problems))
        return copy.deepcopy(document)


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise UserError(f"{key} must be a list of strings, got {value!r}")
    for item in value:
        if not isinstance(item, str):
            raise UserError(f"{key} must be a list of strings, but holds {item!r}")
    return tuple(value)


def _lookup(document: Mapping[str, Any], place: str) -> Any:
    node: Any = document
    for key in place.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def _beside(block: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve the block's JSON path against the YAML's folder where the working directory does not have it."""
    resolved = dict(block)
    path = resolved.get("quantization_config_path")
    if isinstance(path, str) and path and not Path(path).exists() and (folder / path).exists():
        resolved["quantization_config_path"] = str(folder / path)
    return resolved


def _contradictions(document: Any, ignore_patterns: Sequence[str]) -> list[str]:
    """List what in a compressed-tensors JSON says something else than NVFP4 weights with 16-bit activations."""
    if not isinstance(document, dict):
        return ["it holds no JSON object"]
    problems = []
    for key, expected in (("quant_method", "compressed-tensors"), ("format", CHECKPOINT_FORMAT)):
        if document.get(key) != expected:
            problems.append(f"{key} is {document.get(key)!r}, expected {expected!r}")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if document.get(key):
            problems.append(f"{key} is set, which is not supported")
    extra = [entry for entry in document.get("ignore") or () if entry not in ignore_patterns]
    if extra:
        problems.append(
            f"its ignore list holds {', '.join(map(repr, extra))}; add to ignore_patterns what is to stay bf16"
        )
    groups = document.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return [*problems, "config_groups must hold exactly one group"]
    (group,) = groups.values()
    if not isinstance(group, dict):
        return [*problems, "its config group is no JSON object"]
    if group.get("targets") != ["Linear"]:
        problems.append(f"targets is {group.get('targets')!r}, expected ['Linear']")
    if group.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        problems.append(f"the group's format is {group['format']!r}, expected {CHECKPOINT_FORMAT!r}")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            problems.append(f"{key} is set, but mode w4a16 does not quantize activations")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return [*problems, "its weights entry is missing"]
    for key, expected in _WEIGHTS.items():
        found = weights.get(key, False if key == "dynamic" else None)
        if found != expected or isinstance(found, bool) != isinstance(expected, bool):
            problems.append(f"weights.{key} is {found!r}, expected {expected!r}")
    if weights.get("actorder"):
        problems.append("weights.actorder is set, which is not supported")
    return problems
