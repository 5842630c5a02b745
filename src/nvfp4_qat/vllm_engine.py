"""vLLM as the demo's rollout engine: started once an arm, given new weights by `Rollout` after every step.

vLLM runs in a process of its own, on the trainer's GPU or on another one, and takes the same streams as the built-in
engine (`nvfp4_qat.engine`): packed weights where an arm samples in 4 bits, plain ones where it samples in bf16.

It is started with a checkpoint of the arm's first weights, and not with vLLM's random ones (``load_format="dummy"``).
These would also overwrite what a checkpoint does not bring and no sync replaces, such as the scales of attention
layers; a checkpoint costs a moment, and what the engine quantizes is then read from it as by any user. It lies where
the last start of the same model had its own (`start_folder`), so that vLLM finds again what it compiled then.

On a shared GPU vLLM may sleep while the trainer computes. It wakes up in two steps, so that its KV cache takes memory
only when the weights are in place and the buffers they came in are gone.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import save_checkpoint
from .core import apply_qat, qat_plan
from .demo_config import TRAINER_GPU, DemoConfig
from .engine import Loaded, Sample
from .errors import MismatchError, UserError
from .models import without_progress_bars
from .plan import QuantPlan
from .rollout import EXTENSION, Rollout
from .start_folder import start_folder, start_word

LONGEST = 4096
"""Most tokens of a prompt with its response, for models that take more; it bounds the KV cache of a request."""

MOST_AT_ONCE = 1024
"""Most sequences that vLLM computes at once; more are queued."""


def require_vllm(cfg: DemoConfig) -> None:
    """See that this machine has what a run with vLLM needs.

    Raises:
        UserError: vLLM is not installed, there is no GPU, or not the one that is asked for.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--rollout vllm needs vLLM: pip install 'nvfp4-qat[vllm,demo]' on a machine with a GPU, or leave --rollout "
            "at builtin"
        )
    if not torch.cuda.is_available():
        raise UserError("--rollout vllm needs a CUDA device, and PyTorch finds none: leave --rollout at builtin")
    _number(cfg.rollout_device or TRAINER_GPU)


def facts() -> dict[str, str]:
    """What samples and what computes, for a run's summary."""
    return {"vllm": importlib.metadata.version("vllm"), "gpu": torch.cuda.get_device_name()}


