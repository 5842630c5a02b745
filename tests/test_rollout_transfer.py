"""Live weights through vLLM's weight transfer: our engine is registered, and `Rollout` syncs by it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import logging
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_rollout import OF_SEED
from standin_async import AsyncLLM
from standin_server import Server
from standin_trainer import packed, perturb, trainer
from standin_transfer import TransferWorker, installed, worker_class
from standin_vllm import LLM, of_seed, whole

import nvfp4_qat as nq
from nvfp4_qat import live_replies, rollout, vllm, vllm_plugin
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.rollout import Rollout


@pytest.fixture
def factory(monkeypatch):
    """vLLM's, with our plugin loaded."""
    found = installed(monkeypatch)
    real, told = importlib.metadata.version, {"vllm": "0.26.0", "nvfp4-qat": "0.1"}
    monkeypatch.setattr("importlib.metadata.version", lambda name: told.get(name) or real(name))
    vllm_plugin.register()
    return found


@pytest.fixture
def worker(factory):
    return worker_class(factory)


def answered(llm, of=OF_SEED):
    (seed,) = {seed for steps in llm.generate(["a", "b"]) for seed in whole(steps, of)}
    return seed


@pytest.mark.parametrize("transport", ["auto", "direct", "shared", "broadcast"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_sync_gives_what_a_fresh_engine_has(transport, tp, worker):
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=tp, worker=worker, separate=transport in ("shared", "broadcast"))
    engines = Rollout.connect(llm, plan, transport=transport, bucket_bytes=5000, timeout=20)
    of = {seed: of_seed(seed, tp) for seed in range(4)}
    assert engines.versions == [None]
    for version, seed in enumerate((1, 2, 3), 1):
        perturb(model, seed)
        assert engines.sync(model).version == version
        assert answered(llm, of) == seed and engines.versions == [version]
    engines.audit()
    engines.close()


def test_only_what_changed(worker):
    model, plan = trainer(1)
    llm = LLM(packed(0), worker=worker, separate=True)
    engines = Rollout.connect(llm, plan, changes=True, transport="shared")
    engines.sync(model)
    with torch.no_grad():
        model.layers[0].o_proj.weight[0, 0] *= 2
    nq.refresh(model)
    report = engines.sync(model)
    assert 0 < report.fraction_changed < 0.01 and engines.versions == [2]
    assert not llm.core.paused


def test_a_server_is_synced_by_the_endpoints_of_weight_transfer(worker):
    model, plan = trainer(1)
    server = Server(LLM(packed(0), tp=2, worker=worker))
    engines = Rollout.connect(server.url, plan, bucket_bytes=5000)
    assert [path for path, _, _ in server.log] == ["/server_info", *["/init_weight_transfer_engine"] * 2]
    server.log.clear()
    engines.sync(model)
    asked = [path for path, _, _ in server.log]
    call = "/init_weight_transfer_engine"
    assert set(asked[:-4]) == {call, "/sleep"} and asked.index("/sleep") == 2
    assert asked[-4:] == ["/reset_prefix_cache", "/reset_encoder_cache", call, "/wake_up"]
    assert answered(server.llm, {seed: of_seed(seed, 2) for seed in range(2)}) == 1
    engines.verify(model)
    with pytest.raises(UserError, match="a weight-transfer engine does not see requests; start vLLM with the"):
        engines.token_versions("r", 4)
    server.close()


def test_an_asynchronous_engine(worker):
    model, plan = trainer(1)

    async def main():
        llm = AsyncLLM(packed(0), worker=worker)
        engines = await Rollout.connect_async(llm, plan)
        await engines.sync_async(model)
        assert whole(await llm.generate("a"), OF_SEED) == [1] * 4

    asyncio.run(main())


# Updates that break off


@pytest.mark.parametrize("mended", ["by the same", "by another"])
def test_an_update_that_broke_off_is_healed_by_the_next_sync(worker, mended, monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=2, worker=worker)
    engines = Rollout.connect(llm, plan, bucket_bytes=2000)

    def breaks(*args, **options):
        for i, pair in enumerate(nq.packed_weights(*args, **options)):
            if i == 40:
                raise KeyboardInterrupt
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "packed_weights", breaks)
        if mended == "by another":  # the trainer is killed: it says nothing any more
            patch.setattr("nvfp4_qat.live_update.Update.__exit__", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            engines.sync(model)
    assert llm.core.paused
    if mended == "by another":
        engines = Rollout.connect(llm, plan)
    assert engines.versions == [None]
    engines.sync(model)
    assert answered(llm, {seed: of_seed(seed, 2) for seed in range(2)}) == 1


def test_a_trainer_that_hung_while_another_one_took_over_does_no_harm(worker):
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=2, worker=worker)
    hung, other = Rollout.connect(llm, plan)._clients[0], Rollout.connect(llm, plan)
    hung.begin("x", 1, rollout.to_wire(rollout.manifest(model, plan)))
    begun = rollout.Update.send

    def send(update, stream):
        for call in (("nvfp4_load_shared", "x", [], []), ("nvfp4_commit", "x")):
            with pytest.raises(MismatchError, match="given up when another one began"):
                hung.call(*call)
        hung.abandon("x")
        begun(update, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout.Update, "send", send)
        other.sync(model)
    with pytest.raises(MismatchError, match="no update goes on"):
        hung.call("nvfp4_load_shared", "x", [], [])
    assert answered(llm, {seed: of_seed(seed, 2) for seed in range(2)}) == 1 and other.versions == [1]
    assert not any(llm.core.unread)


