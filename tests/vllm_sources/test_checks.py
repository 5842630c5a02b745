"""Checksums of what vLLM's kernels read: an altered layer is found and repaired, and engines are comparable."""

from __future__ import annotations

import pytest
import torch
from comparing import different as differing
from comparing import kernel_tensors
from engine import Engine
from families import Checkpoint, some
from test_patch import CPU, differences, moved

from nvfp4_qat.live_changes import Layout
from nvfp4_qat.live_model import LiveModel
from nvfp4_qat.live_snapshot import Snapshot

KINDS = ("weight", "weight_packed", "weight_scale", "bias", "w13_weight", "w2_weight", "W_UV", "W_UK_T")


def full(live: LiveModel, checkpoint: Checkpoint) -> None:
    live.begin([entry for entry, _ in checkpoint], remember=True)
    live.load((entry.name, t) for entry, t in checkpoint)
    live.commit()


def changed(live: LiveModel, snapshot: Snapshot, checkpoint: Checkpoint) -> list[str]:
    """Bring only what changed; the layers that had drifted before."""
    live.begin_changes([entry for entry, _ in checkpoint])
    drifted = live.drifted
    needed = live.change(snapshot.layout, differences(snapshot, checkpoint))
    live.load((name, snapshot.view(name)) for name in sorted(needed))
    live.commit()
    return drifted


def different(live: LiveModel, checkpoint: Checkpoint) -> list[str]:
    """Layers that are not what vLLM's own code makes of a checkpoint."""
    comparison = live.comparison([entry for entry, _ in checkpoint])
    comparison.load((entry.name, t) for entry, t in checkpoint)
    return comparison.different()


def check(engine: Engine) -> None:
    model, other = (engine.model(engine.family.checkpoint(seed)) for seed in (0, 5))
    live, fresh = engine.live(model), engine.live(other)
    for seed in (1, 2, 2, 2):
        checkpoint = engine.family.checkpoint(seed)
        full(live, checkpoint)
    assert live.checks.drifted() == different(live, checkpoint) == []
    snapshot = Snapshot(Layout([entry for entry, _ in checkpoint]), CPU)
    for entry, t in checkpoint:
        snapshot.keep(entry.name, t)

    checkpoint = moved(checkpoint, 0.01, 1)
    assert changed(live, snapshot, checkpoint) == []
    full(fresh, checkpoint)
    drifted, now = live.checks.compared()
    assert drifted == different(live, checkpoint) == [] and live.checks.layout() == fresh.checks.layout()
    assert now == fresh.checks.compared()[1], "changes leave other bytes than loading everything"
    assert different(live, engine.family.checkpoint(7))

    altered = set()
    memory: dict[int, str] = {}  # where several are in one, the first counts
    for name, p in model.named_parameters():
        memory.setdefault(p.untyped_storage().data_ptr(), name)
    for name, t in kernel_tensors(model).items():
        other_name = memory.get(t.untyped_storage().data_ptr(), name)  # of which it may be a view
        if name.rpartition(".")[2] in KINDS and t.numel() and name == other_name:
            t.data[tuple(n // 2 for n in t.shape)].reshape(1).view(torch.uint8)[0] ^= 1
            altered.add(name.rpartition(".")[0])
    drifted = live.checks.drifted()
    assert set(drifted) == altered <= set(different(live, checkpoint)) and len(altered) > 4
    assert changed(live, snapshot, moved(checkpoint, 0.001, 2)) == drifted
    checkpoint = moved(checkpoint, 0.001, 2)
    full(fresh, checkpoint)
    assert live.checks.drifted() == different(live, checkpoint) == []
    assert differing(kernel_tensors(model), kernel_tensors(other)) == []


def test_altered_layers_are_found_and_repaired(engine: Engine) -> None:
    check(engine)


@pytest.mark.parametrize("place", ["rank0of2-experts", "rank1of2-experts"])
@pytest.mark.parametrize("family", some("qwen3-moe", "deepseek-v3"))
def test_on_ranks_that_hold_whole_experts(engine: Engine) -> None:
    check(engine)
