"""verl with Ray, FSDP and vLLM on GPUs: ``python tests/verl_grpo.py ARM MODEL OUT [KEY=VALUE ...]``.

ARM is ``bf16``, ``noqat`` (trained in bf16, sampled in 4 bits) or ``qat``; MODEL is ``dense``, ``moe`` or ``smollm2``
(`verl_task`) and goes on learning with verl's GRPO. OUT gets the model and the data, used again if they are there; a
folder for the run, with verl's log and all of its metrics; and what is kept of these, ``row-*.json`` and
``metrics-*.jsonl`` (`verl_rows`). At the end stands one line of JSON that begins with RESULT. What stands behind OUT is
for verl's command line.

Options by environment: STEPS (15), STRATEGY (fsdp2), GPUS (1), TP (1), CPUS (what a run needs) for Ray, NAME (a word
for the files, where other overrides would give them the same name).

Any number of runs may go on at once on a machine, with the same OUT too: each is a Ray cluster of its own, with a
temporary folder for Ray and for sockets (`verl_sockets`). ``CUDA_VISIBLE_DEVICES`` says which GPUs a run may use.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_processes import Started
from verl_rows import circumstances, four_bit, said, steps, told, write
from verl_sockets import FOLDER
from verl_task import LENGTHS, MODELS, QUESTIONS, prepare, starting_weights

import nvfp4_qat as nq

HERE = Path(__file__).parent.resolve()
ARMS = ("bf16", "noqat", "qat")
STORAGE = 2
"""Processes that hold verl's batches; each takes one of Ray's CPUs."""

KV_CACHE = 1 << 30
"""Bytes. vLLM then does not measure what is free, which fails where others use the GPU meanwhile."""

OTHERS = ("RAY_ADDRESS", "VLLM_PORT", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Variables that would make a run part of something else."""

