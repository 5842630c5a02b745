"""`Engine`: builds a family's model with vLLM's own code and loads it, as a worker would on one of its ranks.

Ranks of a tensor-parallel group are built one after the other in one process. vLLM asks its group which rank it is and
of how many; here a group of one gives the answer that is wanted. Building, loading and processing do not communicate.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from families import Checkpoint, Family, by_checkpoint_name
from torch import nn

from nvfp4_qat.live_model import LiveModel
from nvfp4_qat.live_vllm import VllmCode
from nvfp4_qat.live_vllm_adapters import without_adapters, wrappers

CPU = torch.device("cpu")


class Engine:
    """Makes models of one family and rank.

    Args:
        folder: for the model's config.
        rank, size: in the tensor-parallel group.
        whole_experts: whether ranks divide the experts among them, instead of each expert.
        stage: of two in a pipeline; None: there is no pipeline.
    """

    def __init__(
        self, family: Family, folder: Path, rank: int, size: int, whole_experts: bool, stage: int | None = None
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs

        self.family, self.rank, self.size, self.stage = family, rank, size, stage
        family.transformers_config().save_pretrained(folder)
        arguments = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            load_format="dummy",
            max_model_len=64,
            block_size=16,
        )
        self.config = arguments.create_engine_config()
        self.config.parallel_config.tensor_parallel_size = size
        self.config.parallel_config.enable_expert_parallel = whole_experts
        self.config.parallel_config.pipeline_parallel_size = 1 if stage is None else 2
        self._open = contextlib.ExitStack()

    @staticmethod
    def start(store: Path) -> None:
        """Once in a process."""
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel

        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            initialize_model_parallel(1, 1)

    def __enter__(self) -> Engine:
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import get_ep_group, get_pp_group, get_tp_group

        self._open.enter_context(set_current_vllm_config(self.config))
        self._open.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.bfloat16)
        for group in (get_tp_group(), get_ep_group()):
            self._open.callback(_pretend, group, group.rank_in_group, group.world_size)
            _pretend(group, self.rank, self.size)
        if self.stage is not None:
            stages = get_pp_group()
            self._open.callback(vars(stages).update, dict(vars(stages)))
            _pretend(stages, self.stage, 2)
            stages.rank, stages.ranks = self.stage, [0, 1]
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        """A model that was loaded from a checkpoint and is ready to compute."""
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        model = self.unloaded()
        model.load_weights([(entry.name, tensor) for entry, tensor in by_checkpoint_name(checkpoint)])
        process_weights_after_loading(model, self.config.model_config, CPU)
        return model

    def unloaded(self) -> nn.Module:
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.model_executor.models import utils

        # Remembered by the id of models, which those that are gone leave to others.
        utils._model_to_pp_missing_layer_names.clear()
        self.config.compilation_config.static_forward_context.clear()
        model: nn.Module = initialize_model(self.config)
        return model

    def live(self, model: nn.Module) -> LiveModel:
        """What updates a model, as a worker has it."""
        bare = without_adapters(model)
        return LiveModel(bare, VllmCode(bare, self.config, CPU), CPU, wrappers(model))


def _pretend(group: Any, rank: int, size: int) -> None:
    group.rank_in_group, group.world_size = rank, size
