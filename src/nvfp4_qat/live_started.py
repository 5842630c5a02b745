"""How an engine was started, from its configuration: by which way its workers can be called, how many replicas it has,
what else holds KV blocks, and whether it may sleep.

This is read and not tried, because what a worker raises is not harmless. `MultiprocExecutor.collective_rpc` of vLLM
(0.15 to 0.33) then returns before it has read the answers of the workers after that one, and each later call gets the
answers to the call before. So nothing is called that may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """How an engine was started.

    Args:
        extension: its ``worker_extension_cls``; empty: none.
        backend: of its ``weight_transfer_config``; None: none.
        replicas: that it spreads requests over.
        connector: whether KV blocks also go to a connector, as for offloading.
        sleeps: whether its memory can be freed.
    """

    extension: str
    backend: str | None
    replicas: int
    connector: bool = False
    sleeps: bool = False


def started(config: Any) -> Started | None:
    """Read a configuration of vLLM.

    Args:
        config: its `VllmConfig`, or the same as JSON.

    Returns:
        None if it is no such configuration.
    """
    parallel = _get(config, "parallel_config")
    size = _get(parallel, "data_parallel_size")
    if not isinstance(size, int):
        return None
    # As `vllm.v1.engine.core_client.MPClient` counts the engines that it has.
    if _get(parallel, "data_parallel_rank_local") is not None:
        size = 1
    elif _get(parallel, "data_parallel_external_lb") or _get(parallel, "data_parallel_hybrid_lb"):
        size = int(_get(parallel, "data_parallel_size_local"))
    backend = _get(_get(config, "weight_transfer_config"), "backend")
    sleeps = bool(_get(_get(config, "model_config"), "enable_sleep_mode"))
    connector = _get(config, "kv_transfer_config") is not None  # vLLM makes one for kv_offloading_size too
    return Started(_get(parallel, "worker_extension_cls") or "", backend, size, connector, sleeps)


def place(config: Any) -> dict[str, Any]:
    """Where a worker is among those of its own and other engines.

    Args:
        config: the worker's, a `VllmConfig`.

    Returns:
        Under "sharing" how many data-parallel engines compute each other's experts (1: this one alone), and under
        "experts" what tells which experts a rank has.
    """
    parallel = _get(config, "parallel_config")
    names = ("data_parallel_rank", "enable_expert_parallel", "expert_placement_strategy")
    has_experts = bool(_get(_get(config, "model_config"), "is_moe"))
    return {
        "sharing": (_get(parallel, "data_parallel_size") or 1) if has_experts else 1,
        "experts": [_get(parallel, name) for name in names] if has_experts else [],
    }


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
