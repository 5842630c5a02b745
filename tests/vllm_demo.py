"""The demo with a real vLLM on a GPU: ``python tests/vllm_demo.py CASE``, where CASE is one of `CASES`.

A case runs a few steps, each arm with an engine of its own, and prints one line of JSON that begins with RESULT.
`test_vllm.py` runs them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers_rl import TOKENIZER, EvenFirst

from nvfp4_qat import demo
from nvfp4_qat.cli import main
from nvfp4_qat.demo_config import DemoConfig

STEPS = 3


def save_model(folder: Path) -> None:
    """A small Qwen3 with random weights that are far enough from uniform for rounding to show."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=len(TOKENIZER), max_position_embeddings=256, tie_word_embeddings=False,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


def told(out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What a run's files say of each arm."""
    found: dict[str, Any] = {}
    for arm, entry in summary["arms"].items():
        rows = [json.loads(line) for line in (out / f"metrics-{arm}.jsonl").read_text().splitlines()]
        found[arm] = {
            "k3": entry["k3_kl_mean"],
            "versions": [row["sync_version"] for row in rows],
            "bytes": entry["sync_bytes"],
            "sync_seconds": [round(row["sync_seconds"], 3) for row in rows],
            "wake_and_sync_seconds": [round(row["time/sync"], 3) for row in rows],
            "sleep_seconds": [round(row["time/sleep"], 3) for row in rows],
            "groups_trained": sum(row["groups_trained"] for row in rows),
            "codes_changed": [row.get("flips/codes", 0.0) for row in rows],
        }
    return found


def small(arms: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """A random model, trained for responses that begin with an even character."""
    demo.make_task = lambda spec, model="": EvenFirst()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"))
        out = Path(folder, "run")
        cfg = DemoConfig(
            out, str(Path(folder, "model")), arms=arms, rollout="vllm", steps=STEPS, prompts=32, samples=8,
            max_batches=1, minibatches=2, lr=1e-4, warmup_steps=0, progress=False, rollout_memory=0.1, **settings,
        )  # fmt: skip
        summary = demo.run_demo(cfg)
        free, total = torch.cuda.mem_get_info()
        return {"arms": told(out, summary), "report": (out / "report.html").stat().st_size, "free_share": free / total}


def command(model: str, *options: str) -> dict[str, Any]:
    """The command as a user gives it, with few steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        arguments = ["demo", "--model", model, "--out", str(out), "--rollout", "vllm", "--rollout-memory", "0.1"]
        arguments += ["--steps", str(STEPS), "--warmup-steps", "20", "--cache", str(Path(folder, "cache")), "--quiet"]
        with contextlib.redirect_stdout(sys.stderr):
            code = main([*arguments, *options])
        assert code == 0
        return {"arms": told(out, json.loads((out / "summary.json").read_text()))}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "sleep0": lambda: small(("bf16", "qat")),
    "sleep1": lambda: small(("bf16", "qat"), sleep=1),
    "sleep2": lambda: small(("bf16", "noqat", "qat"), sleep=2),
    "other-gpu": lambda: small(("bf16", "qat"), rollout_device="cuda:1"),
    "tiny": lambda: command("tiny", "--arms", "bf16,qat", "--sleep", "1"),
    "tiny-moe": lambda: command("tiny-moe", "--arms", "bf16,qat", "--sleep", "2"),
}

if __name__ == "__main__":
    started = time.perf_counter()
    result = CASES[sys.argv[1]]()
    result["seconds"] = round(time.perf_counter() - started, 1)
    print("RESULT " + json.dumps(result), flush=True)
