"""Trainers are killed while they send to a real `vllm serve`: ``python tests/vllm_kill.py [MOMENTS]``.

Users ask all the time. A trainer in a process of its own sends step after step, and is killed at a random moment of a
sync; a new one takes over and sends the same step again, in one full sync. Before every forward the worker reads all
its tensors back (`vllm_checks.Watched`): no forward may have had others than those of a complete step.

Prints one line of JSON at the end, beginning with RESULT.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from vllm_cases import perturb, trainer
from vllm_checks import WATCHED

import nvfp4_qat as nq
from nvfp4_qat.live_http import HttpEngine

BROKEN = 10
"""Updates that have to be broken off: there are more moments, up to four times as many, until there are so many."""

AHEAD = 6
"""Trainers that are being started while others run: that takes longest."""


def sender(url: str) -> None:
    """A trainer: for each line of input that is a number, the weights of that step are made and sent."""
    model, plan = trainer("dense")
    first = [p.detach().clone() for p in model.parameters()]
    rollout: Any = None
    print("ready", flush=True)
    for line in sys.stdin:
        if rollout is None:
            rollout = nq.Rollout.connect(url, plan, timeout=60)
        with torch.no_grad():
            for p, before in zip(model.parameters(), first, strict=True):
                p.copy_(before)
        perturb(model, int(line))
        nq.refresh(model)
        print("sends", flush=True)
        report = rollout.sync(model)
        print(f"sent {report.seconds}", flush=True)


class Trainer:
    """A process that runs `sender`."""

    def __init__(self, url: str, log: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "sender", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def says(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.split()[:1] == [word]:
                return line.split()
        raise RuntimeError(f"a trainer ended before it said {word!r}")

    def starts(self, step: int) -> None:
        """Returns when the weights of the step are being sent."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{step}\n")
        self.process.stdin.flush()
        self.says("sends")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Users:
    """Ask a server all the time."""

    def __init__(self, url: str, model: str, count: int = 4) -> None:
        self.finished: list[str] = []
        self._stop, self._url, self._model = False, url, model
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, user: int) -> None:
        number = 0
        while not self._stop:
            number += 1
            prompt = [(7 * user + 3 * number + i) % 1000 for i in range(16)]
            body = {"model": self._model, "prompt": prompt, "max_tokens": 12, "temperature": 0.0}
            request = urllib.request.Request(
                self._url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    self.finished.append(json.loads(answer.read())["choices"][0]["finish_reason"])
            except OSError as error:
                self.finished.append(f"error: {error}")

    def stop(self) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join(150)


def tokenizer(directory: Path) -> None:
    """A vocabulary of numbers: the server wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(1000)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1").save_pretrained(directory)


@contextlib.contextmanager
def served(directory: Path, log: Any) -> Any:
    """URL of a `vllm serve` in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), "--host", "127.0.0.1",
        "--port", str(port), "--max-model-len", "256", "--max-num-seqs", "64", "--gpu-memory-utilization", "0.2",
        "--kv-cache-memory-bytes", str(1 << 30), "--worker-extension-cls", WATCHED,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(url + "/health", timeout=5):
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.5)
        yield url
        assert server.poll() is None, "the server has died"
    finally:
        server.terminate()
        server.wait(60)


def killed(moments: int) -> dict[str, Any]:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        log = open(os.environ.get("KILL_LOG", os.devnull), "w")  # noqa: SIM115
        directory = Path(folder, "model")
        model, _ = trainer("dense")
        nq.save_checkpoint(model, directory)
        tokenizer(directory)
        with served(directory, log) as url:
            engine = HttpEngine(url, 120)
            (_,) = engine.call("watched_start")
            complete = {engine.call("watched_now")[0]}
            users = Users(url, str(directory))
            waiting = [Trainer(url, log) for _ in range(AHEAD)]
            for t in waiting:
                t.says("ready")
            current = waiting.pop(0)
            broken, delays, recoveries = 0, [], []
            current.starts(0)
            seconds = float(current.says("sent")[1])
            complete |= set(engine.call("watched_now"))
            for step in range(1, 4 * moments + 1):
                if step > moments and broken >= BROKEN:
                    break
                waiting.append(Trainer(url, log))
                delays.append(rng.uniform(0, 1.2 * seconds))
                current.starts(step)
                time.sleep(delays[-1])
                current.kill()
                (status,) = engine.call("nvfp4_status")
                broken += not status["ok"]["whole"] or status["ok"]["updating"]
                time.sleep(rng.uniform(0, 0.2))
                current = waiting.pop(0)
                current.starts(step)
                seconds = float(current.says("sent")[1])
                recoveries.append(seconds)
                complete |= set(engine.call("watched_now"))
            time.sleep(1)
            users.stop()
            (seen,) = engine.call("watched_seen")
            for t in (current, *waiting):
                t.kill()
    errors = [reason for reason in users.finished if reason.startswith("error")]
    return {
        "moments": len(delays), "broken_off": broken, "steps": len(complete), "forwards": sum(seen.values()),
        "forwards_of_mixtures": sum(n for which, n in seen.items() if which not in complete),
        "answered": sum(reason in ("stop", "length") for reason in users.finished),
        "aborted": sum(reason == "abort" for reason in users.finished), "errors": errors[:5],
        "delays": [round(d, 4) for d in delays], "recovery_seconds": [round(s, 3) for s in recoveries],
        "vllm": __import__("vllm").__version__, "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["sender"]:
        sender(sys.argv[2])
    else:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        found = killed(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
        print("RESULT " + json.dumps(found), flush=True)
