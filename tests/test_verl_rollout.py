"""How verl's rollout is started: what its server quantizes, and where both ends of the socket meet."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from verl_on_a_cpu import MODELS, saved_models  # noqa: E402

import nvfp4_qat as nq  # noqa: E402
from nvfp4_qat.integrations import verl_rollout  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models(tmp_path_factory)


@pytest.fixture
def ray_job(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Job 1 of a cluster at an address."""
    import ray

    context = types.SimpleNamespace(gcs_address="10.0.0.1:6379", get_job_id=lambda: "01000000")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setenv(verl_rollout.JOB, "01000000")
    return context


def test_both_ends_of_the_socket_are_named_by_cluster_and_job(
    ray_job: types.SimpleNamespace, folders: dict[str, Path]
) -> None:
    from transformers import AutoConfig

    class ServerAdapter:
        def __init__(self, config: Any, replica: int) -> None:
            self.config = config
            self.zmq_handle = f"ipc:///tmp/rl-colocate-zmq-{ray_job.get_job_id()}-replica-{replica}-rank-0.sock"

    verl_rollout.install_in_adapter(types.SimpleNamespace(ServerAdapter=ServerAdapter))  # type: ignore[arg-type]
    config = types.SimpleNamespace(qat={"enable": True})
    model_config = types.SimpleNamespace(hf_config=AutoConfig.from_pretrained(folders["dense"]))
    handles = set()
    for address in ("10.0.0.1:6379", "10.0.0.1:6380"):
        ray_job.gcs_address = address
        verl_rollout.quantization(types.SimpleNamespace(config=config, model_config=model_config))
        # The worker's end, as verl's extension makes it of the environment.
        expected = f"ipc:///tmp/rl-colocate-zmq-{os.environ[verl_rollout.JOB]}-replica-3-rank-0.sock"
        assert ServerAdapter(config, 3).zmq_handle == expected
        handles.add(expected)
    assert len(handles) == 2
    plain = types.SimpleNamespace(qat=None)
    assert ServerAdapter(plain, 3).zmq_handle == "ipc:///tmp/rl-colocate-zmq-01000000-replica-3-rank-0.sock"


def test_a_socket_that_is_named_otherwise_is_an_error(ray_job: types.SimpleNamespace) -> None:
    class ServerAdapter:
        def __init__(self) -> None:
            self.config = types.SimpleNamespace(qat={"enable": True})
            self.zmq_handle = "ipc:///tmp/another.sock"

    verl_rollout.install_in_adapter(types.SimpleNamespace(ServerAdapter=ServerAdapter))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="another.sock' is not named by the job 01000000"):
        ServerAdapter()


def test_verls_socket_has_the_name_that_is_looked_for() -> None:
    import verl

    adapter = Path(verl.__file__).parent / "workers" / "rollout" / "vllm_rollout" / "vllm_rollout.py"
    name = 'f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{self.replica_rank}-rank-{local_rank}.sock"'
    assert name in adapter.read_text(encoding="utf-8")
    utils = adapter.with_name("utils.py").read_text(encoding="utf-8")
    assert 'job_id = os.environ.get("VERL_RAY_JOB_ID", "0")' in utils
    assert 'f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{replica_rank}-rank-{trainer_rank}.sock"' in utils


@pytest.mark.parametrize("model", MODELS)
def test_the_server_quantizes_what_the_trainer_does(
    model: str, folders: dict[str, Path], ray_job: types.SimpleNamespace
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    server = types.SimpleNamespace(
        config=types.SimpleNamespace(qat={"_target_": "x", "enable": True, "activation_observer": "static_minmax"}),
        model_config=types.SimpleNamespace(hf_config=AutoConfig.from_pretrained(folders[model])),
    )
    server.model_config.hf_config._attn_implementation = "flash_attention_2"  # which is not installed here
    assert verl_rollout.enabled(server)
    method, overrides = verl_rollout.quantization(server)
    plan = nq.QuantPlan.from_model(AutoModelForCausalLM.from_pretrained(folders[model]), nq.QATConfig(enable=True))
    assert method == "compressed-tensors" and overrides["quantization_config"] == plan.quantization_config()
