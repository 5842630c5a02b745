"""What needs a real vLLM on a GPU, each case in a process of its own: ``python tests/vllm_cases.py CASE``.

A case prints one line of JSON at the end. `test_vllm.py` runs them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm_checks import CHECKED, weights
from vllm_experts import wrong_experts

import nvfp4_qat as nq
from nvfp4_qat.rollout import Rollout

ALTERED = ("weight", "weight_packed", "weight_scale", "bias", "w13_weight", "w13_weight_scale", "w2_weight")
CONFIG = nq.QATConfig(enable=True)
SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 512,
}  # fmt: skip


def trainer(kind: str) -> tuple[Any, nq.QuantPlan]:
    """A small model with random weights, prepared for training in 4 bits."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    experts = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    heads = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = {
        "dense": lambda: Qwen3Config(**SIZES),
        "tied": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
        "bias": lambda: Qwen2Config(**heads),
        "moe": lambda: Qwen3MoeConfig(**SIZES, **experts),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(std=0.02 if p.ndim > 1 else 0.5)
    return model, nq.apply_qat(model, CONFIG)


def engine(path: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(path), skip_tokenizer_init=True, max_model_len=256, gpu_memory_utilization=0.2, max_num_seqs=64,
        kv_cache_memory_bytes=1 << 30, worker_extension_cls=CHECKED, **options,
    )  # fmt: skip


def perturb(model: Any, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, device="cuda", dtype=p.dtype) * p.abs().mean() * 0.3)


def worker_of(llm: Any) -> Any:
    """The worker of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


@contextmanager
def another_model(worker: Any) -> Iterator[None]:
    """Let a second model be built with the engine's configuration."""
    context = worker.vllm_config.compilation_config.static_forward_context
    before = dict(context)
    context.clear()
    try:
        yield
    finally:
        context.clear()
        context.update(before)


