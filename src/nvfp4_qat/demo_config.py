"""`DemoConfig`: everything that decides what a demo run computes, and what suits each built-in model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import UserError

ARMS = ("bf16", "noqat", "qat", "qat-ffn")

ENGINES = ("builtin", "vllm")

PLACEMENT = ("sleep", "rollout_device", "rollout_memory", "rollout_kv_cache")
"""Settings that decide where and when vLLM computes, not what."""

TRAINER_GPU = "cuda:0"
"""Where the trainer computes when vLLM samples; the builtin engine and its trainer are on the CPU."""


@dataclass(frozen=True)
class DemoConfig:
    """One run of the experiment of `nvfp4_qat.rl`. The defaults are those of the model ``tiny``; see `for_model`.

    Args:
        out: directory of the results; empty or new unless ``resume``.
        model: what `nvfp4_qat.models.load_model` takes.
        task: what `nvfp4_qat.tasks.make_task` takes.
        arms: which of `ARMS`, in the order in which they run.
        rollout: which of `ENGINES` samples: ``builtin`` (`nvfp4_qat.engine`, on the CPU, as the trainer then is) or
            ``vllm`` (`nvfp4_qat.vllm_engine`, with the trainer on `TRAINER_GPU`).
        sleep: level at which vLLM sleeps while the trainer computes on the same GPU, 1 or 2; 0: never.
        rollout_device: vLLM's GPU, "cuda:N" as this process numbers it; None: the trainer's.
        rollout_memory: share of that GPU's memory that vLLM takes, KV cache included.
        rollout_kv_cache: size of the KV cache in GiB; None: what is left of that share when the weights and the largest
            forward have their place. vLLM finds that out by trying, which fails where others allocate meanwhile: give
            a size where several runs share a GPU.
        steps: RL steps of each arm.
        prompts: groups trained on in a step.
        samples: responses in a group.
        max_batches: batches of ``prompts`` drawn at most to find that many groups which teach something; 1: what is
            drawn first must do.
        minibatches: optimizer steps in an RL step.
        micro_batch: sequences in one forward of the trainer.
        lr: learning rate of AdamW, constant.
        weight_decay: of AdamW.
        max_grad_norm: gradient clipping.
        clip_low, clip_high, clip_dual: see `nvfp4_qat.grpo.policy_loss`.
        tis: bound of the token-level importance weights that correct the mismatch; None leaves it uncorrected.
        overlong_factor: see `nvfp4_qat.grpo.overlong_penalty`.
        warmup_steps: supervised steps on the task's answers before RL, for models made here from random; 0: none.
        warmup_batch: sequences in such a step.
        warmup_lr: its peak learning rate; without ``warmup_until`` it falls to a tenth of that.
        warmup_until: end the warm-up before its last step once a right answer is sampled with this chance, on average
            over held-out problems; None: make all steps.
        eval_every: steps between evaluations (`nvfp4_qat.rollouts.evaluate`) in the arm's own rollout precision; 0:
            none. The first is before the first step, the last after the last one.
        eval_problems: most problems of an evaluation (`nvfp4_qat.tasks`), no two alike, the same in every arm and at
            every step; a row says how many there were.
        eval_samples: responses to each of them.
        seed: of prompts and sampling, and of the model where ``model_seed`` is None.
        model_seed: of random weights and their warm-up.
        resume: continue the run in ``out``.
        keep_every: steps between copies of the weights that stay in ``out`` (`nvfp4_qat.runlog.kept_weights`); 0: none.
            The first is of the weights before the first step, the last of those after the last one.
        checkpoint_seconds: least time between two checkpoints of the trainer, in the warm-up and after it.
        cache: directory of warmed-up models; None: the user's cache directory.
        progress: show a progress bar on stderr.

    Raises:
        UserError: a value is out of range or an arm is not known.
    """

    out: Path
    model: str = "tiny"
    task: str = "auto"
    arms: tuple[str, ...] = ("bf16", "noqat", "qat")
    rollout: str = "builtin"
    sleep: int = 0
    rollout_device: str | None = None
    rollout_memory: float = 0.3
    rollout_kv_cache: float | None = None
    steps: int = 60
    prompts: int = 32
    samples: int = 8
    max_batches: int = 3
    minibatches: int = 4
    micro_batch: int = 256
    lr: float = 5e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    clip_dual: float = 10.0
    tis: float | None = 2.0
    overlong_factor: float = 1.0
    warmup_steps: int = 80
    warmup_batch: int = 128
    warmup_lr: float = 1e-3
    warmup_until: float | None = None
    eval_every: int = 0
    eval_problems: int = 128
    eval_samples: int = 4
    seed: int = 0
    model_seed: int | None = None
    resume: bool = False
    keep_every: int = 0
    checkpoint_seconds: float = 30.0
    cache: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise UserError(f"arms must be some of {', '.join(ARMS)}, each once; got {', '.join(self.arms) or 'none'}")
        least = {
            "steps": 1, "prompts": 1, "samples": 2, "max_batches": 1, "minibatches": 1, "micro_batch": 1,
            "warmup_steps": 0, "warmup_batch": 1, "eval_every": 0, "eval_problems": 1, "eval_samples": 1,
            "keep_every": 0, "checkpoint_seconds": 0, "weight_decay": 0, "overlong_factor": 0,
        }  # fmt: skip
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UserError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.warmup_until is not None and not 0 < self.warmup_until < 1:
            raise UserError(f"warmup_until is a chance, above 0 and below 1; got {self.warmup_until}")
        for name in (
            "lr",
            "warmup_lr",
            "max_grad_norm",
            "clip_low",
            "clip_high",
            "clip_dual",
            "tis",
            "rollout_kv_cache",
        ):
            value = getattr(self, name)
            if not (value is None or value > 0):
                raise UserError(f"{name} must be positive, got {value}")
        self._check_rollout()

    def _check_rollout(self) -> None:
        """What can be said about the engine without looking at this machine."""
        if self.rollout not in ENGINES:
            raise UserError(f"rollout must be one of {', '.join(ENGINES)}, got {self.rollout!r}")
        if self.rollout != "vllm" and (self.sleep or self.rollout_device or self.rollout_kv_cache):
            raise UserError(
                "sleep, rollout_device and rollout_kv_cache are settings of vLLM: give --rollout vllm with them"
            )
        if self.sleep not in (0, 1, 2):
            raise UserError(f"sleep must be 0 (never) or one of vLLM's levels 1 and 2, got {self.sleep}")
        if not 0 < self.rollout_memory <= 1:
            raise UserError(f"rollout_memory is a share of a GPU's memory, from 0 to 1; got {self.rollout_memory}")
        if self.sleep and self.rollout_device not in (None, TRAINER_GPU):
            raise UserError(
                f"vLLM sleeps to leave its memory to the trainer, which is on {TRAINER_GPU}, not on "
                f"{self.rollout_device}: leave out --sleep or --rollout-device"
            )

    @classmethod
    def for_model(cls, model: str, out: Path, **overrides: Any) -> DemoConfig:
        """Return the settings that suit a model, some of them overridden.

        Args:
            model: a name of `PRESETS`; any other model gets the settings of ``smollm2``.
            out: directory of the results.
            overrides: fields of `DemoConfig` by name.
        """
        return cls(**{"out": out, "model": model, **PRESETS.get(model, PRESETS["smollm2"]), **overrides})

    @property
    def weights_seed(self) -> int:
        """The seed of random weights and their warm-up."""
        return self.seed if self.model_seed is None else self.model_seed

    def starting_point(self) -> dict[str, Any]:
        """What the weights before the first step follow from; with equal ones they are equal, on the same machine."""
        names = ("model", "task", "weights_seed", "warmup_steps", "warmup_batch", "warmup_lr", "warmup_until")
        return {name: getattr(self, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """The fields that a result depends on: all but where it is kept and shown, and where an engine is."""
        skipped = {"out", "arms", "resume", "checkpoint_seconds", "keep_every", "cache", "progress", *PLACEMENT}
        return {name: value for name, value in asdict(self).items() if name not in skipped}


_SMALL = {
    "steps": 200,
    "samples": 16,
    "micro_batch": 512,
    "lr": 1e-5,
    "warmup_steps": 20_000,
    "warmup_batch": 256,
    "warmup_lr": 5e-4,
    "warmup_until": 0.4,
    "eval_every": 20,
}

FOR_A_GPU = ("small", "small-moe")
"""Models whose warm-up takes a CPU days."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {},
    "tiny-moe": {},
    "small": _SMALL,
    "small-moe": _SMALL,
    "smollm2": {
        "steps": 12,
        "prompts": 8,
        "samples": 8,
        "max_batches": 2,
        "minibatches": 2,
        "micro_batch": 16,
        "lr": 1e-5,
        "warmup_steps": 0,
    },
}
"""What differs from the defaults."""
