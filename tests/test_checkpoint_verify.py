"""Damaged checkpoints: verification names every difference, loading refuses them, and what is no checkpoint is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import helpers_checkpoint
import pytest
import torch
import transformers as tf
from helpers_checkpoint import ON, make
from safetensors.torch import load_file, save_file

import nvfp4_qat as nq
from nvfp4_qat import safetensors_io
from nvfp4_qat.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from nvfp4_qat.quantizer import packed_names
from nvfp4_qat.safetensors_io import scan

model, written, copy = helpers_checkpoint.model, helpers_checkpoint.written, helpers_checkpoint.copy


def flip(path: Path, name: str, byte: int, mask: int = 1) -> None:
    """Change one byte of one tensor's data."""
    stored = scan(path).tensors[name]
    with stored.path.open("r+b") as file:
        file.seek(stored.start + byte % stored.spec.nbytes)
        value = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([value ^ mask]))


def failures(path: Path, model=None) -> dict[str, str]:
    """What `verify_checkpoint` complains about, by name."""
    with pytest.raises(nq.MismatchError) as caught:
        verify_checkpoint(path, model)
    first, *lines = str(caught.value).split("\n  ")
    count = int(first.removeprefix(f"{path}: ").split()[0])
    assert count == len(lines)
    return dict(line.split(": ", 1) for line in lines)


# ---- changed bytes


@pytest.mark.parametrize("against_model", [True, False])
def test_a_changed_byte_anywhere_names_its_tensor(copy, model, against_model):
    against = model if against_model else None
    for position, name in enumerate(scan(copy).tensors):
        byte, mask = 7919 * position, 1 << position % 8
        flip(copy, name, byte, mask)
        assert failures(copy, against).keys() == {name}
        flip(copy, name, byte, mask)
    verify_checkpoint(copy, against)


def test_every_byte_of_a_tensor_counts(copy):
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    for byte in range(scan(copy).tensors[name].spec.nbytes):
        flip(copy, name, byte)
        assert failures(copy).keys() == {name}
        flip(copy, name, byte)


def test_all_differences_are_named_at_once(copy, model):
    names = set(scan(copy).tensors)
    for name in names:
        flip(copy, name, 0)
    found = failures(copy, model)
    assert found.keys() == names
    assert all("1 (the first at byte 0) of" in text and "(checksum)" in text for text in found.values())


def test_data_beyond_the_first_chunk_counts(monkeypatch, copy, model):
    monkeypatch.setattr(safetensors_io, "CHUNK", 100)
    verify_checkpoint(copy, model)
    flip(copy, "lm_head.weight", 250)
    assert "1 (the first at byte 250) of 4096 bytes differ" in failures(copy, model)["lm_head.weight"]


def test_a_model_that_trained_on_differs_in_what_changed(written):
    changed = make(num_hidden_layers=1, layer_types=["full_attention"])
    verify_checkpoint(written, changed)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(2)
        changed.model.norm.weight.add_(1)
    found = failures(written, changed)
    assert found.keys() == {"model.layers.0.mlp.down_proj.weight_global_scale", "model.norm.weight"}
    assert "(checksum)" not in "".join(found.values()), "the file is as it was written"


# ---- wrong tensors


def rewrite(path: Path, edit, record: bool = True) -> None:
    """Let ``edit`` change the tensors, write them anew and, with ``record``, bring the checkpoint's own record in
    line."""
    file, side = path / "model.safetensors", path / "nvfp4_qat.json"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not the file itself, mapped
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if record:
        document = json.loads(side.read_text())
        names = safetensors_io.DTYPE_NAMES
        document["tensors"] = {n: [names[t.dtype], list(t.shape), _checksum(t)] for n, t in tensors.items()}
        side.write_text(json.dumps(document))


def _checksum(tensor: torch.Tensor) -> str:
    digest = safetensors_io.Checksum()
    digest.update(safetensors_io.as_bytes(tensor))
    return digest.hexdigest()