def test_errors_of_workers_come_back_as_they_were_said(worker, monkeypatch):
    model, plan = trainer(1)
    llm = LLM(packed(0), worker=worker)
    engines = Rollout.connect(llm, plan)
    known = rollout.manifest
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "manifest", lambda *args: known(*args)[1:])
        with pytest.raises(MismatchError, match="nothing was changed.*nothing brings it"):
            engines.sync(model)
    assert answered(llm) == 0, "the engine goes on"
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "packed_weights", lambda *a, **o: list(nq.packed_weights(*a, **o))[1:])
        with pytest.raises(MismatchError, match="1 tensors have not come"):
            engines.sync(model)
    assert llm.core.paused
    engines.sync(model)
    assert answered(llm) == 1


def test_an_engine_that_was_started_anew_gets_everything(worker):
    model, plan = trainer(1)
    llm = LLM(packed(0), worker=worker)
    engines = Rollout.connect(llm, plan)
    engines.sync(model)
    llm.core.stop()
    llm.core = LLM(packed(0), worker=worker).core
    assert engines.sync(model).restarted == ("the engine",) and answered(llm) == 1


def test_an_engine_that_was_started_anew_with_fewer_workers(worker):
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=2, worker=worker)
    engines = Rollout.connect(llm, plan)
    engines.sync(model)
    llm.core = LLM(packed(0), worker=worker).core
    assert engines.sync(model).restarted == ("the engine",) and answered(llm) == 1


def test_vllm_may_make_an_engine_leave_the_trainer(worker):
    model, plan = trainer(1)
    llm = LLM(packed(0), worker=worker)
    engines = Rollout.connect(llm, plan, transport="broadcast", timeout=20)
    engines.sync(model)
    (only,) = llm.core.workers
    engines._clients[0].begin("x", 2, rollout.to_wire(rollout.manifest(model, plan)))
    only.weight_transfer_engine.shutdown()
    (status,) = engines._clients[0].call("nvfp4_status")
    assert status["group"] is None and not status["updating"]
    engines.sync(model)
    assert engines.versions == [2]
    engines.close()


def test_vllm_s_other_calls_change_nothing(worker):
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=2, worker=worker)
    engines = Rollout.connect(llm, plan)
    for step in ("start_weight_update", "finish_weight_update", "start_weight_update"):
        llm.collective_rpc(step)
        engines.sync(model)
    assert engines.versions == [3]


def test_a_closed_rollout_listens_no_more_until_it_is_used(worker):
    engines = Rollout.connect(LLM(packed(0), worker=worker), trainer(1)[1])
    port = engines._clients[0]._transfer._replies.port
    engines.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert engines.versions == [None]
    engines.close()


# What is refused


@pytest.mark.parametrize("backend", [None, "nccl"])
@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_with_another_backend_or_none_is_told_of_before_its_workers_are_called(backend, tp):
    llm = LLM(packed(0), tp=tp, worker=type("Worker", (TransferWorker,), {"backend": backend}))
    reason = r"without a worker extension" + (r", and with the weight-transfer backend 'nccl'\)" if backend else r"\)")
    with pytest.raises(
        UserError, match=reason + '.*worker_extension_cls.*{"backend": "nvfp4"}.*install nvfp4-qat where'
    ):
        Rollout.connect(llm, trainer(1)[1])
    assert not any(llm.core.unread)


def test_an_engine_with_both_is_called_by_the_extension(factory):
    engine = factory._registry["nvfp4"]()
    both = type("Worker", (vllm.LiveWeights, TransferWorker), {"engine_class": engine, "backend": "nvfp4"})
    both._nvfp4_code = lambda self, *_: self.code
    model, plan = trainer(1)
    llm = LLM(packed(0), tp=2, worker=both)
    Rollout.connect(llm, plan).sync(model)
    assert ["_nvfp4_state" in vars(w) for w in llm.core.workers] == [True, True]
    assert not any("_nvfp4_state" in vars(w.weight_transfer_engine) for w in llm.core.workers)


