"""Which groups of responses are kept, how they are graded, and the batch that they become."""

import math

import torch
from helpers_rl import TOKENIZER, EvenFirst, micro_config, micro_model

from nvfp4_qat import rl
from nvfp4_qat.engine import Sample
from nvfp4_qat.policy_update import response_logprobs
from nvfp4_qat.rollouts import Graded, collate, collect


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
