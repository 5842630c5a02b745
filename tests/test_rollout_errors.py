"""Syncs that do not reach every engine: what breaks off, what is refused as a whole, and which requests wait for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers_rollout import OF_SEED, STAYS, Failing, answered, waits, worker
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, Worker, whole

import nvfp4_qat as nq
from nvfp4_qat import live_update, rollout
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.rollout import Rollout


@pytest.mark.parametrize("transport", ["direct", "shared", "broadcast"])
@pytest.mark.parametrize(
    "error, raised, message",
    [
        (MismatchError("w is stale"), MismatchError, f"version 2 was not sent completely: w is stale\n.*{STAYS}"),
        (UserError("w has NaN"), UserError, f"version 2 was not sent completely: w has NaN\n.*{STAYS}"),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=lambda e: type(e).__name__ if isinstance(e, BaseException) else "",
)
def test_after_an_error_of_the_sender_requests_wait_until_the_next_sync(transport, error, raised, message, monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, transport=transport, bucket_bytes=2000, timeout=20)
    engines.sync(model)
    perturb(model, 2)
    with monkeypatch.context() as patch:
        Failing(patch, 40, error)
        with pytest.raises(raised, match=message):
            engines.sync(model)
    waiting, answer = waits(llm)
    assert waiting and engines.versions == [None]
    assert not worker(llm, "nvfp4_status")["ok"]["updating"]
    engines._options = replace(engines._options, in_flight="keep")
    assert engines.sync(model).version == 2
    assert whole(answer.result(20), OF_SEED) == [2] * 4
    engines.close()


@pytest.mark.parametrize("method", ["nvfp4_load", "nvfp4_commit"])
@pytest.mark.parametrize("how", ["answers", "raises"])
def test_one_engine_that_fails_does_not_keep_the_others_from_the_update(method, how):
    class Broken(Worker):
        broken = False

    def failing(self, *args):
        if type(self).broken:
            type(self).broken = False
            if how == "raises":
                raise RuntimeError("engine core died")
            return {"error": "CUDA out of memory", "kind": "OutOfMemoryError"}
        return getattr(Worker, method)(self, *args)

    setattr(Broken, method, failing)
    model, plan = trainer(1)
    llms = [LLM(packed(0)), LLM(packed(0), worker=Broken), LLM(packed(0))]
    engines = Rollout.connect(llms, plan, bucket_bytes=3000)
    engines.sync(model)
    perturb(model, 2)
    Broken.broken = True
    said = "CUDA out of memory" if how == "answers" else "engine core died"
    with pytest.raises(
        MismatchError, match=f"^version 2 did not reach 1 of 3 engines:\n  engine 1: {said}.*\n.*{STAYS}"
    ):
        engines.sync(model)
    assert [answered(llms[i]) for i in (0, 2)] == [2, 2] and waits(llms[1])[0]
    assert [v for i, v in enumerate(engines.versions) if i != 1] == [2, 2]
    perturb(model, 3)
    assert engines.sync(model).version == 3
    assert [answered(llm) for llm in llms] == [3] * 3 and engines.versions == [3] * 3


# What is refused as a whole


def test_weights_that_do_not_fit_are_one_error_before_any_engine_is_changed(monkeypatch):
    model, plan = trainer(1)
    llms = [LLM(packed(0)), LLM(packed(0))]
    engines = Rollout.connect(llms, plan)
    engines.sync(model)

    def wrong(*args):
        entries = {entry.name: entry for entry in rollout_manifest(*args)}
        del entries["layers.0.norm.weight"]
        other = entries["layers.1.o_proj.weight_packed"]
        entries["layers.1.o_proj.weight_packed"] = type(other)(other.name, (16, 16), other.dtype, other.parts)
        other = entries["layers.0.o_proj.weight_packed"]
        entries["layers.0.o_proj.weight_packed"] = type(other)(other.name, other.shape, torch.float32, other.parts)
        extra = type(other)("new.weight", (2,), torch.bfloat16, (type(other.parts[0])("new.weight"),))
        return [*entries.values(), extra, entries["norm.weight"]]

    rollout_manifest = rollout.manifest
    running = [llm.core.add("running") for llm in llms]
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "manifest", wrong)
        with pytest.raises(MismatchError) as error:
            engines.sync(model)
    for part in (
        "nothing was changed", "layers.0.norm.weight: nothing brings it", "norm.weight is listed twice",
        "layers.1.o_proj.weight_packed of shape [16, 16] does not fit", "new.weight", "engine 0", "engine 1",
        "layers.0.o_proj.weight_packed is torch.float32, but",
    ):  # fmt: skip
        assert part in str(error.value), part
    assert [whole(answer.result(20), OF_SEED) for answer in running] == [[1] * 4] * 2, "requests go on"
    assert engines.versions == [1, 1] and [answered(llm) for llm in llms] == [1, 1]
    perturb(model, 2)
    engines.sync(model)
    assert [answered(llm) for llm in llms] == [2, 2]


@pytest.mark.parametrize("transport", ["direct", "shared", "broadcast"])
@pytest.mark.parametrize(
    "kind, message",
    [
        ("unannounced", "other was not announced"),
        ("twice", "norm.weight has come before"),
        ("shape", "norm.weight was announced as "),
        ("dtype", "norm.weight was announced as "),
        ("missing", "1 tensors have not come: norm.weight"),
    ],
)
def test_tensors_that_are_not_those_announced_end_the_update(kind, message, transport, monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, transport=transport, timeout=20)

    def stream(*args, **options):
        for name, tensor in nq.packed_weights(*args, **options):
            if name != "norm.weight":
                yield name, tensor
                continue
            if kind != "missing":
                yield name, {"shape": tensor[:-1], "dtype": tensor.view(torch.float16)}.get(kind, tensor)
            if kind in ("twice", "unannounced"):
                yield ("other" if kind == "unannounced" else name), tensor

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "packed_weights", stream)
        with pytest.raises(MismatchError, match=rf"version 1 did not reach 1 of 1 engines:\n  the engine: {message}"):
            engines.sync(model)
    assert waits(llm)[0]
    engines.sync(model)
    assert answered(llm) == 1
    engines.close()


# Several engines and workers


def test_the_stream_is_used_up_also_when_all_engines_have_failed(monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, bucket_bytes=1000)
    taken = []
    monkeypatch.setattr(Worker, "nvfp4_load", lambda *_: {"error": "no", "kind": "E"})
    monkeypatch.setattr(
        rollout, "packed_weights", lambda *a, **o: (taken.append(pair) or pair for pair in nq.packed_weights(*a, **o))
    )
    with pytest.raises(MismatchError, match="did not reach 1 of 1"):
        engines.sync(model)
    assert len(taken) == len(dict(nq.packed_weights(model, layout="fused")))


def test_several_errors_are_one():
    with pytest.raises(UserError, match="^a\nOSError$"):
        live_update.raise_all([UserError("a"), OSError()])
    live_update.raise_all([])


def test_an_engine_that_agreed_is_told_when_another_one_refuses():
    class Refusing(Worker):
        def nvfp4_begin(self, *args):
            return {"error": "w has no place", "kind": "MismatchError"}

    model, plan = trainer(1)
    llms = [LLM(packed(0)), LLM(packed(0), worker=Refusing)]
    engines = Rollout.connect(llms, plan)
    with pytest.raises(MismatchError, match=r"^engine 1: w has no place \(MismatchError\)$"):
        engines.sync(model)
    assert not worker(llms[0], "nvfp4_status")["ok"]["updating"]
    assert [answered(llm) for llm in llms] == [0, 0] and engines.versions == [None, None]


def test_an_engine_goes_on_only_if_all_of_its_workers_have_the_version():
    class Forgetful(Worker):
        def nvfp4_commit(self, update):
            return self.nvfp4_status() if self.rank else super().nvfp4_commit(update)

    model, plan = trainer(1)
    llm = LLM(packed(0), tp=2, worker=Forgetful)
    engines = Rollout.connect(llm, plan)
    with pytest.raises(MismatchError, match=rf"its workers have versions \[1, None\], not all 1(.*\n)*.*{STAYS}"):
        engines.sync(model)
    assert waits(llm)[0] and engines.versions == [None]


def test_waking_up_does_not_let_an_engine_go_on_with_incomplete_weights(monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, bucket_bytes=2000)
    engines.sleep(2)
    with pytest.raises(UserError, match=r"would go on with incomplete weights: call wake_up\(\['weights'\]\) and sync"):
        engines.wake_up()
    engines.wake_up(["weights"])
    with pytest.raises(UserError, match="incomplete weights"):
        engines.wake_up(["kv_cache"])
    engines.sync(model)
    engines.wake_up(["kv_cache"])
    assert answered(llm) == 1
    with monkeypatch.context() as patch:
        Failing(patch, 40, MismatchError("broken off"))
        with pytest.raises(MismatchError, match="broken off"):
            engines.sync(model)
    for tags in (None, ["weights"], ["kv_cache"]):
        with pytest.raises(UserError, match="incomplete weights"):
            engines.wake_up(tags)
    assert waits(llm)[0]
