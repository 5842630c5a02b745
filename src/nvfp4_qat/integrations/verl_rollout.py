"""verl's vLLM server: the engine is started for 4-bit weights, with our worker extension.

The quantization configuration comes from the plan of the model that is trained, made here from the model's own
configuration, without weights: both sides then quantize the same layers.

Weights come through a Unix socket in ``/tmp`` whose name holds the number of the Ray job. Every cluster counts its jobs
from one, so two runs on one machine, each with a cluster of its own, would meet at the same socket, and an engine could
take the other run's weights. Here the name holds the cluster too, at both ends.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..config import QATConfig
from ..errors import UserError
from ..plan import QuantPlan
from .verl_config import config_of

JOB = "VERL_RAY_JOB_ID"
"""What verl's server tells its workers, for the name of the socket only."""

WORKER = "nvfp4_qat.integrations.verl_worker.QATColocateWorkerExtension"


def enabled(server: Any) -> bool:
    """Whether a server's configuration asks for QAT of ours; Megatron's, which comes by the same key, is ModelOpt's."""
    block = getattr(server.config, "qat", None) or {}
    path = block.get("quantization_config_path", None)
    return bool(block.get("enable", False)) and not (path and _method(path) == "modelopt")


def _method(path: str) -> str | None:
    with open(path, encoding="utf-8") as file:
        found: str | None = json.load(file).get("quant_method")
    return found


def quantization(server: Any) -> tuple[str, dict[str, Any]]:
    """What vLLM is started with: its name for the method, and overrides of the model's configuration."""
    os.environ[JOB] = job()  # vLLM's workers, which are started next, name the socket by it
    config, _ = config_of(server.config.qat)
    plan = plan_of(server.model_config, config)
    return "compressed-tensors", {"quantization_config": plan.quantization_config()}


def job() -> str:
    """A name of this Ray job that no other cluster's job has."""
    import ray

    context = ray.get_runtime_context()
    cluster = hashlib.sha256(str(context.gcs_address).encode()).hexdigest()[:8]
    return f"{context.get_job_id()}-{cluster}"


def plan_of(model_config: Any, config: QATConfig) -> QuantPlan:
    """The plan of a model without its weights, of the class that is trained.

    Raises:
        UserError: transformers has no such model, or nothing of it is to be quantized.
    """
    from verl.utils.model import get_hf_auto_model_class

    hf_config = copy.deepcopy(model_config.hf_config)
    auto = get_hf_auto_model_class(hf_config)
    try:
        with torch.device("meta"):
            model = auto.from_config(
                hf_config,
                trust_remote_code=bool(getattr(model_config, "trust_remote_code", False)),
                attn_implementation="eager",  # nothing is computed, and this machine may lack the trainer's kernels
            )
    except ValueError as error:
        raise UserError(f"the rollout's model cannot be planned: {error}") from error
    return QuantPlan.from_model(model, config)


def install(module: ModuleType) -> None:
    """Replace what the server does about QAT (``verl.workers.rollout.vllm_rollout.vllm_async_server``)."""
    server_class = module.vLLMHttpServer
    server_class._apply_quantization = _or_ours(server_class._apply_quantization, quantization)
    server_class._get_worker_extension_cls = _or_ours(server_class._get_worker_extension_cls, lambda server: WORKER)


def install_in_adapter(module: ModuleType) -> None:
    """Let the trainer's end of the socket have the same name (``verl.workers.rollout.vllm_rollout.vllm_rollout``)."""
    adapter_class = module.ServerAdapter
    original = adapter_class.__init__

    @functools.wraps(original)
    def made(adapter: Any, *arguments: Any, **options: Any) -> None:
        original(adapter, *arguments, **options)
        if enabled(adapter):
            import ray

            number = ray.get_runtime_context().get_job_id()
            before, found, after = adapter.zmq_handle.partition(f"-{number}-replica-")
            if not found:
                raise RuntimeError(f"verl's socket {adapter.zmq_handle!r} is not named by the job {number}")
            adapter.zmq_handle = f"{before}-{job()}-replica-{after}"

    adapter_class.__init__ = made


def _or_ours(original: Callable[[Any], Any], ours: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def chosen(server: Any) -> Any:
        return ours(server) if enabled(server) else original(server)

    return chosen
