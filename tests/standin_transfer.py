"""vLLM's weight transfer: the base class of engines, the factory, and what a worker does with an engine.

The code of vLLM 0.26.0 and 0.33.0 (``vllm/distributed/weight_transfer``, ``vllm/v1/worker/gpu_worker.py``) without what
our engine does not meet; `tests/vllm_sources` has the originals.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace

from standin_layers import ALONE
from standin_vllm import Bare


class WeightTransferEngine(ABC):
    supports_draft_weight_update = True

    def __init__(self, config, vllm_config, device, model):
        self.config, self.vllm_config, self.device, self.model = config, vllm_config, device, model
        self.parallel_config = vllm_config.parallel_config

    def reset_weight_update_target(self):
        self.model = self.model

    def parse_init_info(self, init_dict):
        return self._parsed(self.init_info_cls, init_dict)

    def parse_update_info(self, update_dict):
        return self._parsed(self.update_info_cls, update_dict)

    def _parsed(self, cls, given):
        try:
            return cls(**given)
        except TypeError as e:
            raise ValueError(f"Invalid info for {self.__class__.__name__}: {e}") from e

    @abstractmethod
    def init_transfer_engine(self, init_info): ...

    @abstractmethod
    def start_weight_update(self): ...

    @abstractmethod
    def finish_weight_update(self): ...

    def update_weights(self, update_info):
        raise AssertionError("synchronizes an accelerator")

    @abstractmethod
    def receive_weights(self, update_info): ...

    @abstractmethod
    def shutdown(self): ...

    @staticmethod
    @abstractmethod
    def trainer_send_weights(iterator, trainer_args): ...


class Factory:
    def __init__(self):
        self._registry = {}

    def register_engine(self, name, module_path_or_cls, class_name=None):
        if name in self._registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        self._registry[name] = lambda: getattr(importlib.import_module(module_path_or_cls), class_name)


def installed(monkeypatch):
    """A vLLM that has weight transfer and nothing else; its factory."""
    factory = Factory()
    contents = {
        "vllm": {}, "vllm.distributed": {}, "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.base": {"WeightTransferEngine": WeightTransferEngine},
        "vllm.distributed.weight_transfer.factory": {"WeightTransferEngineFactory": factory},
    }  # fmt: skip
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "nvfp4_qat.live_transfer", raising=False)
    return factory


class TransferWorker(Bare):
    """A worker whose weight-transfer engine is of a class, or that has none."""

    engine_class, executor = None, "mp"

    def __init__(self, weights, place=ALONE, device="cpu"):
        super().__init__(weights, place, device)
        self.weight_transfer_engine, self._weight_update_active = None, False
        if self.engine_class is not None:
            parallel = SimpleNamespace(
                rank=self.rank, world_size=place.tp_size, distributed_executor_backend=self.executor
            )
            config = SimpleNamespace(parallel_config=parallel)
            model = self.model_runner.get_model()
            self.weight_transfer_engine = self.engine_class(None, config, self.device, model)
            self.weight_transfer_engine._nvfp4_code = lambda *_: self.code

    def _check_weight_transfer_engine(self):
        if self.weight_transfer_engine is None:
            raise RuntimeError(
                "Weight transfer not configured. Please set weight_transfer_config to enable weight transfer."
            )

    def init_weight_transfer_engine(self, init_info):
        self._check_weight_transfer_engine()
        self.weight_transfer_engine.init_transfer_engine(self.weight_transfer_engine.parse_init_info(init_info))

    def start_weight_update(self):
        self._check_weight_transfer_engine()
        if self._weight_update_active:
            raise RuntimeError("start_weight_update called while a weight update is already active.")
        self.weight_transfer_engine.start_weight_update()
        self._weight_update_active = True

    def update_weights(self, update_info):
        self._check_weight_transfer_engine()
        if not self._weight_update_active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        try:
            self.weight_transfer_engine.update_weights(update_info)
        except BaseException:
            self._weight_update_active = False
            self.weight_transfer_engine.reset_weight_update_target()
            raise

    def finish_weight_update(self):
        self._check_weight_transfer_engine()
        if not self._weight_update_active:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self.weight_transfer_engine.finish_weight_update()
        self.weight_transfer_engine.reset_weight_update_target()
        self._weight_update_active = False

    def shutdown_weight_transfer_engine(self):
        if self._weight_update_active:
            raise RuntimeError("Cannot release a trainer connection during a weight update")
        self.weight_transfer_engine.shutdown()


def worker_class(factory, name="nvfp4"):
    """Workers with a registered engine."""
    return type("Worker", (TransferWorker,), {"engine_class": factory._registry[name](), "backend": name})
