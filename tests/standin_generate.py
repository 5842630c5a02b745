"""In the place of ``vllm``: it loads checkpoints of small transformers models, takes live weights, and samples.

`LLM` has the arguments that the demo gives `vllm.LLM`, and no others. Its one worker holds a checkpoint's tensors as
they are, by name, mixed with `LiveWeights`; what it holds is what it samples with, by the built-in engine's model. As
in another process, workers get nothing that is not JSON. Sleeping takes the weights away; whoever asks for tokens
then, loads into them, or calls an engine that has ended, fails.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from standin_engine import StandinCode, copied
from torch import nn
from transformers import AutoConfig

from nvfp4_qat.engine import RolloutEngine, Sample
from nvfp4_qat.vllm import LiveWeights

VERSION = "0.24.0"


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    max_tokens: int
    detokenize: bool
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    seed: int | None = None


class Held(nn.Module):
    """Tensors of a checkpoint as parameters under their names."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, tensor in weights:
            getattr(params[name], "weight_loader", copied)(params[name], tensor)


class Code(StandinCode):
    def quantized(self, model):
        return [name for name, layer in model.named_modules() if "weight_packed" in layer._parameters]


class Worker(LiveWeights):
    device = torch.device("cpu")

    def __init__(self, tensors):
        self.model = Held(tensors)
        self.code = Code(self.model)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.asleep, self._kept = set(), None

    def _nvfp4_code(self, model, device):
        return self.code

    def nvfp4_hello(self):
        answer = super().nvfp4_hello()
        answer.get("ok", {})["process"] = "another"
        return answer

    def nvfp4_load_shared(self, *arguments):
        assert "weights" not in self.asleep, "weights came while there was no memory for them"
        return super().nvfp4_load_shared(*arguments)

    def sleep(self, level):
        self._kept = {n: p.clone() for n, p in self.model.named_parameters()} if level == 1 else {}
        for parameter in self.model.parameters():
            parameter.data.view(torch.uint8).fill_(255)
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags):
        now = self.asleep if tags is None else self.asleep & set(tags)
        if "weights" in now:
            for name, kept in self._kept.items():
                self.model.get_parameter(name).data.copy_(kept)
        self.asleep -= now


@dataclass
class LLM:
    model: str
    worker_extension_cls: str
    skip_tokenizer_init: bool
    generation_config: str
    logprobs_mode: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    enable_sleep_mode: bool
    seed: int
    calls: list = field(default_factory=list)

    def __post_init__(self):
        names = ("CUDA_VISIBLE_DEVICES", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_STREAM")
        self.environment = {name: os.environ.get(name) for name in names}
        self.ended = self.paused = False
        self.finish_reason = None
        tensors = {}
        for file in sorted(Path(self.model).glob("*.safetensors")):
            tensors |= load_file(file)
        self.config = AutoConfig.from_pretrained(self.model)
        self.config.__dict__.pop("quantization_config", None)
        self.worker = Worker(tensors)
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(shutdown=self._shutdown),
            reset_encoder_cache=lambda: self._called("reset_encoder_cache"),
        )

    def _shutdown(self):
        self.ended = True

    def _called(self, *call):
        assert not self.ended
        self.calls.append(call)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        self._called(method)
        answer = getattr(self.worker, method)(*json.loads(json.dumps(args)))
        return [json.loads(json.dumps(answer))]

    def sleep(self, level=1, mode="abort"):
        self._called("sleep", level)
        assert level == 0 or self.enable_sleep_mode
        self.paused = True
        if level:
            self.worker.sleep(level)

    def wake_up(self, tags=None):
        self._called("wake_up", *(tags or ()))
        self.worker.wake_up(tags)
        if not self.worker.asleep:
            self.paused = False

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self._called("reset_prefix_cache")
        return True

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self._called("generate", len(prompts))
        assert not self.paused and not self.worker.asleep, "asked while it could not answer"
        assert not use_tqdm
        if isinstance(sampling_params, SamplingParams):
            return self._scored(prompts, sampling_params)
        engine = None
        answers = []
        for prompt, sampling in zip(prompts, sampling_params, strict=True):
            assert (sampling.temperature, sampling.logprobs, sampling.detokenize) == (1.0, 0, False)
            if engine is None:
                engine = RolloutEngine(self.config, sampling.stop_token_ids)
                engine.load((n, p.data) for n, p in self.worker.model.named_parameters())
            (samples,) = engine.generate([prompt["prompt_token_ids"]], sampling.n, sampling.max_tokens, sampling.seed)
            answers.append(SimpleNamespace(outputs=[self._output(s, sampling) for s in samples]))
        return answers

    def _scored(self, prompts, sampling):
        assert (sampling.temperature, sampling.prompt_logprobs, sampling.max_tokens) == (1.0, 0, 1)
        engine = RolloutEngine(self.config, [])
        engine.load((n, p.data) for n, p in self.worker.model.named_parameters())
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        scores = engine.score([Sample(i[:1], i[1:], []) for i in ids])
        return [
            SimpleNamespace(
                prompt_logprobs=[None]
                + [{token: SimpleNamespace(logprob=p)} for token, p in zip(i[1:], score, strict=True)]
            )
            for i, score in zip(ids, scores, strict=True)
        ]

    def _output(self, sample, sampling):
        pairs = zip(sample.response, sample.logprobs, strict=True)
        stopped = sample.response[-1] in sampling.stop_token_ids
        return SimpleNamespace(
            token_ids=tuple(sample.response),
            logprobs=[{token: SimpleNamespace(logprob=logprob)} for token, logprob in pairs],
            finish_reason=self.finish_reason or ("stop" if stopped else "length"),
        )


def install(monkeypatch, gpus=2):
    """Put the stand-in in the place of vLLM, and let PyTorch say that there are GPUs; returns the engines made."""
    made = []

    class Recorded(LLM):
        def __post_init__(self):
            super().__post_init__()
            made.append(self)

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Recorded, SamplingParams
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: VERSION if name == "vllm" else real(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr("nvfp4_qat.rl.trainer_device", lambda cfg: torch.device("cpu"))
    return made
