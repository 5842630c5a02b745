"""Evaluations in a run, weights that it keeps, and responses that an engine scores."""

import pytest
import torch
from helpers_rl import TOKENIZER, EvenFirst, micro_config, micro_model, run_arm
from safetensors.torch import load_file

from nvfp4_qat.engine import RolloutEngine, Sample
from nvfp4_qat.rl import plain_weights, prepare_arm
from nvfp4_qat.rollouts import evaluate
from nvfp4_qat.runlog import kept_weights
from nvfp4_qat.tasks import EVAL_KEY, SortDigits


class Answers:
    """An engine that gives these texts for each prompt."""

    def __init__(self, *texts):
        self.asked, self.texts = [], texts

    def generate(self, prompts, samples, max_new_tokens, seed):
        self.asked.append((len(prompts), samples, max_new_tokens, seed))
        responses = [[*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id] for text in self.texts[:samples]]
        return [[Sample(list(p), r, [0.0] * len(r)) for r in responses] for p in prompts]


def test_an_evaluation_by_hand():
    task, engine = EvenFirst(), Answers("b", "bb", "c")  # the codes of b are even
    found = evaluate(engine, task, TOKENIZER, problems=5, samples=3)
    accuracy = {"accuracy": pytest.approx(2 / 3), "accuracy_se": pytest.approx(0.0)}
    assert found == {**accuracy, "problems": 5, "response_length": 7 / 3}
    evaluate(engine, task, TOKENIZER, problems=5, samples=3)
    assert engine.asked[0] == engine.asked[1]
    assert {key for key, _ in task.drawn} == {EVAL_KEY}


def test_an_evaluation_of_a_small_task_counts_its_problems_once():
    found = evaluate(Answers("0", "1"), SortDigits(digits=1), TOKENIZER, problems=64, samples=2)
    right = torch.tensor([0.5, 0.5, *[0.0] * 8])
    assert found["problems"] == 10 and found["accuracy"] == pytest.approx(0.1)
    assert found["accuracy_se"] == pytest.approx(float(right.std()) / 10**0.5)


@pytest.mark.parametrize("arm", ["bf16", "qat"])
def test_a_run_evaluates_and_keeps_its_weights(tmp_path, arm):
    cfg = micro_config(tmp_path, eval_every=2, eval_problems=6, eval_samples=2, keep_every=2)
    rows = run_arm(cfg, arm)
    assert [("eval/accuracy" in row, "eval_end/accuracy" in row) for row in rows] == [
        (True, False), (False, False), (True, False), (False, True),
    ]  # fmt: skip
    kept = kept_weights(tmp_path, arm)
    assert list(kept) == [0, 2, 4]
    base = dict(plain_weights(micro_model()))
    first, last = (load_file(path) for path in (kept[0], kept[4]))
    assert first.keys() == base.keys() == last.keys()
    assert all(torch.equal(first[name], base[name]) for name in base)
    assert any(not torch.equal(last[name], base[name]) for name in base)
    # The last evaluation is of the weights kept last, in the arm's own precision.
    model = micro_model()
    model.load_state_dict(last, strict=False)
    stream = prepare_arm(model, arm)
    engine = RolloutEngine(model.config, [TOKENIZER.eos_token_id])
    engine.load(stream())
    again = evaluate(engine, EvenFirst(), TOKENIZER, 6, 2)
    assert again == {name: rows[-1][f"eval_end/{name}"] for name in again}


def test_evaluations_change_nothing_else(tmp_path):
    plain = run_arm(micro_config(tmp_path / "plain"), "qat")
    evaluated = run_arm(micro_config(tmp_path / "evaluated", eval_every=1, eval_problems=3, keep_every=1), "qat")
    assert [{k: v for k, v in row.items() if not k.startswith("eval")} for row in evaluated] == plain


def test_an_engine_scores_what_it_sampled(tmp_path):
    model = micro_model()
    engine = RolloutEngine(model.config, [TOKENIZER.eos_token_id])
    engine.load(plain_weights(model))
    groups = engine.generate([TOKENIZER(text).input_ids for text in ("12>", "4567>")], 6, 7, seed=1)
    samples = [sample for group in groups for sample in group]
    scores = engine.score(samples)
    for sample, score in zip(samples, scores, strict=True):
        assert score == pytest.approx(sample.logprobs, abs=0.05)  # bf16, in other shapes
    alone = [engine.score([sample])[0] for sample in samples]
    assert all(a == pytest.approx(b, abs=0.05) for a, b in zip(alone, scores, strict=True))
