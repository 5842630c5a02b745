"""What a model owns: every weight, what kind of module it belongs to, and which names are two names of one parameter.

Reads structure only, so a model on the meta device will do. Wrappers are looked through (see `naming`); what an
adapter method such as LoRA added is recognised by where it hangs: beside the layer it wraps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .architectures import classify_module, is_router
from .checkpoint_names import transformers_model
from .errors import UserError
from .naming import canonical_name, join, split_leaf

_WRAPPED = ("base_layer", "original_module")


@dataclass(frozen=True)
class Weight:
    """A parameter of two or more dimensions.

    Args:
        name: canonical parameter name. module: canonical name of its module. param: its name within the module.
        shape: its (global) shape.
        kind: what its module is, see `classify_module`; "adapter" for what PEFT added.
        reason: why its module keeps it in bf16, or None.
        tied_to: the name under which the same parameter is stored, if this is a second name for it.
        shared_with: another name of the same parameter, for the name under which it is stored.
    """

    name: str
    module: str
    param: str
    shape: tuple[int, ...]
    kind: str
    reason: str | None
    tied_to: str | None = None
    shared_with: str | None = None


@dataclass(frozen=True)
class Inventory:
    """Everything the plan needs to know about a model.

    Args:
        model: the bare model inside all wrappers.
        weights: its parameters of two or more dimensions, in module order, second names included.
        tensors: canonical name to shape of what a checkpoint stores: parameters and persistent buffers, each once,
            without adapters.
        parameters: number of elements of all stored parameters.
        head: canonical name of the module that makes the logits, if transformers knows one.
        broken_ties: pairs of parameters, one to be stored for both by the model's config, that are two and hold data.
    """

    model: nn.Module
    weights: tuple[Weight, ...]
    tensors: dict[str, tuple[int, ...]]
    parameters: int
    head: str | None
    broken_ties: tuple[tuple[str, str], ...] = ()

    def tie_problem(self) -> str | None:
        """Say which ties are broken and how to mend them; None if all hold."""
        if not self.broken_ties:
            return None
        pairs = "; ".join(f"{name} and {source}" for name, source in self.broken_ties[:3])
        more = "; …" if len(self.broken_ties) > 3 else ""
        return (
            f"the model's config ties parameters that are two by now ({pairs}{more}): checkpoints and engines have one "
            "for both, so what training makes of the other would be lost. Call model.tie_weights() (after to_empty, "
            "before fully_shard, which must have both in one unit), or set tie_word_embeddings=False in the model's "
            "config before apply_qat."
        )


def take_inventory(model: nn.Module) -> Inventory:
    """List the weights of a model.

    Args:
        model: bare or wrapped, on any device.

    Raises:
        UserError: two different parameters have the same name once wrappers are taken out.
    """
    bare = _bare_model(model)
    children: dict[str, set[str]] = defaultdict(set)
    walked = list(_walk(model))
    for raw, _, _ in walked:
        parent, leaf = split_leaf(canonical_name(raw))
        children[parent].add(leaf)

    tensors: dict[str, Tensor] = {}
    names_of: dict[int, list[str]] = defaultdict(list)
    weights: list[Weight] = []
    buffers: dict[str, tuple[int, ...]] = {}
    parameters: dict[str, int] = {}
    for raw, module, adapter in walked:
        name = canonical_name(raw)
        router = is_router(name, children)
        for param_name, param in module._parameters.items():
            if param is None:
                continue
            full = join(name, param_name)
            if adapter and full in tensors:  # one adapter around another
                full = join(raw, param_name)
            if tensors.setdefault(full, param) is not param:
                raise UserError(f"two different parameters are called {full} once the names of wrappers are taken out")
            if adapter:
                kind: str = "adapter"
                reason: str | None = "adapter"
            else:
                names_of[id(param)].append(full)
                parameters[full] = param.numel()
                kind, reason = classify_module(module, name, router) if param.ndim > 1 else ("other", None)
            if param.ndim > 1:
                weights.append(Weight(full, name, param_name, tuple(param.shape), kind, reason))
        if not adapter:
            for buffer_name, buffer in module._buffers.items():
                if buffer is not None and buffer_name not in module._non_persistent_buffers_set:
                    buffers[join(name, buffer_name)] = tuple(buffer.shape)

    declared = _declared_ties(bare, parameters)
    second_names = _second_names(declared, list(names_of.values()))
    shared = {stored: second for second, stored in reversed(second_names.items())}
    weights = [replace(w, tied_to=second_names.get(w.name), shared_with=shared.get(w.name)) for w in weights]
    stored = [name for name in parameters if name not in second_names]
    return Inventory(
        model=bare,
        weights=tuple(weights),
        tensors={name: tuple(tensors[name].shape) for name in stored} | buffers,
        parameters=sum(parameters[name] for name in stored),
        head=_head(model, bare),
        broken_ties=tuple(
            (name, source)
            for name, source in declared.items()
            if tensors[name] is not tensors[source] and not (tensors[name].is_meta or tensors[source].is_meta)
        ),
    )


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (raw name, module, whether an adapter method added it), parents first, shared modules under each name."""
    adapters: dict[str, bool] = {}
    modules: dict[str, nn.Module] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        modules[raw] = module
        parent_name, leaf = split_leaf(raw)
        parent = modules[parent_name] if raw else None
        inherited = parent is not None and adapters[parent_name] and not _wraps(parent)
        beside = parent is not None and (_outside_wrapped(parent, leaf) or inherited)
        # A wrapping layer's own parameters belong to the adapter; what hangs below its wrapped child does not.
        adapters[raw] = beside or _wraps(module)
        yield raw, module, adapters[raw]


