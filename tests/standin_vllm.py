"""An engine in the way of vLLM around `standin_engine.Model`: requests, scheduler, workers, and `LLM` to drive them.

`Core` has a thread of its own in which steps of requests and calls take turns, as in vLLM's EngineCore. A request takes
several steps. Each tells, for all workers, a digest of everything that a captured graph reads, and of what was there
when the request's context was computed, which may come out of the prefix cache: an answer from a mixture of weights, or
from a cache that should have been reset, shows. Requests that come while the scheduler is paused wait.
A worker's model runner (`standin_runner`) knows how many tokens, one a step, each request has.

`LLM` takes the calls that `vllm.LLM` takes. With ``separate`` what goes to workers must be JSON, like what vLLM sends
to another process without pickled code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import queue
import threading
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import torch
from standin_engine import Graph, Model, StandinCode, start
from standin_layers import ALONE, EXPERTS, Experts, Place
from standin_runner import First

from nvfp4_qat.vllm import LiveWeights

STEPS = 4
"""Of a request."""


def digest(operands):
    """All bytes of a model's operands, in few."""
    found = hashlib.sha1()
    for name in sorted(operands):
        found.update(operands[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def places(tp):
    return [Place(rank, tp) for rank in range(tp)] if tp > 1 else [ALONE]


def digests(weights, tp=1):
    """What an engine's steps tell when it was started with some weights."""
    found = []
    for place in places(tp):
        model = Model(place)
        start(model, weights)
        found.append(digest(model.operands()))
    return found


class Code(StandinCode):
    def quantized(self, model):
        found = []
        for name, layer in model.named_modules():
            if not any(parameter.endswith("weight_packed") for parameter in self.checkpoint_form(layer)):
                continue
            parts = ("gate_proj", "up_proj", "down_proj") if isinstance(layer, Experts) else ()
            found += [f"{name}.{e}.{part}" for e in range(EXPERTS) for part in parts] or [name]
        return found


class Bare:
    """A worker without the extension."""

    device = torch.device("cpu")
    backend = None
    """Of its weight transfer."""

    runner = First

    def __init__(self, weights, place=ALONE, device="cpu"):
        self.rank, model = place.tp_rank, Model(place)
        self.device = torch.device(device)
        self.code = start(model, weights)
        self.code.__class__ = Code
        self.graph = Graph(model)
        self.model_runner, self.gone = self.runner(model), set()

    def digest(self):
        return digest(self.graph.operands)

    def sleep(self, level):
        assert not self.gone
        self.gone = {"weights", "kv_cache"}
        if level == 2:  # vLLM saves buffers
            buffers = {b.data_ptr() for b in self.model_runner.get_model().buffers()}
            for tensor in self.graph.operands.values():
                if tensor.data_ptr() not in buffers:
                    tensor.zero_()

    def wake_up(self, tags):
        woken = {"weights", "kv_cache"} if tags is None else set(tags)
        assert woken <= self.gone, "mapped twice"
        self.gone -= woken


class Worker(Bare, LiveWeights):
    def _nvfp4_code(self, model, device):
        return self.code


class Request:
    def __init__(self, prompt, name, length):
        self.prompt, self.answer, self.context, self.steps = prompt, Future(), None, []
        self.name, self.length = f"{name}-{uuid.uuid4().hex[:8]}", length  # as InputProcessor.assign_request_id


class Core:
    replicas, external_lb, rank_local, sleep_mode = 1, False, None, False

    def __init__(self, workers):
        self.workers, self.paused, self.asleep, self.cache = workers, False, set(), {}
        self.unread = [deque() for _ in workers]
        self.waiting, self.running = [], []
        self.ended, self.preempted = set(), set()
        """What the workers are told in the next step."""
        self.room = self.budget = None
        """How many requests are taken up in a step; how many steps there may be."""
        self.refused_resets = self.encoder_resets = 0
        self.connector = None
        """The contexts that a KV connector holds, by prompt; None: there is no connector."""
        self.earlier = False
        """As vLLM 0.20: to reset a connector that is not there fails, and any waking up lets the scheduler go on."""
        self._calls, self._pool = queue.SimpleQueue(), ThreadPoolExecutor(len(workers))
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def do(self, function, *arguments):
        """Call something between steps."""
        answer = Future()
        self._calls.put((answer, function, arguments))
        return answer.result()

    def stop(self):
        self._calls.put(None)
        self._thread.join()

    def add(self, prompt, name="r", length=STEPS):
        """A request's future answer: its steps, or "aborted"."""
        return self.do(self.add_now, prompt, name, length)

    def add_now(self, prompt, name="r", length=STEPS):
        request = Request(prompt, name, length)
        self.waiting.append(request)
        return request.answer

    def rpc(self, method, args, kwargs=None):
        """As in `MultiprocExecutor`: behind an error, the answers of the other workers are left for the next call."""

        def answer(worker):
            try:
                if not hasattr(worker, method):
                    raise NotImplementedError(f"Method {method!r} is not implemented.")
                return getattr(worker, method)(*args, **kwargs or {})
            except Exception as error:
                return error

        for unread, found in zip(self.unread, self._pool.map(answer, self.workers), strict=True):
            unread.append(found)
        answers = []
        for unread in self.unread:
            answers.append(unread.popleft())
            if isinstance(answers[-1], Exception):
                raise answers[-1]
        return answers

    @property
    def vllm_config(self):
        """How vLLM tells that it was started."""
        worker = self.workers[0]
        extension = "nvfp4_qat.vllm.LiveWeights" if isinstance(worker, LiveWeights) else ""
        return SimpleNamespace(
            parallel_config=SimpleNamespace(
                worker_extension_cls=extension, data_parallel_size=self.replicas, data_parallel_size_local=1,
                data_parallel_rank_local=self.rank_local, data_parallel_external_lb=self.external_lb,
            ),
            model_config=SimpleNamespace(enable_sleep_mode=self.sleep_mode),
            kv_transfer_config=None if self.connector is None else SimpleNamespace(kv_connector="OffloadingConnector"),
            weight_transfer_config=None if worker.backend is None else SimpleNamespace(backend=worker.backend),
        )  # fmt: skip

    def pause(self, mode, clear_cache):
        if mode not in ("abort", "keep"):
            raise ValueError(f"Invalid pause mode: {mode}")
        if mode == "abort":
            self.abort()
        self.paused = True
        if clear_cache:
            self.reset(True)

    def abort(self):
        for request in self.running + self.waiting:
            request.answer.set_result("aborted")
            self.ended.add(request.name)
        self.running, self.waiting = [], []

    def preempt(self, name):
        """As for lack of KV memory."""
        (request,) = [r for r in self.running if r.name.startswith(name)]
        self.running.remove(request)
        self.waiting.append(request)
        self.preempted.add(request.name)
        request.context = None

    def reset(self, running, connector=False):
        if running:
            for request in self.running:
                request.context = None
                self.preempted.add(request.name)
            self.waiting, self.running = self.running + self.waiting, []
        if self.running or self.refused_resets:
            self.refused_resets -= bool(self.refused_resets)
            if running:
                raise RuntimeError("Failed to reset KV cache even when all the running requests are preempted")
            return False
        self.cache.clear()
        if connector and self.connector is not None:
            self.connector.clear()
        return not (connector and self.connector is None and self.earlier)

    def reset_encoder(self):
        assert self.paused
        self.encoder_resets += 1

    def sleep(self, level, mode):
        self.pause(mode, level >= 1)
        if level >= 1 and not self.asleep:
            self.asleep = {"weights", "kv_cache"}
            for worker in self.workers:
                worker.sleep(level)

    def wake_up(self, tags):
        if self.asleep and (tags is None or set(tags) <= self.asleep):
            self.asleep -= {"weights", "kv_cache"} if tags is None else set(tags)
            for worker in self.workers:
                worker.wake_up(tags)
        if self.earlier or not self.asleep:
            self.paused = False

    def _loop(self):
        while True:
            work = self.ended or not self.paused and (self.waiting or self.running)
            idle = self.budget == 0 or not work
            try:
                call = self._calls.get(timeout=None if idle else 0.001)
            except queue.Empty:
                self._step()
                continue
            if call is None:
                return
            answer, function, arguments = call
            try:
                answer.set_result(function(*arguments))
            except Exception as error:
                answer.set_exception(error)

    def _step(self):
        if self.paused:  # workers are still told what ended
            return self._tell([], [])
        assert not any(worker.gone for worker in self.workers)
        taken_up, self.waiting = self.waiting[: self.room], self.waiting[len(self.waiting[: self.room]) :]
        self.running += taken_up
        self._tell(taken_up, self.running)
        self.budget = None if self.budget is None else self.budget - 1
        now = [worker.digest() for worker in self.workers]
        for request in list(self.running):
            if request.context is None:
                held = {} if self.connector is None else self.connector
                request.context = self.cache.setdefault(request.prompt, held.setdefault(request.prompt, now))
            request.steps.append([request.context, now])
            if len(request.steps) == request.length:
                self.ended.add(request.name)
                self.running.remove(request)
                request.answer.set_result(request.steps)

    def _tell(self, taken_up, running):
        """What a step tells the workers' model runners."""
        for worker in self.workers:
            worker.model_runner.step(self.ended, self.preempted, taken_up, running)
        self.ended, self.preempted = set(), set()


class LLM:
    def __init__(self, weights, tp=1, worker=Worker, separate=False):
        self.core = Core([worker(weights, place) for place in places(tp)])
        self._separate = separate

    @property
    def llm_engine(self):
        return SimpleNamespace(
            reset_encoder_cache=lambda: self.core.do(self.core.reset_encoder), vllm_config=self.core.vllm_config
        )

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert timeout is None
        if self._separate:
            args, kwargs = json.loads(json.dumps([args, kwargs]))
        return self.core.do(self.core.rpc, method, args, kwargs)

    def sleep(self, level=1, mode="abort"):
        self.core.do(self.core.sleep, level, mode)

    def wake_up(self, tags=None):
        self.core.do(self.core.wake_up, tags)

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        return self.core.do(self.core.reset, reset_running_requests, reset_connector)

    def generate(self, prompts):
        return [answer.result(20) for answer in [self.core.add(prompt) for prompt in prompts]]


def whole(steps, versions):
    """The versions that a request's steps were computed with; fails where it was a mixture.

    Args:
        steps: as `Core` answers.
        versions: `digests` by version.
    """
    of = {tuple(d): version for version, d in versions.items()}
    for context, now in steps:
        assert tuple(now) in of, "a step was computed with weights of several versions"
        assert context == now, "a step was computed with the context of other weights"
    return [of[tuple(now)] for _, now in steps]


@functools.cache
def of_seed(seed, tp=1):
    """`digests` of the stand-in trainer's weights."""
    from standin_trainer import packed

    return digests(packed(seed), tp)
