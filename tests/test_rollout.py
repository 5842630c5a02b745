"""`Rollout` with engines of this process: what they have after a sync, what they do meanwhile, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, Worker, of_seed, whole

import nvfp4_qat as nq
from nvfp4_qat import live_update, rollout
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.rollout import Rollout

OF_SEED = {seed: of_seed(seed) for seed in range(5)}
STAYS = "stays paused and its requests wait; the next complete sync makes it whole"


def answered(llm, prompts=("a", "b")):
    """Of which seed's weights all answers of an engine are."""
    seeds = {seed for steps in llm.generate(prompts) for seed in whole(steps, OF_SEED)}
    assert len(seeds) == 1
    return seeds.pop()


def waits(llm):
    """Whether an engine is paused, so that a request waits; it does so from now on."""
    answer = llm.core.add("waits")
    return llm.core.paused and not answer.done(), answer


def worker(llm, method, *args):
    return llm.core.do(llm.core.rpc, method, args)[0]


class Failing:
    """Weights of a model that break off after some tensors."""

    def __init__(self, monkeypatch, after, error):
        def stream(*args, **options):
            for i, pair in enumerate(nq.packed_weights(*args, **options)):
                if i == after:
                    raise error
                yield pair

        monkeypatch.setattr(rollout, "packed_weights", stream)


@pytest.mark.parametrize("transport", ["auto", "direct", "shared", "broadcast"])
def test_a_sync_gives_what_a_fresh_engine_has(transport):
    model, plan = trainer(1)
    llm = LLM(packed(0), separate=transport not in ("auto", "direct"))
    assert answered(llm) == 0
    engines = Rollout.connect(llm, plan, transport=transport, bucket_bytes=5000, timeout=20)
    assert engines.versions == [None]
    for i, seed in enumerate((1, 2, 3)):
        perturb(model, seed)
        report = engines.sync(model)
        assert (report.version, engines.versions, report.restarted) == (i + 1, [i + 1], ())
        sent = dict(nq.packed_weights(model, layout="fused"))
        assert (report.tensors, report.bytes) == (len(sent), sum(t.nbytes for t in sent.values()))
        assert 0 < report.seconds < 20
        assert answered(llm) == seed
    engines.close()


@pytest.mark.parametrize("transport", ["direct", "shared", "broadcast"])
def test_all_workers_of_an_engine_take_their_part(transport):
    model, plan = trainer(1)
    llm, of = LLM(packed(0), tp=2), {seed: of_seed(seed, 2) for seed in range(3)}
    engines = Rollout.connect(llm, plan, transport=transport, timeout=20)
    for seed in (1, 2):
        perturb(model, seed)
        engines.sync(model)
        assert {s for steps in llm.generate(["a"]) for s in whole(steps, of)} == {seed}
    engines.close()


def test_a_stream_may_be_sent_instead_of_what_the_model_trains_with():
    model, plan = trainer(1)
    full, _ = trainer(2)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    quantizer = nq.QATQuantizer(plan.config, plan, layout="fused")
    report = engines.sync(model, quantizer.quantize(full.state_dict().items()))
    assert report.bytes == sum(t.nbytes for _, t in nq.packed_weights(model, layout="fused")) and answered(llm) == 2
    incomplete = list(nq.packed_weights(model, layout="fused"))[1:]
    with pytest.raises(MismatchError, match=f"1 tensors have not come(.*\n)*.*{STAYS}"):
        engines.sync(model, incomplete)
    assert engines.versions == [None] and llm.core.paused
    assert engines.sync(model).version == 2 and answered(llm) == 1


def test_the_checks_of_answers_can_fail():
    old, new = OF_SEED[0], OF_SEED[1]
    assert whole([[old, old], [new, new]], OF_SEED) == [0, 1]
    for steps in ([[old, new]], [[["x"], ["x"]]]):
        with pytest.raises(AssertionError):
            whole(steps, OF_SEED)


# Versions


def test_a_new_trainer_goes_on_with_the_engines_version():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    assert Rollout.connect(llm, plan).sync(model).version == 1
    second = Rollout.connect(llm, plan)
    assert second.versions == [1]
    assert second.sync(model).version == 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_stale_or_repeated_version_is_refused_with_the_reason(version):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    for _ in range(2):
        engines.sync(model)
    answer = worker(llm, "nvfp4_begin", "x", version, [])
    assert answer["kind"] == "UserError" and f"version {version} is not newer than 2, which" in answer["error"]
    assert engines.versions == [2] and answered(llm) == 1


