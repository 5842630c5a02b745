"""`LiveTransfer`: live weights as a weight-transfer engine of vLLM, from 0.26.

vLLM makes one in each worker that is started with ``weight_transfer_config={"backend": "nvfp4"}``, and gives it the
worker's model. It takes the calls of `vllm.LiveWeights`, which do all there is to do; no worker extension is needed.
`live_replies` says how calls and their answers travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from .errors import UserError
from .live_replies import Call, reply
from .vllm import LiveWeights


class LiveTransfer(LiveWeights, WeightTransferEngine):  # type: ignore[misc]
    """Takes new weights for a worker's model; see `vllm.LiveWeights`."""

    init_info_cls = update_info_cls = Call
    supports_draft_weight_update = False

    @property
    def rank(self) -> int:
        found: int = self.parallel_config.rank
        return found

    def _nvfp4_model(self) -> nn.Module:
        found: nn.Module = self.model
        return found

    def init_transfer_engine(self, init_info: Call) -> None:
        """Take a call, and bring its answer to the trainer; nothing is raised."""
        call = init_info
        if call.method in vars(LiveWeights) and call.method.startswith("nvfp4_"):
            answer: dict[str, Any] = getattr(self, call.method)(*call.arguments)
        else:
            answer = {"error": f"{call.method!r} is none of the calls of live weights", "kind": "UserError"}
        external = self.parallel_config.distributed_executor_backend == "external_launcher"  # each calls its own worker
        reply(call, answer, 1 if external else self.parallel_config.world_size)

    def receive_weights(self, update_info: Call) -> None:
        """The same, for whoever calls ``update_weights``."""
        self.init_transfer_engine(update_info)

    def start_weight_update(self) -> None:
        """Nothing: updates begin and end by calls."""

    def finish_weight_update(self) -> None:
        """Nothing: updates begin and end by calls."""

    def shutdown(self) -> None:
        """Give up the update that goes on, if there is one, and leave the trainer."""
        self._nvfp4_leave()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Not how weights are sent."""
        raise UserError("weights are sent by nvfp4_qat.Rollout.connect(engine, plan).sync(model)")
