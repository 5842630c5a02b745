"""Checkpoints as they are written: their files, the safetensors format, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import helpers_checkpoint
import pytest
import torch
import transformers as tf
from helpers_checkpoint import logits, make
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import qwen3

import nvfp4_qat as nq
from nvfp4_qat import checkpoint as checkpoint_module
from nvfp4_qat.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from nvfp4_qat.quantizer import packed_weights
from nvfp4_qat.safetensors_io import ShardWriter, TensorSpec, scan

model = helpers_checkpoint.model


def entries(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*")}


# ---- what is written


def test_wrappers_are_looked_through(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    save_checkpoint(model, tmp_path / "bare")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    for number, wrapped in enumerate((adapted, torch.compile(adapted))):
        save_checkpoint(wrapped, tmp_path / str(number))
        assert entries(tmp_path / str(number)) == entries(tmp_path / "bare")
        for name in entries(tmp_path / "bare"):
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()
        verify_checkpoint(tmp_path / "bare", wrapped)


def test_shards_and_index(model, tmp_path):
    save_checkpoint(model, tmp_path / "c", shard_bytes=2000)
    files = sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    sent = {name: tensor.clone() for name, tensor in packed_weights(model)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in sent.values())
    found = {}
    for filename in files:
        with safe_open(tmp_path / "c" / filename, "pt") as shard:  # maps the file: needs aligned tensors
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}
        assert {index["weight_map"][name] for name in tensors} == {filename}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 2000
        found |= tensors
    assert found.keys() == sent.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[n].view(torch.uint8), sent[n].view(torch.uint8)) for n in sent)
    verify_checkpoint(tmp_path / "c", model)
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "c")), logits(model))
    assert torch.equal(logits(load_checkpoint(tmp_path / "c")), logits(model))


def test_config_generation_config_and_tokenizer(tmp_path):
    from nvfp4_qat.models import tiny_tokenizer

    model, tokenizer = make(), tiny_tokenizer()
    model.generation_config.temperature = 0.7  # without do_sample, which save_pretrained would refuse
    save_checkpoint(model, tmp_path / "c", tokenizer=tokenizer)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["quantization_config"] == json.loads(json.dumps(nq.qat_plan(model).quantization_config()))
    assert not hasattr(model.config, "quantization_config"), "the trainer's own config stays as it was"
    assert tf.GenerationConfig.from_pretrained(tmp_path / "c").temperature == 0.7
    read = tf.AutoTokenizer.from_pretrained(tmp_path / "c")
    assert read("1+2=").input_ids == tokenizer("1+2=").input_ids


# ---- nothing is half-written


def test_a_directory_that_is_not_empty_is_refused(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    before = entries(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(nq.UserError, match="not an empty directory"):
            save_checkpoint(model, tmp_path / name)
    with pytest.raises(nq.UserError, match="cannot write"):
        save_checkpoint(model, tmp_path / "file" / "below")
    assert entries(tmp_path) == before


def test_an_empty_directory_will_do_and_parents_are_made(model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    save_checkpoint(model, tmp_path / "empty")
    save_checkpoint(model, tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(tmp_path)
    save_checkpoint(model, "relative")
    for path in ("empty", "a/b/c", "relative"):
        verify_checkpoint(tmp_path / path, model)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "a", "relative"}
    assert (tmp_path / "relative").stat().st_mode == (tmp_path / "a").stat().st_mode


def test_a_full_disk_leaves_nothing(model, tmp_path):
    """A limit on the size of files makes the kernel refuse writes half-way, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = sum(tensor.nbytes for _, tensor in packed_weights(model))
    for limit in (0, 1000, size // 2, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(nq.UserError, match="cannot write .*Nothing was left behind"):
                save_checkpoint(model, tmp_path / "deep" / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert entries(tmp_path) == set()


def test_too_little_space_is_said_before_anything_is_packed(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(nq.UserError, match="no space for .* are free"):
        save_checkpoint(model, tmp_path / "deep" / "out")
    assert entries(tmp_path) == set()


class _Tokenizer:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("half")
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken tokenizer"), SystemExit(3)])
def test_an_interruption_leaves_nothing(model, tmp_path, error):
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty", "a/b"):
        with pytest.raises(type(error)):
            save_checkpoint(model, tmp_path / name, tokenizer=_Tokenizer(error))
    assert entries(tmp_path) == {"empty"}


def test_a_bad_weight_leaves_nothing(tmp_path):
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        broken = make()
        with torch.no_grad():
            broken.get_parameter(name)[3, 3] = float("nan")
        with pytest.raises(nq.UserError, match=f"{name} holds NaN or Inf"):
            save_checkpoint(broken, tmp_path / "out")
    assert entries(tmp_path) == set()


def test_a_complex_buffer_is_refused_by_name(tmp_path):
    model = qwen3()
    model.model.register_buffer("freqs", torch.ones(4, dtype=torch.complex64))
    nq.apply_qat(model, helpers_checkpoint.ON)
    with pytest.raises(nq.UserError, match=r"model\.freqs \(torch\.complex64\).*persistent=False"):
        save_checkpoint(model, tmp_path / "a" / "out")
    assert entries(tmp_path) == set()


# ---- the file format


SPECS = [
    TensorSpec("bytes", torch.uint8, (3,)),
    TensorSpec("empty", torch.float32, (0, 4)),
    TensorSpec("scalar", torch.float64, ()),
    TensorSpec("flags", torch.bool, (5,)),
    TensorSpec("weights", torch.bfloat16, (2, 3)),
]


def test_what_is_written_in_any_order_the_safetensors_library_reads(tmp_path):
    tensors = {s.name: (torch.rand(s.shape) * 9).to(s.dtype) for s in SPECS}
    with ShardWriter(tmp_path, SPECS, shard_bytes=1000) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], tensors[n]) and read[n].dtype == tensors[n].dtype for n in tensors)
    found = scan(tmp_path)
    assert found.problems == {}
    assert all(torch.equal(found.tensors[n].read(), tensors[n]) for n in tensors)
    strided = torch.arange(6.0).bfloat16().view(3, 2).T
    (tmp_path / "second").mkdir()
    with ShardWriter(tmp_path / "second", SPECS[-1:], shard_bytes=1000) as writer:
        writer.write("weights", strided)
    assert torch.equal(load_file(tmp_path / "second" / "model.safetensors")["weights"], strided)


def test_a_writer_wants_what_was_announced(tmp_path):
    with pytest.raises(ValueError, match="bytes is announced twice"):
        ShardWriter(tmp_path, [SPECS[0], SPECS[0]], 1000)
    writer = ShardWriter(tmp_path, SPECS, 1000)
    writer.write("bytes", torch.zeros(3, dtype=torch.uint8))
    for name, tensor, message in (
        ("bytes", torch.zeros(3, dtype=torch.uint8), "bytes comes twice"),
        ("more", torch.zeros(3), "more is F32 \\[3\\], announced as None"),
        ("weights", torch.zeros(2, 3), "weights is F32 \\[2, 3\\], announced as BF16"),
        ("weights", torch.zeros(3, 2).bfloat16(), "weights is BF16 \\[3, 2\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="announced and not written: scalar, empty, weights, flags"):
        writer.close()
