"""Requests kept over updates of a real vLLM on a GPU: ``python tests/vllm_keep.py async|inprocess|preempted 0|1``.

Whatever the prompt is, weights of version v make the model sample token v: all embeddings are the same large vector,
the layers add little to it, and only row v of the output layer is not zero. So each token tells by itself which weights
made it, and what `Rollout.token_versions` says must be just that. The second argument is ``VLLM_USE_V2_MODEL_RUNNER``.

- async: an `AsyncLLM` that answers while a coroutine syncs; some requests have two choices.
- inprocess: an `LLM` whose engine runs in this process, driven step by step, so that updates find steps under way.
- preempted: as async, with so little KV memory that vLLM preempts requests. The second model runner loses sight of
  those: then it must be said that their tokens are not known.

Prints one line of JSON at the end, beginning with RESULT.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from vllm_cases import trainer

import nvfp4_qat as nq
from nvfp4_qat.errors import UserError
from nvfp4_qat.rollout import EXTENSION, Rollout

UPDATES, CONCURRENT, LONGEST = 8, 48, 400
START = 999
"""What the weights of the start sample."""


def constant(model: Any, token: int) -> None:
    """Have the model sample one token always."""
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(4.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0


class Found:
    """Responses, compared with what is said of them."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, self.count, self.examples = rollout, Counter[str](), list[Any]()

    def add(self, output: Any, with_metrics: bool) -> None:
        for completion in output.outputs:
            tokens = list(completion.token_ids)
            made = [None if t == START else t for t in tokens]
            asked: Any = (output, None) if with_metrics else (output.request_id, len(tokens))
            known = {} if with_metrics and len(output.outputs) == 1 else {"ended": made[-1]}
            self.count["responses"] += 1
            self.count["tokens"] += len(tokens)
            self.count["mixed"] += len(set(made)) > 1
            try:
                told = self.rollout.token_versions(*asked, choice=completion.index, **known)
            except UserError as error:
                self.count["refused"] += 1
                self.examples.append(str(error))
                continue
            if told != made:
                self.count["wrong"] += 1
                self.examples.append([output.request_id, completion.index, runs(made), runs(told)])

    def result(self) -> dict[str, Any]:
        names = ("responses", "tokens", "mixed", "refused", "wrong")
        return {**{name: self.count[name] for name in names}, "examples": self.examples[:5]}


def runs(versions: list[Any]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for v in versions:
        if found and found[-1][0] == v:
            found[-1][1] += 1
        else:
            found.append([v, 1])
    return found


def parameters(rng: random.Random, choices: int = 1) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.01, n=choices, max_tokens=rng.randrange(20, LONGEST), ignore_eos=True, detokenize=False
    )


def prompt(rng: random.Random) -> Any:
    return {"prompt_token_ids": [rng.randrange(900) for _ in range(rng.randrange(4, 40))]}


async def asynchronous(path: Path, model: Any, plan: Any, options: dict[str, Any]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(path), **options))
    rollout = await Rollout.connect_async(llm, plan, in_flight="keep")
    rng, outputs, going_on = random.Random(0), list[Any](), True

    async def user(number: int) -> None:
        i = 0
        while going_on:
            name, choices = f"user{number}-{i}", 2 if rng.random() < 0.2 else 1
            async for output in llm.generate(prompt(rng), parameters(rng, choices), name):
                last = output
            outputs.append(last)
            i += 1

    users = [asyncio.create_task(user(i)) for i in range(CONCURRENT)]
    for version in range(1, UPDATES + 1):
        await asyncio.sleep(rng.uniform(0.2, 0.6))
        constant(model, version)
        assert (await rollout.sync_async(model)).version == version
    await asyncio.sleep(0.5)
    going_on = False
    await asyncio.gather(*users)
    found = Found(rollout)
    for i, output in enumerate(outputs):
        found.add(output, with_metrics=i % 2 == 0)
    llm.shutdown()
    return found.result()


def in_process(path: Path, model: Any, plan: Any, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    llm = LLM(str(path), **options)
    rollout = Rollout.connect(llm, plan, in_flight="keep")
    rng, engine, found = random.Random(0), llm.llm_engine, Found(rollout)
    started = version = steps = 0
    while version < UPDATES or engine.has_unfinished_requests():
        while version < UPDATES and engine.get_num_unfinished_requests() < CONCURRENT:
            engine.add_request(f"r{started}", prompt(rng), parameters(rng))
            started += 1
        for output in engine.step():
            if output.finished:
                found.add(output, with_metrics=False)
        steps += 1
        if version < UPDATES and steps % 100 == 0:
            version += 1
            constant(model, version)
            assert rollout.sync(model).version == version
    return found.result()


def main(case: str, runner: str) -> dict[str, Any]:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = runner
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(case != "inprocess"))
    model, plan = trainer("dense")
    constant(model, START)
    options = {
        "skip_tokenizer_init": True, "max_model_len": 512, "gpu_memory_utilization": 0.2, "max_num_seqs": 64,
        "kv_cache_memory_bytes": (8 if case == "preempted" else 1024) << 20, "worker_extension_cls": EXTENSION,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        nq.save_checkpoint(model, folder)
        if case == "inprocess":
            return in_process(Path(folder), model, plan, options)
        return asyncio.run(asynchronous(Path(folder), model, plan, options))


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1], sys.argv[2])), flush=True)
