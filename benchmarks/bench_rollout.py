"""Time from packed weights on a GPU to a vLLM engine that is ready to generate with them.

    python benchmarks/bench_rollout.py                              the shapes of Qwen3-8B, all layers
    python benchmarks/bench_rollout.py --model Qwen3-30B-A3B
    python benchmarks/bench_rollout.py --transports direct --layers 4 --repeats 3

Trainer and engine are on one GPU. The trainer's weights are random and packed; the engine starts with random weights of
the same shapes. A sync is `Rollout.sync`: manifest, pause, all tensors, commit, prefix cache, resumption. Transports:

- ``direct``: the engine's worker is in the trainer's process.
- ``shared``: it is in one of its own and reads buckets of shared CUDA memory.

With ``direct``, vLLM's own ``reload_weights`` gets the same tensors in the same process (under their checkpoint names;
experts one by one), and afterwards every tensor of the model is compared with what `Rollout.sync` made of them: a row
of its own. Those of a model with experts are on the CPU then. vLLM 0.24 keeps what it is given until all of a layer is
there, and for each tensor on a GPU adds up anew how much it keeps: a reload of Qwen3-30B-A3B had not ended after four
minutes.

Before each sync the trainer's weights are written, as by an optimizer, so that it includes packing them;
``packing_seconds`` is what that takes alone; ``from_packed_seconds`` is a sync of weights that were packed before. The
first sync, which finds out where everything goes, and the second, which proves quicker ways of processing, are not in
the median; they are reported beside it.

With ``--changes`` the model is then trained by AdamW on random tokens, and only what changed is sent; a row of its own
says how much and how long, again with and without the packing. Masters in fp32 (``--masters fp32``) keep updates that
are too small for bf16.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Row, append, environment, summary

import nvfp4_qat as nq
from nvfp4_qat.engine_memory import write_config
from nvfp4_qat.live_client import EXTENSION
from nvfp4_qat.rollout import Rollout
from nvfp4_qat.shipped_configs import shipped, shipped_config

TRANSPORTS = ("direct", "shared")
RELOADS = 60.0
"""Seconds, after which vLLM's own reload is not repeated."""
MASTERS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def random_model(name: str, layers: int | None, masters: str) -> Any:
    """A model on the GPU, with a shipped configuration."""
    from transformers import AutoModelForCausalLM

    config: Any = shipped_config(name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=MASTERS[masters])


def profiled(run: Callable[[], Any], lines: int) -> None:
    """Print where a sync spends Python's time; with ``direct`` the worker's part is in this process too."""
    profile = cProfile.Profile()
    profile.enable()
    seconds, _ = timed(run)
    profile.disable()
    print(f"{seconds:.3f} s", file=sys.stderr)
    for order in ("cumulative", "tottime"):
        pstats.Stats(profile, stream=sys.stderr).sort_stats(order).print_stats(lines)


def touch(model: torch.nn.Module) -> None:
    """Write every parameter as an optimizer does, with the value that it has."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1)


def packing(model: torch.nn.Module) -> float:
    """Seconds that the trainer packs for, before the first and between the other tensors of a sync."""
    touch(model)

    def stream() -> None:
        for _ in nq.packed_weights(model, layout="fused"):
            pass

    return timed(stream)[0]


def from_packed(rollout: Rollout, model: Any, args: argparse.Namespace) -> list[float]:
    """Seconds of syncs for which the trainer only hands over what is packed."""
    weights = list(nq.packed_weights(model, layout="fused"))
    samples = [timed(lambda: rollout.sync(model, weights=weights))[0] for _ in range(args.repeats)]
    if args.profile is not None:
        profiled(lambda: rollout.sync(model, weights=weights), args.profile)
    return samples


def adamw_step(model: Any, lr: float, seed: int) -> None:
    """A first step of AdamW on random tokens, parameter by parameter, so that its state needs little memory."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (2, 512), generator=generator, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    for p in model.parameters():
        if p.grad is not None:
            torch.optim.AdamW([p], lr=lr, weight_decay=0.0).step()
            p.grad = None


def measure(args: argparse.Namespace, transport: str) -> Iterator[Row]:
    from vllm import LLM, SamplingParams

    trainer = random_model(args.model, args.layers, args.masters)
    plan = nq.apply_qat(trainer, nq.QATConfig(enable=True))
    nq.refresh(trainer)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, args.model)
        write_config(directory, trainer, plan)
        llm = LLM(
            str(directory), load_format="dummy", skip_tokenizer_init=True, worker_extension_cls=EXTENSION, seed=0,
            max_model_len=512, max_num_seqs=32, gpu_memory_utilization=0.3, kv_cache_memory_bytes=4 << 30,
            dtype="bfloat16",
        )  # fmt: skip
    rollout = Rollout.connect(llm, plan)
    prompts = [{"prompt_token_ids": [1, 2, 3, 4]}] * 4
    sampling = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False)

    def works() -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]

    before = works()
    first, report = timed(lambda: rollout.sync(trainer))
    second, _ = timed(lambda: rollout.sync(trainer))  # done both ways: see `live_quick`
    packed = [packing(trainer) for _ in range(3)]
    samples, extra = [], []
    for _ in range(args.repeats):
        touch(trainer)
        seconds, report = timed(lambda: rollout.sync(trainer))
        samples.append(seconds)
        extra.append(report.extra_bytes)
    ready = from_packed(rollout, trainer, args)
    if args.profile is not None:
        touch(trainer)
        profiled(lambda: rollout.sync(trainer), args.profile)
    held = max(w["ok"]["graph_bytes"] for w in llm.collective_rpc("nvfp4_status"))
    after = works()
    common: Row = {
        "benchmark": "rollout", "model": args.model, "layers": trainer.config.num_hidden_layers,
        "masters": args.masters, "transport": transport, "tensors": report.tensors,
    }  # fmt: skip
    yield {
        **common, "method": "everything", "bytes": report.bytes, "first_seconds": round(first, 3),
        "second_seconds": round(second, 3), **summary("packing_seconds", packed, 4),
        **summary("seconds", samples, 4), **summary("from_packed_seconds", ready, 4), "extra_bytes": max(extra),
        "graph_bytes": held,
        "check": "ok" if before != after else "the weights did not change what is generated",
    }  # fmt: skip
    if args.changes:
        yield common | changes(llm, plan, trainer, args)
    if transport == "direct" and args.reload:
        yield common | reload(llm, trainer, args.repeats)


