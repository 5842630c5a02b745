"""verl's stream: announced, taken bucket by bucket from memory that is used again, and complete or an error."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from standin_trainer import packed, perturb, trainer
from standin_vllm import Worker
from torch import nn
from verl_rows import four_bit

import nvfp4_qat as nq
from nvfp4_qat.errors import MismatchError
from nvfp4_qat.integrations.verl_stream import NAME, PROTOCOL, Update, announced, announcement, held, read
from nvfp4_qat.integrations.verl_training import coverage
from nvfp4_qat.live_manifest import from_wire, manifest

CPU = torch.device("cpu")


def stream(model, plan):
    return announced(manifest(model, plan), nq.packed_weights(model, layout="fused"), CPU)


def carried(tensors, size=3000):
    """What `verl`'s receiver hands over: buckets of one piece of memory, which is overwritten afterwards."""
    memory, bucket, at = torch.empty(size, dtype=torch.uint8), [], 0
    for name, tensor in [*tensors, (None, None)]:
        at = 0 if tensor is None else -(-at // tensor.element_size()) * tensor.element_size()
        if tensor is None or at + tensor.nbytes > size:
            yield bucket, tensor is None
            memory.random_(0, 256)
            bucket, at = [], 0
        if tensor is not None and tensor.nbytes > size:
            yield [(name, tensor.clone())], False
        elif tensor is not None:
            place = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor)
            bucket.append((name, place))
            at += tensor.nbytes


def taken(worker, tensors, **options):
    update = Update(worker)
    for bucket, last in carried(tensors, **options):
        update.take(bucket, last)
    update.end()


@pytest.mark.parametrize("size", [3000, 1 << 20])
def test_a_worker_has_the_trainers_weights(size):
    model, plan = trainer(1)
    worker = Worker(packed(0))
    for seed in (1, 2, 3):
        perturb(model, seed)
        taken(worker, stream(model, plan), size=size)
        assert worker.digest() == Worker(packed(seed)).digest()
        assert worker.nvfp4_status()["ok"]["whole"]


def test_the_announcement_is_the_manifest():
    model, plan = trainer(1)
    entries = manifest(model, plan)
    tensor = announcement(entries)
    assert (tensor.dtype, tensor.ndim, tensor.numel() % 16) == (torch.uint8, 1, 0)
    assert from_wire(read(tensor)) == entries
    assert next(iter(stream(model, plan)))[0] == NAME
    other = torch.frombuffer(bytearray(b'{"protocol": 99, "tensors": []}'), dtype=torch.uint8)
    with pytest.raises(
        MismatchError, match=f"speaks version 99 of the stream, the engine's {PROTOCOL}: install the same"
    ):
        read(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], "1 tensors have not come"),
        (lambda s: [*s, s[-1]], "has come before"),
        (lambda s: s[1:], "the verl plugin of nvfp4-qat is not active in its FSDP workers"),
        (lambda s: [], "the trainer sent nothing"),
        (lambda s: [(n, t if n == NAME else t.float()) for n, t in s], "was announced as"),
    ],
)
def test_what_is_not_complete_raises_at_the_end_and_the_next_update_heals_it(change, message):
    model, plan = trainer(1)
    worker = Worker(packed(0))
    taken(worker, stream(model, plan))
    perturb(model, 2)
    with pytest.raises(MismatchError, match=message):
        taken(worker, change(list(stream(model, plan))))
    taken(worker, stream(model, plan))
    assert worker.digest() == Worker(packed(2)).digest()


def test_an_engine_of_another_model_is_left_as_it_was():
    model, plan = trainer(1)
    worker, before = Worker(packed(0)), Worker(packed(0)).digest()
    entries = manifest(model, plan)
    fewer = announced(
        entries[1:], ((n, t) for n, t in nq.packed_weights(model, layout="fused") if n != entries[0].name), CPU
    )
    with pytest.raises(MismatchError, match="cannot take these weights; nothing was changed"):
        taken(worker, fewer)
    assert worker.digest() == before


def test_a_stream_brings_what_was_announced():
    model, plan = trainer(1)
    entries = manifest(model, plan)
    with pytest.raises(MismatchError, match="1 tensors of the announcement did not come"):
        list(announced(entries, list(nq.packed_weights(model, layout="fused"))[1:], CPU))
    with pytest.raises(MismatchError, match="was announced otherwise or has come before"):
        list(announced(entries[1:], nq.packed_weights(model, layout="fused"), CPU))


def test_an_engine_says_what_it_holds():
    layers = nn.ModuleDict(
        {"a": nn.Module(), "b": nn.Module(), "c": nn.Linear(4, 10, bias=False), "d": nn.Linear(4, 64)}
    )
    # vLLM's vocabulary of 49 tokens, two of them added by LoRA, of which 64 rows are kept.
    layers["d"].shard_indices = SimpleNamespace(num_elements_padded=64, num_org_elements=47, num_added_elements=2)
    forms = {
        layers["a"]: {"weight_packed": torch.zeros(8, 16), "weight_scale": torch.zeros(8, 2)},
        layers["b"]: {"w13_weight_packed": torch.zeros(2, 4, 8), "w2_weight_packed": torch.zeros(2, 4, 4)},
    }

    class Code:
        def checkpoint_form(self, layer):
            return forms.get(layer, {})

    layers["e"] = nn.Linear(4, 10, bias=False)
    layers["e"].weight = layers["c"].weight
    layers["f"] = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])
    codes, others = 8 * 32 + 2 * 4 * 16 + 2 * 4 * 8, 40 + 49 * 5 + 1
    said = held(Code(), layers)
    share = f"{100 * codes / (codes + others):.1f} % of all parameters"
    assert said == f"the engine holds 2 layers in 4 bits, {codes} parameters, {share}"
    parts = [held(Code(), layers, rank, 2) for rank in range(2)]
    assert parts[1].startswith("worker 2 of 2 of the engine holds 2 layers in 4 bits, ") and "% of its" in parts[1]
    planned = f"training in 4 bits (fsdp2, gather mode): {coverage(trainer(1)[1])}"
    for lines, engine in (([said], codes), (parts, 2 * codes), ([], None)):
        told = four_bit(["x", *lines, *lines, planned])
        assert told["engine_4bit_parameters"] == engine
        assert told["trainer_4bit_parameters"] == sum(math.prod(w.shape) for w in trainer(1)[1].quantized)
    assert four_bit(["x"]) == {"engine_4bit_parameters": None, "trainer_4bit_parameters": None}
