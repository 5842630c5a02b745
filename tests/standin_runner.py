"""What vLLM's two model runners keep of requests, as far as `live_in_flight` reads it.

Both are told at the beginning of a step which requests ended or were preempted since the last one. `First` (as
``vllm/v1/worker/gpu_model_runner.py``) keeps those that were preempted, and has a placeholder for each token while the
scheduling is asynchronous; `Second` (``vllm/v1/worker/gpu/model_runner.py``) forgets them, and takes them up again with
the tokens that they have.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

SLOTS, PROMPT = 64, 3


class First:
    use_async_scheduling, num_spec_tokens = True, 0

    def __init__(self, model):
        self.get_model, self.requests = lambda: model, {}

    def step(self, ended, preempted, taken_up, running):
        for name in ended:
            self.requests.pop(name, None)
        for request in taken_up:
            # Resumed requests get what the scheduler has.
            state = self.requests.setdefault(request.name, SimpleNamespace())
            state.output_token_ids = [0] * len(request.steps)
        for request in running:
            self.requests[request.name].output_token_ids.append(-1)


class Second:
    def __init__(self, model):
        self.get_model, self._free = lambda: model, list(range(SLOTS))
        self.req_states = SimpleNamespace(
            req_id_to_index={}, total_len=SimpleNamespace(gpu=torch.full((SLOTS,), 999, dtype=torch.int32)),
            prompt_len=SimpleNamespace(np=np.zeros(SLOTS, np.int32)),
            prefill_len=SimpleNamespace(np=np.zeros(SLOTS, np.int32)),
        )  # fmt: skip

    def step(self, ended, preempted, taken_up, running):
        states = self.req_states
        for name in {*ended, *preempted} & states.req_id_to_index.keys():
            self._free.append(states.req_id_to_index.pop(name))
        for request in taken_up:
            index = states.req_id_to_index[request.name] = self._free.pop()
            states.prompt_len.np[index] = PROMPT
            states.prefill_len.np[index] = states.total_len.gpu[index] = PROMPT + len(request.steps)
        for request in running:
            states.total_len.gpu[states.req_id_to_index[request.name]] += 1
