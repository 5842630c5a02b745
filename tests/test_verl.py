"""The verl plugin against verl's own code: configurations, what its FSDP engine trains and sends, how engines start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed")

from verl_on_a_cpu import engine, one_process, use_a_cpu  # noqa: E402

import nvfp4_qat as nq  # noqa: E402
from nvfp4_qat.errors import UserError  # noqa: E402
from nvfp4_qat.integrations import verl as plugin  # noqa: E402
from nvfp4_qat.integrations import verl_rollout  # noqa: E402
from nvfp4_qat.integrations.import_hooks import when_imported  # noqa: E402
from nvfp4_qat.integrations.verl_config import settle  # noqa: E402
from nvfp4_qat.integrations.verl_stream import NAME, read  # noqa: E402
from nvfp4_qat.live_manifest import from_wire, manifest  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's
ACTOR, FSDP = "actor_rollout_ref.actor.qat", "actor_rollout_ref.actor.fsdp_config.qat"
ROLLOUT = "actor_rollout_ref.rollout.qat"


def config(*overrides: str) -> Any:
    """verl's own schema and defaults, with overrides as on its command line."""
    from hydra import compose, initialize_config_dir

    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    always = [
        "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1", "actor_rollout_ref.actor.strategy=fsdp2",
    ]  # fmt: skip
    with initialize_config_dir(config_dir=folder, version_base=None):
        return compose("ppo_trainer", overrides=[*always, *overrides])


def validated(*overrides: str) -> Any:
    from verl.utils.config import validate_config

    found = config(*overrides)
    validate_config(found, use_reference_policy=False, use_critic=False)
    return found


def test_verl_has_loaded_the_plugin_by_itself() -> None:
    assert plugin.active() is None
    done = subprocess.run([sys.executable, "-m", "nvfp4_qat.integrations.verl"], capture_output=True, text=True)
    assert done.returncode == 0 and f"is active (nvfp4-qat {plugin._version('nvfp4-qat')}, verl" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "nvfp4_qat.integrations.verl"], capture_output=True, text=True,
        env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"},
    )  # fmt: skip
    assert done.returncode == 1 and "is not active: verl did not import it" in done.stderr


@pytest.mark.parametrize("place", [ACTOR, FSDP])
def test_either_place_turns_qat_on_for_trainer_and_rollout(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = validated(f"{place}.enable=True", f"{place}.ignore_patterns=[lm_head,re:.*self_attn.*]").actor_rollout_ref
    for block in (found.actor.qat, found.actor.fsdp_config.qat, found.rollout.qat):
        assert block.enable and list(block.ignore_patterns) == ["lm_head", "re:.*self_attn.*"]
    assert "nvfp4-qat: QAT is on, w4a16, all layers but lm_head, re:.*self_attn.*" in capsys.readouterr().out


def test_both_places_may_say_the_same() -> None:
    found = validated(f"{ACTOR}.enable=True", f"{FSDP}.enable=True", f"{FSDP}.ignore_patterns=[lm_head]")
    assert list(found.actor_rollout_ref.actor.qat.ignore_patterns) == ["lm_head"]


def test_the_rollout_may_say_the_same() -> None:
    said = "{enable: True, ignore_patterns: [lm_head]}"
    found = validated(f"{ACTOR}.enable=True", f"{FSDP}.ignore_patterns=[lm_head]", f"{ROLLOUT}={said}")
    assert found.actor_rollout_ref.rollout.qat == found.actor_rollout_ref.actor.qat
    settle(found)  # as where a run is started from what was validated


def test_a_rollout_in_4_bits_alone_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"rollout\.qat\.enable is true alone: set actor_rollout_ref\.actor\.qat\.enable"
    ):
        validated(f"{ROLLOUT}={{enable: True}}")


