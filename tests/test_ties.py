"""Parameters that a model's config ties: one for planning and export, and an error once they are two that hold data."""

import copy

import pytest
import torch
import transformers as tf
from small_models import qwen3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nvfp4_qat as nq

ON = nq.QATConfig(enable=True)
IDS = torch.arange(10).view(2, 5)
BOTH = r"lm_head\.weight and model\.embed_tokens\.weight.*model\.tie_weights\(\).*tie_word_embeddings=False"


def tied():
    return qwen3(tie_word_embeddings=True)


def untie(model, factor=1.0):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * factor)
    return model


def exports(model, path):
    """Everything that stores or sends a model's weights, as far as it reads the model."""
    return (
        lambda: list(nq.packed_weights(model)),
        lambda: list(nq.packed_weights(model, layout="fused")),
        lambda: nq.save_checkpoint(model, path / "out"),
        lambda: nq.verify_checkpoint(path / "written", model),
    )


def head_and_embedding(model):
    return {name for name, _ in nq.packed_weights(model) if "lm_head" in name or "embed_tokens" in name}


@pytest.mark.parametrize("gather", [None, "nvfp4"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_apply_qat_refuses_a_broken_tie_and_says_what_to_do(factor, gather):
    model = untie(tied(), factor)
    before = [type(m) for m in model.modules()]
    with pytest.raises(nq.UserError, match=BOTH):
        nq.apply_qat(model, ON, gather=gather)
    assert [type(m) for m in model.modules()] == before
    second = copy.deepcopy(model)
    model.tie_weights()
    assert "lm_head.weight" not in nq.apply_qat(model, ON, gather=gather).checkpoint_slices
    second.config.tie_word_embeddings = False
    assert "lm_head.weight" in nq.apply_qat(second, ON, gather=gather).checkpoint_slices


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_every_export_refuses_a_tie_that_was_broken_later(factor, tmp_path):
    model = tied()
    nq.apply_qat(model, ON)
    nq.save_checkpoint(model, tmp_path / "written")
    untie(model, factor)
    for export in exports(model, tmp_path):
        with pytest.raises(nq.MismatchError, match=BOTH):
            export()
    assert not (tmp_path / "out").exists()
    model.tie_weights()
    for export in exports(model, tmp_path):
        export()
    assert head_and_embedding(model) == {"model.embed_tokens.weight"}


def test_a_head_that_the_config_does_not_tie_is_stored(tmp_path):
    model = untie(tied(), 2.0)
    model.config.tie_word_embeddings = False
    nq.apply_qat(model, ON)
    assert head_and_embedding(model) == {"lm_head.weight", "model.embed_tokens.weight"}
    nq.save_checkpoint(model, tmp_path / "out")
    nq.verify_checkpoint(tmp_path / "out")
    restored = nq.load_checkpoint(tmp_path / "out")
    assert torch.equal(restored.lm_head.weight, model.lm_head.weight.bfloat16())
    assert not torch.equal(restored.lm_head.weight, restored.model.embed_tokens.weight)


def test_a_checkpoint_of_two_whose_config_says_tied(tmp_path):
    untie(tied(), 2.0).save_pretrained(tmp_path / "plain")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")  # warns, and does not tie them
    with pytest.raises(nq.UserError, match=BOTH):
        nq.apply_qat(model, ON)


def test_meta_then_to_empty_then_load():
    source = tied()
    with torch.device("meta"):
        model = tied()
    untie(model)  # two, but without data: a loader will tie them
    nq.apply_qat(model, ON)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    for ours, theirs in zip(model.buffers(), source.buffers(), strict=True):
        ours.copy_(theirs)
    with pytest.raises(nq.MismatchError, match=BOTH):
        list(nq.packed_weights(model))
    model.tie_weights()
    nq.apply_qat(source, ON)
    assert torch.equal(model(IDS).logits, source(IDS).logits)
    sent = dict(nq.packed_weights(model))
    assert all(torch.equal(sent[name], value) for name, value in nq.packed_weights(source))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gather", [None, "nvfp4"])
def test_a_sharded_tie_holds_in_one_unit_and_not_in_two(gather, tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for apart in (False, True):
            model = tied()
            nq.apply_qat(model, ON, gather=gather)
            for unit in (*model.model.layers, *([model.lm_head] if apart else []), model):
                fully_shard(unit, mesh=mesh)
            if apart:
                with pytest.raises(nq.MismatchError, match=BOTH):
                    list(nq.packed_weights(model))
                continue
            model(input_ids=IDS, labels=IDS).loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            assert head_and_embedding(model) == {"model.embed_tokens.weight"}
            nq.save_checkpoint(model, tmp_path / "out")
            nq.verify_checkpoint(tmp_path / "out", model)
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_on_tied_layers_are_no_broken_tie():
    peft = pytest.importorskip("peft")
    for targets, saved in (
        (["q_proj", "embed_tokens"], None),
        (["q_proj", "lm_head"], None),
        (["q_proj"], ["lm_head"]),
    ):
        config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved)
        model = peft.get_peft_model(tied(), config)
        nq.apply_qat(model, ON)
        assert head_and_embedding(model) == {"model.embed_tokens.weight"}
