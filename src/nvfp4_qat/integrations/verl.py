"""The verl plugin: with it `actor_rollout_ref.actor.qat.enable=True` trains in 4 bits and samples from the same bytes.

verl imports it in every process (entry point ``verl.plugins``, ``VERL_USE_EXTERNAL_MODULES``, or ``external_lib``). It
replaces what verl calls at its own seams, as soon as verl imports these modules, and nothing as long as QAT is off:

======================================  ==================================================  =========================
in                                      seam                                                ours
======================================  ==================================================  =========================
the process that reads the config       ``verl.utils.config.validate_config``               `verl_config.settle`
workers that train                      ``FSDPEngine._apply_qat``,                          `verl_training`
                                        ``get_per_tensor_param``, ``train_batch``
vLLM's server                           ``vLLMHttpServer._apply_quantization``,             `verl_rollout`
                                        ``_get_worker_extension_cls``
vLLM's workers                          the worker extension                                `verl_worker`
everywhere                              ``verl.utils.qat``'s own patches of vLLM            none are made
======================================  ==================================================  =========================

verl passes over a plugin that fails at import. So this module needs the standard library only to be imported, and what
fails afterwards is kept: whatever would train or sample without us raises it instead.

``python -m nvfp4_qat.integrations.verl`` says whether it is active, and with which versions.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import types
from collections.abc import Callable
from types import ModuleType

from .import_hooks import when_imported

SUPPORTED = ((0, 9), (0, 9))
"""The first and the last minor release of verl that this was written for."""

_state: dict[str, str | None] = {}
"""Under "reason" why the plugin cannot work; None: it works."""


def activate() -> None:
    """Replace what verl calls; any number of times."""
    if _state:
        return
    _state["reason"] = None
    try:
        _check(_version("verl"))
        _without_verls_patches()
        for name, install in _seams().items():
            when_imported(name, install)
    except Exception as error:
        _state["reason"] = f"{type(error).__name__}: {error}"
        _stop_where_qat_is_used()
        print(f"nvfp4-qat: the verl plugin could not be activated: {_state['reason']}", file=sys.stderr, flush=True)


def active() -> str | None:
    """Why the plugin does not work in this process; None: it does."""
    return _state.get("reason", "the plugin has not been imported")


def versions() -> str:
    """The versions of everything that takes part, as one line."""
    found = {name: _version(name) for name in ("nvfp4-qat", "verl", "vllm", "torch", "transformers")}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)


def _seams() -> dict[str, Callable[[ModuleType], None]]:
    from . import verl_config, verl_rollout, verl_training

    return {
        "verl.utils.config": verl_config.install,
        "verl.utils.py_functional": verl_training.install_names,
        "verl.trainer.main_ppo": verl_config.install_in_main,
        "verl.workers.config.actor": verl_config.install_in_workers,
        "verl.workers.engine.fsdp.transformer_impl": verl_training.install,
        "verl.workers.rollout.vllm_rollout.vllm_async_server": verl_rollout.install,
        "verl.workers.rollout.vllm_rollout.vllm_rollout": verl_rollout.install_in_adapter,
    }


def _without_verls_patches() -> None:
    """Stand in for the module that patches vLLM's classes: no vLLM that verl supports has them."""

    def nothing(*_: object, **__: object) -> None:
        """The weights of such a model are taken by `verl_worker`."""

    module = types.ModuleType("verl.utils.qat.vllm_patch", nothing.__doc__)
    for name in ("apply_qat_patches", "manual_process_weights_after_loading", "prepare_qat_for_load_weights"):
        setattr(module, name, nothing)
    sys.modules.setdefault("verl.utils.qat.vllm_patch", module)


def _stop_where_qat_is_used() -> None:
    """Let verl's own QAT raise why ours is not there."""

    def install(module: ModuleType) -> None:
        def stopped(*_: object, **__: object) -> None:
            raise RuntimeError(
                f"nvfp4-qat: QAT is enabled, but the verl plugin is not active in this process: {active()}. Nothing "
                "was trained"
            )

        for name in ("apply_qat", "load_quantization_config"):
            setattr(module, name, stopped)

    when_imported("verl.utils.qat.core", install)


def _check(version: str | None) -> None:
    """Raise if a release of verl is not supported; one that nobody can tell is."""
    numbers = [part for part in (version or "").split(".")[:2] if part.isdecimal()]
    if len(numbers) == 2 and not SUPPORTED[0] <= (int(numbers[0]), int(numbers[1])) <= SUPPORTED[1]:
        first, last = (".".join(map(str, release)) for release in SUPPORTED)
        raise RuntimeError(f"verl {version} is not supported: install one of {first}.x to {last}.x")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Say whether verl finds the plugin and whether it works; the exit code is for scripts."""
    import logging

    logging.disable(logging.WARNING)
    try:
        import verl  # noqa: F401
    except Exception as error:
        print(f"nvfp4-qat: verl cannot be imported ({type(error).__name__}: {error})", file=sys.stderr)
        return 1
    plugin = sys.modules.get("nvfp4_qat.integrations.verl")
    reason = "verl did not import it" if plugin is None else plugin.active()
    if reason is not None:
        policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
        print(
            f"nvfp4-qat: the verl plugin is not active: {reason} (VERL_USE_EXTERNAL_PLUGINS={policy}). Install "
            "nvfp4-qat into the environment of every node, or set "
            "VERL_USE_EXTERNAL_MODULES=nvfp4_qat.integrations.verl",
            file=sys.stderr,
        )
        return 1
    print(f"nvfp4-qat: the verl plugin is active ({versions()})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

activate()