Q = "model.layers.0.self_attn.q_proj"
EDITS = {
    "missing": (lambda t: t.pop(f"{Q}.weight_scale"), {f"{Q}.weight_scale": "missing"}),
    "missing norm": (lambda t: t.pop("model.norm.weight"), {"model.norm.weight": "missing"}),
    "extra": (lambda t: t.update(more=torch.zeros(2)), {"more": "extra"}),
    "dtype of codes": (
        lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"].view(torch.int8)}),
        {f"{Q}.weight_packed": "is I8"},
    ),
    "dtype of the divisor": (
        lambda t: t.update({f"{Q}.weight_global_scale": t[f"{Q}.weight_global_scale"].double()}),
        {f"{Q}.weight_global_scale": "is F64"},
    ),
    "shape": (
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].T.contiguous()}),
        {f"{Q}.weight_scale": r"is F8_E4M3 [2, 32]"},
    ),
    "not quantized": (
        lambda t: (
            [t.pop(name) for name in packed_names(f"{Q}.weight")],
            t.update({f"{Q}.weight": torch.zeros(32, 32, dtype=torch.bfloat16)}),
        ),
        dict.fromkeys(packed_names(f"{Q}.weight"), "missing") | {f"{Q}.weight": "extra"},
    ),
    "subnormal block scale": (
        lambda t: t[f"{Q}.weight_scale"].view(torch.uint8)[3].fill_(0x07),
        {f"{Q}.weight_scale": "2 (the first at byte 6) of 64 block scales are no positive normal"},
    ),
    "NaN block scale": (
        lambda t: t[f"{Q}.weight_scale"].view(torch.uint8)[0, 1].fill_(0x7F),
        {f"{Q}.weight_scale": "1 (the first at byte 1) of 64 block scales"},
    ),
    "negative block scale": (
        lambda t: t[f"{Q}.weight_scale"].view(torch.uint8)[0, 0].fill_(0xB8),
        {f"{Q}.weight_scale": "1 (the first at byte 0) of 64 block scales"},
    ),
    "divisors of a group": (
        lambda t: t[f"{Q}.weight_global_scale"].mul_(2),
        {f"model.layers.0.self_attn.{part}_proj.weight_global_scale": "shares one global scale" for part in "qkv"},
    ),
    "no power of two": (
        lambda t: t["model.layers.0.mlp.down_proj.weight_global_scale"].mul_(1.5),
        {"model.layers.0.mlp.down_proj.weight_global_scale": "is no power of two"},
    ),
    "NaN divisor": (
        lambda t: t["model.layers.0.mlp.down_proj.weight_global_scale"].fill_(float("nan")),
        {"model.layers.0.mlp.down_proj.weight_global_scale": "nan is no finite positive number"},
    ),
    "negative divisor": (
        lambda t: t["model.layers.0.mlp.down_proj.weight_global_scale"].neg_(),
        {"model.layers.0.mlp.down_proj.weight_global_scale": "is no finite positive number"},
    ),
    "divisor too small": (
        lambda t: t["model.layers.0.mlp.down_proj.weight_global_scale"].fill_(2.0**-9),
        {"model.layers.0.mlp.down_proj.weight_global_scale": "out of the range"},
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_wrong_tensors_are_named_even_where_checksums_hold(copy, model, what):
    edit, expected = EDITS[what]
    rewrite(copy, edit)
    found = failures(copy)
    assert found.keys() == expected.keys()
    assert all(text in found[name] for name, text in expected.items()), found
    changed = {f"{Q}.weight_global_scale"} if what == "divisors of a group" else expected.keys()
    assert failures(copy, model).keys() >= changed


@pytest.mark.parametrize("what", ["missing", "extra", "dtype of codes", "shape", "not quantized"])
def test_the_record_notices_without_a_model(copy, what):
    edit, expected = EDITS[what]
    rewrite(copy, edit, record=False)
    assert failures(copy).keys() == expected.keys()
    with pytest.raises(nq.MismatchError) as caught:
        load_checkpoint(copy)
    assert all(f"\n  {name}: " in str(caught.value) for name in expected)


# ---- broken files


def test_a_truncated_file_names_the_tensors_it_lost(copy, model):
    file = copy / "model.safetensors"
    stored = sorted(scan(copy).tensors.values(), key=lambda s: s.start)
    whole = file.read_bytes()
    cut = stored[-3].start + 1
    file.write_bytes(whole[:cut])
    lost = {s.spec.name for s in stored[-3:]}
    for against in (None, model):
        found = failures(copy, against)
        assert found.keys() == lost
        assert f"truncated: 1 of {stored[-3].spec.nbytes} bytes" in found[stored[-3].spec.name]
    untouched = make(num_hidden_layers=1, layer_types=["full_attention"])
    before = untouched.state_dict()["lm_head.weight"].clone()
    with pytest.raises(nq.MismatchError, match="truncated"):
        load_checkpoint(copy, model=untouched)
    assert torch.equal(untouched.lm_head.weight, before)
    file.write_bytes(whole + b"x")
    assert failures(copy) == {"model.safetensors": "1 bytes follow its last tensor"}
    for length in (0, 5, 8, 100):
        file.write_bytes(whole[:length])
        assert "truncated inside its header" in failures(copy)["model.safetensors"]


def test_damaged_headers(copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head = whole[8 : 8 + length].decode()

    def write(text: str) -> None:
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + whole[8 + length :])

    write(head.replace('{"__metadata__"', '["__metadata__"', 1))
    assert "its header is not valid" in failures(copy)["model.safetensors"]
    write(head.replace('"dtype":"BF16"', '"dtype":"BF17"', 1))
    (found,) = [text for text in failures(copy).values() if "unknown dtype 'BF17'" in text]
    write(head.replace('"shape":[64,32]', '"shape":[64,33]', 1))
    assert any("F32" in text or "needs 4224" in text for text in failures(copy).values())
    table = json.loads(head)
    first, second = [name for name in table if name != "__metadata__"][:2]
    write(head.replace(f'"{second}"', f'"{first}"', 1))
    assert f"its header names {first} twice" in failures(copy)["model.safetensors"]
    table[first]["data_offsets"], table[second]["data_offsets"] = table[second]["data_offsets"], [0, 0]
    write(json.dumps(table))
    assert any("bytes, " in text for text in failures(copy).values())


def test_shards_and_index_must_agree(model, tmp_path):
    path = tmp_path / "c"
    save_checkpoint(model, path, shard_bytes=2000)
    index, shards = path / "model.safetensors.index.json", sorted(path.glob("*.safetensors"))
    text = index.read_text()
    held = set(load_file(shards[0]))

    aside = shards[0].read_bytes()
    shards[0].unlink()
    assert failures(path).keys() == {shards[0].name, *held}
    shards[0].write_bytes(aside)

    (path / "stray.safetensors").write_bytes(shards[1].read_bytes())
    found = failures(path)
    assert "extra" in found["stray.safetensors"]
    assert all("stray.safetensors" in found[name] for name in load_file(shards[1]))
    (path / "stray.safetensors").unlink()

    name = sorted(load_file(shards[1]))[0]
    index.write_text(text.replace(f'"{name}": "{shards[1].name}"', f'"{name}": "{shards[0].name}"'))
    assert failures(path) == {name: f"in {shards[1].name}, {index.name} places it in {shards[0].name}"}
    index.write_text(text[:-20])
    assert "not a readable index" in failures(path)[index.name]
    index.unlink()
    assert "missing" in failures(path)[index.name]
    index.write_text(text)
    verify_checkpoint(path, model)


# ---- another model, another checkpoint, none


def test_config_and_record_must_agree(copy, model):
    config, record = copy / "config.json", copy / "nvfp4_qat.json"
    text = config.read_text()
    document = json.loads(text)
    document["quantization_config"]["ignore"] = []
    config.write_text(json.dumps(document))
    assert "not the one the checkpoint was written with" in failures(copy)["config.json"]
    assert "differs from the model's in ignore" in failures(copy, model)["config.json"]
    config.write_text("{")
    with pytest.raises(nq.MismatchError, match=r"config\.json: damaged"):
        verify_checkpoint(copy)
    config.write_text(text.replace('"hidden_size": 32', '"hidden_size": 64'))
    assert any("config.json has it as" in found for found in failures(copy).values())
    config.write_text(text)
    aside = record.read_text()
    record.write_text(aside.replace('"qat"', '"qta"'))
    with pytest.raises(nq.MismatchError, match=r"nvfp4_qat\.json: damaged"):
        verify_checkpoint(copy)
    record.write_text(aside.replace('"version": 1', '"version": 2'))
    with pytest.raises(nq.UserError, match="version 2.*update"):
        load_checkpoint(copy)


def test_another_policy_is_named(written):
    other = make(policy="amax", num_hidden_layers=1, layer_types=["full_attention"])
    found = failures(written, other)
    assert found["nvfp4_qat.json"] == "the checkpoint was written with global_scale='pow2', the model has 'amax'"
    assert f"{Q}.weight_global_scale" in found


def test_what_is_no_checkpoint_is_refused(tmp_path, model, written):
    for action in (verify_checkpoint, load_checkpoint):
        with pytest.raises(nq.UserError, match=r"has no config\.json"):
            action(tmp_path / "nowhere")
    foreign = shutil.copytree(written, tmp_path / "foreign")
    (foreign / "nvfp4_qat.json").unlink()
    with pytest.raises(nq.UserError, match=r"has no nvfp4_qat\.json.*save_checkpoint wrote"):
        verify_checkpoint(foreign)
    unknown = shutil.copytree(written, tmp_path / "unknown")
    (unknown / "config.json").write_text((written / "config.json").read_text().replace('"qwen3"', '"qwen99"'))
    with pytest.raises(nq.UserError, match="transformers cannot build"):
        load_checkpoint(unknown)
    plain = tf.AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(nq.UserError, match="apply_qat"):
        verify_checkpoint(written, plain)
    with pytest.raises(nq.UserError, match="apply_qat"):
        save_checkpoint(plain, tmp_path / "plain")
    small = torch.nn.Sequential(torch.nn.Linear(16, 16))
    nq.apply_qat(small, ON)
    with pytest.raises(nq.UserError, match="needs a transformers model"):
        save_checkpoint(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()
