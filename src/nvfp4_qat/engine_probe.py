"""A vLLM with random weights, asked what it takes: ``python -m nvfp4_qat.engine_probe DIRECTORY SETTINGS ANSWER``.

`engine_memory` runs it. The figures are those vLLM itself works with when it sizes its KV cache; the memory of its CUDA
graphs it only logs.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .engine_memory import EngineSettings
from .errors import UserError

WORKER_LOG = "vllm.v1.worker.gpu_worker"
GRAPHS = re.compile(r"and (?P<gib>[\d.]+) GiB for CUDAGraph memory")

PROMPT = 16
"""Tokens of the prompts that decoding is timed with."""


def probe(directory: Path, settings: EngineSettings) -> dict[str, Any]:
    """Start an engine, and measure.

    Args:
        directory: with a ``config.json``.
        settings: of the engine.

    Returns:
        Bytes by the names of `engine_memory.ROWS`, ``kv_cache_tokens``, ``decode_tokens_per_second`` (by number of
        sequences: median and samples), the GPU and the versions.

    Raises:
        UserError: vLLM or a CUDA device is missing, or this vLLM does not tell what is asked.
    """
    import torch

    if importlib.util.find_spec("vllm") is None:
        raise UserError("measuring an engine needs vLLM: pip install 'nvfp4-qat[vllm]'")
    if not torch.cuda.is_available():
        raise UserError("measuring an engine needs a CUDA device")
    from vllm import LLM

    said = _Messages()
    log = logging.getLogger(WORKER_LOG)
    log.setLevel(logging.DEBUG)
    log.addHandler(said)
    llm = LLM(
        str(directory), load_format="dummy", skip_tokenizer_init=True, seed=0, enforce_eager=settings.eager,
        gpu_memory_utilization=settings.utilization, max_model_len=settings.length,
        max_num_batched_tokens=settings.batched_tokens, max_num_seqs=settings.sequences, enable_prefix_caching=False,
    )  # fmt: skip
    (memory,) = llm.collective_rpc(_memory)
    graphs = 0.0
    if not settings.eager:
        found = [match for text in said.texts if (match := GRAPHS.search(text))]
        if not found:
            raise UserError(f"vLLM {version('vllm')} does not log the memory of its CUDA graphs: try it with --eager")
        graphs = float(found[-1]["gib"])
    return {
        **memory,
        "graph_bytes": round(graphs * (1 << 30)),
        "kv_cache_tokens": _tokens_in_cache(llm),
        "decode_tokens_per_second": {str(n): _decode(llm, n, settings) for n in settings.decode},
        "gpu": torch.cuda.get_device_name(),
        **{package: version(package) for package in ("vllm", "torch", "transformers")},
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


class _Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _memory(worker: Any) -> dict[str, int]:
    return {
        "weights_bytes": int(worker.model_runner.model_memory_usage),
        "kv_cache_bytes": int(worker.available_kv_cache_memory_bytes),
        "activation_bytes": int(worker.peak_activation_memory),
        "non_torch_bytes": int(worker.non_torch_memory),
    }


def _tokens_in_cache(llm: Any) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks) * int(cache.block_size)


def _decode(llm: Any, sequences: int, settings: EngineSettings) -> dict[str, Any]:
    """Tokens a second of decoding alone: what more tokens take, over how many more they are."""
    from vllm import SamplingParams

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [1 + (i + j) % 1000 for j in range(PROMPT)]} for i in range(sequences)]
        start = time.perf_counter()
        done = llm.generate(prompts, sampling, use_tqdm=False)
        passed = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != tokens for output in done):
            raise UserError(f"the engine did not generate {tokens} tokens for each of {sequences} sequences")
        return passed

    few, many = 8, 8 + settings.tokens
    seconds(many)
    samples = [sequences * (many - few) / (seconds(many) - seconds(few)) for _ in range(settings.repeats)]
    return {"median": round(statistics.median(samples), 1), "samples": [round(s, 1) for s in samples]}


def main() -> int:
    directory, settings, answer = sys.argv[1:]
    try:
        found = probe(Path(directory), EngineSettings(**json.loads(settings)))
    except UserError as error:
        print(f"UserError: {error}", flush=True)
        return 2
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
