"""Changes of single bytes in a live model of vLLM give what loading all of it anew gives."""

from __future__ import annotations

import os

import pytest
import torch
from comparing import different, kernel_tensors, reachable_tensors
from engine import Engine
from families import Checkpoint, some
from torch import Tensor

from nvfp4_qat.live_changes import Layout, places
from nvfp4_qat.live_snapshot import Snapshot

CPU = torch.device("cpu")


def moved(checkpoint: Checkpoint, fraction: float, seed: int) -> Checkpoint:
    """Some packed codes, scales and bf16 numbers are others; the largest scale of a layer stays."""
    g = torch.Generator().manual_seed(seed)
    new = []
    for entry, t in checkpoint:
        data = t.clone().contiguous().view(-1).view(torch.uint8)
        if t.dtype in (torch.uint8, torch.float8_e4m3fn, torch.bfloat16) and "global_scale" not in entry.name:
            chosen = torch.rand(data.shape, generator=g) < fraction
            if t.dtype is torch.float8_e4m3fn:
                chosen &= data < data.max() - 1
            data = torch.where(chosen, data ^ 1, data)
        new.append((entry, data.view(t.dtype).view(t.shape)))
    return new


def differences(snapshot: Snapshot, checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    return list(places(list(snapshot.changes((entry.name, t) for entry, t in checkpoint))))


def patched(engine: Engine) -> list[str]:
    """What had to be sent whole, for some syncs of changes after full ones."""
    model = engine.model(engine.family.checkpoint(0))
    live, whole = engine.live(model), []
    for seed in (1, 2, 2, 2):  # from one to the other a layer's scale factor may change
        checkpoint = engine.family.checkpoint(seed)
        live.begin([entry for entry, _ in checkpoint], remember=True)
        live.load((entry.name, t) for entry, t in checkpoint)
        live.commit()
    snapshot = Snapshot(Layout([entry for entry, _ in checkpoint]), CPU)
    for entry, t in checkpoint:
        snapshot.keep(entry.name, t)
    for seed, fraction in enumerate((0.001, 0.02)):
        checkpoint = moved(checkpoint, fraction, seed)
        live.begin_changes([entry for entry, _ in checkpoint])
        needed = live.change(snapshot.layout, differences(snapshot, checkpoint))
        live.load((name, snapshot.view(name)) for name in sorted(needed))
        live.commit()
        whole += sorted(needed)
    fresh = engine.model(checkpoint)
    assert different(kernel_tensors(model), kernel_tensors(fresh)) == []
    assert different(reachable_tensors(model), reachable_tensors(fresh)) == []
    return whole


def check(engine: Engine) -> None:
    """DeepSeek's experts share a parameter with their router: both are processed together, and sent whole.

    So are layers with a bias from 0.33, which writes the processed bias into the loaded one.
    """
    together = {"deepseek-v3": ".1.mlp."}
    if os.environ["VLLM_SOURCES"] >= "0.33":
        together["qwen2"] = ".self_attn."
    part = together.get(engine.family.name)
    whole = patched(engine)
    assert all(part is not None and part in name for name in whole), whole


def test_changes_of_single_bytes(engine: Engine) -> None:
    check(engine)


@pytest.mark.parametrize("place", ["rank0of2-experts", "rank1of2-experts"])
@pytest.mark.parametrize("family", some("qwen3-moe", "deepseek-v3"))
def test_on_ranks_that_hold_whole_experts(engine: Engine) -> None:
    check(engine)
