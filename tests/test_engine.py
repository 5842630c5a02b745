"""The rollout engine: what it accepts, and that it samples from the distribution the trainer computes."""

import inspect

import pytest
import torch
from helpers_rl import TOKENIZER, micro_model

from nvfp4_qat.core import pack_from_masters
from nvfp4_qat.engine import RolloutEngine, left_pad
from nvfp4_qat.errors import MismatchError
from nvfp4_qat.models import load_model
from nvfp4_qat.policy_update import response_logprobs
from nvfp4_qat.rl import plain_weights, prepare_arm, stop_ids
from nvfp4_qat.rollouts import Graded, collate

PROMPTS = [TOKENIZER(text).input_ids for text in ("12>", "9876>", "5>")]


def engine_for(model):
    return RolloutEngine(model.config, stop_ids(model, TOKENIZER))


def loaded(model):
    engine = engine_for(model)
    engine.load(plain_weights(model))
    return engine


@pytest.mark.parametrize("tied", [True, False])
def test_plain_weights_arrive_unchanged_in_storage_of_its_own(tied):
    model = micro_model(tied=tied)
    engine = engine_for(model)
    stream = list(plain_weights(model))
    assert engine.load(iter(stream)).bytes == sum(2 * tensor.numel() for _, tensor in stream)
    assert len(stream) == len(model.state_dict()) - tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(engine.weights()[name], tensor), name
        assert engine.weights()[name].data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("arm", ["qat", "qat-ffn"])
def test_packed_weights_arrive_as_the_trainer_uses_them(moe, arm):
    model = micro_model(moe)
    stream = prepare_arm(model, arm)
    engine = engine_for(model)
    received = engine.load(stream()).bytes
    weights = engine.weights()
    quantized = set()
    for entry, packed in pack_from_masters(model):
        quantized.add(entry.name)
        assert torch.equal(weights[entry.name], packed.dequantize(torch.bfloat16)), entry.name
        assert not torch.equal(weights[entry.name], model.state_dict()[entry.name]), entry.name
    assert any("self_attn" in name for name in quantized) == (arm == "qat")
    for name, tensor in model.state_dict().items():
        if name not in quantized:
            assert torch.equal(weights[name], tensor), name
    assert received < sum(2 * tensor.numel() for _, tensor in plain_weights(model))


@pytest.mark.parametrize("moe", [False, True])
def test_without_qat_the_same_bytes_are_sent(moe):
    streams = [dict(prepare_arm(micro_model(moe), arm)()) for arm in ("noqat", "qat")]
    assert streams[0].keys() == streams[1].keys()
    for name, tensor in streams[0].items():
        assert torch.equal(tensor.view(torch.uint8), streams[1][name].view(torch.uint8)), name


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda s: s.pop(f"{Q_PROJ}.weight_scale"), [f"{Q_PROJ}.weight_scale: missing"]),
        (lambda s: s.pop("model.norm.weight"), ["model.norm.weight: missing"]),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith(Q_PROJ)],
            [f"{Q_PROJ}.weight: missing"],
        ),
        (lambda s: s.update({"model.layers.7.x": torch.zeros(2)}), ["model.layers.7.x: not in this architecture"]),
        (lambda s: s.update({f"{Q_PROJ}.weight": torch.zeros(32, 32)}), [f"{Q_PROJ}.weight: sent twice"]),
        (
            lambda s: s.update({"model.norm.weight": torch.zeros(3), "extra": torch.zeros(1)}),
            ["model.norm.weight: shape (3,), expected (32,)", "extra: not in this architecture"],
        ),
    ],
)
def test_every_tensor_is_accounted_for(change, messages):
    model = micro_model()
    stream = dict(prepare_arm(model, "qat")())
    change(stream)
    with pytest.raises(MismatchError) as error:
        engine_for(model).load(iter(stream.items()))
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.strip() for line in lines) == sorted(messages)


