"""GRPO with DAPO's changes, the optimizer, the arms, and that a killed run continues as if nothing had happened."""

import math

import pytest
import torch
from helpers_rl import TOKENIZER, EvenFirst, micro_config, micro_model, run_arm

from nvfp4_qat import rl
from nvfp4_qat.engine import Sample
from nvfp4_qat.grpo import group_advantages, overlong_penalty, policy_loss
from nvfp4_qat.masters import MasterAdamW
from nvfp4_qat.policy_update import old_logprobs, response_logprobs, update
from nvfp4_qat.rl import prepare_arm
from nvfp4_qat.rollouts import Graded, collate, collect
from nvfp4_qat.tasks import Grade

# --- by hand


def test_advantages_are_centred_and_scaled_within_a_group():
    rewards = torch.tensor([[1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, -1.0]])
    scale = 1 + 1e-6  # mean -1/2, unbiased standard deviation 1
    deviation = math.sqrt(8 / 3) + 1e-6
    expected = [[1.5 / scale, *[-0.5 / scale] * 3], [0.0] * 4, [2 / deviation, 0.0, 0.0, -2 / deviation]]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected))


@pytest.mark.parametrize(
    ("length", "buffer", "factor", "penalty"),
    [
        (10, 4, 1.0, 0.0),
        (16, 4, 1.0, 0.0),
        (17, 4, 1.0, -0.25),
        (20, 4, 1.0, -1.0),
        (18, 4, 2.0, -1.0),
        (20, 0, 1.0, 0),
    ],
)
def test_overlong_penalty(length, buffer, factor, penalty):
    assert overlong_penalty(length, 20, buffer, factor) == penalty


def loss_of(ratio, advantage, **kwargs):
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, active = policy_loss(new, torch.zeros(1, 1), one * advantage, one.bool(), **kwargs)
    loss.backward()
    return loss.item(), new.grad.item(), [name for name, count in active.items() if count]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "active"),
    [
        (1.0, 2.0, -2.0, -2.0, []),
        (1.25, 2.0, -2.5, -2.5, []),
        (1.5, 2.0, -2.56, 0.0, ["clipped_high"]),  # 1.28 · 2
        (0.5, 2.0, -1.0, -1.0, []),  # a good token that became rarer may always come back
        (0.9, -2.0, 1.8, 1.8, []),
        (0.5, -2.0, 1.6, 0.0, ["clipped_low"]),  # 0.8 · 2
        (1.5, -2.0, 3.0, 3.0, []),
        (20.0, -2.0, 20.0, 0.0, ["clipped_dual"]),  # 10 · 2
    ],
)
def test_clipping(ratio, advantage, loss, gradient, active):
    result = loss_of(ratio, advantage)
    assert result[0] == pytest.approx(loss, rel=1e-6)
    assert result[1] == pytest.approx(gradient, rel=1e-6)
    assert result[2] == active


def test_clip_bounds_are_parameters():
    assert loss_of(1.5, 1.0, clip_high=0.1)[0] == pytest.approx(-1.1)
    assert loss_of(0.5, -1.0, clip_low=0.4)[0] == pytest.approx(0.6)
    assert loss_of(5.0, -1.0, clip_dual=3.0)[0] == pytest.approx(3.0)


def test_the_loss_is_a_mean_over_tokens_not_over_sequences():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages = torch.tensor([[4.0, 9.0, 9.0], [-1.0, -1.0, -1.0]])
    new = torch.zeros(2, 3, requires_grad=True)
    loss, _ = policy_loss(new, torch.zeros(2, 3), advantages, mask)
    assert loss.item() == pytest.approx(-(4 - 3) / 4)
    loss.backward()
    assert new.grad.tolist() == [[-1.0, 0.0, 0.0], [0.25, 0.25, 0.25]]
    assert policy_loss(new, torch.zeros(2, 3), advantages, mask, tokens=8)[0].item() == pytest.approx(-1 / 8)
    weights = torch.tensor([[0.5, 7.0, 7.0], [2.0, 1.0, 1.0]])
    weighted = policy_loss(new, torch.zeros(2, 3), advantages, mask, weights=weights)[0]
    assert weighted.item() == pytest.approx(-(0.5 * 4 - 2 - 1 - 1) / 4)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_overflow_outside_the_mask_does_no_harm(advantage):
    new = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss, _ = policy_loss(new, torch.zeros(1, 2), torch.full((1, 2), advantage), torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == -advantage
    assert new.grad.tolist() == [[-advantage, 0.0]]


# --- rollouts


class Scripted:
    """Stands for an engine; says for each batch how many responses of each group are right."""

    def __init__(self, batches):
        self.batches, self.seeds = iter(batches), []

    def generate(self, prompts, samples, max_new_tokens, seed):
        self.seeds.append(seed)
        rights = next(self.batches)
        assert len(rights) == len(prompts)
        even, odd = TOKENIZER("2").input_ids, TOKENIZER("1").input_ids
        return [
            [Sample(p, (even if i < n else odd) * 2, [-0.1, -0.2]) for i in range(samples)]
            for p, n in zip(prompts, rights, strict=True)
        ]


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tmp_path):
    cfg = micro_config(tmp_path, prompts=3, samples=4, max_batches=3)
    engine = Scripted([[0, 2, 4], [1, 0, 3]])
    kept, drawn, batches = collect(engine, EvenFirst(), TOKENIZER, cfg, step=5)
    assert batches == 2
    assert len(drawn) == 6
    assert [sum(g.correct for g in group) for group in kept] == [2, 1, 3]
    assert len(set(engine.seeds)) == 2
    assert engine.seeds == [rl.stable_seed("0/5/0"), rl.stable_seed("0/5/1")]


