"""A server driven over HTTP: what is asked of it and in which form, and what it may answer."""

from __future__ import annotations

import socket
import time

import pytest
from helpers_rollout import OF_SEED
from standin_server import Server
from standin_trainer import packed, perturb, trainer
from standin_vllm import LLM, Bare, whole

import nvfp4_qat as nq
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_http import HttpEngine


@pytest.fixture
def server():
    made = Server(LLM(packed(0)))
    yield made
    made.close()


def answered(server):
    return whole(server.llm.generate(["a"])[0], OF_SEED)


@pytest.mark.parametrize("told", [False, True], ids=["0.24", "0.26"])
@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_a_server_is_synced_by_its_development_endpoints(server, transport, told):
    server.told = told
    model, plan = trainer(1)
    engines = nq.Rollout.connect(server.url, plan, transport=transport, bucket_bytes=5000, timeout=20)
    assert engines.versions == [None]
    for seed in (1, 2):
        perturb(model, seed)
        server.log.clear()
        engines.sync(model)
        assert answered(server) == [seed] * 4
    engines.close()
    asked = [body["method"] if path == "/collective_rpc" else path for path, _, body in server.log]
    loads = {"shared": "nvfp4_load_shared", "broadcast": "nvfp4_load_broadcast"}[transport]
    assert asked[:3] == ["nvfp4_status", "nvfp4_begin", "/sleep"]
    ending = ["nvfp4_commit", "nvfp4_updates", "/reset_prefix_cache", "/reset_encoder_cache", "nvfp4_go_on", "/wake_up"]
    assert asked[-6:] == ending and set(asked[3:-6]) == {loads} and len(asked) > 9
    queries = {path: query for path, query, _ in server.log}
    assert queries["/sleep"] == {"level": ["0"], "mode": ["abort"]} and queries["/wake_up"] == {"tags": ["scheduling"]}
    assert queries["/reset_prefix_cache"] == {"reset_running_requests": ["true"]}
    for path, _, body in server.log:
        assert (body is None) == (path != "/collective_rpc") and (body is None or set(body) == {"method", "args"})


def test_control_messages_are_small(server):
    """No tensor goes over HTTP, but the list of them does."""
    import json

    model, plan = trainer(1)
    nq.Rollout.connect(server.url, plan).sync(model)
    begin = next(b for _, _, b in server.log if b and b["method"] == "nvfp4_begin")
    tensors = len(dict(nq.packed_weights(model, layout="fused")))
    assert len(json.dumps(begin)) < 200 * tensors
    assert sum(len(json.dumps(b)) for _, _, b in server.log if b and b is not begin) < 100 * tensors


def test_requests_may_be_kept(server):
    model, plan = trainer(1)
    nq.Rollout.connect(server.url, plan, in_flight="keep").sync(model)
    assert [query for path, query, _ in server.log if path == "/sleep"] == [{"level": ["0"], "mode": ["keep"]}]


def test_servers_and_engines_of_this_process_are_updated_together(server):
    model, plan = trainer(1)
    llm = LLM(packed(0))
    engines = nq.Rollout.connect([server.url, llm], plan)
    engines.sync(model)
    assert engines.versions == [1, 1]
    assert answered(server) == whole(llm.generate(["a"])[0], OF_SEED) == [1] * 4
    engines.verify(model)
    server.llm.core.workers[0].graph.operands["norm:weight"][0] += 1
    with pytest.raises(nq.MismatchError, match="version 1 was altered after it had been updated, in norm;"):
        engines.verify()


def test_sleeping_and_waking(server):
    model, plan = trainer(1)
    engines = nq.Rollout.connect(server.url, plan)
    engines.sleep(2)
    assert server.llm.core.asleep == {"weights", "kv_cache"} and engines.versions == [None]
    engines.wake_up(["weights"])
    assert server.llm.core.asleep == {"kv_cache"}
    engines.sync(model)
    assert server.llm.core.paused, "a request would find no KV cache"
    engines.wake_up()
    assert server.llm.core.asleep == set() and answered(server) == [1] * 4
    asked = [(path, query) for path, query, _ in server.log if path in ("/sleep", "/wake_up")]
    assert asked == [
        ("/sleep", {"level": ["2"], "mode": ["abort"]}), ("/wake_up", {"tags": ["weights"]}),
        ("/sleep", {"level": ["0"], "mode": ["abort"]}), ("/wake_up", {"tags": ["scheduling"]}), ("/wake_up", {}),
    ]  # fmt: skip


def test_a_replica_that_was_started_anew_gets_everything(server):
    model, plan = trainer(1)
    engines = nq.Rollout.connect(server.url, plan)
    engines.sync(model)
    server.llm = LLM(packed(0))
    perturb(model, 2)
    report = engines.sync(model)
    assert (report.version, report.restarted) == (1, (server.url,))
    assert answered(server) == [2] * 4


