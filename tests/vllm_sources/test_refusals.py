"""What cannot become a complete set of weights is refused with one error, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comparing import contents, reachable_tensors
from engine import Engine
from families import some

from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_recipe import Incoming, Part
from nvfp4_qat.live_settings import check_settings

Entries = list[Incoming]


def last(entries: Entries, ending: str) -> int:
    return max(i for i, entry in enumerate(entries) if entry.name.endswith(ending))


def missing(entries: Entries) -> tuple[Entries, list[str]]:
    """Scales of a whole layer, and one of several tensors that are fused."""
    i, k = last(entries, "o_proj.weight_scale"), last(entries, "k_proj.weight_packed")
    layer = entries[i].name.removesuffix(".weight_scale")
    return [e for n, e in enumerate(entries) if n not in (i, k)], [
        f"{layer}.weight_scale: nothing brings it",
        "qkv_proj.weight_packed: 4096 of 16384 elements are missing",
    ]


def unexpected(entries: Entries) -> tuple[Entries, list[str]]:
    name = "model.layers.0.mlp.other_proj.weight"
    return [*entries, Incoming(name, (3,), torch.bfloat16, (Part(name),))], [name]


def misshaped(entries: Entries) -> tuple[Entries, list[str]]:
    i = last(entries, "o_proj.weight_packed")
    rows, columns = entries[i].shape
    changed = replace(entries[i], shape=(rows + 1, columns))
    return [*entries[:i], changed, *entries[i + 1 :]], [f"{changed.name} of shape {[rows + 1, columns]} does not fit"]


def twice(entries: Entries) -> tuple[Entries, list[str]]:
    """The same place from two tensors, and a name that is listed again."""
    norm, scale = entries[last(entries, "input_layernorm.weight")], entries[last(entries, "o_proj.weight_scale")]
    return [*entries, replace(scale, name="again"), norm], [
        f"{scale.name}: {scale.shape[0] * scale.shape[1]} elements are written twice",
        f"{norm.name} is listed twice",
    ]


def everything(entries: Entries) -> tuple[Entries, list[str]]:
    found: list[str] = []
    for change in (unexpected, missing):
        entries, words = change(entries)
        found += words
    i = last(entries, "o_proj.weight_packed")
    found.append(f"{entries[i].name} of shape [5, 7] does not fit")
    entries = [replace(e, shape=(5, 7)) if n == i else e for n, e in enumerate(entries)]
    return [*entries, entries[last(entries, "input_layernorm.weight")]], [*found, "is listed twice"]


@pytest.mark.parametrize("family", some("qwen3", "qwen3-moe"))
@pytest.mark.parametrize("change", [missing, unexpected, misshaped, twice, everything])
def test_refused_as_one(engine: Engine, change: Callable[[Entries], tuple[Entries, list[str]]]) -> None:
    checkpoint = engine.family.checkpoint(1)
    model = engine.model(checkpoint)
    before = contents(reachable_tensors(model))
    live = engine.live(model)
    entries = [entry for entry, _ in checkpoint]
    bad, words = change(entries)
    with pytest.raises(MismatchError) as error:
        live.begin(bad)
    if engine.size == 1:  # the numbers of elements are those of the whole model
        assert [w for w in words if w not in str(error.value)] == []
    assert live.whole and not live.updating
    assert contents(reachable_tensors(model)) == before
    live.begin(entries)


@pytest.mark.parametrize("family", some("qwen3-moe"))
def test_absent_expert_is_named(engine: Engine) -> None:
    checkpoint = engine.family.checkpoint(1)
    model = engine.model(checkpoint)
    entries = []
    for entry, _ in checkpoint:
        if entry.name.endswith("layers.1.mlp.experts.down_proj_weight_packed"):
            (part,) = entry.parts
            entry = replace(
                entry, shape=(entry.shape[0] - 1, *entry.shape[1:]), parts=(replace(part, count=part.count - 1),)
            )
        entries.append(entry)
    with pytest.raises(MismatchError, match=r"layers\.1\..*w2_weight_packed: \d+ of \d+ elements are missing"):
        engine.live(model).begin(entries)


@pytest.mark.parametrize("place", ["alone"])
@pytest.mark.parametrize("family", some("qwen3-moe"))
def test_settings_are_where_they_are_looked_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = SimpleNamespace(vllm_config=engine.config)
    check_settings(worker)
    monkeypatch.setattr(engine.config.model_config, "dtype", torch.float16)
    monkeypatch.setattr(engine.config.parallel_config, "enable_eplb", True)
    with pytest.raises(MismatchError, match=r"it computes in float16, .*\(enable_eplb\)"):
        check_settings(worker)
