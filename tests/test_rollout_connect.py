"""Which engines `Rollout` connects with: those that take live weights, and quantize the same layers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from standin_trainer import packed, trainer
from standin_vllm import LLM, Bare, Worker, of_seed, whole

from nvfp4_qat import vllm
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.rollout import Rollout


def silent(llm):
    """An engine that does not tell how it was started."""
    return SimpleNamespace(collective_rpc=llm.collective_rpc)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_without_the_extension_is_told_of_before_its_workers_are_called(tp):
    llm = LLM(packed(0), worker=Bare, tp=tp)
    message = (
        r"not take live weights \(it was started without a worker extension\): start vLLM with worker_extension_cls="
        '.*or from vLLM 0.26 with weight_transfer_config={"backend": "nvfp4"}, and install nvfp4-qat where'
    )
    with pytest.raises(UserError, match=message):
        Rollout.connect(llm, trainer(1)[1])
    assert not any(llm.core.unread)


def test_an_engine_without_the_extension_that_does_not_tell():
    with pytest.raises(
        UserError, match=r"not take live weights \(NotImplementedError: Method 'nvfp4_hello'.*start vLLM"
    ):
        Rollout.connect(silent(LLM(packed(0), worker=Bare)), trainer(1)[1])
    assert Rollout.connect(silent(LLM(packed(0))), trainer(1)[1])


def test_replicas_of_which_only_one_answers_are_refused():
    llm = LLM(packed(0))
    llm.core.replicas = 2
    with pytest.raises(
        UserError, match="the engine has 2 replicas .*answers of the first one only: start a server for"
    ):
        Rollout.connect(llm, trainer(1)[1])
    for own in ({"external_lb": True}, {"rank_local": 1}):
        vars(llm.core).update({"external_lb": False, **own})
        assert Rollout.connect(llm, trainer(1)[1]).versions == [None]


def with_experts(llm, size=1, **parallel):
    """Tell what vLLM tells its workers of a model with experts; of others it sets the size to 1."""
    for worker in llm.core.workers:
        worker.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(is_moe=True),
            parallel_config=SimpleNamespace(data_parallel_size=size, enable_expert_parallel=True, **parallel),
        )
    return llm


def test_engines_that_compute_each_others_experts_are_refused():
    llm = with_experts(LLM(packed(0)), size=2, data_parallel_rank=1)
    llm.core.replicas, llm.core.external_lb = 2, True
    with pytest.raises(UserError, match="one of 2 data-parallel engines of a model with experts, .*updated as one"):
        Rollout.connect([llm, LLM(packed(0))], trainer(1)[1])
    assert Rollout.connect(with_experts(llm), trainer(1)[1]).versions == [None]
    llm.core.workers[0].vllm_config.model_config.is_moe = False
    llm.core.workers[0].vllm_config.parallel_config.data_parallel_size = 2
    assert Rollout.connect(llm, trainer(1)[1]).versions == [None]


def test_engines_with_other_experts_at_the_same_rank_are_not_compared():
    model, plan = trainer(1)
    llms = [with_experts(LLM(packed(0)), expert_placement_strategy=s) for s in ("linear", "linear", "round_robin")]
    engines = Rollout.connect(llms, plan)
    engines.sync(model)
    for llm in llms[1:]:
        checks = llm.core.workers[0]._nvfp4_state.live.checks
        sums = {**checks.compared()[1], "layers.1.experts": -1}
        checks.compared = lambda sums=sums: ([], sums)
    with pytest.raises(MismatchError) as error:
        engines.verify()
    assert str(error.value).startswith("engine 1: version 1 differs from engine 0 in layers.1.experts;")
    assert "engine 2" not in str(error.value)


def test_an_engine_that_lost_its_extension_is_told_of_at_the_next_sync():
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    llm.core = LLM(packed(0), worker=Bare).core
    with pytest.raises(UserError, match="does not take live weights"):
        engines.sync(model)
    assert engines.versions == [None] and set(whole(llm.generate(["a"])[0], {0: of_seed(0)})) == {0}


class Older(Worker):
    def nvfp4_hello(self):
        hello = super().nvfp4_hello()
        hello["ok"] |= {"protocol": 0, "package": "0.0.9"}
        return hello


def test_another_protocol_is_refused():
    with pytest.raises(MismatchError, match="nvfp4-qat 0.0.9, which cannot talk to this version: install the same"):
        Rollout.connect(LLM(packed(0), worker=Older), trainer(1)[1])


@pytest.mark.parametrize(
    "version, supported",
    [
        ("0.14.3", False),
        ("0.17.0", True),
        ("0.24.0+cu130", True),
        ("0.33.9", True),
        ("0.34.0rc1", False),
        ("dev", True),
    ],
)
def test_versions_of_vllm_that_were_never_tried_are_refused(version, supported, monkeypatch):
    known = vllm._version
    monkeypatch.setattr(vllm, "_version", lambda package: version if package == "vllm" else known(package))
    if supported:
        Rollout.connect(LLM(packed(0)), trainer(1)[1])
    else:
        with pytest.raises(MismatchError, match=f"vLLM {re.escape(version)} is not supported: .* with 0.15 to 0.33;"):
            Rollout.connect(LLM(packed(0)), trainer(1)[1])


def configured(dtype=torch.bfloat16, eplb=False):
    """An engine whose workers have such a configuration of vLLM."""

    class Configured(Worker):
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=dtype), parallel_config=SimpleNamespace(enable_eplb=eplb)
        )

    return LLM(packed(0), worker=Configured)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dtype": torch.float16}, 'it computes in float16, .* start vLLM with dtype="bfloat16"'),
        ({"dtype": torch.float32}, 'it computes in float32, .* start vLLM with dtype="bfloat16"'),
        ({"eplb": True}, r"experts to other places by their load \(enable_eplb\).*start vLLM without enable_eplb"),
        ({"dtype": torch.float16, "eplb": True}, "computes in float16.*; it moves experts"),
    ],
)
def test_settings_that_would_make_weights_wrong_are_refused(settings, message):
    llm = configured(**settings)
    with pytest.raises(MismatchError, match=f"this engine cannot take live weights: .*{message}"):
        Rollout.connect(llm, trainer(1)[1])
    model, plan = trainer(1)
    assert Rollout.connect(configured(), plan).sync(model).version == 1


def test_an_engine_that_is_started_anew_with_such_settings_is_refused_at_the_next_sync():
    model, plan = trainer(1)
    llm = configured()
    engines = Rollout.connect(llm, plan)
    engines.sync(model)
    llm.core = configured(eplb=True).core
    with pytest.raises(MismatchError, match="without enable_eplb"):
        engines.sync(model)


def test_all_engines_that_cannot_be_connected_are_one_error():
    llms = [LLM(packed(0)), LLM(packed(0), worker=Bare), LLM(packed(0), worker=Older)]
    with pytest.raises(MismatchError, match="(?s)engine 1 does not take live.*engine 2 has nvfp4-qat 0.0.9"):
        Rollout.connect(llms, trainer(1)[1])


@pytest.mark.parametrize("ignored", [["layers.0.o_proj"], ["layers.1.experts"]])
def test_layers_that_are_4_bit_in_the_engine_only_are_named(ignored):
    _, plan = trainer(1, ignored)
    with pytest.raises(
        MismatchError, match=rf"the engine \(there\) and the plan \(here\).*\n  only there: {ignored[0]}"
    ):
        Rollout.connect(LLM(packed(0)), plan)


def test_layers_that_are_4_bit_in_the_plan_only_are_named():
    class Less(Worker):
        def nvfp4_hello(self):
            hello = super().nvfp4_hello()
            hello["ok"]["quantized"].remove("layers.1.o_proj")
            return hello

    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = Rollout.connect(llm, plan)
    engines.audit()
    llm.core = LLM(packed(0), worker=Less).core
    for call in (engines.audit, lambda: engines.sync(model)):
        with pytest.raises(MismatchError, match=r"quantized on one side only:\n  only here: layers\.1\.o_proj$"):
            call()


@pytest.mark.parametrize(
    "engine, options, message",
    [
        (object(), {}, "object is no engine: connect a vllm.LLM or AsyncLLM, a URL"),
        ("localhost:8000", {}, "is not the URL of a server: it should look like"),
        ([], {"in_flight": "wait"}, "in_flight='wait' is none of 'abort', 'keep'"),
        ([], {"transport": "ipc"}, "transport='ipc' is none of 'auto', 'direct', 'shared', 'broadcast'"),
        ([], {"bucket_bytes": 0}, "bucket_bytes=0 .* must both be positive"),
        ([], {"timeout": -1.0}, "timeout=-1.0 must both be positive"),
    ],
)
def test_bad_arguments_are_errors(engine, options, message):
    with pytest.raises(UserError, match=message):
        Rollout.connect(engine, trainer(1)[1], **options)