@pytest.mark.parametrize("absent", [f"~{ACTOR}", f"{ACTOR}=null", f"~{FSDP}", f"{FSDP}=null"])
def test_a_place_that_was_taken_out_is_there_again(absent: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    found = validated(f"{FSDP if ACTOR in absent else ACTOR}.enable=True", absent).actor_rollout_ref
    assert found.rollout.qat.enable and omega_conf_to_dataclass(found.actor).engine.qat.enable


def test_without_qat_nothing_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    validated(f"{ACTOR}.ignore_patterns=[a]", f"{FSDP}.ignore_patterns=[b]", "actor_rollout_ref.rollout.name=sglang")
    assert "nvfp4-qat" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"{ACTOR}.ignore_patterns=[a]", f"{FSDP}.ignore_patterns=[b]"],
            r"ignore_patterns is \['a'\] and .* keep one",
        ),
        ([f"+{FSDP}.keep_gathered=True"], "have no key keep_gathered; known keys: enable, mode, group_size"),
        ([f"{FSDP}.mode=w4a4"], "4-bit activations"),
        ([f"{FSDP}.group_size=32"], "group_size must be 16"),
        ([f"{FSDP}.quantization_config_path=/nowhere.json"], "cannot read /nowhere.json"),
        (["actor_rollout_ref.rollout.name=sglang"], "rollout.name is sglang"),
        (["actor_rollout_ref.rollout.load_format=auto"], "load_format is auto: leave it at dummy"),
        (["actor_rollout_ref.rollout.quantization=fp8"], "rollout.quantization is fp8"),
        (["actor_rollout_ref.model.lora.merge=True"], "adapters cannot be merged"),
        (["actor_rollout_ref.actor.strategy=fsdp_turbo"], "actor.strategy is fsdp_turbo"),
        (
            ["actor_rollout_ref.rollout.checkpoint_engine.backend=mooncake"],
            "backend is mooncake, which sends all as bf16",
        ),
        (
            ["actor_rollout_ref.rollout.checkpoint_engine.backend=nccl", "actor_rollout_ref.model.lora_rank=8"],
            "leaves out adapters that are not merged",
        ),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides={a:1}"], "vllm.hf_overrides is set: QAT sets it"),
        (["actor_rollout_ref.rollout.dtype=float16"], "rollout.dtype is float16: leave it at bfloat16"),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.dtype=half"], "vllm.dtype is half: leave it out"),
        (["actor_rollout_ref.actor.fsdp_config.dtype=float16"], "fsdp_config.dtype is float16, but the rollout"),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.enable_eplb=True"], "enable_eplb is true: weights cannot"),
        ([f"{ROLLOUT}=null"], "rollout.qat is set to None, which is not what actor.qat says: do not set it"),
        ([f"~{ROLLOUT}"], "rollout.qat is set to None, which"),
        ([f"{ROLLOUT}={{enable: False}}"], "rollout.qat is set to {'enable': False}, which is not"),
        ([f"{ROLLOUT}={{enable: True, mode: w4a4}}"], "rollout.qat is set to .*'w4a4'}, which is not"),
        ([f"{ROLLOUT}={{enable: True, other: 1}}"], "rollout.qat is set to .*'other': 1}, which is not"),
        (["actor_rollout_ref.model.mtp.enable_rollout=True"], "draft models get no 4-bit weights"),
    ],
)
def test_what_cannot_run_stops_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validated(f"{ACTOR}.enable=True", *overrides)


def test_workers_notice_that_the_driver_has_no_plugin() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    with pytest.raises(Exception, match="the plugin of nvfp4-qat was not active where"):
        omega_conf_to_dataclass(config(f"{ACTOR}.enable=True").actor_rollout_ref.actor)
    assert omega_conf_to_dataclass(validated(f"{ACTOR}.enable=True").actor_rollout_ref.actor).engine.qat.enable


MODELS = ("dense", "moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128,
    }  # fmt: skip
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    found = {}
    for name, made in (("dense", Qwen3Config(**sizes)), ("moe", Qwen3MoeConfig(**sizes, **experts))):
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(found[name])
    return found


