"""A vLLM over all GPUs of the trainer, started by rank 0 and driven from there.

It is a `vllm.LLM` in rank 0's process, whose engine core and workers (one a GPU, tensor-parallel) are processes of
their own, and not a ``vllm serve``: tensors then take the same way, through memory of CUDA IPC, and no HTTP server,
tokenizer or port is needed that could fail besides. Three things come of being started by a rank of `torchrun`:

- What the launcher says to its ranks by environment variables must not reach the engine's processes. With
  ``TORCHELASTIC_USE_AGENT_STORE`` their process group would look for a store that is not theirs, and wait.
- They must see all GPUs. So ``CUDA_VISIBLE_DEVICES`` stays as it is; `torchrun` does not set it.
- Main programs of spawned processes are imported again: ``real_size.py`` does nothing when it is.

The engine starts with ``load_format="dummy"``: random weights of the right shapes, so that no checkpoint of 17 or 61 GB
is written and read. Every weight comes by the first sync, which is to be made before anything is generated. What dummy
weights also overwrite and no sync brings, the scales of attention layers, `LiveWeights` sets back (`live_dummy`).

Reductions by multicast, which vLLM would try with four GPUs, are left off: not every host allows them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nvfp4_qat.vllm import LiveWeights

EXTENSION = "real_size_engine.Measured"

LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")
"""Variables that `torchrun` sets, besides those that begin or end with `LAUNCHER_PARTS`."""

LAUNCHER_PARTS = ("TORCHELASTIC_", "WORLD_SIZE")

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # not stdout, which is for results
}


@dataclass(frozen=True)
class Options:
    """How the engine is started.

    Args:
        tensor_parallel: GPUs.
        kv_bytes: of the KV cache on each.
        sequences: at once. length: most tokens of one. batched_tokens: most tokens of a forward.
        sleep: whether it is to sleep.
        expert_parallel: whole experts on each GPU instead of parts of all.
        eager: without CUDA graphs.
        more: other arguments of `vllm.LLM`.
    """

    tensor_parallel: int
    kv_bytes: int
    sequences: int = 256
    length: int = 2048
    batched_tokens: int = 8192
    sleep: bool = True
    expert_parallel: bool = False
    eager: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Those of `vllm.LLM`."""
        found: dict[str, Any] = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "worker_extension_cls": EXTENSION,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "dtype": "bfloat16",
            "seed": 0,
            "tensor_parallel_size": self.tensor_parallel,
            "enable_expert_parallel": self.expert_parallel,
            "distributed_executor_backend": "mp",
            "enable_sleep_mode": self.sleep,
            "enforce_eager": self.eager,
            "max_model_len": self.length,
            "max_num_seqs": self.sequences,
            "max_num_batched_tokens": self.batched_tokens,
            "gpu_memory_utilization": 0.3,  # has to be free at the start; the next line says what is taken
            "kv_cache_memory_bytes": self.kv_bytes,
        }
        if not self.eager:  # as few graphs as do for this experiment: capturing dozens takes a while
            sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size < self.sequences]
            found["compilation_config"] = {"cudagraph_capture_sizes": [*sizes, self.sequences]}
        return found | dict(self.more)

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "more": dict(self.more)}


@contextlib.contextmanager
def apart(settings: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started meanwhile get these variables, and none of the launcher's."""
    before = dict(os.environ)
    for name in before:
        if name in LAUNCHER or name.startswith(LAUNCHER_PARTS) or name.endswith(LAUNCHER_PARTS):
            del os.environ[name]
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in [name for name in settings if name not in before]:
            os.environ.pop(name, None)
        os.environ.update(before)


class Engine:
    """A vLLM that is up.

    Args:
        folder: with the model's ``config.json``.
        options: how to start it.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        with apart(ENVIRONMENT):
            from vllm import LLM

            self.llm: Any = LLM(str(folder), **options.arguments())

    def memory(self) -> list[dict[str, Any]]:
        """What each worker holds (`Measured.real_size_memory`), or under "error" why it cannot say."""
        return [answer.get("ok", answer) for answer in self.llm.collective_rpc("real_size_memory")]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, int]:
        """Sample so many tokens for each prompt.

        Returns:
            Seconds, and how many tokens came.
        """
        start = time.perf_counter()
        answers = self._ask(prompts, tokens, None)
        return time.perf_counter() - start, sum(len(answer.token_ids) for answer in answers)

    def sample(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[list[list[int]], list[list[float]]]:
        """Prompts with what was sampled behind them, and the log-probabilities of that."""
        answers = self._ask(prompts, tokens, 0)
        sequences = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
        scores = [
            [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ]
        return sequences, scores

    def _ask(self, prompts: Sequence[Sequence[int]], tokens: int, logprobs: int | None) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        asked: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = [answer.outputs[0] for answer in self.llm.generate(asked, sampling, use_tqdm=False)]
        found = [len(answer.token_ids) for answer in answers]
        if found != [tokens] * len(prompts):
            raise RuntimeError(f"{tokens} tokens were asked for {len(prompts)} prompts, and {sorted(set(found))} came")
        return answers

    def close(self) -> None:
        """End its processes."""
        self.llm.llm_engine.engine_core.shutdown()


class Measured(LiveWeights):
    """vLLM's worker with live weights, which also says what it holds."""

    def real_size_memory(self) -> dict[str, Any]:
        """Bytes.

        weights, kv_cache: allocated under these names where the engine may sleep (also while it does); else 0.
        weights_loaded: what vLLM counted while it loaded weights.
        graphs: in the memory pool of the CUDA graphs.
        processing: held for the processing of new weights (`live_graphs`).
        allocated, reserved: of PyTorch's allocator. device_used: of the GPU, by all processes.
        """
        try:
            return {"ok": _memory(self)}
        except Exception as error:  # what a worker raises would spoil later calls of vLLM (0.15 to 0.33)
            return {"error": f"{type(error).__name__}: {error}"}


def _memory(worker: Any) -> dict[str, int]:
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.platforms import current_platform

    tagged = {"weights": 0, "kv_cache": 0}
    if CuMemAllocator.instance is not None:
        for data in CuMemAllocator.instance.pointer_to_data.values():
            tagged[data.tag] = tagged.get(data.tag, 0) + int(data.handle[1])
    pool = tuple(current_platform.get_global_graph_pool())
    segments = torch.cuda.memory_snapshot()
    free, total = torch.cuda.mem_get_info()
    processing = worker.nvfp4_status().get("ok", {}).get("graph_bytes", 0)
    return {
        **tagged,
        "weights_loaded": int(worker.model_runner.model_memory_usage),
        "graphs": sum(int(s["total_size"]) for s in segments if tuple(s.get("segment_pool_id", ())) == pool),
        "processing": int(processing),
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "device_used": total - free,
    }