def test_dynamic_sampling_gives_up_after_max_batches_and_never_keeps_too_many(tmp_path):
    cfg = micro_config(tmp_path, prompts=3, samples=4, max_batches=2)
    kept, drawn, batches = collect(Scripted([[0, 4, 4], [0, 0, 1]]), EvenFirst(), TOKENIZER, cfg, step=0)
    assert (len(kept), len(drawn), batches) == (1, 6, 2)
    kept, _, batches = collect(Scripted([[1, 0, 4], [1, 2, 3]]), EvenFirst(), TOKENIZER, cfg, step=0)
    assert (len(kept), batches) == (3, 2)
    kept, _, batches = collect(Scripted([[1, 2, 3]]), EvenFirst(), TOKENIZER, cfg, step=0)
    assert (len(kept), batches) == (3, 1)


def test_the_overlong_penalty_is_part_of_the_reward_but_not_of_being_right(tmp_path):
    class Long(EvenFirst):
        max_new_tokens = 2

    (kept, *_), _, _ = collect(
        Scripted([[2, 2, 2]]), Long(), TOKENIZER, micro_config(tmp_path, overlong_factor=0.5), step=0
    )
    assert [(g.reward, g.correct) for g in kept] == [(0.5, True)] * 2 + [(-1.5, False)] * 2


def test_collate_pads_prompts_in_front_and_responses_behind():
    group = [
        Graded(Sample([5, 6], [7], [-1.0]), 1.0, True),
        Graded(Sample([8], [9, 10], [-2.0, -3.0]), -1.0, False),
    ]
    batch = collate([group], pad=0)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [0, 8, 9, 10]]
    assert batch.attention.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.rollout_logprobs.tolist() == [[-1.0, 0.0], [-2.0, -3.0]]
    torch.testing.assert_close(batch.advantages[:, 0], torch.tensor([1.0, -1.0]) / (math.sqrt(2) + 1e-6) * 1.0)
    assert batch.rows(slice(1, 2)).ids.tolist() == [[0, 8, 9, 10]]