def _wraps(module: nn.Module) -> bool:
    return any(name in module._modules for name in _WRAPPED)


def _outside_wrapped(parent: nn.Module, leaf: str) -> bool:
    wrapped = [name for name in _WRAPPED if name in parent._modules]
    if wrapped:
        return leaf not in wrapped
    base = parent._modules.get("base_model")
    if base is not None and "model" in base._modules:  # a PeftModel: prompt encoders and the like hang beside the model
        return leaf != "base_model"
    return False


def _bare_model(model: nn.Module) -> nn.Module:
    """Return the innermost module whose name is empty without wrappers, a transformers model if there is one."""
    shells = [module for raw, module in model.named_modules() if canonical_name(raw) == ""]
    for shell in shells:
        if transformers_model(shell._modules.get("base_model")) is not None:
            raise UserError(
                "PEFT prompt learning is not supported: make the plan from the model inside (`.base_model`)"
            )
    hf_models: list[nn.Module] = [module for module in shells if transformers_model(module) is not None]
    return (hf_models or shells)[-1]


def _declared_ties(bare: nn.Module, parameters: Container[str]) -> dict[str, str]:
    """Map each parameter that the model's config ties to the one it is tied to.

    The config is asked anew: ``all_tied_weights_keys`` is as old as the model, and `from_pretrained` takes out of it
    what it found untied, but engines follow the config.
    """
    hf_model = transformers_model(bare)
    if hf_model is None:
        return {}
    ties = hf_model.get_expanded_tied_weights_keys(all_submodels=True).items()
    named = {canonical_name(name): canonical_name(source) for name, source in ties}
    return {name: source for name, source in named.items() if name in parameters and source in parameters}


def _second_names(declared: dict[str, str], names: list[list[str]]) -> dict[str, str]:
    """Map each name that is not stored to the stored name of the same parameter."""
    second: dict[str, str] = {}
    for group in names:
        # transformers says which of the tied names a checkpoint leaves out.
        stored = next((name for name in group if name not in declared), group[0])
        second.update({name: stored for name in group if name != stored})
    for name, source in declared.items():
        # On meta they may be two: a loader will tie them, so one of them must not be stored.
        if name not in second and second.get(source, source) != name:
            second[name] = second.get(source, source)
    return second


def _head(model: nn.Module, bare: nn.Module) -> str | None:
    hf_model = transformers_model(bare)
    head: object = None if hf_model is None else hf_model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        return None
    return next((canonical_name(raw) for raw, module in model.named_modules() if module is head), None)
