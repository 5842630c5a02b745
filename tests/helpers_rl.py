"""A model of a few thousand weights, a task that random weights half solve, a batch to train on, and a run."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from nvfp4_qat.demo_config import DemoConfig
from nvfp4_qat.engine import Sample
from nvfp4_qat.models import tiny_tokenizer
from nvfp4_qat.rl import train_arm
from nvfp4_qat.rollouts import Graded, collate
from nvfp4_qat.runlog import ArmLog
from nvfp4_qat.tasks import EVAL_KEY, Grade, Problem, SortDigits

TOKENIZER = tiny_tokenizer()


def micro_model(moe: bool = False, tied: bool = True, seed: int = 0):
    shape = {
        "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id,
    }  # fmt: skip
    moe_shape = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**shape, **moe_shape) if moe else Qwen3Config(**shape)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


class EvenFirst:
    """Right is a response that begins with a character of even code: about half of what random weights produce."""

    name = "even-first"
    max_new_tokens = 5
    overlong_buffer = 2

    def __init__(self):
        self.drawn = []

    def problems(self, count, key):
        self.drawn.append((key, SortDigits(digits=3).problems(count, key)))
        return self.drawn[-1][1]

    def evaluation(self, count):
        return self.problems(count, EVAL_KEY)

    def grade(self, problem: Problem, response: str) -> Grade:
        correct = bool(response) and ord(response[0]) % 2 == 0
        return Grade(1.0 if correct else -1.0, correct, response[:1])


def micro_config(out: Path, **overrides) -> DemoConfig:
    defaults = {
        "steps": 4, "prompts": 3, "samples": 4, "max_batches": 2, "micro_batch": 5, "lr": 1e-3, "progress": False,
        "checkpoint_seconds": 0.0, "warmup_steps": 0,
    }  # fmt: skip
    return DemoConfig(out, **{**defaults, **overrides})


def make_batch():
    """Three groups of four graded responses, of one to four tokens."""
    torch.manual_seed(0)
    groups = []
    for _ in range(3):
        responses = [torch.randint(3, 90, (length,)).tolist() for length in (1, 3, 4, 2)]
        groups.append(
            [
                Graded(Sample([15, 16], r, [-4.5] * len(r)), reward, reward > 0)
                for r, reward in zip(responses, (1.0, -1.0, -1.0, 1.0), strict=True)
            ]
        )
    return collate(groups, 0)


def run_arm(cfg: DemoConfig, arm: str, on_step=lambda row: None, base=None, task=None):
    """Run or resume one arm; returns its rows without the timings."""
    cfg.out.mkdir(exist_ok=True)
    log = ArmLog(cfg.out, arm, cfg.checkpoint_seconds)
    try:
        train_arm(base or micro_model(), TOKENIZER, task or EvenFirst(), arm, cfg, log, on_step, lambda steps: None)
    finally:
        log.close()
    return [without_timings(row) for row in log.rows]


def without_timings(row):
    return {name: value for name, value in row.items() if not name.startswith("time/")}
