"""What an engine takes of a GPU: the table and its rows, the engine's configuration, and what goes wrong."""

import json
import logging
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from nvfp4_qat import (  # noqa: E402
    QATConfig,
    cli,
    engine_memory,  # noqa: E402
    engine_probe,
)
from nvfp4_qat.engine_memory import EngineMemory, EngineSettings, measure_engines, write_config  # noqa: E402
from nvfp4_qat.errors import UserError  # noqa: E402
from nvfp4_qat.models import load_model  # noqa: E402
from nvfp4_qat.plan import QuantPlan  # noqa: E402

GIB = 1 << 30
SETTINGS = EngineSettings(decode=(1, 32), tokens=64, repeats=3)


def measured(weights: float, cache: float, *speeds: float) -> dict:
    return {
        "weights_bytes": int(weights * GIB), "kv_cache_bytes": int(cache * GIB), "activation_bytes": GIB,
        "non_torch_bytes": GIB // 2, "graph_bytes": 3 * GIB // 4,
        "decode_tokens_per_second": {str(n): {"median": s} for n, s in zip((1, 32), speeds, strict=True)},
    }  # fmt: skip


def test_the_table_has_every_part_and_the_difference():
    found = {"bf16": measured(56.88, 65.47, 100, 3000), "nvfp4": measured(16.89, 105.45, 150, 3600)}
    memory = EngineMemory("a model", SETTINGS, found)
    lines = memory.table().splitlines()
    assert lines[0].split() == ["bf16", "nvfp4", "difference"]
    assert [line.split(",")[0] for line in lines[1:6]] == [
        "weights", "KV cache", "peak activation", "non-torch", "CUDA graphs",
    ]  # fmt: skip
    assert lines[1].split() == ["weights,", "GiB", "56.88", "16.89", "-39.99"]
    assert lines[6].split()[-4:] == ["100", "150", "×", "1.50"] and lines[7].split()[-2:] == ["×", "1.20"]
    assert [row["precision"] for row in memory.rows()] == ["bf16", "nvfp4"]
    assert json.loads(json.dumps(memory.rows()))[1]["settings"]["decode"] == [1, 32]
    alone = EngineMemory("a model", SETTINGS, {"nvfp4": found["nvfp4"]}).table().splitlines()
    assert alone[0].split() == ["nvfp4"] and alone[1].split()[-1] == "16.89"


def test_the_engine_s_configuration(tmp_path):
    from transformers import AutoConfig

    model = load_model("Qwen/Qwen3-30B-A3B", meta=True).model
    write_config(tmp_path / "bf16", model, None)
    write_config(tmp_path / "nvfp4", model, QuantPlan.from_model(model, QATConfig(enable=True)))
    bf16, nvfp4 = (AutoConfig.from_pretrained(tmp_path / name) for name in ("bf16", "nvfp4"))
    assert bf16.architectures == ["Qwen3MoeForCausalLM"] and bf16.num_experts == 128
    assert getattr(bf16, "quantization_config", None) is None
    assert nvfp4.quantization_config["format"] == "nvfp4-pack-quantized"
    assert "lm_head" in nvfp4.quantization_config["ignore"]


@pytest.mark.parametrize(("name", "billions"), [("Qwen/Qwen3-8B", 8.19), ("Qwen3-30B-A3B", 30.53)])
def test_models_whose_configuration_is_shipped_need_no_network(name, billions, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = load_model(name, meta=True)
    assert {p.device.type for p in loaded.model.parameters()} == {"meta"}
    assert loaded.model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.005)


def test_another_publisher_s_model_of_that_name_is_another_model(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot load 'somebody/Qwen3-8B'"):
        load_model("somebody/Qwen3-8B", meta=True)


def test_precisions_that_do_not_exist():
    with pytest.raises(UserError, match="bf16 and nvfp4, not fp8"):
        measure_engines("tiny", QATConfig(), SETTINGS, ["fp8"])
    with pytest.raises(UserError, match="not none"):
        measure_engines("tiny", QATConfig(), SETTINGS, [])


def test_each_precision_is_written_when_it_is_measured(monkeypatch, tmp_path):
    out, said = tmp_path / "new" / "rows.jsonl", []

    def probe(directory, settings, precision):
        if precision == "nvfp4":
            raise UserError("the nvfp4 engine did not start")
        return {"weights_bytes": 7}

    monkeypatch.setattr(engine_memory, "_probe", probe)
    with pytest.raises(UserError, match="nvfp4 engine did not start"):
        measure_engines("tiny", QATConfig(enable=True), SETTINGS, out=out, say=said.append)
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["precision"], row["weights_bytes"]) == ("bf16", 7)
    assert [line.split(":")[0] for line in said] == ["bf16", "nvfp4"]


def test_without_vllm_or_a_gpu_the_command_says_what_is_missing(capsys):
    if engine_probe.importlib.util.find_spec("vllm") is not None and torch.cuda.is_available():
        pytest.skip("both are here")
    assert cli.main(["bench", "memory", "--model", "tiny"]) == 2
    assert (
        "the bf16 engine did not start (exit code 2): UserError: measuring an engine needs" in capsys.readouterr().err
    )


class FakeLLM:
    """Says what vLLM says when it starts, and takes 1 ms a token and 10 ms a call."""

    def __init__(self, directory, **options) -> None:
        self.options, self.clock = options, 0.0
        logging.getLogger("vllm.v1.worker.gpu_worker").debug(
            "Actual usage is 16.89 GiB for weight, 2.0 GiB for peak activation, 0.1 GiB for non-torch memory, and 0.75 "
            "GiB for CUDAGraph memory. Replace gpu_memory_utilization config with ..."
        )
        cache = SimpleNamespace(num_gpu_blocks=10, block_size=16)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def collective_rpc(self, ask):
        runner = SimpleNamespace(model_memory_usage=7.0)
        return [
            ask(
                SimpleNamespace(
                    model_runner=runner, available_kv_cache_memory_bytes=5, peak_activation_memory=3, non_torch_memory=2
                )
            )
        ]

    def generate(self, prompts, sampling, use_tqdm):
        FakeLLM.now += 0.01 + 0.001 * sampling.max_tokens
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(range(sampling.max_tokens)))])
        return [output] * len(prompts)

    now = 0.0


def test_the_probe_reads_what_vllm_reports(monkeypatch, tmp_path):
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = FakeLLM, SimpleNamespace
    vllm.__spec__ = engine_probe.importlib.util.spec_from_loader("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(engine_probe, "version", lambda package: f"{package} 1")
    monkeypatch.setattr(engine_probe.time, "perf_counter", lambda: FakeLLM.now)
    found = engine_probe.probe(tmp_path, SETTINGS)
    assert (found["weights_bytes"], found["kv_cache_bytes"], found["kv_cache_tokens"]) == (7, 5, 160)
    assert found["graph_bytes"] == round(0.75 * GIB)
    assert found["decode_tokens_per_second"]["1"]["median"] == pytest.approx(1000)
    assert found["decode_tokens_per_second"]["32"]["samples"] == pytest.approx([32000] * 3)
    monkeypatch.setattr(engine_probe, "GRAPHS", engine_probe.re.compile("never logged"))
    with pytest.raises(UserError, match="vllm 1 does not log the memory of its CUDA graphs: try it with --eager"):
        engine_probe.probe(tmp_path, SETTINGS)
    assert engine_probe.probe(tmp_path, replace(SETTINGS, eager=True))["graph_bytes"] == 0
