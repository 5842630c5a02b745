"""verl's FSDP engine with the plugin: what it trains with, what it sends, and what it says of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")

from verl_on_a_cpu import MODELS, engine, one_process, saved_models, use_a_cpu  # noqa: E402

import nvfp4_qat as nq  # noqa: E402
from nvfp4_qat.errors import UserError  # noqa: E402
from nvfp4_qat.integrations.verl_stream import NAME, read  # noqa: E402
from nvfp4_qat.live_manifest import from_wire, manifest  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models(tmp_path_factory)


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


def test_metrics_keep_their_names() -> None:
    from verl.utils.py_functional import rename_dict

    assert rename_dict({"loss": 1, "qat/coverage": 0.9}, "actor/") == {"actor/loss": 1, "qat/coverage": 0.9}
