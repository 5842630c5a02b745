"""Our weight-transfer engine in this release: vLLM finds and makes it, and its worker and routes pass the calls on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comparing import different, kernel_tensors, reachable_tensors
from engine import CPU, Engine
from families import Checkpoint, some
from test_control import async_llm, served

from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_buckets import SharedMemory
from nvfp4_qat.live_client import Client
from nvfp4_qat.live_engines import LocalEngine, release
from nvfp4_qat.live_http import HttpEngine
from nvfp4_qat.live_manifest import to_wire
from nvfp4_qat.live_memory import device_name
from nvfp4_qat.vllm_plugin import FIRST, register

ROOT = Path(__file__).parent.parent.parent
VLLM = os.environ["VLLM_SOURCES"]
needed = pytest.mark.skipif((release(VLLM) or FIRST) < FIRST, reason="from vLLM 0.26")
one = pytest.mark.parametrize("family", some("qwen3-moe"))
alone = pytest.mark.parametrize("place", ["alone"])


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's, after vLLM has loaded plugins: ours, installed by what pyproject.toml says."""
    import tomllib
    import vllm.plugins

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    folder = tmp_path / "installed-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (folder / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ModuleNotFoundError:  # 0.15
        vllm.plugins.load_general_plugins()
        return None
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", dict(WeightTransferEngineFactory._registry))
    WeightTransferEngineFactory._registry.pop("nvfp4", None)  # of a test before
    vllm.plugins.load_general_plugins()
    return WeightTransferEngineFactory


def test_vllm_loads_the_plugin_and_knows_the_engine(factory: Any) -> None:
    """In earlier releases the plugin does nothing."""
    register()  # again
    assert factory is None or ("nvfp4" in factory._registry) == ((release(VLLM) or FIRST) >= FIRST)


def bare_worker() -> Any:
    """A worker of vLLM that was given nothing yet."""
    from vllm.triton_utils import triton

    if not isinstance(triton.Config, type):  # vLLM's own placeholder has less than 0.33 reads at import
        triton.Config = lambda kwargs, **options: SimpleNamespace(kwargs=kwargs, **options)
    from vllm.v1.worker.gpu_worker import Worker

    return Worker.__new__(Worker)


class Up:
    """A worker of vLLM with a family's model and our engine, and the object that calls it."""

    def __init__(self, engine: Engine, factory: Any, checkpoint: Checkpoint) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.v1.serial_utils import run_method

        self.model = engine.model(checkpoint)
        config = engine.config.weight_transfer_config = WeightTransferConfig(backend="nvfp4")
        self.llm_engine = SimpleNamespace(vllm_config=engine.config)
        worker = bare_worker()
        worker.vllm_config, worker.rank, worker.device = engine.config, 0, CPU
        worker.weight_transfer_engine = factory.create_engine(config, engine.config, CPU, self.model)
        self.worker = worker

        def rpc(method: str, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[Any]:
            return [run_method(worker, method, tuple(args), kwargs or {})]

        self.collective_rpc = rpc
        self.plan: Any = SimpleNamespace(audit=lambda names: None)


@pytest.fixture
def up(engine: Engine, factory: Any) -> Up:
    return Up(engine, factory, engine.family.checkpoint(1))


@pytest.fixture(params=["Python", "routes"])
def client(request: pytest.FixtureRequest, up: Up) -> Iterator[Client]:
    """`Client` of the worker, by an object like `vllm.LLM` or by the server's own routes."""
    if request.param == "Python":
        yield Client(LocalEngine(up), up.plan)
        return
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = async_llm()
    llm.collective_rpc.side_effect = up.collective_rpc
    llm.init_weight_transfer_engine.side_effect = AsyncLLM.init_weight_transfer_engine.__get__(llm)
    with served(llm, up.llm_engine.vllm_config) as url:
        yield Client(HttpEngine(url, 20.0), up.plan)


@needed
@one
@alone
def test_an_update_gives_what_a_fresh_model_has(engine: Engine, up: Up, client: Client) -> None:
    for version in (1, 2, 3):
        checkpoint = engine.family.checkpoint(version + 1)
        client.begin("x", version, to_wire([entry for entry, _ in checkpoint]))
        sender = SharedMemory(client.call, "x", [device_name(CPU)], 1 << 20, 20.0)
        for entry, tensor in checkpoint:
            sender.send(entry.name, tensor)
        sender.flush()
        client._note(client.call("nvfp4_commit", "x"))
        sender.close()
        assert client.version == version
        fresh = engine.model(checkpoint)
        assert different(kernel_tensors(up.model), kernel_tensors(fresh)) == []
        assert different(reachable_tensors(up.model), reachable_tensors(fresh)) == []


@needed
@one
@alone
def test_errors_come_back_and_an_update_that_was_left_open_is_given_up(engine: Engine, up: Up, client: Client) -> None:
    wire = to_wire([entry for entry, _ in engine.family.checkpoint(1)])
    with pytest.raises(MismatchError, match=r"nothing brings it|elements are missing"):
        client.begin("x", 1, wire[1:])
    client.begin("x", 1, wire)  # and its trainer dies
    other = Client(client.engine, up.plan)
    other.begin("y", 1, wire)
    with pytest.raises(MismatchError, match="given up when another one began"):
        client.call("nvfp4_commit", "x")
    other.abandon("y")


@needed
@one
@alone
def test_what_is_no_call_of_ours_is_refused(up: Up) -> None:
    with pytest.raises(ValueError, match="Invalid init_info for LiveTransfer"):
        up.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"master_port": 1}})
    with pytest.raises(RuntimeError, match="does not support draft"):
        up.collective_rpc("start_draft_weight_update")
    with pytest.raises(ConnectionError, match="could not reach this process at nowhere.invalid"):
        Client(LocalEngine(up), up.plan, address="nowhere.invalid")
    with pytest.raises(MismatchError, match="'shutdown' is none of the calls of live weights"):
        Client(LocalEngine(up), up.plan).call("shutdown")
    up.worker.weight_transfer_engine.shutdown()


@needed
def test_the_backend_is_an_engine_argument(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(["--model", "m", "--weight-transfer-config", '{"backend": "nvfp4"}'])
    assert given.weight_transfer_config.backend == "nvfp4"
    config = EngineArgs(model=str(tmp_path), weight_transfer_config={"backend": "nvfp4"}).weight_transfer_config
    assert config is not None and config.backend == "nvfp4"


@pytest.mark.parametrize("backend", ["nccl", None])
@one
@alone
def test_whoever_has_another_backend_or_none_is_told(engine: Engine, factory: Any, backend: str | None) -> None:
    """Also in releases before ours, and before any worker is called."""
    if backend is not None:
        if factory is None:
            pytest.skip("0.15 has no weight transfer")
        from vllm.config import WeightTransferConfig

        engine.config.weight_transfer_config = WeightTransferConfig(backend=backend)
    llm: Any = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=engine.config))
    plan: Any = None
    with pytest.raises(
        UserError, match="was started without a worker extension.*start vLLM with worker_extension_cls="
    ):
        Client(LocalEngine(llm), plan)