def test_an_engine_that_was_started_anew_gets_everything():
    model, plan = trainer(1)
    llms = [LLM(packed(0)), LLM(packed(0))]
    engines = Rollout.connect(llms, plan)
    engines.sync(model)
    llms[1].core.stop()
    llms[1].core = LLM(packed(0)).core
    assert answered(llms[1]) == 0
    assert engines.versions == [1, None]
    perturb(model, 2)
    report = engines.sync(model)
    assert (report.version, report.restarted) == (2, ("engine 1",))
    assert engines.versions == [2, 2] and [answered(llm) for llm in llms] == [2, 2]


def test_what_a_sender_that_was_given_up_still_sends_is_refused():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    wire = rollout.to_wire(rollout.manifest(model, plan))
    assert "ok" in worker(llm, "nvfp4_begin", "first", 1, wire)
    assert "ok" in worker(llm, "nvfp4_begin", "second", 1, wire)
    for method, args in (("load", ([],)), ("commit", ()), ("load_shared", ([], []))):
        answer = worker(llm, f"nvfp4_{method}", "first", *args)
        assert "this update was given up when another one began" in answer["error"]
    assert worker(llm, "nvfp4_abandon", "first")["ok"]["updating"]
    assert not worker(llm, "nvfp4_abandon", "second")["ok"]["updating"]
    assert "no update goes on" in worker(llm, "nvfp4_commit", "second")["error"]
    assert engines.sync(model).version == 1 and answered(llm) == 1


# What engines do meanwhile


@pytest.mark.parametrize("transport", ["direct", "shared"])
@pytest.mark.parametrize("in_flight", ["abort", "keep"])
def test_requests_in_flight_are_ended_or_kept_and_no_step_mixes_weights(in_flight, transport, monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan, in_flight=in_flight, transport=transport, bucket_bytes=9000)
    engines.sync(model)  # so that the next one is quick
    core, answers, held = llm.core, [], []
    step = core._step

    def stepping():  # one step and no more until the update has come
        if not core.paused and len(held) < 1:
            step()
            held.append(1)

    def stream(*args, **options):
        for pair in nq.packed_weights(*args, **options):
            answers.append(core.add("during"))
            yield pair

    monkeypatch.setattr(core, "_step", stepping)
    answers.append(core.add("before"))
    while not held:
        pass
    monkeypatch.setattr(rollout, "packed_weights", stream)
    perturb(model, 2)
    engines.sync(model)
    monkeypatch.setattr(core, "_step", step)
    core.do(int)
    first, *rest = [answer.result(20) for answer in answers]
    if in_flight == "abort":
        assert first == "aborted"
    else:
        assert whole(first, OF_SEED) == [1, 2, 2, 2]
    assert len(rest) > 50 and all(whole(steps, OF_SEED) == [2] * 4 for steps in rest)


def test_the_prefix_cache_is_reset_before_an_engine_goes_on(monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    assert answered(llm, ["same"]) == 0 and llm.core.cache
    llm.core.refused_resets = 3
    engines.sync(model)
    assert answered(llm, ["same"]) == 1 and llm.core.encoder_resets == 1
    monkeypatch.setattr("nvfp4_qat.live_engines.ATTEMPTS", 2)
    llm.core.refused_resets = 2
    perturb(model, 2)
    with pytest.raises(
        MismatchError, match=f"did not reach 1 of 1 engines:\n.*not reset its prefix cache.*(\n.*)*{STAYS}"
    ):
        engines.sync(model)
    waiting, answer = waits(llm)
    assert waiting
    engines._options = replace(engines._options, in_flight="keep")
    engines.sync(model)
    assert whole(answer.result(20), OF_SEED) == [2] * 4


@pytest.mark.parametrize("level", [1, 2])
def test_engines_sleep_and_get_weights_before_the_rest_of_their_memory(level):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    engines.sync(model)
    engines.sleep(level)
    assert llm.core.asleep and engines.versions == ([1] if level == 1 else [None])
    engines.wake_up(["weights"])
    assert llm.core.asleep == {"kv_cache"}
    perturb(model, 2)
    engines.sync(model)
    assert llm.core.paused, "a request would find no KV cache"
    engines.wake_up(["kv_cache"])
    assert answered(llm) == 2 and engines.versions == [2]
    with pytest.raises(UserError, match="levels 1 and 2, not 3"):
        engines.sleep(3)


# Updates that break off


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


def test_a_rank_without_engines_takes_part_in_packing_only(monkeypatch):
    model, plan = trainer(1)
    assert Rollout.connect([], plan).sync(model).tensors == len(dict(nq.packed_weights(model, layout="fused")))


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