def changes(llm: Any, plan: nq.QuantPlan, trainer: Any, args: argparse.Namespace) -> Row:
    """Steps of training, of which only what they changed is sent."""
    rollout = Rollout.connect(llm, plan, changes=True)
    remembering, whole = timed(lambda: rollout.sync(trainer))
    reports, samples = [], []
    for step in range(args.repeats + 1):  # the first finds out where kernels have codes
        adamw_step(trainer, args.changes, step)
        seconds, report = timed(lambda: rollout.sync(trainer))
        samples.append(seconds)
        reports.append(report)
    ready = []
    for step in range(args.repeats):
        adamw_step(trainer, args.changes, 100 + step)
        packed = list(nq.packed_weights(trainer, layout="fused"))
        ready.append(timed(lambda packed=packed: rollout.sync(trainer, weights=packed))[0])
        del packed
    if args.profile is not None:
        adamw_step(trainer, args.changes, 1000)
        profiled(lambda: rollout.sync(trainer), args.profile)
    remembered = max(w["ok"]["remembered_bytes"] for w in llm.collective_rpc("nvfp4_status"))
    full = Rollout.connect(llm, plan)
    before = llm.collective_rpc(_sums)
    full.sync(trainer)
    same = before == llm.collective_rpc(_sums)
    return {
        "method": "changes", "learning_rate": args.changes, "bytes": reports[-1].bytes, "whole_bytes": whole.bytes,
        "fraction_bytes": max(r.bytes for r in reports[1:]) / whole.bytes,
        "fraction_changed": reports[-1].fraction_changed, "remembering_seconds": round(remembering, 3),
        "first_seconds": round(samples[0], 3), **summary("seconds", samples[1:], 4),
        **summary("from_packed_seconds", ready, 4), "extra_bytes": max(r.extra_bytes for r in reports[1:]),
        "remembered_bytes": remembered,
        "check": "ok" if same else "a complete sync gives other tensors",
    }  # fmt: skip


def _sums(worker: Any) -> dict[str, int]:
    """A sum over the bytes of each parameter and buffer of a model, in which places count."""
    sums = {}
    for name, t in _tensors(worker, "cuda").items():
        data = t.contiguous().view(-1).view(torch.uint8)
        total = 0
        for i, part in enumerate(data.split(1 << 26)):
            places = torch.arange(len(part), device=part.device) * 2654435761 % 1000003
            total += (i + 1) * int((part * places).sum())
        sums[name] = total
    return sums


def reload(llm: Any, trainer: Any, repeats: int) -> Row:
    """The same with vLLM's own way of taking weights."""
    kept: list[Any] = []
    if hasattr(trainer.config, "num_experts"):
        kept = [(name, tensor.cpu()) for name, tensor in nq.packed_weights(trainer, layout="checkpoint")]

    def run() -> None:
        stream = iter(kept) if kept else nq.packed_weights(trainer, layout="checkpoint")
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream, "is_checkpoint_format": True})

    (ours,) = llm.collective_rpc(_tensors)
    samples: list[float] = []
    while len(samples) < min(repeats, 3) and sum(samples) < RELOADS:
        seconds, _ = timed(run)
        samples.append(seconds)
    (theirs,) = llm.collective_rpc(_tensors)
    different = [name for name in ours if name not in theirs or not _same(ours[name], theirs[name])]
    return {
        "method": "reload", "tensors_on": "cpu" if kept else "cuda", **summary("reload_seconds", samples, 4),
        "reload_tensors_that_differ": different[:20],
    }  # fmt: skip


def _tensors(worker: Any, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A model's parameters and buffers, on the CPU copies of them."""
    model = worker.model_runner.get_model()
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: t.detach().to(device) for name, t in named}


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
    parser.add_argument("--masters", choices=list(MASTERS), default="bf16", help="dtype of the trainer's weights")
    parser.add_argument("--changes", type=float, metavar="LR", help="also send what steps of AdamW at LR change")
    parser.add_argument("--no-reload", dest="reload", action="store_false", help="do not time vLLM's own reload")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if not args.alone:  # an engine a process: where its worker is, is decided when vLLM is imported
        codes = []
        for transport in args.transports:
            command = [sys.executable, __file__, *sys.argv[1:], "--transports", transport, "--alone"]
            settings = {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if transport == "direct" else "1",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the comparison of tensors; syncs do without
            }
            codes.append(subprocess.run(command, env={**os.environ, **settings}, check=False).returncode)
        return max(codes)
    about = environment(torch.device("cuda")) | {"vllm": __import__("vllm").__version__}
    for row in measure(args, args.transports[0]):  # what is known is kept, whatever becomes of the rest
        append(args.out, [row | about])
        print(json.dumps(row | about), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