def fresh(worker: Any, path: Path) -> Any:
    """A model that vLLM loads from a checkpoint, as at its start."""
    from copy import copy

    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = copy(worker.vllm_config)
    config.model_config = copy(config.model_config)
    config.model_config.model = str(path)
    with another_model(worker), set_current_vllm_config(config):
        return get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def weights_in_kernels(model: Any, live: Any, plan: nq.QuantPlan) -> list[str]:
    """Quantized linear layers whose weight, read by multiplying an identity, is not the trainer's to the bit."""
    wrong = []
    masters = dict(model.named_parameters())
    for group, members in plan.groups().items():
        if members[0].batch_dims:
            continue
        layer = live.get_submodule(group)
        x = torch.eye(members[0].shape[1], dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            y = layer(x)
            y = (y[0] if isinstance(y, tuple) else y).t()
            y = y if layer.bias is None else y - layer.bias[:, None]
        g = nq.global_scale(torch.stack([nq.amax(masters[m.name]) for m in members]).amax(0))
        expected = torch.cat([nq.fake_quantize(masters[m.name].detach(), g) for m in members])
        if layer.bias is None and not torch.equal(y, expected):
            wrong.append(group)
    return wrong


def drift(rollout: Rollout, model: Any, live: Any, ours: Any) -> list[str]:
    """A byte of each kernel tensor is altered: what was not found by its layer's name, or not repaired by that alone.

    Args:
        rollout: connected with ``changes=True``.
    """
    wrong = []
    for i in range(3):
        perturb(model, 100 + i)
        full = rollout.sync(model).bytes
    for key, t in weights(live, ours).items():
        layer, _, path = key.partition(" ")
        if path not in ALTERED or not t.is_contiguous():
            continue
        data = t.data.view(-1).view(torch.uint8)
        data[len(data) // 3] ^= 1
        try:
            rollout.verify()
            wrong.append(f"{key} was not found")
        except nq.MismatchError as error:
            if layer not in str(error):
                wrong.append(f"{key}: {error}")
        report = rollout.sync(model)
        if [found.partition(": ")[2] for found in report.repaired] != [layer] or report.bytes >= full:
            wrong.append(f"{key}: repaired {report.repaired} by {report.bytes} of {full} bytes")
        rollout.verify()
    rollout.verify(model)
    return wrong


def exact(kind: str, rounds: int = 20, **options: Any) -> dict[str, Any]:
    """Many updates in a row, tokens in between: at the end every tensor of the engine is a freshly loaded one's."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        first, last = Path(folder, "first"), Path(folder, "last")
        model, plan = trainer(kind)
        nq.save_checkpoint(model, first)
        llm = engine(first, **options)
        worker = worker_of(llm)
        live = worker.model_runner.get_model()
        rollout = Rollout.connect(llm, plan)
        state = worker.__dict__["_nvfp4_state"]
        code = state.code
        addresses = {k: t.data_ptr() for k, t in weights(live, code.ours).items()}
        prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 for j in range(16)]} for i in range(16)]
        greedy = SamplingParams(temperature=0.0, max_tokens=16, detokenize=False)
        seconds = []
        for i in range(rounds):
            perturb(model, i)
            seconds.append(rollout.sync(model).seconds)
            out = llm.generate(prompts, greedy, use_tqdm=False)
        rollout.verify()
        rollout.verify(model)
        nq.save_checkpoint(model, last)
        other = fresh(worker, last)
        now, want = weights(live, code.ours), weights(other, code.ours)
        found = {
            "tensors": len(now),
            "other_names": sorted(now.keys() ^ want.keys())[:10],
            "different": [k for k, t in now.items() if k in want and not same_bits(t, want[k])][:10],
            "moved": [k for k, t in now.items() if t.data_ptr() != addresses.get(k)][:10],
            "wrong_in_kernels": weights_in_kernels(model, live, plan),
            "tokens": sum(len(o.outputs[0].token_ids) for o in out),
            "seconds": [round(s, 3) for s in seconds],
            "quick": [state.live.quick.taken, state.live.quick.proved, state.live.quick.refused],
        }
        started = time.perf_counter()
        rollout.verify()
        found["verify_seconds"] = round(time.perf_counter() - started, 4)
        if kind == "moe":
            found["wrong_experts"] = wrong_experts(model, rollout, live, worker.vllm_config)
        if kind in ("dense", "moe"):
            found["drift"] = drift(Rollout.connect(llm, plan, changes=True), model, live, code.ours)
        return found


def apart(
    kind: str, rounds: int = 6, transport: Any = "auto", device: int | None = None, **options: Any
) -> dict[str, Any]:
    """After several updates an engine in processes of its own has the tensors of one that loads the checkpoint.

    Args:
        device: the only GPU that the engine sees.
    """
    from vllm import SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        first, last = Path(folder, "first"), Path(folder, "last")
        model, plan = trainer(kind)
        nq.save_checkpoint(model, first)
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
        llm = engine(first, **options)
        rollout = Rollout.connect(llm, plan, transport=transport)
        prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 for j in range(16)]} for i in range(16)]
        greedy = SamplingParams(temperature=0.0, max_tokens=16, detokenize=False)

        def tokens() -> list[list[int]]:
            return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]

        before = tokens()
        reports = []
        for i in range(rounds):
            perturb(model, i)
            reports.append(rollout.sync(model))
            after = tokens()
        now = llm.collective_rpc("checked_digests")
        nq.save_checkpoint(model, last)
        want = engine(last, enforce_eager=True, **options).collective_rpc("checked_digests")
        different = [
            f"{rank} {n}" for rank, (a, b) in enumerate(zip(now, want, strict=True)) for n in a if a[n] != b.get(n)
        ]
        return {
            "changed": before != after, "tensors": [len(d) for d in now], "different": different[:10],
            "other_names": [sorted(a.keys() ^ b.keys())[:5] for a, b in zip(now, want, strict=True)],
            "bytes": reports[-1].bytes, "extra_bytes": reports[-1].extra_bytes,
            "seconds": [round(r.seconds, 3) for r in reports],
        }  # fmt: skip


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "exact-dense": lambda: exact("dense"),
    "exact-tied": lambda: exact("tied", 3),
    "exact-bias": lambda: exact("bias", 3),
    "exact-moe": lambda: exact("moe"),
    "shared-dense": lambda: apart("dense"),
    "shared-moe": lambda: apart("moe"),
    "broadcast-dense": lambda: apart("dense", transport="broadcast", device=1),
    "tp2-dense": lambda: apart("dense", tensor_parallel_size=2),
    "tp2-moe": lambda: apart("moe", tensor_parallel_size=2),
    "ep2-moe": lambda: apart("moe", tensor_parallel_size=2, enable_expert_parallel=True),
}

if __name__ == "__main__":
    result = CASES[sys.argv[1]]()
    print("RESULT " + json.dumps(result), flush=True)
