"""Senders that are killed: the engine waits, answers nothing wrong and stays alive, and the next sync heals it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from standin_sender import ask, killed, stalled
from standin_trainer import perturb, trainer
from standin_vllm import of_seed, whole

import nvfp4_qat as nq
from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_manifest import manifest, to_wire

HERE = Path(__file__).parent
KILLS = 36
SEEDS = range(8)


@pytest.fixture(scope="module")
def processes():
    """Makes processes in which everything is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["standin_sender"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
        context.Process(target=int).start()
    return context


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"], scope="module")
def engine(request):
    """URL and number of workers of an engine in a process of its own; versions are looked at in all answers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, HERE / "standin_server.py", "0", str(request.param)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
    )  # fmt: skip
    yield server.stdout.readline().strip(), request.param
    assert server.poll() is None, "the engine has died"
    server.stdin.close()
    server.wait(10)


class Users:
    """Ask an engine all the time."""

    def __init__(self, url, count=2):
        self.answers, self._stop, self._url = [], False, url
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, user):
        number = 0
        while not self._stop:
            number += 1
            time.sleep(0.01)
            self.answers.append(ask(self._url, "/generate", {"prompt": f"{user}-{number % 5}"}))

    def stop(self):
        self._stop = True
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "a request was never answered"


@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_an_engine_survives_senders_that_are_killed_at_any_moment(engine, processes, transport):
    url, workers = engine
    rng = random.Random(f"{transport} {workers}")
    of = {seed: of_seed(seed, workers) for seed in SEEDS}
    model, plan = trainer(0)
    engines = nq.Rollout.connect(url, plan, transport=transport, bucket_bytes=9000, timeout=20)
    engines.sync(model)
    users, broken_off, now = Users(url), 0, 0
    try:
        for i in range(KILLS // 4):
            seed = rng.choice(SEEDS)
            requests = 3 + len(list(nq.packed_weights(model, layout="fused"))) // 10
            when, delay = rng.randint(1, requests + 5), rng.choice([-1.0, rng.uniform(0, 0.01), rng.uniform(0, 0.1)])
            sender = processes.Process(target=killed, args=(url, seed, transport, when, delay))
            sender.start()
            sender.join(60)
            assert sender.exitcode in (-signal.SIGKILL, 0)
            (version,) = engines.versions
            state, status = ask(url, "/state"), engines._clients[0].workers
            if any(not worker["whole"] for worker in status):
                broken_off += 1
                assert state["paused"] and version is None
            elif not state["paused"]:
                assert version is not None
            seed = rng.choice(SEEDS)
            perturb(model, seed)
            report = engines.sync(model)  # one full sync heals
            assert engines.versions == [report.version]
            steps = ask(url, "/generate", {"prompt": f"after {i}"})
            assert whole(steps, of) == [seed] * 4
            now = i
    finally:
        engines.sync(model)  # nobody has to wait for ever
        users.stop()
        engines.close()
    assert now == KILLS // 4 - 1 and broken_off >= 2
    served = [answer for answer in users.answers if answer != "aborted"]
    assert len(served) > 10
    for steps in served:
        assert len(set(whole(steps, of))) == 1


@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_another_trainer_takes_over_from_one_that_stalls(engine, processes, transport):
    url, workers = engine
    model, plan = trainer(4)
    sender = processes.Process(target=stalled, args=(url, transport))
    sender.start()
    deadline = time.monotonic() + 30
    while ask(url, "/state") | {"running": 0} != {"paused": True, "waiting": 1, "running": 0}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engines = nq.Rollout.connect(url, plan, transport=transport, timeout=20)
    assert engines.versions == [None]
    engines.sync(model)
    assert whole(ask(url, "/generate", {"prompt": "after"}), {4: of_seed(4, workers)}) == [4] * 4
    sender.join(30)  # its request was answered, and what it sends now is refused
    assert sender.exitcode == 1
    assert whole(ask(url, "/generate", {"prompt": "later"}), {4: of_seed(4, workers)}) == [4] * 4
    assert not ask(url, "/state")["paused"]
    engines.sync(model)
    engines.close()


def test_a_worker_does_not_wait_for_a_trainer_for_ever(engine):
    url, _ = engine
    model, plan = trainer(5)
    engines = nq.Rollout.connect(url, plan, transport="broadcast", timeout=3.0)
    engines.sync(model)
    start = time.monotonic()
    (client,) = engines._clients
    client.engine._timeout = 20.0
    wire = to_wire(manifest(model, plan))
    client.begin("silent", client.newest + 1, wire)
    _, group = engines._group(client, torch.device("cpu"))
    with pytest.raises(MismatchError, match="the trainer took no part in a broadcast within 3 s"):
        client.call("nvfp4_load_broadcast", "silent", group, 100, [])
    assert time.monotonic() - start < 15
    with pytest.raises(MismatchError, match="this worker is not in a group with the trainer, or left it"):
        client.call("nvfp4_load_broadcast", "silent", group, 100, [])
    perturb(model, 6)
    engines.sync(model)
    engines.close()
