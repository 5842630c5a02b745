"""The entry point in ``vllm.general_plugins``: each process of vLLM calls `register` when it starts.

It makes our weight-transfer engine known to vLLM 0.26 and later, and does nothing else: no class of vLLM is touched.
An error here would end every vLLM on this machine, also one that needs nothing of ours, and vLLM would pass over one
at import with a line in its log. So this module imports the standard library only and `register` logs what failed; who
then asks for the weight-transfer engine hears from vLLM that there is none of that name.
"""

from __future__ import annotations

import importlib.metadata
import logging

FIRST = (0, 26)
"""The minor release of vLLM from which `live_transfer` can be used."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Make ``weight_transfer_config={"backend": "nvfp4"}`` known to vLLM; any number of times."""
    vllm = "?"
    try:
        from .live_engines import release
        from .live_replies import BACKEND

        vllm = importlib.metadata.version("vllm")
        if (release(vllm) or FIRST) < FIRST:
            logger.debug("vLLM %s has no weight-transfer engines of others; ours is not registered", vllm)
            return
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        try:
            WeightTransferEngineFactory.register_engine(BACKEND, "nvfp4_qat.live_transfer", "LiveTransfer")
        except ValueError as error:  # it is there already
            logger.debug("%s", error)
    except Exception:
        logger.exception(
            "nvfp4-qat could not register its weight-transfer engine with vLLM %s: vLLM will refuse the backend "
            '"nvfp4". worker_extension_cls="nvfp4_qat.vllm.LiveWeights" does the same and does not need this',
            vllm,
        )