DEFAULTS = {
    "HYDRA_FULL_ERROR": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # which says how long each part of vLLM's start takes
    "TORCHINDUCTOR_COMPILE_THREADS": "4",
    "RES_OPTIONS": "timeout:1 attempts:1",  # names of hosts are asked for, and offline nobody answers
}


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        arm, model: see above.
        out: folder of the model and of all runs with it.
        gpus, tp: of trainer and rollout; GPUs that share a copy of the rollout.
        cpus: that Ray counts with; 0: as many as are needed.
        name: a word more for the names of files.
        place: of the run's own folder within `out`; "": its label.
    """

    arm: str
    model: str
    out: Path
    steps: int = 15
    strategy: str = "fsdp2"
    gpus: int = 1
    tp: int = 1
    cpus: int = 0
    name: str = ""
    place: str = ""

    def __post_init__(self) -> None:
        assert self.arm in ARMS and self.model in MODELS, __doc__

    @classmethod
    def asked(cls, arm: str, model: str, out: Path, **options: Any) -> Run:
        """With the options of the environment."""
        numbers = {name: int(os.environ[name.upper()]) for name in NUMBERS if name.upper() in os.environ}
        words = {name: os.environ[name.upper()] for name in WORDS if name.upper() in os.environ}
        return cls(arm, model, out, **{**options, **numbers, **words})

    @property
    def label(self) -> str:
        """Of the run, in the names of files."""
        parts = [self.model, self.arm, self.strategy, f"{self.gpus}gpu", f"tp{self.tp}"]
        return "-".join(parts + [self.name] * bool(self.name))

    @property
    def folder(self) -> Path:
        return self.out / (self.place or self.label)

    def about(self) -> dict[str, Any]:
        names = {"model": self.model, "strategy": self.strategy, "arm": self.arm, "name": self.name}
        return {**names, "gpus": self.gpus, "tensor_parallel": self.tp}

    def arguments(self, private: Path) -> list[str]:
        """verl's command line.

        Args:
            private: a folder for Ray; its path must be short.
        """
        (longest_prompt, longest_response), questions = LENGTHS[self.model], QUESTIONS[self.model]
        actor, rollout, ray = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "ray_kwargs.ray_init"
        # Its controller, and what `gpus` places are made of; actors take one more while they are started.
        needed = STORAGE + 1 + 3 * self.gpus + 2
        found = [
            "algorithm.adv_estimator=grpo", "algorithm.rollout_correction.rollout_is=token",
            "algorithm.rollout_correction.rollout_is_threshold=2.0", f"data.train_files={self.out / 'train.parquet'}",
            f"data.val_files={self.out / 'test.parquet'}", f"data.train_batch_size={questions}",
            f"data.max_prompt_length={longest_prompt}", f"data.max_response_length={longest_response}",
            f"actor_rollout_ref.model.path={self.out / 'model'}", "actor_rollout_ref.model.use_remove_padding=False",
            "+actor_rollout_ref.model.override_config.attn_implementation=sdpa", f"{actor}.strategy={self.strategy}",
            f"{actor}.use_kl_loss=False", f"{actor}.ppo_mini_batch_size={questions // 2}",
            f"{actor}.ppo_micro_batch_size_per_gpu=64", f"{actor}.optim.lr=1e-5", f"{rollout}.name=vllm",
            f"{rollout}.n=8",
            f"{rollout}.gpu_memory_utilization=0.2", f"{rollout}.log_prob_micro_batch_size_per_gpu=128",
            f"{rollout}.calculate_log_probs=True", f"{rollout}.tensor_model_parallel_size={self.tp}",
            f"+{rollout}.engine_kwargs.vllm.kv_cache_memory_bytes={KV_CACHE}", f"+{ray}.include_dashboard=False",
            f"+{ray}._temp_dir={private / 'ray'}", f"{ray}.num_cpus={self.cpus or needed}",
            f"trainer.n_gpus_per_node={self.gpus}", "trainer.nnodes=1", f"trainer.total_training_steps={self.steps}",
            'trainer.logger=["console","file"]', "trainer.val_before_train=False", "trainer.test_freq=-1",
            "trainer.save_freq=-1", "trainer.resume_mode=disable",
            f"trainer.default_local_dir={self.folder / 'checkpoints'}",
            f"reward.custom_reward_function.path={self.out / 'reward.py'}",
            "reward.custom_reward_function.name=compute_score",
            # Less of what waits or has to be started; each of these processes imports verl and vLLM.
            f"trainer.v1.sampler.custom_sampler.path={HERE / 'verl_buffer.py'}",
            "trainer.v1.sampler.custom_sampler.name=OftenAsked", f"{rollout}.agent.num_workers=2",
            "reward.num_workers=1", "data.dataloader_num_workers=0",
            f"transfer_queue.backend.SimpleStorage.num_data_storage_units={STORAGE}",
        ]  # fmt: skip
        if self.arm != "bf16":
            path = self.folder / f"{self.arm}.json"
            document = nq.QATConfig(enable=True).to_compressed_tensors(list(nq.QATConfig().ignore_patterns))
            path.write_text(json.dumps({**document, "nvfp4_qat": {"train": self.arm == "qat"}}))
            found += [f"{actor}.qat.enable=True", f"{actor}.qat.quantization_config_path={path}"]
        return found

    def environment(self, private: Path, metrics: Path) -> dict[str, str]:
        """Of the command."""
        inherited = {name: value for name, value in os.environ.items() if name not in OTHERS}
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile all of vLLM anew
        paths = [str(HERE), *map(os.path.abspath, filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep)))]
        modules = [*filter(None, [inherited.get("VERL_USE_EXTERNAL_MODULES")]), "verl_sockets"]
        return {
            **DEFAULTS, **inherited, "PYTHONPATH": os.pathsep.join(paths), FOLDER: str(private),
            "VERL_USE_EXTERNAL_MODULES": ",".join(modules), "VERL_FILE_LOGGER_PATH": str(metrics),
        }  # fmt: skip

    def start(self, private: Path, metrics: Path, log: Path, *overrides: str) -> Started:
        """Start verl in the run's folder, which is there."""
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *self.arguments(private), *overrides]
        return Started(command, log, self.environment(private, metrics), self.folder)


NUMBERS, WORDS = ("steps", "gpus", "tp", "cpus"), ("strategy", "name")


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """For what a run's processes have together; paths of sockets have at most 107 bytes."""
    return tempfile.TemporaryDirectory(prefix="verl-", ignore_cleanup_errors=True)


def main(arm: str, model: str, out: Path, *overrides: str) -> dict[str, Any]:
    run = Run.asked(arm, model, out)
    prepare(out, model)
    run.folder.mkdir(exist_ok=True)
    metrics, log = run.folder / "metrics.jsonl", run.folder / "log.txt"
    metrics.unlink(missing_ok=True)
    start = time.perf_counter()
    with private_folder() as private, run.start(Path(private), metrics, log, *overrides) as started:
        while started.wait(60) is None:
            pass
        code = started.code
    seconds = round(time.perf_counter() - start, 1)
    found = steps(metrics)
    row = {**run.about(), "starting_weights": starting_weights(out), "exit": code, **told(found)}
    row |= {"seconds": seconds, "said": said(log), **four_bit(said(log)), **circumstances()}
    write(out, run.label, row, found)
    return row


def ends_when_told() -> None:
    """Let SIGTERM end this process as an error does, so that what it has started ends too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


if __name__ == "__main__":
    ends_when_told()
    result = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve(), *sys.argv[4:])
    print("RESULT " + json.dumps(result), flush=True)
    sys.exit(result["exit"])