class Trained:
    """verl's engine and the same model trained without verl, step by step."""

    def __init__(self, folder: Path, strategy: str, **qat: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.engine = engine(folder, strategy, {"enable": True, **qat})
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.plan = nq.apply_qat(self.model, nq.QATConfig(enable=True))
        self.batch = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(1))

    def step(self) -> None:
        self.engine.optimizer_zero_grad()
        self.engine.module(input_ids=self.batch, labels=self.batch).loss.backward()
        self.engine.optimizer_step()

    def follow(self) -> None:
        """Give the other model the engine's masters."""
        masters = {
            name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in self.engine.module.state_dict().items()
        }
        self.model.load_state_dict(masters)

    def sent(self) -> dict[str, torch.Tensor]:
        stream, peft = self.engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
        assert peft is None
        return dict(stream)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("model", MODELS)
def test_the_engine_trains_in_4_bits_and_sends_the_packed_weights(
    model: str, strategy: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    use_a_cpu()
    with one_process():
        trained = Trained(folders[model], strategy)
        mode = "fsdp2, gather mode" if strategy == "fsdp2" else "fsdp, module mode"
        assert f"nvfp4-qat: training in 4 bits ({mode})" in capsys.readouterr().out
        before = trained.sent()
        for _ in range(2):
            trained.step()
        found = trained.sent()
        trained.follow()
        entries = from_wire(read(found.pop(NAME)))
        assert sorted(e.name for e in entries) == sorted(e.name for e in manifest(trained.model, trained.plan))
        want = dict(nq.packed_weights(trained.model, layout="fused"))
        assert found.keys() == want.keys() and all(same(found[name], want[name]) for name in want)
        codes = [name for name in want if name.endswith("weight_packed")]
        assert codes and any(not same(before[name], found[name]) for name in codes)
        metrics = trained.engine._nvfp4_training.metrics()
        announcement = before[NAME].nbytes
        assert metrics["qat/sync_bytes"] == sum(t.nbytes for t in want.values()) + announcement
        assert 0.5 < metrics["qat/coverage"] < 1 and 0 < metrics["qat/flip_rate"] < 1


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_a_comparison_trains_in_bf16_and_samples_in_4_bits(
    strategy: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "noqat.json"
    document = nq.QATConfig(enable=True).to_compressed_tensors(list(nq.QATConfig().ignore_patterns))
    path.write_text(json.dumps({**document, "nvfp4_qat": {"train": False}}))
    use_a_cpu()
    with one_process():
        trained = Trained(folders["dense"], strategy, quantization_config_path=str(path))
        trained.step()
        modules = {type(m).__name__ for m in trained.engine.module.modules()}
        assert "QATLinear" not in modules
        got = trained.engine.module(input_ids=trained.batch).logits
        found = trained.sent()
        trained.follow()
        want = dict(nq.packed_weights(trained.model, layout="fused"))
        found.pop(NAME)
        assert found.keys() == want.keys() and all(same(found[name], want[name]) for name in want)
        rounded = trained.model.to(torch.bfloat16)(input_ids=trained.batch).logits
        assert (got.float() - rounded.float()).abs().max() > 0.05  # the trainer does not see the rounding


def test_moving_the_model_off_the_gpu_and_back_keeps_it_4_bit(folders: dict[str, Path]) -> None:
    """As verl's ``param_offload`` does, here from the CPU to the CPU."""
    use_a_cpu()
    with one_process():
        trained = Trained(folders["moe"], "fsdp2")
        for _ in range(2):
            trained.step()
            for _ in range(2):
                trained.engine.module._apply(lambda t: t.to("cpu", copy=True))
        found = trained.sent()
        trained.follow()
        want = dict(nq.packed_weights(trained.model, layout="fused"))
        assert all(same(found[name], want[name]) for name in want)


@pytest.mark.parametrize("moved", [False, True])
def test_a_snapshot_that_is_restored_is_what_is_computed_with(moved: bool, folders: dict[str, Path]) -> None:
    """As verl does for log-probabilities of older weights; with offloading the model is in other memory then."""
    from torch.distributed.tensor import DTensor
    from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu

    use_a_cpu()
    with one_process(), torch.no_grad():
        trained = Trained(folders["dense"], "fsdp2")
        module = trained.engine.module

        def logits() -> torch.Tensor:
            found: torch.Tensor = module(input_ids=trained.batch).logits.float()
            return found

        def move() -> None:
            if moved:
                module._apply(lambda t: t.to("cpu", copy=True))

        old = logits()
        specs = {name: p._spec for name, p in module.named_parameters() if isinstance(p, DTensor)}
        shards = {
            name: (p._local_tensor.detach().to("cpu", copy=True), specs[name])
            for name, p in module.named_parameters()
            if name in specs
        }
        with torch.enable_grad():
            trained.step()
        assert not torch.equal(logits(), old)
        move()
        fsdp2_sharded_load_from_cpu(module, shards, next(iter(specs.values())))
        move()
        assert torch.equal(logits(), old)
        trained.sent()


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_the_base_of_lora_is_packed_and_stays_as_it_is(strategy: str, folders: dict[str, Path]) -> None:
    use_a_cpu()
    with one_process():
        made = engine(folders["dense"], strategy, {"enable": True}, rank=4, use_orig_params=True)
        ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(1))

        def base() -> tuple[dict[str, torch.Tensor], Any]:
            stream, peft = made.get_per_tensor_param(layered_summon=False, base_sync_done=False)
            return dict(stream), peft

        before, peft = base()
        assert peft["r"] == 4 and not any("lora" in name or "base_layer" in name for name in before)
        with torch.autocast("cpu", torch.bfloat16):  # as verl's forward_step
            loss = made.module(input_ids=ids, labels=ids).loss
        loss.backward()
        made.optimizer_step()
        after, _ = base()
        assert before.keys() == after.keys() and all(same(before[name], after[name]) for name in before)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folders["dense"], dtype=torch.float32)
        nq.apply_qat(model, nq.QATConfig(enable=True))
        want = dict(nq.packed_weights(model, layout="fused"))
        assert all(same(before[name], want[name]) for name in want)