def test_log_probabilities_are_those_of_the_trainer():
    model = micro_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # far from uniform
    groups = loaded(model).generate(PROMPTS, samples=6, max_new_tokens=8, seed=3)
    assert [len(group) for group in groups] == [6, 6, 6]
    assert [group[0].prompt for group in groups] == PROMPTS
    batch = collate([[Graded(sample, 0.0, True) for sample in group] for group in groups], pad=0)
    with torch.no_grad():
        trainer = response_logprobs(model, batch)
    difference = (trainer - batch.rollout_logprobs).abs()[batch.mask]
    assert batch.rollout_logprobs[batch.mask].std() > 0.5
    # Two ways of rounding to bf16: logits here are below 8, where a bf16 step is 2^-5 at most.
    assert difference.max() < 0.1


def test_the_engine_is_another_program_even_on_short_sequences():
    model = load_model("tiny").model
    with torch.no_grad():  # as if trained: what attention adds must be seen next to the residual stream
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(10)
            layer.self_attn.o_proj.weight.mul_(10)
    groups = loaded(model).generate(PROMPTS, samples=4, max_new_tokens=6, seed=0)
    batch = collate([[Graded(sample, 0.0, True) for sample in group] for group in groups], pad=0)
    assert batch.ids.shape[1] < 16
    with torch.no_grad():
        differs = (response_logprobs(model, batch) - batch.rollout_logprobs).abs()[batch.mask] > 1e-5
    assert differs.float().mean() > 0.5


def test_responses_end_with_a_stop_token_or_at_the_limit():
    model = micro_model()
    stops = stop_ids(model, TOKENIZER) | set(range(3, 40))
    engine = RolloutEngine(model.config, stops)
    engine.load(plain_weights(model))
    samples = [s for group in engine.generate(PROMPTS, 16, 4, seed=0) for s in group]
    lengths = {len(sample.response) for sample in samples}
    assert min(lengths) == 1
    assert max(lengths) == 4
    for sample in samples:
        assert len(sample.logprobs) == len(sample.response)
        assert not stops & set(sample.response[:-1])
        assert sample.response[-1] in stops or len(sample.response) == 4


def test_sampling_follows_its_seed_and_not_its_neighbours():
    engine = loaded(micro_model())
    first = engine.generate(PROMPTS, 4, 6, seed=1)
    assert engine.generate(PROMPTS, 4, 6, seed=1) == first
    assert engine.generate(PROMPTS, 4, 6, seed=2) != first
    alone = engine.generate(PROMPTS[:1], 4, 6, seed=1)
    assert [sample.response for sample in alone[0]] == [sample.response for sample in first[0]]


def test_tokens_come_as_often_as_their_probability_says():
    model = micro_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
        probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].float().softmax(-1)
    (group,) = loaded(model).generate(PROMPTS[:1], samples=4000, max_new_tokens=1, seed=0)
    counts = torch.bincount(torch.tensor([s.response[0] for s in group]), minlength=len(probabilities))
    expected = 4000 * probabilities
    # Five standard deviations of a binomial count, for each of 99 tokens.
    assert ((counts - expected).abs() <= 5 * (expected * (1 - probabilities)).sqrt() + 1).all()
    assert probabilities.max() > 0.05


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_passed_under_the_name_that_transformers_has_for_it(monkeypatch, name):
    model, passed = micro_model(), []
    expected = loaded(model).generate(PROMPTS, 4, 6, seed=1)
    forward = type(model).forward
    own = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def renamed(self, **arguments):
        passed.append(name in arguments and (name == own or own not in arguments))
        return forward(self, **{own if key == name else key: value for key, value in arguments.items()})

    taken = [inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD) for key in ("self", "input_ids", name)]
    renamed.__signature__ = inspect.Signature(taken)
    monkeypatch.setattr(type(model), "forward", renamed)
    assert loaded(model).generate(PROMPTS, 4, 6, seed=1) == expected
    assert len(passed) == 6 and all(passed)


def test_left_pad():
    ids, mask = left_pad([[5], [6, 7]], pad=9)
    assert ids.tolist() == [[9, 5], [6, 7]]
    assert mask.tolist() == [[0, 1], [1, 1]]
