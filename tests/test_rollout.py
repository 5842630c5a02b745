"""`Rollout` with engines of this process: what they have after a sync, in which version, and what they do meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers_rollout import OF_SEED, STAYS, answered, waits, worker
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, of_seed, whole

import nvfp4_qat as nq
from nvfp4_qat import rollout
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.rollout import Rollout


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


def test_a_rank_without_engines_takes_part_in_packing_only(monkeypatch):
    model, plan = trainer(1)
    assert Rollout.connect([], plan).sync(model).tensors == len(dict(nq.packed_weights(model, layout="fused")))


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