class VllmEngine:
    """A `vllm.LLM` that samples with a model's weights; `nvfp4_qat.engine.SamplingEngine` says how it is used.

    Args:
        model: in training, on `TRAINER_GPU`, after `apply_qat` or not.
        plan: of the model; what it quantizes, the streams of `load` bring in 4 bits.
        stop_ids: token ids that end a response; the token itself belongs to the response.
        cfg: device, share of memory and sleep level; how many sequences are drawn together.

    Raises:
        UserError: vLLM does not start.
        MismatchError: it does not quantize what the plan says.
    """

    def __init__(self, model: nn.Module, plan: QuantPlan, stop_ids: Iterable[int], cfg: DemoConfig) -> None:
        self._model, self._stop_ids, self._level = model, sorted(set(stop_ids)), cfg.sleep
        self._length = _length(model)
        self._asleep = False
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(start_folder(start_word(model.config, plan)))
            write_start(model, plan, folder)
            torch.cuda.empty_cache()  # vLLM looks at what is free
            self._llm = _started(folder, self._length, cfg)
            stack.callback(lambda: self._llm.llm_engine.engine_core.shutdown())
            self._rollout = Rollout.connect(self._llm, plan)
            stack.callback(self._rollout.close)
            self._end = stack.pop_all()

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> Loaded:
        """Send the weights of a stream; vLLM is awake afterwards."""
        if self._asleep:
            torch.cuda.empty_cache()  # what the trainer has freed is vLLM's to take
            self._rollout.wake_up(["weights"])
        report = self._rollout.sync(self._model, stream)
        if self._asleep:
            torch.cuda.empty_cache()
            self._rollout.wake_up(["kv_cache"])
            self._asleep = False
        return Loaded(report.bytes, report.seconds, report.version)

    def generate(
        self, prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int, seed: int
    ) -> list[list[Sample]]:
        """Sample at temperature 1; the log-probabilities are those of the distribution that was sampled from.

        Raises:
            UserError: a prompt is too long.
            MismatchError: vLLM ended a response for another reason than its length or a stop token.
        """
        from vllm import SamplingParams

        longest = max(len(prompt) for prompt in prompts)
        if longest + max_new_tokens > self._length:  # vLLM would cut the response short
            raise UserError(
                f"a prompt of {longest} tokens and a response of {max_new_tokens} do not fit into the {self._length} "
                "that the rollout engine holds: take the prompt out of the task's file"
            )
        sampling = [
            SamplingParams(
                n=samples, temperature=1.0, max_tokens=max_new_tokens, logprobs=0, stop_token_ids=self._stop_ids,
                seed=seed + i * samples, detokenize=False,
            )  # vLLM adds the response's number to the seed
            for i in range(len(prompts))
        ]  # fmt: skip
        asked: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self._llm.generate(asked, sampling, use_tqdm=False)
        return [
            [_sample(prompt, response) for response in answer.outputs]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def score(self, samples: Sequence[Sample]) -> list[list[float]]:
        """What vLLM gives responses that are there already; see `nvfp4_qat.engine.SamplingEngine`."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        asked: list[Any] = [{"prompt_token_ids": sample.prompt + sample.response} for sample in samples]
        answers = self._llm.generate(asked, sampling, use_tqdm=False)
        return [
            [
                entry[token].logprob
                for token, entry in zip(sample.response, answer.prompt_logprobs[len(sample.prompt) :], strict=True)
            ]
            for sample, answer in zip(samples, answers, strict=True)
        ]

    def sleep(self) -> None:
        """Free vLLM's memory until the next `load`, if the run's settings say so."""
        if self._level:
            self._rollout.sleep(self._level)
            self._asleep = True

    def close(self) -> None:
        """End vLLM's process, and with it all it holds."""
        self._end.close()


def write_start(model: nn.Module, plan: QuantPlan, folder: Path) -> None:
    """Write a checkpoint of a transformers model's present weights, packed where a plan says so.

    Args:
        model: after `apply_qat` or not; not changed.
        plan: of the model.
        folder: does not exist.
    """
    if not plan.quantized:
        plain: Any = model
        with without_progress_bars():
            plain.save_pretrained(folder)
        return
    try:
        qat_plan(model)
    except UserError:  # trained in bf16 and sampled in 4 bits
        model = copy.deepcopy(model)
        apply_qat(model, plan.config)
    save_checkpoint(model, folder)


def _started(folder: Path, length: int, cfg: DemoConfig) -> Any:
    # Counted, and thereby noted by PyTorch, while this process still sees all of them.
    number = _number(cfg.rollout_device or TRAINER_GPU)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    environment = {
        "CUDA_VISIBLE_DEVICES": visible[number] if visible != [""] else str(number),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # Not stdout, which is for results.
        "VLLM_LOGGING_STREAM": os.environ.get("VLLM_LOGGING_STREAM", "ext://sys.stderr"),
    }
    with _environment(environment):
        try:
            from vllm import LLM

            return LLM(
                str(folder),
                worker_extension_cls=EXTENSION,
                skip_tokenizer_init=True,
                generation_config="vllm",  # sampling as asked for, not as the model's file says
                logprobs_mode="processed_logprobs",
                dtype="bfloat16",
                max_model_len=length,
                max_num_seqs=min(cfg.prompts * cfg.samples, MOST_AT_ONCE),
                gpu_memory_utilization=cfg.rollout_memory,
                kv_cache_memory_bytes=None if cfg.rollout_kv_cache is None else int(cfg.rollout_kv_cache * 2**30),
                enable_sleep_mode=cfg.sleep > 0,
                seed=0,
            )
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise UserError(
                f"vLLM did not start ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); what it "
                "wrote before says why. If it is for lack of GPU memory, free some or change --rollout-memory "
                f"(now {cfg.rollout_memory:g})"
            ) from error


def _number(device: str) -> int:
    """The number of a GPU, "cuda:N".

    Raises:
        UserError: it is another word, or there is no such GPU.
    """
    count = torch.cuda.device_count()
    named = re.fullmatch(r"cuda:(\d+)", device)
    if named is None or int(named[1]) >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count))
        raise UserError(f"--rollout-device {device} is none of the GPUs that PyTorch finds here: {there}")
    return int(named[1])


def _length(model: Any) -> int:
    """Most tokens of a prompt with its response."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LONGEST if known is None else min(known, LONGEST)


def _sample(prompt: Sequence[int], response: Any) -> Sample:
    if response.finish_reason not in ("stop", "length"):
        raise MismatchError(f"vLLM ended a response before it was complete ({response.finish_reason})")
    tokens = list(response.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(tokens, response.logprobs, strict=True)]
    return Sample(list(prompt), tokens, logprobs)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