def test_a_forward_sees_4_bit_weights(folders: dict[str, Path]) -> None:
    use_a_cpu()
    with one_process():
        trained = Trained(
            folders["dense"],
            "fsdp2",
        )
        got = trained.engine.module(input_ids=trained.batch).logits
        want = trained.model.to(torch.bfloat16)(input_ids=trained.batch).logits
        torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)


def test_metrics_come_through_verls_worker(folders: dict[str, Path]) -> None:
    """They are gathered over ranks and flattened there, each a list."""
    from itertools import chain

    from verl.utils.torch_functional import allgather_dict_into_dict

    use_a_cpu()
    with one_process():
        made = engine(folders["dense"], "fsdp2", {"enable": True})
        for _ in range(2):
            dict(made.get_per_tensor_param()[0])
            made._nvfp4_training.stepped = True
        outputs: dict[str, Any] = {"metrics": {"actor/pg_loss": [0.5, 0.25]}}
        made.forward_backward_batch = lambda *a, **k: outputs
        made.optimizer_step = lambda: 1.0
        found = made.train_batch({}, None)["metrics"]
        assert found.pop("grad_norm") == 1.0
        gathered = allgather_dict_into_dict(found, made.get_data_parallel_group())
        flat = {name: list(chain.from_iterable(values)) for name, values in gathered.items()}
        assert flat["qat/sync_bytes"][0] > 0 and flat["qat/flip_rate"] == [0.0] and flat["actor/pg_loss"] == [0.5, 0.25]


