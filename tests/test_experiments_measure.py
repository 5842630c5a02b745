"""What is measured on weights that a run kept: variants of the contract, and engines against the trainer."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nvfp4_qat as nq
from nvfp4_qat.engine import Sample
from nvfp4_qat.models import load_model
from nvfp4_qat.reference import quantize
from nvfp4_qat.rl import arm_plan, plain_weights
from nvfp4_qat.runlog import load_kept
from nvfp4_qat.tasks import make_task

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

import measure  # noqa: E402
from variants import VARIANTS, differences, shared, sides, unclamped  # noqa: E402


@pytest.fixture(params=["linear", "experts"])
def group(request):
    torch.manual_seed(0)
    if request.param == "experts":
        return [torch.randn(4, 32, 64).bfloat16() * 0.05 * torch.tensor([1, 2, 4, 9.0]).view(4, 1, 1).bfloat16()]
    return [torch.randn(48, 64).bfloat16() * scale for scale in (0.05, 0.2, 0.01)]


@pytest.mark.parametrize("name", ["amax", "unfused", "unclamped"])
def test_both_sides_hold_the_same_in_these_variants(group, name):
    values, meant, sent = VARIANTS[name].sides(group)
    assert meant is sent and all(torch.equal(v, s.dequantize()) for v, s in zip(values, sent, strict=True))


def test_variants_do_what_their_names_say(group):
    contract = shared("pow2")(group)
    for value, w in zip(VARIANTS["contract"].sides(group)[2], group, strict=True):
        g = nq.global_scale(torch.stack([nq.amax(x, x.ndim - 2) for x in group]).amax(0))
        codes, scale = quantize(w, g)
        assert torch.equal(value.packed, codes) and torch.equal(value.scale.view(torch.uint8), scale.view(torch.uint8))
    same = [torch.equal(a.packed, b.packed) for a, b in zip(unclamped(group), contract, strict=True)]
    assert all(same)  # no block scale is below the bound here
    small = [w.clone() for w in group]
    small[0][..., 0, -1] = nq.amax(group[0], group[0].ndim - 2)  # so that the global scale stays
    small[0][..., :16] *= 2.0**-15
    small[0][..., 16:32] = 0
    ours, theirs = shared("pow2")(small)[0], unclamped(small)[0]
    assert (ours.scale.float() >= 2.0**-6).all() and (theirs.scale.float()[..., 0] < 2.0**-6).all()
    assert torch.equal(ours.packed[..., 16:], theirs.packed[..., 16:])
    error = [(p.dequantize() - small[0])[..., :16].float().square().sum() for p in (ours, theirs)]
    assert error[1] < error[0]
    scales = {float(p.global_scale.reshape(-1)[0]) for p in VARIANTS["unfused"].sides(group)[2]}
    assert len(scales) == len(group)
    values, _, sent = VARIANTS["requantized"].sides(group)
    assert not torch.equal(values[0], sent[0].dequantize())
    values, _, sent = VARIANTS["repacked"].sides(group)
    assert all(torch.equal(v, s.dequantize()) for v, s in zip(values, sent, strict=True))


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_the_contract_s_stream_is_the_one_of_packed_weights(model):
    loaded = load_model(model).model
    masters = {name: tensor.clone() for name, tensor in loaded.state_dict().items() if name != "lm_head.weight"}
    plan = nq.QuantPlan.from_model(loaded, nq.QATConfig(enable=True))
    made = dict(sides(masters, plan, VARIANTS["contract"]).stream())
    nq.apply_qat(loaded, nq.QATConfig(enable=True))
    expected = dict(nq.packed_weights(loaded, layout="fused"))
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype and made[name].shape == tensor.shape, name
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_what_differs_from_the_contract_is_counted(group):
    plan = SimpleNamespace(groups=lambda: {"g": [SimpleNamespace(name=str(i)) for i in range(len(group))]})
    group = [w.clone() for w in group]
    group[0][..., 0, :16] *= 2.0**-15  # blocks whose scale is below the bound, in the first weight
    masters = dict(zip(map(str, range(len(group))), group, strict=True))
    both = {name: sides(masters, plan, variant) for name, variant in VARIANTS.items()}
    found = {name: differences(made, both["contract"]) for name, made in both.items()}
    sizes = sum(w.numel() for w in group)
    of = {"values": sizes, "codes": sizes // 2, "scales": sizes // 16, "divisors": 4 if len(group) == 1 else 3}
    nothing = dict.fromkeys(of, 0)
    assert all(counted["of"] == of for counted in found.values())
    assert found["contract"]["trainer"] == found["contract"]["engine"] == nothing
    assert found["repacked"]["engine"] == nothing
    blocks = 4 if len(group) == 1 else 1
    assert found["unclamped"]["trainer"] == found["unclamped"]["engine"]
    assert found["unclamped"]["trainer"]["scales"] == blocks and found["unclamped"]["trainer"]["divisors"] == 0
    assert 0 < found["unclamped"]["trainer"]["values"] <= 16 * blocks
    assert found["amax"]["trainer"]["divisors"] == of["divisors"]
    for name in ("requantized", "rounded-twice"):
        assert found[name]["trainer"] == nothing and found[name]["engine"]["divisors"] == of["divisors"]
        assert found[name]["engine"]["codes"] > 0
    assert (found["unfused"]["engine"]["divisors"] > 0) == (len(group) > 1)


def test_engines_are_held_against_the_trainer_as_they_score_and_as_they_sampled(monkeypatch):
    class Says:
        def __init__(self, sampled, scored):
            self.sampled, self.scored, self.asked, self.times_scored = sampled, scored, [], 0

        def load(self, stream):
            assert list(stream)

        def generate(self, prompts, samples, *more):
            self.asked.append((prompts, samples, *more))
            return [[Sample(prompt, [5] * len(self.sampled), self.sampled)] * samples for prompt in prompts]

        def score(self, samples):
            self.times_scored += 1
            assert all(len(sample.response) == 2 for sample in samples)  # those that the 4-bit engine sampled
            return [self.scored for _ in samples]

    monkeypatch.setattr(measure, "PROBLEMS", 2)
    monkeypatch.setattr(measure, "SAMPLES", 3)
    loaded = load_model("tiny")
    nvfp4, bf16 = Says([-1.0, -3.0], [-1.0, -2.0]), Says([-1.0, -1.0, -1.5], [-1.25, -1.0])
    bench = SimpleNamespace(
        model=loaded.model, tokenizer=loaded.tokenizer, task=make_task("auto", "tiny"),
        engines={"nvfp4": nvfp4, "bf16": bf16}, plans={"nvfp4": arm_plan(loaded.model, "noqat")},
        _trainer=lambda samples: [[-1.0] * len(sample.response) for sample in samples],
    )  # fmt: skip
    row = measure.Bench.paired(bench, dict(plain_weights(loaded.model)), VARIANTS["contract"], "key")

    def k3(*log_ratios):
        return pytest.approx([sum(math.exp(x) - 1 - x for x in log_ratios)] * 6, rel=1e-4)

    assert row["k3_nvfp4"] == k3(0, 1) and row["k3_bf16"] == k3(0.25, 0)
    assert row["k3_sampled"] == k3(0, 2) and row["k3_bf16_sampled"] == k3(0, 0, 0.5)
    assert row["k3_engines"] == k3(-0.25, 1) and row["apart"] == [1.0] * 6
    assert (row["samples"], row["tokens"], row["lengths"], row["lengths_bf16"]) == (3, 12, [2] * 6, [3] * 6)
    assert nvfp4.asked == bf16.asked and len(bf16.asked) == 1 and (nvfp4.times_scored, bf16.times_scored) == (1, 1)


def test_weights_of_another_model_are_refused(tmp_path):
    model = load_model("tiny").model
    weights = dict(plain_weights(model))
    load_kept(model, weights)
    weights["model.layers.9.mlp.up_proj.weight"] = weights.pop("model.norm.weight")
    with pytest.raises(nq.MismatchError, match="missing or unknown: model.norm.weight, model.layers.9"):
        load_kept(model, weights)
