"""What verl learns in our runs: a small Qwen3 adds two numbers, and has been taught so far that it is right half of the
time, so that there is a reward between nothing and everything; SmolLM2 writes a sentence with a word in it."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nvfp4_qat.models import load_model
from nvfp4_qat.tasks import OneSentence
from nvfp4_qat.tensor_digest import digest

MODELS = {"dense": "qwen3", "moe": "qwen3_moe", "smollm2": "llama"}
"""And what transformers calls them: four layers, 3 and 7 million parameters, and SmolLM2-135M-Instruct."""

LENGTHS = {"dense": (24, 8), "moe": (24, 8), "smollm2": (64, 32)}
"""Most tokens of a prompt and of a response."""

QUESTIONS = {"dense": 64, "moe": 64, "smollm2": 16}
"""Of a step, with eight answers each; there is an update for each half. 512 sequences take ten seconds whatever the
model."""

TARGET = 0.45
TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "dense": TINY,
    "moe": {**TINY, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip
LEARNING_RATE = 1e-3

HELD_OUT = 128
"""Questions that nothing is trained on."""

ADD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.strip() == ground_truth)
"""
WRITE = """
from nvfp4_qat.tasks import OneSentence, Problem

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(OneSentence().grade(Problem("", ground_truth), solution_str).correct)
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def prepare(out: Path, kind: str) -> None:
    """Put the model and the data into a folder, once; whoever wants them at the same time waits."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "prepared.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "model").exists():
            partial = out / "model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            if kind == "smollm2":
                pretrained(partial, kind)
            else:
                warm_up(partial, kind, "cuda" if torch.cuda.is_available() else "cpu")
            partial.rename(out / "model")
        if not (out / "test.parquet").exists():
            data(out, kind)
    found = json.loads((out / "model" / "config.json").read_text())["model_type"]
    assert found == MODELS[kind], f"{out} has a model {found}: choose another folder for {kind}"


def starting_weights(out: Path) -> str:
    """A digest of the weights that runs with a folder begin from."""
    from safetensors.torch import load_file

    tensors = dict[str, torch.Tensor]()
    for file in sorted((out / "model").glob("*.safetensors")):
        tensors |= load_file(file)
    assert tensors, f"{out / 'model'} has no weights"
    return digest(tensors)


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
    tokens = {"vocab_size": len(tok), "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    rest = {"head_dim": 64, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": None}
    options = {**SIZES[kind], **tokens, **rest}
    config = Qwen3MoeConfig(**options) if kind == "moe" else Qwen3Config(**options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0), 0.0
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


def pretrained(folder: Path, name: str) -> None:
    """Save one of the package's models that need no training before RL."""
    loaded = load_model(name)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def questions(kind: str, split: str, rows: int) -> Iterator[tuple[Sequence[Mapping[str, str]], str]]:
    """Messages, and what they are graded by."""
    if kind == "smollm2":
        task = OneSentence()
        for problem in task.problems(rows, "verl") if split == "train" else task.evaluation(rows):
            assert not isinstance(problem.prompt, str)
            yield problem.prompt, problem.answer
        return
    rng = random.Random({"train": 2, "test": 3}[split])
    for _ in range(rows):
        asked, answer = question(rng)
        yield [{"role": "user", "content": asked}], answer


def data(folder: Path, kind: str) -> None:
    """Questions for training and held out ones, and how answers are graded."""
    import pandas as pd

    (folder / "reward.py").write_text(WRITE if kind == "smollm2" else ADD)
    for split, rows in (("train", 4096), ("test", HELD_OUT)):
        found = []
        for index, (messages, answer) in enumerate(questions(kind, split, rows)):
            found.append({
                "data_source": kind, "prompt": list(messages), "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": {"index": index},
            })  # fmt: skip
        assert len(found) == rows
        pd.DataFrame(found).to_parquet(folder / f"{split}.parquet")
