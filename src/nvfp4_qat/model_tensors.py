"""Which tensors of a model go into a checkpoint, and in which dtype.

What is 4-bit is decided by the plan. Everything else (embeddings, norms, biases, routers, a head) is stored in the
dtype the trainer computes in, so that an engine holds the trainer's values:

- A model that holds any 16-bit parameter computes in what it holds: every tensor keeps its dtype.
- A model that holds only fp32 parameters holds masters. Mixed-precision training computes in bf16, and the checkpoint's
  ``config.json`` says bf16, so parameters are rounded to bf16 (nearest even), as the 4-bit weights are. Kept in fp32
  are buffers, which mixed precision does not touch, and the parameters that transformers keeps in fp32 whatever the
  dtype of the model (``_keep_in_fp32_modules_strict``).

Source: transformers 5.23 ``PreTrainedModel._get_dtype_plan``; torch FSDP ``MixedPrecisionPolicy`` (parameters only).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import MismatchError, UserError
from .inventory import take_inventory
from .naming import canonical_name
from .parameter import is_dtensor
from .plan import QuantPlan


@dataclass(frozen=True, eq=False)
class ModelTensor:
    """A tensor of a model, and the dtype in which a checkpoint stores it if it is not quantized."""

    tensor: Tensor
    stored_dtype: torch.dtype

    @property
    def sharded(self) -> bool:
        """Whether this rank holds a part of it only (a DTensor)."""
        return is_dtensor(self.tensor)

    def stored(self) -> Tensor:
        """The tensor in the dtype of the checkpoint; no copy if it has it already."""
        return self.tensor.detach().to(self.stored_dtype)


def model_tensors(
    model: nn.Module, plan: QuantPlan, meta: bool = False, sharded: bool = False
) -> dict[str, ModelTensor]:
    """Find every tensor that a checkpoint of a model stores.

    Args:
        model: the model the plan was made for, wrapped or not.
        plan: its plan.
        meta: whether parameters without data will do.
        sharded: whether DTensors will do.

    Returns:
        Canonical name → tensor; each tied parameter once, no adapters.

    Raises:
        UserError: parameters are sharded, or the model has other tensors than its plan.
        MismatchError: parameters that the model's config ties are two.
    """
    _refuse_sharded(model, meta, sharded)
    inventory = take_inventory(model)
    if (problem := inventory.tie_problem()) is not None:
        raise MismatchError(problem)
    present = inventory.tensors
    changes = [f"{name} is new" for name in present if name not in plan.checkpoint_slices]
    changes += [f"{name} is gone" for name in plan.checkpoint_slices if name not in present]
    if changes:
        raise UserError(
            f"the model is no longer the one its quantization plan was made for: {'; '.join(changes)}. Call apply_qat "
            "after the last change of the architecture."
        )
    parameters = _by_canonical_name(model.named_parameters(remove_duplicate=False), present)
    buffers = _by_canonical_name(model.named_buffers(remove_duplicate=False), present)
    masters = all(p.dtype.itemsize > 2 for p in parameters.values() if p.is_floating_point())
    kept = _kept_in_fp32(inventory.model) if masters else None

    def dtype(name: str) -> torch.dtype:
        if name in buffers or kept is None or not parameters[name].is_floating_point():
            return found[name].dtype
        return torch.float32 if kept.search(name) else torch.bfloat16

    found = {**parameters, **buffers}
    return {name: ModelTensor(found[name], dtype(name)) for name in present}


def _by_canonical_name(named: Iterable[tuple[str, Tensor]], wanted: Iterable[str]) -> dict[str, Tensor]:
    wanted, found = set(wanted), dict[str, Tensor]()
    for raw, tensor in named:
        name = canonical_name(raw)
        if name in wanted:
            found.setdefault(name, tensor)
    return found


def _kept_in_fp32(model: nn.Module) -> re.Pattern[str]:
    """What transformers holds in fp32 in a bf16 model, as a pattern to search for in parameter names."""
    entries = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return re.compile("|".join(entry.replace("*", ".*") for entry in sorted(entries)) or r"(?!)")


def keep_in_fp32(model: nn.Module) -> None:
    """Give a bf16 model's tensors the dtypes that `from_pretrained` gives them: fp32 for what must stay in fp32."""
    pattern = _kept_in_fp32(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and pattern.search(name):
            tensor.data = tensor.data.float()


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model or a part of it; it may show full parameters at the moment."""
    return any(hasattr(module, "reshard") and hasattr(module, "unshard") for module in model.modules())


def check_full(name: str, tensor: Tensor, meta: bool = False) -> None:
    """Raise `UserError` unless a tensor is all there, on a real device or, if allowed, on meta."""
    if is_dtensor(tensor):
        raise UserError(
            f"{name} is sharded over several ranks (DTensor): packed_weights(model) and save_checkpoint(model, path) "
            "take sharded models; elsewhere pass full tensors"
        )
    if tensor.is_meta and not meta:
        raise UserError(f"{name} is on the meta device and holds no data: load the weights first")


def _refuse_sharded(model: nn.Module, meta: bool, sharded: bool) -> None:
    for name, module in model.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise UserError(
                f"{name or 'the model'} is sharded by FSDP1, which is not supported yet: gather full tensors and pass "
                "them through QATQuantizer(config, plan).quantize"
            )
    for name, parameter in model.named_parameters():
        if not (sharded and is_dtensor(parameter)):
            check_full(canonical_name(name), parameter, meta)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `UserError` if a floating-point tensor holds NaN or Inf. Waits for the device."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor.detach())  # without a temporary of the tensor's size; NaN wins
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(f"{name} holds NaN or Inf: it cannot be exported. Check the training step that made it.")


def check_all_finite(tensors: Mapping[str, ModelTensor]) -> None:
    """`check_finite` of what is stored of many tensors. Waits for each device once.

    Rounding keeps the order of numbers, so that the stored extremes are those of the tensor, rounded.
    """
    fine: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, entry in tensors.items():
        if entry.tensor.is_floating_point() and entry.tensor.numel():
            low, high = (t.to(entry.stored_dtype) for t in torch.aminmax(entry.tensor.detach()))
            fine.setdefault(entry.tensor.device, []).append((name, torch.isfinite(low) & torch.isfinite(high)))
    for found in fine.values():
        for (name, _), good in zip(found, torch.stack([t for _, t in found]).tolist(), strict=True):
            if not good:
                check_finite(name, tensors[name].stored())
