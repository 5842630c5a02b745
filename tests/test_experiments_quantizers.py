"""The experiment on quantizers: what it measures, held against other ways to compute it, and the packages it calls."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_models import qwen3, qwen3_moe

import nvfp4_qat as nq
from nvfp4_qat.core import pack_from_masters
from nvfp4_qat.errors import UserError
from nvfp4_qat.models import load_model, tiny_tokenizer
from nvfp4_qat.tasks import make_task

ROOT = Path(__file__).parent.parent
PEERS = (
    "llm-compressor", "llm-compressor-mse", "llm-compressor-expanded-mse", "modelopt", "torchao", "torchao-one-level",
)  # fmt: skip
ROW = {
    "experiment", "quantizer", "package", "version", "global_scale", "weight_error", "bits_per_weight", "perplexity",
    "perplexity_95", "nll_increase", "nll_increase_95", "kl", "kl_95", "kl_ratio", "kl_ratio_95", "model", "source",
    "sequences", "tokens", "arithmetic", "gpu", "torch", "triton", "transformers", "date", "commit", "settings",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The files of experiments/ import each other by name, as they do when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments"))
        yield


@pytest.fixture(scope="module")
def experiment():
    return importlib.import_module("quantizers")


@pytest.fixture(scope="module")
def peers():
    return importlib.import_module("peer_quantizers")


@pytest.fixture(scope="module")
def tiny():
    """The tiny model in float32 arithmetic, its tokenizer, and some problems of different lengths."""
    loaded = load_model("tiny")
    return loaded.model.float(), loaded.tokenizer


@pytest.fixture(scope="module")
def passages(experiment, tiny):
    short, long = (make_task("sort"), SimpleNamespace(problems=lambda n, key: make_task("sort").problems(n, "long")))
    some = experiment.answers(short, tiny[1], 5)
    return [*some, *(experiment.Passage(p.tokens + p.tokens, p.given) for p in experiment.answers(long, tiny[1], 4))]


def plan_of(model):
    return nq.QuantPlan.from_model(model, nq.QATConfig(enable=True))


def rounded(experiment, model, rounder):
    """A copy of a model with rounded weights, and what is said of them."""
    plan = plan_of(model)
    other = experiment.twin(model, plan)
    return other, experiment.round_weights(model, other, plan, rounder)


def quantizer(peers, name):
    return next(q for q in peers.QUANTIZERS if q.name == name)


def rounder_of(peers, name):
    """The function of a package, if it is installed."""
    try:
        return quantizer(peers, name).make()
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def coarse(peers):
    """A quantizer that is worse than any: the sign, times the mean magnitude of a row."""

    def rounder(group):
        return {
            name: peers.Rounded(w.sign() * w.abs().mean(1, keepdim=True), w.numel() // 8) for name, w in group.items()
        }

    return peers.Quantizer("coarse", (), "none", lambda: rounder)


@pytest.mark.parametrize("policy", ["pow2", "amax"])
@pytest.mark.parametrize("make", [qwen3, qwen3_moe])
def test_ours_is_what_training_and_export_hold(experiment, peers, make, policy):
    model = make().bfloat16()
    other, _ = rounded(experiment, model, peers.ours(policy))
    nq.apply_qat(model, nq.QATConfig(enable=True, global_scale=policy))
    held = dict(other.named_parameters())
    entries = list(pack_from_masters(model))
    assert len(entries) >= 4
    for entry, packed in entries:
        assert torch.equal(held[entry.name], packed.dequantize()), entry.name


@pytest.mark.parametrize("make", [qwen3, qwen3_moe])
def test_a_twin_shares_what_is_not_rounded_and_rounding_leaves_the_model(experiment, peers, make):
    model = make().bfloat16()
    before = copy.deepcopy(model.state_dict())
    plan = plan_of(model)
    other, numbers = rounded(experiment, model, peers.ours("pow2"))
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (mine is theirs) == (name not in plan), name
        assert torch.equal(mine, before[name])
        assert torch.equal(mine, theirs) == (name not in plan), name
    mine, theirs = (
        torch.cat([m.get_parameter(entry.name).detach().double().flatten() for entry in plan.quantized])
        for m in (model, other)
    )
    error = (theirs - mine).square().sum() / mine.square().sum()
    assert numbers["weight_error"] == pytest.approx(float(error), rel=1e-12)
    assert 4.5 <= numbers["bits_per_weight"] <= 4.5 + 32 / 256


def test_experts_are_groups_of_their_own(experiment):
    model = qwen3_moe()
    groups = list(experiment.fusion_groups(model, plan_of(model)))
    names = [tuple(group) for group in groups]
    assert names.count(("gate_proj", "up_proj")) == names.count(("down_proj",)) == 2 * 4
    assert names.count(("q_proj", "k_proj", "v_proj")) == 2
    first = next(group for group in groups if "up_proj" in group)
    assert torch.equal(first["up_proj"], model.model.layers[0].mlp.experts.gate_up_proj[0, 16:])


def test_identical_models_have_no_divergence(experiment, tiny, passages):
    model, _ = tiny
    scores = experiment.score(model, experiment.twin(model, plan_of(model)), passages, 4)
    assert scores.kl.tolist() == [0.0] * len(passages)


def test_scores_are_those_of_one_passage_at_a_time(experiment, peers, tiny, passages):
    """Without padding or batches, by transformers' own loss and torch's own divergence."""
    model, _ = tiny
    other, _ = rounded(experiment, model, peers.ours("pow2"))
    scores = experiment.score(model, other, passages, 4)
    for i, passage in enumerate(passages):
        ids = torch.tensor([passage.tokens])
        labels = ids.clone()
        labels[:, : passage.given] = -100
        with torch.no_grad():
            loss = other(input_ids=ids, labels=labels).loss
            p, q = (m(input_ids=ids).logits[0, passage.given - 1 : -1].double().log_softmax(-1) for m in (model, other))
        count = len(passage.tokens) - passage.given
        assert scores.tokens[i] == count
        assert float(scores.nll[i]) == pytest.approx(count * float(loss), rel=1e-5)
        assert float(scores.kl[i]) == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="sum")), rel=1e-3)
    perplexity = experiment.summary(scores, scores, None)["perplexity"]
    assert perplexity == pytest.approx(math.exp(float(scores.nll.sum()) / float(scores.tokens.sum())), rel=1e-12)


def test_forbidden_tokens_add_nothing(experiment):
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    nll, kl = experiment._per_token(logits, logits + torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1]))[:, 0].tolist()
    p, q = torch.tensor([1.0, 2.0]).double().softmax(0), torch.tensor([1.0, 3.0]).double().softmax(0)
    assert kl == pytest.approx(float((p * (p / q).log()).sum()))
    assert nll == pytest.approx(-float(q[1].log()))


def test_a_worse_quantizer_looks_worse(experiment, peers, tiny, passages):
    model, _ = tiny
    bf16, ours, worse = experiment.measure(model, passages, [quantizer(peers, "ours"), coarse(peers)], 4)
    assert (bf16["kl"], bf16["kl_95"], bf16["weight_error"], bf16["bits_per_weight"]) == (0.0, [0.0, 0.0], 0.0, 16.0)
    assert 0.008 < ours["weight_error"] < 0.010
    assert ours["kl_ratio"] == 1.0 and ours["kl_ratio_95"] == [1.0, 1.0]
    assert worse["weight_error"] > 20 * ours["weight_error"]
    assert worse["kl"] > 5 * ours["kl"] > 0
    assert 5 < worse["kl_ratio_95"][0] <= worse["kl_ratio"] <= worse["kl_ratio_95"][1]
    for row in (bf16, ours, worse):
        for key in ("perplexity", "nll_increase", "kl"):
            low, high = row[f"{key}_95"]
            assert low <= row[key] <= high
        assert row["perplexity"] == pytest.approx(bf16["perplexity"] * math.exp(row["nll_increase"]), rel=1e-12)


def test_intervals(experiment):
    draw = torch.Generator().manual_seed(1)
    weights = torch.full((400,), 3.0, dtype=torch.float64)
    values = 2.0 * weights + torch.randn(400, generator=draw, dtype=torch.float64)
    low, high = experiment.interval(values, weights)
    error = float((values / weights).std()) / math.sqrt(400)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(float(values.sum() / weights.sum()), abs=0.2 * error)
    assert experiment.interval(values, weights) == [low, high]
    assert experiment.interval(2 * weights, weights) == [2.0, 2.0]


def test_only_answers_are_scored(experiment):
    tokenizer = tiny_tokenizer()
    for passage in experiment.answers(make_task("sort"), tokenizer, 3):
        digits, answer = tokenizer.decode(passage.tokens).split(">")
        assert answer == "".join(sorted(digits))
        assert passage.given == len(digits) + 1
    with pytest.raises(UserError, match="nothing to score"):
        experiment.Passage((1, 2, 3), 3)


def test_windows(experiment):
    tokenizer = tiny_tokenizer()
    text = "".join(chr(33 + i) for i in range(21))
    ids = tuple(tokenizer(text).input_ids)
    cut = experiment.windows(text, tokenizer, 5, 100)
    assert [p.tokens for p in cut] == [ids[:5], ids[5:10], ids[10:15], ids[15:20]]  # the last has nothing to score
    assert {p.given for p in cut} == {1}
    assert len(experiment.windows(text, tokenizer, 5, 2)) == 2
    tokenizer.bos_token = "<eos>"

    def with_start(text, add_special_tokens=True, **options):
        found = tokenizer(text, **options).input_ids
        return SimpleNamespace(input_ids=[tokenizer.bos_token_id, *found] if add_special_tokens else found)

    class Starting:
        bos_token_id = tokenizer.bos_token_id
        __call__ = staticmethod(with_start)

    cut = experiment.windows(text, Starting(), 5, 100)
    assert [p.tokens[0] for p in cut] == [tokenizer.bos_token_id] * 6
    assert tuple(token for p in cut for token in p.tokens[1:]) == ids


def test_packages_that_are_missing_or_fail_are_reported(experiment, peers, tiny, passages, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'elsewhere'")

    def broken(result):
        return lambda: lambda group: {name: peers.Rounded(result(w), 0) for name, w in group.items()}

    others = [
        peers.Quantizer("absent", ("elsewhere", "tool"), "weight", missing),
        peers.Quantizer("nan", ("nan",), "weight", broken(lambda w: w * math.nan)),
        peers.Quantizer("float", ("float",), "weight", broken(lambda w: w.float())),
        coarse(peers),
    ]
    rows = list(experiment.measure(tiny[0], passages[:2], others, 2))
    assert [row["quantizer"] for row in rows] == ["bf16", "coarse"]
    printed = capsys.readouterr().out
    assert "# skipped absent: No module named 'elsewhere'. pip install elsewhere tool\n" in printed
    assert "# nan failed: ValueError" in printed and "# float failed: ValueError" in printed
    with pytest.raises(ValueError, match="not a finite bf16 weight"):
        own = peers.Quantizer("own", (), "weight", broken(lambda w: w[:1]))
        list(experiment.measure(tiny[0], passages[:2], [own], 2))


@pytest.mark.parametrize("arithmetic", ["float32", "bf16"])
def test_the_command_writes_rows(experiment, tmp_path, arithmetic):
    out = tmp_path / "rows.jsonl"
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 3, encoding="utf-8")
    command = ["--model", "tiny", "--out", str(out), "--only", "ours", "ours-amax", "--arithmetic", arithmetic]
    assert experiment.main([*command, "--sequences", "3"]) == 0
    assert experiment.main([*command, "--text", str(text), "--window", "20", "--sequences", "4", "--batch", "3"]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["quantizer"] for row in rows] == ["bf16", "ours", "ours-amax"] * 2
    assert all(set(row) == ROW for row in rows)
    assert [(row["source"], row["tokens"]) for row in rows[::3]] == [("sort", 3 * 6), ("text.txt", 4 * 19)]
    assert rows[0]["kl"] == 0.0
    assert 80 < rows[0]["perplexity"] < 120  # a model of random weights spreads over its 99 tokens
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments", [["--task", "chess"], ["--text", "no such file"], ["--sequences", "0"], ["--only", "none"]]
)
def test_what_makes_no_sense_is_refused(experiment, tmp_path, arguments):
    with pytest.raises(SystemExit):
        experiment.main(["--model", "tiny", "--out", str(tmp_path / "rows.jsonl"), *arguments])
    assert not (tmp_path / "rows.jsonl").exists()


def test_nothing_is_imported_before_a_quantizer_is_made(peers):
    assert {q.name for q in peers.QUANTIZERS if q.packages} == set(PEERS)
    assert "pip install llmcompressor compressed-tensors" == quantizer(peers, "llm-compressor").installation()
    assert quantizer(peers, "ours").version() == nq.__version__


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("make", [qwen3, qwen3_moe])
def test_packages_round_as_well_as_they_say(experiment, peers, make, name):
    rounder = rounder_of(peers, name)
    model = make(hidden_size=64).bfloat16()
    _, ours = rounded(experiment, model, peers.ours("pow2"))
    _, theirs = rounded(experiment, model, rounder)
    ratio = theirs["weight_error"] / ours["weight_error"]
    if name == "torchao-one-level":  # its smallest block scale, 2^-6, is for weights of magnitude 0.1
        assert ratio > 1.2
    elif name.endswith("mse"):
        assert 0.65 < ratio < 0.92
    else:
        assert 0.97 < ratio < 1.03
    assert 4.5 <= theirs["bits_per_weight"] <= ours["bits_per_weight"]
    assert quantizer(peers, name).version() != "unknown"


@pytest.mark.parametrize("name", ["ours", "ours-amax", *PEERS])
@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
def test_who_shares_a_global_scale(peers, name, names):
    """A much larger sibling makes a difference to a weight where, and only where, it shares its global scale.

    Much: with a power of two it makes none until block scales leave the range of normal E4M3 numbers.
    """
    rounder = rounder_of(peers, name)
    group = {part: 0.02 * torch.randn(32, 64).bfloat16() for part in names}
    group[names[-1]] *= 1e5
    together, alone = rounder(group)[names[0]].weight, rounder({names[0]: group[names[0]]})[names[0]].weight
    assert torch.equal(together, alone) == (quantizer(peers, name).global_scale != "fusion group")


@pytest.mark.parametrize("name", PEERS)
def test_packages_leave_their_input(peers, name):
    rounder = rounder_of(peers, name)
    group = {part: 0.02 * torch.randn(32, 64).bfloat16() for part in ("gate_proj", "up_proj")}
    before = {part: weight.clone() for part, weight in group.items()}
    results = rounder(group)
    assert set(results) == set(group)
    for part, weight in before.items():
        assert torch.equal(group[part], weight)
        assert results[part].weight.dtype == torch.bfloat16
        codes, scales = weight.numel() // 2, weight.numel() // 16
        assert results[part].nbytes in (codes + scales, codes + scales + 4)


def test_compressed_tensors_gives_the_same_without_packing(peers):
    """llm-compressor's weights are what `fake_quantize` makes with the observer's scales, computed here by hand."""
    rounder = rounder_of(peers, "llm-compressor")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    scheme = importlib.import_module("compressed_tensors.quantization.quant_scheme").NVFP4A16["weights"]
    group = {part: 0.02 * torch.randn(32, 64).bfloat16() for part in ("gate_proj", "up_proj")}
    amax = torch.stack([w.abs().max() for w in group.values()]).max()
    divisor = (2688.0 / amax).float().reshape(1)  # a bf16 quotient
    for part, result in rounder(group).items():
        blocks = group[part].unflatten(-1, (-1, 16)).abs().amax(-1)
        scale = (divisor * (blocks / 6)).to(torch.float8_e4m3fn).float()
        expected = forward.fake_quantize(group[part], scale, None, scheme, global_scale=divisor)
        assert torch.equal(result.weight, expected.to(torch.bfloat16))


def test_modelopt_is_the_amax_policy_but_for_its_smallest_block_scale(peers):
    """The same codes and scales as ours by "amax" up to the rounding of the global scale, for weights of one size."""
    rounder = rounder_of(peers, "modelopt")
    weight = 0.02 * torch.randn(64, 256).bfloat16()
    theirs = rounder({"o_proj": weight})["o_proj"].weight
    mine = peers.ours("amax")({"o_proj": weight})["o_proj"].weight
    assert (theirs != mine).float().mean() < 0.01
    assert "modelopt.torch.export" not in sys.modules  # nor any of what would need its dependencies


@pytest.mark.parametrize(("name", "two_level"), [("torchao", True), ("torchao-one-level", False)])
def test_torchao_is_what_its_own_configuration_makes_of_a_layer(peers, name, two_level):
    rounder = rounder_of(peers, name)
    api, formats = (importlib.import_module(f"torchao.{part}") for part in ("quantization", "prototype.mx_formats"))
    layer = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).bfloat16()
    expected = rounder({"o_proj": layer[0].weight.detach().clone()})["o_proj"].weight
    api.quantize_(layer, formats.NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=two_level))
    assert torch.equal(layer[0].weight.dequantize(), expected)
