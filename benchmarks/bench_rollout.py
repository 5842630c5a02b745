"""Time from packed weights on a GPU to a vLLM engine that is ready to generate with them.

    python benchmarks/bench_rollout.py                              the shapes of Qwen3-8B, all layers
    python benchmarks/bench_rollout.py --model Qwen3-30B-A3B
    python benchmarks/bench_rollout.py --transports direct --layers 4 --repeats 3

Trainer and engine are on one GPU. The trainer's weights are random and packed; the engine starts with random weights of
the same shapes. A sync is `Rollout.sync`: manifest, pause, all tensors, commit, prefix cache, resumption. Transports:

- ``direct``: the engine's worker is in the trainer's process.
- ``shared``: it is in one of its own and reads buckets of shared CUDA memory.

With ``direct``, vLLM's own ``reload_weights`` gets the same tensors in the same process (under their checkpoint names;
experts one by one), and afterwards every tensor of the model is compared with what `Rollout.sync` made of them.
The first sync, which finds out where everything goes, and the second, which proves quicker ways of processing, are not
in the median; they are reported beside it.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Row, append, environment, summary

import nvfp4_qat as nq
from nvfp4_qat.engine_memory import write_config
from nvfp4_qat.live_client import EXTENSION
from nvfp4_qat.live_model import LiveModel
from nvfp4_qat.rollout import Rollout
from nvfp4_qat.shipped_configs import shipped, shipped_config

TRANSPORTS = ("direct", "shared")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def random_model(name: str, layers: int | None) -> Any:
    """A bf16 model on the GPU, with a shipped configuration."""
    from transformers import AutoModelForCausalLM

    config = shipped_config(name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def profiled(run: Callable[[], Any], lines: int) -> None:
    """Print where the worker's side of a sync spends Python's time; with ``direct``, where it is in this process."""
    profile, whole = cProfile.Profile(), time.perf_counter()
    seconds: dict[str, float] = {}

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(LiveModel, name)

        def call(self: LiveModel, *arguments: Any) -> Any:
            start = time.perf_counter()
            profile.enable()
            try:
                return original(self, *arguments)
            finally:
                profile.disable()
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return call

    originals = {name: getattr(LiveModel, name) for name in ("begin", "load", "commit")}
    for name in originals:
        setattr(LiveModel, name, watched(name))
    try:
        run()
    finally:
        for name, original in originals.items():
            setattr(LiveModel, name, original)
    print(f"{time.perf_counter() - whole:.3f} s, of which {seconds}", file=sys.stderr)
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(lines)


def measure(model: str, layers: int | None, transport: str, repeats: int, profile: int | None) -> Row:
    from vllm import LLM, SamplingParams

    trainer = random_model(model, layers)
    plan = nq.apply_qat(trainer, nq.QATConfig(enable=True))
    nq.refresh(trainer)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, model)
        write_config(directory, trainer, plan)
        llm = LLM(
            str(directory), load_format="dummy", skip_tokenizer_init=True, worker_extension_cls=EXTENSION, seed=0,
            max_model_len=512, max_num_seqs=32, gpu_memory_utilization=0.3, kv_cache_memory_bytes=4 << 30,
        )  # fmt: skip
    rollout = Rollout.connect(llm, plan)
    prompts = [{"prompt_token_ids": [1, 2, 3, 4]}] * 4
    sampling = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False)

    def works() -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]

    before = works()
    first, report = timed(lambda: rollout.sync(trainer))
    second, _ = timed(lambda: rollout.sync(trainer))  # done both ways: see `live_quick`
    samples, extra = [], []
    for _ in range(repeats):
        seconds, report = timed(lambda: rollout.sync(trainer))
        samples.append(seconds)
        extra.append(report.extra_bytes)
    if profile is not None:
        profiled(lambda: rollout.sync(trainer), profile)
    after = works()
    row: Row = {
        "benchmark": "rollout", "model": model, "layers": trainer.config.num_hidden_layers, "transport": transport,
        "tensors": report.tensors, "bytes": report.bytes, "first_seconds": round(first, 3),
        "second_seconds": round(second, 3), **summary("seconds", samples, 4), "extra_bytes": max(extra),
        "check": "ok" if before != after else "the weights did not change what is generated",
    }  # fmt: skip
    if transport == "direct":
        row |= reload(llm, trainer, repeats)
    return row


def reload(llm: Any, trainer: Any, repeats: int) -> Row:
    """The same with vLLM's own way of taking weights."""

    def run() -> None:
        stream = nq.packed_weights(trainer, layout="checkpoint")
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream, "is_checkpoint_format": True})

    (ours,) = llm.collective_rpc(_tensors)
    samples = []
    for _ in range(min(repeats, 3)):
        seconds, _ = timed(run)
        samples.append(seconds)
    (theirs,) = llm.collective_rpc(_tensors)
    different = [name for name in ours if name not in theirs or not _same(ours[name], theirs[name])]
    return {**summary("reload_seconds", samples, 4), "reload_tensors_that_differ": different[:20]}


def _tensors(worker: Any) -> dict[str, torch.Tensor]:
    """Copies of a model's parameters and buffers on the CPU."""
    model = worker.model_runner.get_model()
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: t.detach().cpu() for name, t in named}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=shipped(), default="Qwen3-8B", help="whose shapes")
    parser.add_argument("--layers", type=int, help="decoder layers; by default the original's")
    parser.add_argument("--transports", choices=TRANSPORTS, nargs="+", default=list(TRANSPORTS))
    parser.add_argument("--repeats", type=int, default=7, help="syncs that are timed")
    parser.add_argument("--out", type=Path, default=RESULTS / "rollout.jsonl", help="file the rows are appended to")
    parser.add_argument("--profile", type=int, metavar="N", help="print the N functions that take longest (direct)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if not args.alone:  # an engine a process: where its worker is, is decided when vLLM is imported
        codes = []
        for transport in args.transports:
            command = [sys.executable, __file__, *sys.argv[1:], "--transports", transport, "--alone"]
            processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if transport == "direct" else "1"}
            codes.append(subprocess.run(command, env={**os.environ, **processes}, check=False).returncode)
        return max(codes)
    row = measure(args.model, args.layers, args.transports[0], args.repeats, args.profile) | environment(
        torch.device("cuda")
    )
    row["vllm"] = __import__("vllm").__version__
    append(args.out, [row])
    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