def test_weights_that_are_sent_again_do_not_count_as_unchanged(folders: dict[str, Path]) -> None:
    use_a_cpu()
    with one_process():
        trained = Trained(folders["dense"], "fsdp2")
        trained.sent()
        trained.step()
        trained.sent()
        rate = trained.engine._nvfp4_training.metrics()["qat/flip_rate"]
        trained.sent()
        assert trained.engine._nvfp4_training.metrics()["qat/flip_rate"] == rate > 0


def test_shards_in_bf16_are_not_sent(folders: dict[str, Path]) -> None:
    use_a_cpu()
    with one_process():
        made = engine(folders["dense"], "fsdp2", {"enable": True})
        with pytest.raises(UserError, match="backend=naive, nccl or nixl"):
            made.get_per_tensor_param_shard()


def test_megatrons_quantization_is_left_to_verl(tmp_path: Path) -> None:
    path = tmp_path / "modelopt.json"
    path.write_text('{"quant_method": "modelopt"}')
    block = {"enable": True, "quantization_config_path": str(path)}
    assert not verl_rollout.enabled(types.SimpleNamespace(config=types.SimpleNamespace(qat=block)))


def test_programs_that_do_not_validate_are_settled_too() -> None:
    from verl.trainer import main_ppo

    found = config(f"{ACTOR}.enable=True", "actor_rollout_ref.rollout.name=sglang")
    with pytest.raises(UserError, match="rollout.name is sglang"):
        main_ppo.run_ppo(found, task_runner_class=None)


def test_metrics_keep_their_names() -> None:
    from verl.utils.py_functional import rename_dict

    assert rename_dict({"loss": 1, "qat/coverage": 0.9}, "actor/") == {"actor/loss": 1, "qat/coverage": 0.9}


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


def test_options_beside_the_quantization_config(tmp_path: Path) -> None:
    from nvfp4_qat.integrations.verl_config import config_of

    path = tmp_path / "nvfp4.json"
    document = nq.QATConfig(enable=True).to_compressed_tensors(["lm_head"])
    block = {"enable": True, "quantization_config_path": str(path), "ignore_patterns": ["lm_head"]}
    path.write_text(json.dumps({**document, "nvfp4_qat": {"gather": "module", "global_scale": "amax"}}))
    qat, options = config_of(block)
    assert (qat.global_scale, options.gather, options.keep_gathered) == ("amax", "module", False)
    assert "nvfp4_qat" not in qat.to_compressed_tensors(["lm_head"])
    path.write_text(json.dumps({**document, "nvfp4_qat": {"gathers": "module"}}))
    with pytest.raises(UserError, match="unknown keys gathers; known: gather, keep_gathered, global_scale, train"):
        config_of(block)


def test_actions_follow_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_to_hook.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    when_imported("module_to_hook", lambda module: seen.append(module.value))
    assert seen == []
    import module_to_hook  # type: ignore[import-not-found]

    assert seen == [1] and module_to_hook.__spec__.loader is module_to_hook.__loader__
    when_imported("module_to_hook", lambda module: seen.append(2))
    assert seen == [1, 2]


def test_code_that_runs_already_cannot_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = "from nvfp4_qat.integrations.import_hooks import when_imported\n"
    (tmp_path / "module_in_a_circle.py").write_text(hook + "when_imported(__name__, print)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="module_in_a_circle is being imported already"):
        import module_in_a_circle  # noqa: F401


FAILS = """
import sys
import nvfp4_qat.integrations as i
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "nvfp4_qat.integrations.verl_training":
            raise ImportError("libcudart is missing")
sys.meta_path.insert(0, Broken())
import verl
from verl.utils.qat.core import apply_qat
try:
    apply_qat(None, {"enable": True})
except RuntimeError as error:
    print("STOPPED", error)
"""


def test_a_plugin_that_could_not_be_activated_stops_whoever_uses_qat() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True)
    assert "could not be activated: ImportError: libcudart is missing" in done.stderr, done.stderr[-2000:]
    assert "STOPPED nvfp4-qat: QAT is enabled, but the verl plugin is not active in this process" in done.stdout