@pytest.mark.parametrize("lost", [(0,), (1,), (0, 1)])
def test_workers_that_cannot_reach_the_trainer(worker, lost, monkeypatch, caplog):
    llm = LLM(packed(0), tp=2, worker=worker)
    known = live_transfer().reply

    def reply(call, answer, workers):
        rank = answer["ok"]["rank"] if "ok" in answer else None
        known(replace(call, address="nowhere.invalid") if rank in lost else call, answer, workers)

    with monkeypatch.context() as patch:
        patch.setattr(live_transfer(), "reply", reply)
        with pytest.raises(
            UserError, match=rf"{2 - len(lost)} of .* workers.*could not reach this process.*address=\"…\""
        ):
            Rollout.connect(llm, trainer(1)[1])
    assert "the answer to nvfp4_hello did not reach the trainer at nowhere.invalid" in caplog.text
    assert not any(llm.core.unread)
    model, plan = trainer(1)
    Rollout.connect(llm, plan).sync(model)


def live_transfer():
    return sys.modules["nvfp4_qat.live_transfer"]


def test_the_address_that_workers_are_given(worker):
    llm = LLM(packed(0), worker=worker)
    with pytest.raises(UserError, match=r"0 of the workers of the engine .*this process at nowhere.invalid:\d+"):
        Rollout.connect(llm, trainer(1)[1], address="nowhere.invalid")
    assert Rollout.connect(llm, trainer(1)[1], address="localhost").versions == [None]


def test_an_external_launcher_calls_its_own_worker_only(worker):
    worker.executor = "external_launcher"
    llm = LLM(packed(0), tp=2, worker=worker)
    llm.core.workers, llm.core.unread = llm.core.workers[:1], llm.core.unread[:1]
    assert len(Rollout.connect(llm, trainer(1)[1])._clients[0].workers) == 1


def test_an_answer_that_nobody_waits_for_any_more_is_logged(caplog):
    replies = live_replies._Replies()
    live_replies.reply(live_replies.Call("nvfp4_status", [], "unknown", "127.0.0.1", replies.port), {"ok": {}}, 1)
    assert f"the trainer at 127.0.0.1:{replies.port} no longer waits for nvfp4_status" in caplog.text
    replies.close()


def test_a_trainer_that_stands_still_is_not_waited_for(caplog, monkeypatch):
    """It has been stopped: connections come about, and nothing is answered."""
    monkeypatch.setattr(live_replies, "PATIENCE", 0.2)
    with socket.socket() as stopped:
        stopped.bind(("127.0.0.1", 0))
        stopped.listen()
        call = live_replies.Call("nvfp4_status", [], "x", *stopped.getsockname())
        live_replies.reply(call, {"ok": {}}, 1)
    assert "did not reach the trainer" in caplog.text and "timed out" in caplog.text


@pytest.mark.parametrize("method", ["shutdown", "nvfp4_model", "_nvfp4_leave", "__init__"])
def test_only_the_calls_of_live_weights_can_be_made(worker, method):
    client = Rollout.connect(LLM(packed(0), worker=worker), trainer(1)[1])._clients[0]
    with pytest.raises(MismatchError, match=f"'{method}' is none of the calls of live weights"):
        client.call(method)


def test_vllm_s_own_way_to_send_is_refused(factory):
    with pytest.raises(UserError, match=r"nvfp4_qat.Rollout.connect\(engine, plan\).sync\(model\)"):
        factory._registry["nvfp4"]().trainer_send_weights(iter(()), {})


# The plugin


def test_the_entry_point_names_the_plugin():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (value,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = value.partition(":")
    assert getattr(importlib.import_module(module), name) is vllm_plugin.register


def test_the_plugin_registers_our_engine_once_and_imports_it_when_it_is_asked_for(factory, caplog):
    with caplog.at_level(logging.WARNING, "nvfp4_qat"):
        vllm_plugin.register()
    assert list(factory._registry) == ["nvfp4"] and caplog.text == ""
    assert "nvfp4_qat.live_transfer" not in sys.modules
    assert factory._registry["nvfp4"]().__name__ == "LiveTransfer"


@pytest.mark.parametrize("version, registered", [("0.15.0", False), ("0.25.1", False), ("0.26.0", True), ("dev", True)])
def test_versions_without_engines_of_others(version, registered, monkeypatch, caplog):
    factory = installed(monkeypatch)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    with caplog.at_level(logging.WARNING, "nvfp4_qat"):
        vllm_plugin.register()
    assert ("nvfp4" in factory._registry) == registered and caplog.text == ""


def test_what_fails_in_the_plugin_is_logged_and_does_not_end_vllm(monkeypatch, caplog):
    installed(monkeypatch)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.33.0")
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", None)
    with caplog.at_level(logging.WARNING, "nvfp4_qat"):
        vllm_plugin.register()
    assert "could not register its weight-transfer engine with vLLM 0.33.0: vLLM will refuse the backend" in caplog.text
    assert "import of vllm.distributed.weight_transfer.factory halted" in caplog.text


def test_an_engine_that_may_sleep_is_refused(worker):
    llm = LLM(packed(0), worker=worker)
    llm.core.sleep_mode = True
    with pytest.raises(UserError, match="enable_sleep_mode, and a weight-transfer engine does not see when it sleeps"):
        Rollout.connect(llm, trainer(1)[1])
    assert Rollout.connect(LLM(packed(0), worker=worker), trainer(1)[1])
