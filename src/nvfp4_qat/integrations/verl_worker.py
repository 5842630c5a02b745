"""The worker extension of verl's vLLM: 4-bit weights go into the engine that is up.

verl's own extension receives the buckets; what is in them is taken by `nvfp4_qat.vllm.LiveWeights`, so an update is
complete or an error, and CUDA graphs go on with the memory that they have. Adapters (LoRA) and models that are not
4-bit take verl's way.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from ..vllm import LiveWeights
from .verl_stream import Update, held


class QATColocateWorkerExtension(vLLMColocateWorkerExtension, LiveWeights):  # type: ignore[misc]
    """verl's extension, for engines that hold 4-bit weights."""

    _is_qat_model: bool

    def update_weights_from_ipc(
        self, peft_config: dict[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Take the weights that the trainer sends, all of them, or raise.

        Raises:
            MismatchError: they were not packed by nvfp4-qat, or are not those of this engine. What comes after the
                error is received all the same, so that the trainer does not wait for ever.
        """
        if not self._is_qat_model or (peft_config and base_sync_done):
            before, self._is_qat_model = self._is_qat_model, False
            try:
                return super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)  # type: ignore[no-any-return]
            finally:
                self._is_qat_model = before
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        update = Update(self)
        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=update.take)
        update.end()
        if "_nvfp4_told" not in self.__dict__:
            self.__dict__["_nvfp4_told"] = True
            state = self.__dict__["_nvfp4_state"]
            rank, workers = self.parallel_config.rank, self.parallel_config.world_size
            print(f"nvfp4-qat: {held(state.code, state.live.model, rank % workers, workers)}", flush=True)

    def _nvfp4_sleeps(self, level: int) -> dict[str, Any]:
        return super()._nvfp4_sleeps(level) if self._is_qat_model else {}
