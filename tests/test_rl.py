"""The arms of a run: what each trains and samples with, and that a killed one continues as if nothing had happened."""

import pytest
import torch
from helpers_rl import EvenFirst, make_batch, micro_config, micro_model, run_arm

from nvfp4_qat import rl
from nvfp4_qat.masters import MasterAdamW
from nvfp4_qat.policy_update import old_logprobs, update
from nvfp4_qat.rl import prepare_arm
from nvfp4_qat.tasks import Grade


@pytest.mark.parametrize("arm", ["qat", "qat-ffn"])
def test_an_optimizer_step_reaches_the_packed_weights(arm, tmp_path):
    model = micro_model()
    stream = prepare_arm(model, arm)
    before = {name: tensor.clone() for name, tensor in stream()}
    batch = make_batch()
    cfg = micro_config(tmp_path)
    old, _ = old_logprobs(model, batch, cfg)
    optimizer = MasterAdamW(model.parameters(), lr=1e-2)
    update(model, optimizer, batch, old, cfg)
    after = dict(stream())
    name = "model.layers.1.mlp.down_proj.weight_packed"
    assert not torch.equal(before[name], after[name])
    # What the trainer computes with now is what is sent now.
    after_logprobs, _ = old_logprobs(model, batch, cfg)
    reloaded = micro_model()
    engine = rl.RolloutEngine(reloaded.config, {1})
    engine.load(iter(after.items()))
    reloaded.load_state_dict(engine.weights())
    with_sent_weights, _ = old_logprobs(reloaded, batch, cfg)
    assert torch.equal(after_logprobs[batch.mask], with_sent_weights[batch.mask])


def test_arms_see_the_same_prompts_and_start_from_the_same_policy(tmp_path):
    base = micro_model()
    untouched = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first_rows, draws = {}, {}
    for arm in ("bf16", "noqat", "qat", "qat-ffn"):
        task = EvenFirst()
        first_rows[arm] = run_arm(micro_config(tmp_path / arm, steps=2, max_batches=1), arm, base=base, task=task)[0]
        draws[arm] = task.drawn
    assert all(draw == draws["bf16"] for draw in draws.values())
    # The arms noqat and qat sample from the same bytes at the first step, so they draw the same responses.
    assert first_rows["noqat"]["reward"] == first_rows["qat"]["reward"]
    assert first_rows["noqat"]["sync_bytes"] == first_rows["qat"]["sync_bytes"]
    assert first_rows["qat"]["sync_bytes"] < first_rows["qat-ffn"]["sync_bytes"] < first_rows["bf16"]["sync_bytes"]
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, untouched[name]), name


@pytest.mark.parametrize("moe", [False, True])
def test_the_mismatch_without_qat_is_far_above_the_others(tmp_path, moe):
    base = micro_model(moe)
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(10)
    k3 = {}
    for arm in ("bf16", "noqat", "qat"):
        rows = run_arm(micro_config(tmp_path / arm, steps=2, samples=8, lr=1e-4), arm, base=base)
        k3[arm] = sum(row["rollout_corr/k3_kl"] for row in rows) / len(rows)
    # So narrow a model often rounds to the very same bits in both programs: the floor may be zero.
    assert k3["noqat"] > 1e-5
    assert k3["noqat"] > 10 * max(k3["qat"], k3["bf16"])


def test_a_step_without_a_group_to_learn_from_trains_nothing(tmp_path):
    class Hopeless(EvenFirst):
        def grade(self, problem, response):
            return Grade(-1.0, False, "")

    rows = run_arm(micro_config(tmp_path / "run", steps=2), "qat", task=Hopeless())
    for row in rows:
        assert row["groups_trained"] == 0
        assert row["batches_drawn"] == 2
        assert "loss" not in row
        assert row["flips/codes"] == 0.0
        assert row["rollout_corr/k3_kl"] >= 0


# --- kill and resume


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("arm", "checkpoint_seconds", "torn"), [("qat", 0.0, False), ("bf16", 0.0, True), ("noqat", 1e9, True)]
)
def test_a_killed_arm_continues_with_the_same_numbers(tmp_path, arm, checkpoint_seconds, torn):
    reference = run_arm(micro_config(tmp_path / "whole"), arm)
    assert len({row["reward"] for row in reference}) > 1

    def kill(row):
        if row["step"] == 1:
            raise Killed

    cfg = micro_config(tmp_path / "killed", checkpoint_seconds=checkpoint_seconds)
    with pytest.raises(Killed):
        run_arm(cfg, arm, kill)
    metrics = cfg.out / f"metrics-{arm}.jsonl"
    if torn:  # the process died inside a line of the step after the checkpoint
        metrics.write_text(metrics.read_text() + '{"step": 2, "rew')
    steps = []
    assert run_arm(cfg, arm, lambda row: steps.append(row["step"])) == reference
    assert steps == ([2, 3] if checkpoint_seconds == 0 else [0, 1, 2, 3])
    assert len(metrics.read_text().splitlines()) == 4
    assert not list(cfg.out.glob("checkpoint*"))
    assert run_arm(cfg, arm, lambda row: pytest.fail("a finished arm was continued")) == reference


def test_metrics_ahead_of_the_checkpoint_are_computed_again(tmp_path, monkeypatch):
    """Killed after a step's line was written and before its checkpoint was: the order in which both are written."""
    reference = run_arm(micro_config(tmp_path / "whole"), "qat")
    cfg = micro_config(tmp_path / "killed")
    save = rl.ArmLog.step.__globals__["save_file"]
    saved = []

    def save_twice_then_die(path, state):
        if len(saved) == 2:
            raise Killed
        saved.append(state["step"])
        save(path, state)

    monkeypatch.setitem(rl.ArmLog.step.__globals__, "save_file", save_twice_then_die)
    with pytest.raises(Killed):
        run_arm(cfg, "qat")
    monkeypatch.undo()
    assert saved == [1, 2]
    assert len((cfg.out / "metrics-qat.jsonl").read_text().splitlines()) == 3
    assert run_arm(cfg, "qat") == reference
