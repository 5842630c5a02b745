"""Paired mismatch of a real vLLM on a GPU: ``python tests/vllm_kl.py smollm2|moe [ROUNDS]``.

In every round the weights change, the 4-bit engine takes them by `Rollout.sync`, and generates. The same tokens are
then scored three times: by the 4-bit engine, by an engine that holds the dequantized weights in bf16, and by the
trainer. What each engine differs from the trainer by is the k3 estimate of the KL divergence; their ratio says what
4-bit kernels add to the mismatch that bf16 has anyway. Sequences are drawn with replacement for its bound.

Prints one line of JSON at the end, beginning with RESULT.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm_cases import CONFIG, trainer

import nvfp4_qat as nq
from nvfp4_qat.models import load_model
from nvfp4_qat.rollout import EXTENSION, Rollout

SEQUENCES, TOKENS = 64, 64
NOISE = 0.02
"""Of a round, relative to a weight tensor's mean magnitude: more codes change than by an optimizer step."""


def engine(path: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(path), skip_tokenizer_init=True, max_model_len=256, max_num_seqs=SEQUENCES, seed=0,
        gpu_memory_utilization=0.5, kv_cache_memory_bytes=2 << 30, **options,
    )  # fmt: skip


def prepared(kind: str) -> tuple[Any, nq.QuantPlan, list[list[int]]]:
    """A model that is trained in 4 bits, its plan, and prompts."""
    if kind == "smollm2":
        loaded = load_model("smollm2")
        plan = nq.apply_qat(loaded.model.cuda(), CONFIG)
        texts = [f"Tell me something about the number {i} that" for i in range(SEQUENCES)]
        return loaded.model, plan, [loaded.tokenizer(text)["input_ids"] for text in texts]
    model, plan = trainer(kind)
    return model, plan, [[(7 * i + 3 * j) % 1000 for j in range(12)] for i in range(SEQUENCES)]


def move(model: Any, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                noise = torch.randn(p.shape, generator=generator, device="cuda", dtype=torch.float32)
                p.add_((noise * p.abs().mean() * NOISE).to(p.dtype))


def generated(llm: Any, prompts: list[list[int]], seed: int) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, seed=1000 * seed + i)
        for i in range(len(prompts))
    ]
    done = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in done]


def scored(llm: Any, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """Log-probabilities of the responses' tokens, [sequence, token]."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    whole = [{"prompt_token_ids": p + r} for p, r in zip(prompts, responses, strict=True)]
    rows = []
    for output, p, r in zip(llm.generate(whole, sampling, use_tqdm=False), prompts, responses, strict=True):
        entries = output.prompt_logprobs[len(p) :]
        rows.append([entry[token].logprob for entry, token in zip(entries, r, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def trained(model: Any, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
    """What the trainer's forward gives for the same tokens; sequences of a length go through it together."""
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    for length in {len(p) for p in prompts}:
        chosen = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] + responses[i] for i in chosen], device="cuda")
        logits = model(input_ids=ids).logits[:, length - 1 : -1].float()
        found = logits.log_softmax(-1).gather(2, ids[:, length:, None])[..., 0].double().cpu()
        for i, row in zip(chosen, found, strict=True):
            rows[i] = row
    return torch.stack(rows)


def k3(trainer: Tensor, engine: Tensor) -> Tensor:
    ratio = trainer - engine
    return ratio.exp() - ratio - 1


def bound(four: Tensor, sixteen: Tensor, draws: int = 10_000) -> float:
    """The 95th percentile of the ratio over sequences drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(four), (draws, len(four)), generator=generator)
    ratios = four.mean(1)[picked].mean(1) / sixteen.mean(1)[picked].mean(1)
    return float(ratios.quantile(0.95))


def paired(kind: str, rounds: int) -> dict[str, Any]:
    model, plan, prompts = prepared(kind)
    model.eval()
    four_bit: list[Tensor] = []
    bf16: list[Tensor] = []
    stale: list[Tensor] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:

        def write(name: str) -> tuple[Path, Path]:
            packed, dequantized = Path(folder, name, "nvfp4"), Path(folder, name, "bf16")
            nq.save_checkpoint(model, packed)
            nq.load_checkpoint(packed).save_pretrained(dequantized)
            return packed, dequantized

        packed, dequantized = write("first")
        llm = engine(packed, worker_extension_cls=EXTENSION)
        other = engine(dequantized)
        rollout = Rollout.connect(llm, plan)
        for i in range(rounds):
            move(model, i)
            report = rollout.sync(model)
            _, dequantized = write(f"round{i}")
            if i == 0:  # what a mismatch looks like: the weights before the first update
                responses = generated(llm, prompts, 1000)
                stale.append(k3(trained(model, prompts, responses), scored(other, prompts, responses)))
            other.collective_rpc("reload_weights", kwargs={"weights_path": str(dequantized)})
            other.reset_prefix_cache()
            responses = generated(llm, prompts, i)
            expected = trained(model, prompts, responses)
            four_bit.append(k3(expected, scored(llm, prompts, responses)))
            bf16.append(k3(expected, scored(other, prompts, responses)))
            ratio = four_bit[-1].mean() / bf16[-1].mean()
            print(f"round {i}: {four_bit[-1].mean():.3e} {bf16[-1].mean():.3e} ratio {ratio:.3f}", flush=True)
    four, sixteen = torch.cat(four_bit), torch.cat(bf16)
    return {
        "model": kind, "rounds": rounds, "tokens": four.numel(), "k3_nvfp4": float(four.mean()),
        "k3_bf16": float(sixteen.mean()), "ratio": float(four.mean() / sixteen.mean()),
        "bound95": bound(four, sixteen), "k3_one_update_behind": float(torch.cat(stale).mean()),
        "version": report.version,
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "vllm": __import__("vllm").__version__,
    }  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    result = paired(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
    print("RESULT " + json.dumps(result), flush=True)