def test_padding_does_not_change_log_probabilities():
    model = micro_model().float()
    short = Graded(Sample([20, 21], [22, 23], [0.0, 0.0]), 1.0, True)
    long = Graded(Sample([20, 24, 25, 26, 27], [22, 23, 24, 25], [0.0] * 4), 1.0, True)
    with torch.no_grad():
        alone = response_logprobs(model, collate([[short, short]], 0))[0]
        beside = response_logprobs(model, collate([[short, long]], 0))[0, :2]
        logits = model(torch.tensor([[20, 21, 22, 23]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(alone, beside)
    torch.testing.assert_close(alone, torch.stack([logits[1, 22], logits[2, 23]]))


def make_batch(model, seed=0):
    torch.manual_seed(seed)
    groups = []
    for _ in range(3):
        responses = [torch.randint(3, 90, (length,)).tolist() for length in (1, 3, 4, 2)]
        groups.append(
            [
                Graded(Sample([15, 16], r, [-4.5] * len(r)), reward, reward > 0)
                for r, reward in zip(responses, (1.0, -1.0, -1.0, 1.0), strict=True)
            ]
        )
    return collate(groups, 0)


def test_old_log_probabilities_and_entropy(tmp_path):
    model = micro_model()
    batch = make_batch(model)
    old, entropy = old_logprobs(model, batch, micro_config(tmp_path, micro_batch=5))
    with torch.no_grad():
        whole = response_logprobs(model, batch)
    torch.testing.assert_close(old[batch.mask], whole[batch.mask], atol=0.05, rtol=0)  # bf16 in other batch sizes
    assert 4.0 < entropy <= math.log(len(TOKENIZER))


def test_micro_batches_do_not_change_the_update(tmp_path):
    results = []
    for micro in (2, 100):
        model = micro_model().float()
        batch = make_batch(model)
        cfg = micro_config(tmp_path, micro_batch=micro, minibatches=1)
        optimizer = MasterAdamW(model.parameters(), lr=1e-3)
        old, _ = old_logprobs(model, batch, cfg)
        stats = update(model, optimizer, batch, old, cfg)
        results.append((stats, optimizer.masters))
    for name, value in results[0][0].items():
        assert value == pytest.approx(results[1][0][name], abs=1e-5), name
    for a, b in zip(results[0][1], results[1][1], strict=True):
        # AdamW's first step is lr · sign(g): a gradient of nearly zero may come out with either sign.
        assert ((a - b).abs() > 1e-5).float().mean() < 0.01


def test_an_update_makes_good_responses_likelier(tmp_path):
    model = micro_model()
    batch = make_batch(model)
    cfg = micro_config(tmp_path, minibatches=2)
    optimizer = MasterAdamW(model.parameters(), lr=1e-3)
    before, _ = old_logprobs(model, batch, cfg)
    stats = update(model, optimizer, batch, before, cfg)
    after, _ = old_logprobs(model, batch, cfg)
    gain = ((after - before) * batch.advantages)[batch.mask].sum()
    assert gain > 0
    assert stats["grad_norm"] > 0


def test_importance_weights_are_the_truncated_ratio_to_the_rollout(tmp_path):
    """At the first update ratio and gradient scale are known: the loss is -Σ weight · advantage / tokens."""
    model = micro_model()
    batch = make_batch(model)
    losses = {}
    for tis in (None, 2.0, 0.25):
        cfg = micro_config(tmp_path, minibatches=1, micro_batch=100, tis=tis)
        old, _ = old_logprobs(model, batch, cfg)
        weights = torch.ones_like(old) if tis is None else torch.exp(old - batch.rollout_logprobs).clamp(max=tis)
        expected = -(weights * batch.advantages)[batch.mask].sum() / batch.mask.sum()
        fresh = micro_model()
        losses[tis] = update(fresh, MasterAdamW(fresh.parameters(), lr=0.0), batch, old, cfg)["loss"]
        assert losses[tis] == pytest.approx(float(expected), abs=1e-5)
    assert len(set(losses.values())) == 3


# --- fp32 masters


def test_masters_hold_steps_that_bf16_cannot():
    parameter = torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    optimizer = MasterAdamW([parameter], lr=1e-6)
    for step in range(200):
        parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
        optimizer.step()
        assert torch.equal(parameter.detach(), optimizer.masters[0].bfloat16())
        if step == 9:
            assert torch.equal(parameter.detach(), before)
    assert (parameter.detach() < before).all()
    assert optimizer.masters[0].tolist() == pytest.approx([float(before[0]) - 200e-6] * 4, rel=1e-3)


def test_gradients_are_accumulated_in_fp32():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], lr=1e-3)
    for value in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        parameter.grad = torch.full((1,), value, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert parameter.grad is None
    assert optimizer.clip(1.0) == 258.0
    parameter.grad = torch.full((1,), float("nan"), dtype=torch.bfloat16)
    optimizer.accumulate()
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip(1.0)


def test_optimizer_state_continues_exactly():
    def train(optimizer, parameter, steps):
        for step in steps:
            parameter.grad = torch.full_like(parameter, math.sin(step))
            optimizer.accumulate()
            optimizer.step()

    start = torch.linspace(-1, 1, 8).bfloat16()
    whole = torch.nn.Parameter(start.clone())
    reference = MasterAdamW([whole], lr=1e-3)
    train(reference, whole, range(6))
    half = torch.nn.Parameter(start.clone())
    first = MasterAdamW([half], lr=1e-3)
    train(first, half, range(3))
    continued = torch.nn.Parameter(start.clone())
    second = MasterAdamW([continued], lr=1e-3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(continued.detach(), half.detach())
    train(second, continued, range(3, 6))
    assert torch.equal(second.masters[0], reference.masters[0])
    assert torch.equal(continued.detach(), whole.detach())


# --- arms


@pytest.mark.parametrize("arm", ["qat", "qat-ffn"])
def test_an_optimizer_step_reaches_the_packed_weights(arm, tmp_path):
    model = micro_model()
    stream = prepare_arm(model, arm)
    before = {name: tensor.clone() for name, tensor in stream()}
    batch = make_batch(model)
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
