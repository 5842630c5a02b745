"""verl with Ray, FSDP and vLLM on GPUs: ``python tests/verl_grpo.py ARM MODEL OUT [KEY=VALUE ...]``.

ARM is ``bf16``, ``noqat`` (trained in bf16, sampled in 4 bits) or ``qat``; MODEL is ``dense`` or ``moe``. A small Qwen3
is first trained by supervised learning to add numbers, so that there is a reward between nothing and everything; then
verl's GRPO goes on with it. OUT gets the model (used again if it is there), the data, verl's log and its metrics of
every step; at the end one line of JSON that begins with RESULT. What stands behind OUT is for verl's command line.

Options by environment: STEPS (15), STRATEGY (fsdp2), GPUS (1), TP (1).
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import nvfp4_qat as nq

ARMS = ("bf16", "noqat", "qat")
MODELS = ("dense", "moe")
PROMPT, RESPONSE, TARGET = 24, 8, 0.45
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": None,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2}

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.strip() == ground_truth)
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def tokenizer() -> Any:
    """Bytes, and what verl wants of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>", additional_special_tokens=["<|im_start|>"]
    )
    made.chat_template = TEMPLATE
    return made


def question(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a}+{b}=", str(a + b)


def batch(tok: Any, rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, ``[count, length]``; only answers have labels."""
    rows, labels = [], []
    for _ in range(count):
        asked, answer = question(rng)
        before = tok.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        after = tok(answer)["input_ids"] + [tok.eos_token_id]
        rows.append(before + after)
        labels.append([-100] * len(before) + after)
    length = max(map(len, rows))
    pad = [[tok.pad_token_id] * (length - len(row)) for row in rows]
    return (
        torch.tensor([row + p for row, p in zip(rows, pad, strict=True)]),
        torch.tensor([row + [-100] * len(p) for row, p in zip(labels, pad, strict=True)]),
    )


def right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The chance that an answer is sampled without a mistake, on average."""
    of = labels[:, 1:]
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, of.clamp(min=0)[..., None])[..., 0]
    return float(torch.where(of >= 0, chosen, 0).sum(1).exp().mean())


def warm_up(folder: Path, kind: str, device: str, most: int = 6000) -> float:
    """Save a model that adds two numbers of two digits about half of the time."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    tok, rng = tokenizer(), random.Random(0)
    options = {**SIZES, "vocab_size": len(tok), "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    config = Qwen3MoeConfig(**options, **EXPERTS) if kind == "moe" else Qwen3Config(**options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), 0.0
    held_out = [t.to(device) for t in batch(tok, random.Random(1), 256)]
    for step in range(most):
        ids, labels = (t.to(device) for t in batch(tok, rng, 128))
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            with torch.no_grad():
                chance = right(model(input_ids=held_out[0]).logits, held_out[1])
            if chance >= TARGET:
                break
    model.to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)
    return chance


def data(folder: Path) -> None:
    import pandas as pd

    for split, rows, seed in (("train", 4096, 2), ("test", 128, 3)):
        rng, found = random.Random(seed), []
        for index in range(rows):
            asked, answer = question(rng)
            found.append({
                "data_source": "add", "prompt": [{"role": "user", "content": asked}], "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": {"index": index},
            })  # fmt: skip
        pd.DataFrame(found).to_parquet(folder / f"{split}.parquet")
    (folder / "reward.py").write_text(REWARD)


def arguments(arm: str, out: Path, steps: int, strategy: str, gpus: int, tp: int) -> list[str]:
    """verl's command line."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    found = [
        "algorithm.adv_estimator=grpo", "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_is_threshold=2.0", f"data.train_files={out / 'train.parquet'}",
        f"data.val_files={out / 'test.parquet'}", "data.train_batch_size=64", f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}", f"actor_rollout_ref.model.path={out / 'model'}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa", f"{actor}.strategy={strategy}",
        f"{actor}.use_kl_loss=False", f"{actor}.ppo_mini_batch_size=32", f"{actor}.ppo_micro_batch_size_per_gpu=64",
        f"{actor}.optim.lr=1e-5", f"{rollout}.name=vllm", f"{rollout}.n=8", f"{rollout}.gpu_memory_utilization=0.2",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=128", f"{rollout}.calculate_log_probs=True",
        f"{rollout}.tensor_model_parallel_size={tp}", "+ray_kwargs.ray_init.include_dashboard=False",
        f"trainer.n_gpus_per_node={gpus}", "trainer.nnodes=1", f"trainer.total_training_steps={steps}",
        'trainer.logger=["console","file"]', "trainer.val_before_train=False", "trainer.test_freq=-1",
        "trainer.save_freq=-1", f"trainer.default_local_dir={out / 'checkpoints'}",
        f"reward.custom_reward_function.path={out / 'reward.py'}",
        "reward.custom_reward_function.name=compute_score",
    ]  # fmt: skip
    if arm != "bf16":
        path = out / f"{arm}.json"
        document = nq.QATConfig(enable=True).to_compressed_tensors(list(nq.QATConfig().ignore_patterns))
        path.write_text(json.dumps({**document, "nvfp4_qat": {"train": arm == "qat"}}))
        found += [f"{actor}.qat.enable=True", f"{actor}.qat.quantization_config_path={path}"]
    return found


def rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "actor/grad_norm" in entry["data"]:
            yield {"step": entry["step"], **entry["data"]}


def told(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's metrics say."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in found if name in row]
        return statistics.fmean(values) if values else None

    names = (
        "rollout_corr/k3_kl", "rollout_corr/kl", "critic/score/mean", "actor/grad_norm", "actor/entropy",
        "timing_s/step", "timing_s/update_weights", "qat/sync_bytes", "qat/coverage", "qat/flip_rate",
    )  # fmt: skip
    return {"steps": len(found), **{name: mean(name) for name in names}}


def main(arm: str, kind: str, out: Path, *overrides: str) -> dict[str, Any]:
    assert arm in ARMS and kind in MODELS, __doc__
    out.mkdir(parents=True, exist_ok=True)
    steps, gpus, tp = (int(os.environ.get(name, default)) for name, default in (("STEPS", 15), ("GPUS", 1), ("TP", 1)))
    strategy = os.environ.get("STRATEGY", "fsdp2")
    if not (out / "model" / "config.json").exists():
        warm_up(out / "model", kind, "cuda" if torch.cuda.is_available() else "cpu")
    data(out)
    metrics, log = out / f"metrics-{arm}.jsonl", out / f"log-{arm}.txt"
    environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(metrics), "HYDRA_FULL_ERROR": "1"}
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        *arguments(arm, out, steps, strategy, gpus, tp),
        *overrides,
    ]
    start = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    said = sorted(
        {line.split("nvfp4-qat: ")[1] for line in log.read_text(errors="replace").splitlines() if "nvfp4-qat: " in line}
    )
    found = list(rows(metrics)) if metrics.exists() else []
    about = {"arm": arm, "model": kind, "strategy": strategy, "gpus": gpus, "tensor_parallel": tp}
    return {**about, "exit": code, "seconds": round(time.perf_counter() - start, 1), **told(found), "said": said}


if __name__ == "__main__":
    result = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve(), *sys.argv[4:])
    print("RESULT " + json.dumps(result), flush=True)
    sys.exit(result["exit"])