def test_a_replica_that_is_started_anew_during_an_update_stays_whole(server, monkeypatch):
    model, plan = trainer(1)
    engines = nq.Rollout.connect(server.url, plan, bucket_bytes=5000)
    engines.sync(model)
    perturb(model, 2)
    post, calls = HttpEngine._post, []

    def restarting(self, path, body=None):
        calls.append(path)
        if len(calls) == 6:
            server.llm = LLM(packed(0))
        return post(self, path, body)

    with monkeypatch.context() as patch:
        patch.setattr(HttpEngine, "_post", restarting)
        with pytest.raises(MismatchError, match="no update goes on: it was not begun, .*or the engine is new"):
            engines.sync(model)
    assert answered(server) == [0] * 4 and engines.versions == [None]
    engines.sync(model)
    assert answered(server) == [2] * 4


# What goes wrong with servers


def test_tensors_cannot_be_handed_over_to_a_server(server):
    model, plan = trainer(1)
    with pytest.raises(UserError, match='transport="direct" does not reach workers of another process: leave it at'):
        nq.Rollout.connect(server.url, plan, transport="direct").sync(model)
    assert not server.llm.core.paused and answered(server) == [0] * 4


def test_a_server_without_development_endpoints(server):
    server.dev = False
    with pytest.raises(UserError, match=f"{server.url} has no /collective_rpc: start .* with VLLM_SERVER_DEV_MODE=1"):
        nq.Rollout.connect(server.url, trainer(1)[1])


def test_a_server_without_the_extension(server):
    server.llm = LLM(packed(0), worker=Bare)
    message = r"live weights \(it was started without a worker ext.*vllm serve --worker-extension-cls nvfp4.*install"
    with pytest.raises(UserError, match=message):
        nq.Rollout.connect(server.url, trainer(1)[1])
    server.broken["/server_info"] = 404, {}  # behind a proxy
    with pytest.raises(UserError, match=r"live weights \(.*status 500.*'nvfp4_hello' is not implemented"):
        nq.Rollout.connect(server.url, trainer(1)[1])


def test_a_server_may_take_longer_to_tell_how_it_was_started(server):
    server.slow["/server_info"] = 0.8
    assert nq.Rollout.connect(server.url, trainer(1)[1], timeout=0.5).versions == [None]


def test_a_server_that_is_not_there():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/"
    with pytest.raises(UserError, match=f"{url[:-1]} cannot be reached .*refused.*is `vllm serve` up there"):
        nq.Rollout.connect(url, trainer(1)[1])


@pytest.mark.parametrize("said", [b"<html>", b"[1]", b'{"results": 1}', b'{"results": ["x"]}', b'{"results": []}'])
def test_a_server_that_is_something_else(server, said):
    server.broken["nvfp4_hello"] = 200, said
    with pytest.raises(
        UserError, match=f"{server.url}.*(is it a vLLM server|it is not a vLLM|does not take live weights)"
    ):
        nq.Rollout.connect(server.url, trainer(1)[1])


@pytest.mark.parametrize("slow", ["nvfp4_load_shared", "nvfp4_commit", "/sleep"])
def test_a_server_that_does_not_answer_in_time(server, slow):
    model, plan = trainer(1)
    engines = nq.Rollout.connect(server.url, plan, timeout=20.0)
    engines.sync(model)
    engines._clients[0].engine._timeout = 1.0
    server.slow[slow] = 1.8
    perturb(model, 2)
    message = f"{server.url} did not answer (/collective_rpc|/sleep) within 1 s"
    with pytest.raises((MismatchError, UserError), match=message):
        engines.sync(model)
    server.slow.clear()
    time.sleep(1.0)  # what was asked for is done late, but done
    assert server.llm.core.paused
    engines._clients[0].engine._timeout = 20.0
    report = engines.sync(model)
    assert answered(server) == [2] * 4 and engines.versions == [report.version]


@pytest.mark.parametrize("broken", ["/sleep", "nvfp4_begin", "nvfp4_load_shared", "/reset_prefix_cache", "/wake_up"])
def test_a_server_that_answers_with_an_error(server, broken):
    model, plan = trainer(1)
    engines = nq.Rollout.connect(server.url, plan)
    server.broken[broken] = 500, {"error": "Failed to pause generation: engine core died"}
    with pytest.raises(MismatchError, match=f"{server.url} answered /.* with status 500: .*engine core died"):
        engines.sync(model)
    server.broken.clear()
    engines.sync(model)
    assert answered(server) == [1] * 4


def test_an_address_that_workers_cannot_reach(server):
    model, plan = trainer(1)
    engines = nq.Rollout.connect(server.url, plan, transport="broadcast", timeout=3.0, address="nowhere.invalid")
    with pytest.raises(MismatchError, match='cannot reach the trainer at nowhere.invalid:.*address="…"'):
        engines.sync(model)
    assert server.llm.core.paused
    engines.close()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://"])
def test_urls_that_are_none(url):
    with pytest.raises(UserError, match="is not the URL of a server"):
        HttpEngine(url)


def test_an_engine_behind_a_proxy_gets_headers_and_a_path(server):
    engine = HttpEngine(f"{server.url}/prefix/", headers={"X-Key": "k"})
    with pytest.raises(UserError, match="has no /wake_up"):
        server.dev = False
        engine.resume()
    assert server.log[-1][0] == "/prefix/wake_up" and engine.address() == "127.0.0.1"
