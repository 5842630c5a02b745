"""Requests that an engine is answering while its weights change: how many tokens each had, as its workers see it.

Read at the commit of an update, when the scheduler has been paused (``sleep(level=0)``). vLLM answers that call once no
step is on its way any more (``EngineCoreProc.pause_scheduler`` waits for ``has_work()`` to be false, batch queue
included). So what a worker has sampled the scheduler has taken and sent to the caller, the placeholders (-1) that
asynchronous scheduling has in place of tokens count like tokens, and resetting the prefix cache, which drops tokens of
steps under way, finds none. What is sampled afterwards is computed by the new weights. An ``LLM`` whose engine runs in
this process does not wait, so there the scheduler itself is asked (`scheduled`).

A request that ended before the pause may still be listed, with at least as many tokens as its caller got.

vLLM has two model runners. The first keeps requests that it preempted; the second, the default in later releases,
forgets them until they are scheduled again, so `live_tokens` must not take them for ended.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from .errors import UserError

UPDATES = 16
"""So many updates are remembered, and requests that were in flight at one of them."""


class Notes:
    """What a worker saw at its last updates."""

    def __init__(self) -> None:
        self._updates: deque[dict[str, Any]] = deque(maxlen=UPDATES)

    def take(self, worker: Any, before: int | None, version: int | None) -> None:
        """Note the requests that are in flight; nothing is raised.

        Args:
            worker: of vLLM, or its weight-transfer engine.
            before: the version so far; None: the weights of the start.
            version: what comes now.
        """
        tokens, preempted, why = None, False, ""
        try:
            tokens, preempted = sampled(worker)
        except Exception as error:
            why = str(error) or type(error).__name__
        self._updates.append(
            {
                "version": version,
                "before": before,
                "at": time.monotonic(),
                "tokens": tokens,
                "preempted": preempted,
                "why": why,
            }
        )

    def since(self, version: int | None) -> list[dict[str, Any]]:
        """Updates that brought a newer version; None: all that are remembered.

        Returns:
            Of each its version and the one before, when it was (seconds of ``time.monotonic``), "tokens": by request
            how many it had, and how many of them when it was last taken up; None if that cannot be told, for the reason
            in "why". "preempted": whether requests that wait after a preemption are among them.
        """
        return [update for update in self._updates if version is None or update["version"] > version]


def sampled(worker: Any) -> tuple[dict[str, list[int]], bool]:
    """How many tokens a worker sampled for each request; see `Notes.since`.

    Raises:
        UserError: it does not know.
    """
    runner = getattr(worker, "model_runner", None)
    if runner is None:
        raise UserError("a weight-transfer engine does not see requests; start vLLM with the worker extension")
    requests = getattr(runner, "requests", None)
    if requests is not None:
        if getattr(runner, "use_async_scheduling", False) and getattr(runner, "num_spec_tokens", 0):
            # How many drafts of the last step were accepted is counted with the next one.
            raise UserError("with speculative decoding and asynchronous scheduling this model runner counts too late")
        return {name: [len(request.output_token_ids)] * 2 for name, request in requests.items()}, True
    states = runner.req_states
    total, prompt, prefill = states.total_len.gpu.tolist(), states.prompt_len.np, states.prefill_len.np
    return {
        name: [int(total[i]) - int(prompt[i]), int(prefill[i]) - int(prompt[i])]
        for name, i in states.req_id_to_index.items()
    }, False


def scheduled(llm: Any) -> dict[str, int] | None:
    """How many tokens the scheduler of a `vllm.LLM` took for each request; None: it is in another process."""
    found = llm
    for name in ("llm_engine", "engine_core", "engine_core", "scheduler"):
        found = getattr(found, name, None)
    requests = getattr(found, "requests", None)
    return None if requests is None else {name: int(r.num_output_tokens) for name, r in requests.items()}
