"""The evaluation of the recipes, without an engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

verl = pytest.importorskip("verl", reason="verl is not installed")

import torch  # noqa: E402
from helpers_recipes import RECIPES, bash, jsonl, load, python_that  # noqa: E402

import nvfp4_qat as nq  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # verl's
data, offline = load("prepare_dapo_data"), load("eval_offline")


def test_intervals_are_those_of_a_mean() -> None:
    assert offline.bootstrap_interval([0.5] * 30) == (0.5, 0.5)
    values = [1.0] * 12 + [0.0] * 18
    low, high = offline.bootstrap_interval(values)
    assert (low, high) == offline.bootstrap_interval(values)
    half = 1.96 * (0.4 * 0.6 / 30) ** 0.5  # of the normal distribution
    assert low == pytest.approx(0.4 - half, abs=0.02) and high == pytest.approx(0.4 + half, abs=0.02)
    narrow = offline.bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < 0.4 < narrow[1] < high


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Answer: 33", "33", True), ("Answer: $33$", "33", True), ("Answer: 33\nAnswer: 34", "33", False),
        ("it is 33", "33", False), (r"so \boxed{33}", "33", True), ("Answer: 33" + "." * 400, "33", False),
        ("", "0", False),
    ],
)  # fmt: skip
def test_grading_is_verls(text: str, answer: str, right: bool) -> None:
    assert offline.correct(text, answer) is right


class Answers:
    """An engine that is right where it is told to be, and how often it was started."""

    def __init__(self, share: dict[str, int]) -> None:
        self.share, self.started = share, 0

    def __call__(self) -> Any:
        self.started += 1

        def answer(problems: Sequence[Any], settings: Any) -> list[list[Any]]:
            right = [self.share.get(problem.answer, 0) for problem in problems]
            return [
                [
                    offline.Response(f"Answer: {problem.answer}" if i < n else "Answer: no", 10 * (i + 1), i > 0)
                    for i in range(settings.samples)
                ]
                for problem, n in zip(problems, right, strict=True)
            ]

        return answer


@pytest.fixture
def exams(tmp_path: Path) -> list[Path]:
    rows = [{"problem": f"Find {i}.", "answer": str(i)} for i in range(3)]
    jsonl(tmp_path / "aime-2025.jsonl", rows)
    data.main(["--out", str(tmp_path), "--only", "aime-2025", "--from-folder", str(tmp_path), "--accept-counts"])
    first, second = tmp_path / "aime-2025.parquet", tmp_path / "aime-2024.parquet"
    second.write_bytes(first.read_bytes())
    return [first, second]


def test_results_are_graded_kept_and_compared(exams: list[Path], tmp_path: Path) -> None:
    out, settings = tmp_path / "out", offline.Settings(samples=4)
    engine = Answers({"0": 4, "1": 1})
    (target,) = offline.evaluate("m", "bf16", exams[:1], out, settings, engine)
    row = json.loads(target.read_text())
    assert target.name == "aime-2025-bf16.json" and row["avg"] == pytest.approx(5 / 12)
    assert row["problems"][1] == {"answer": "1", "correct": 1, "samples": 4, "tokens": 25.0, "cut_off": 1}
    assert row["cut_off"] == 0.25 and row["interval"][0] <= row["avg"] <= row["interval"][1]
    assert "verl" in row["versions"] and row["settings"]["temperature"] == 0.6
    offline.evaluate("m", "bf16", exams, out, settings, engine)
    assert engine.started == 2 and sorted(p.name for p in out.iterdir()) == [
        "aime-2024-bf16.json",
        "aime-2025-bf16.json",
    ]
    offline.evaluate("m", "bf16", exams, out, settings, engine)
    assert engine.started == 2
    with pytest.raises(offline.EvaluationError, match="was made with another model and settings: remove it"):
        offline.evaluate("n", "bf16", exams, out, offline.Settings(samples=8), engine)
    offline.evaluate("m4", "nvfp4", exams[:1], out, settings, Answers({"0": 4}))
    table = offline.summarize(out)
    assert (
        "| aime-2025 | bf16 | 0.4167 |" in table and "aime-2025: nvfp4 - bf16 -0.0833, 95 % interval -0.2500" in table
    )
    summary = json.loads((out / "summary.json").read_text())
    assert [len(summary["results"]), list(summary["nvfp4 - bf16"])] == [3, ["aime-2025"]]
    with pytest.raises(offline.EvaluationError, match="has no results"):
        offline.summarize(tmp_path / "nowhere")


def test_a_checkpoint_is_not_called_what_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    always = ["run", "--model", str(tmp_path), "--out", str(tmp_path), "--data", str(tmp_path / "no.parquet")]
    assert offline.main([*always, "--precision", "bf16"]) == 2
    assert "is a quantized checkpoint: --precision is wrong" in capsys.readouterr().err
    assert offline.main([*always, "--precision", "nvfp4"]) == 2
    assert "no.parquet: run recipes/prepare_dapo_data.sh" in capsys.readouterr().err


def test_evaluation_asks_for_each_step_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "global_step_5"
    (checkpoint / "actor").mkdir(parents=True)
    variables = {"OUT": str(tmp_path / "out"), "DRY_RUN": "1", "K": "2", "PYTHON": "python", "DATA_DIR": "/data"}
    lines = bash("eval_offline.sh", str(checkpoint), "--seed", "3", IGNORE="re:.*self_attn.* x", **variables).stdout
    merged, nvfp4 = tmp_path / "out" / "merged", tmp_path / "out" / "nvfp4"
    assert f"--local_dir {checkpoint}/actor --target_dir {merged}.partial\nmv {merged}.partial {merged}\n" in lines
    assert f"export --model {merged} --out {nvfp4} --ignore re:.*self_attn.* --ignore x\n" in lines
    assert f"--model {nvfp4} --precision nvfp4" in lines and lines.count("--samples 2") == lines.count("--seed 3") == 2
    merged.mkdir(parents=True)
    nvfp4.mkdir()
    lines = bash("eval_offline.sh", str(checkpoint), PRECISIONS="nvfp4", **variables).stdout
    script = str(RECIPES / "eval_offline.py")
    assert [line.split()[1:3] for line in lines.splitlines()] == [
        ["-p", str(tmp_path / "out")], ["-m", "nvfp4_qat"], [script, "run"], [script, "summary"],
    ]  # fmt: skip
    assert bash("eval_offline.sh", str(tmp_path / "no")).returncode == 2


def test_results_of_one_checkpoint_are_not_those_of_another(tmp_path: Path) -> None:
    program, log = python_that(tmp_path, 0)
    variables = {"OUT": str(tmp_path / "out"), "PYTHON": str(program), "PRECISIONS": "bf16"}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for _ in range(2):
        assert bash("eval_offline.sh", str(tmp_path / "a"), **variables).returncode == 0
    assert len(log.read_text().splitlines()) == 4
    for arguments, more in ((tmp_path / "b", {}), (tmp_path / "a", {"IGNORE": "x"})):
        done = bash("eval_offline.sh", str(arguments), **variables, **more)
        assert done.returncode == 2 and "choose another OUT" in done.stderr


def test_what_is_evaluated_are_the_bytes_that_were_trained(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger
    from verl_on_a_cpu import engine, one_process, use_a_cpu

    from nvfp4_qat.integrations.verl_stream import NAME
    from nvfp4_qat.models import load_model, tiny_tokenizer

    tokenizer, base, actor, out = tiny_tokenizer(), tmp_path / "base", tmp_path / "actor", tmp_path / "merged"
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    use_a_cpu()
    with one_process():
        trained = engine(base, "fsdp2", {"enable": True})
        tokens = torch.randint(len(tokenizer), (2, 16))
        for _ in range(2):
            trained.optimizer_zero_grad()
            trained.module(input_ids=tokens, labels=tokens).loss.backward()
            trained.optimizer_step()
        stream, _ = trained.get_per_tensor_param()
        sent = {name: tensor.clone() for name, tensor in stream if name != NAME}
        actor.mkdir()
        torch.save(trained.module.state_dict(), actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    AutoConfig.from_pretrained(base).save_pretrained(actor / "huggingface")
    tokenizer.save_pretrained(actor / "huggingface")
    FSDPModelMerger(
        ModelMergerConfig(
            operation="merge", backend="fsdp", target_dir=str(out), hf_upload_path=None, private=False,
            test_hf_dir=None, tie_word_embedding=False, trust_remote_code=False, is_value_model=False,
            local_dir=str(actor), hf_model_config_path=str(actor / "huggingface"), use_cpu_initialization=False,
        )
    ).merge_and_save()  # fmt: skip
    model = load_model(str(out)).model  # as `nvfp4-qat export` does
    nq.apply_qat(model, nq.QATConfig(enable=True))
    packed = dict(nq.packed_weights(model, layout="fused"))
    assert packed.keys() == sent.keys() and sum(name.endswith("weight_packed") for name in packed) >= 4
    for name, tensor in packed.items():
        assert torch.equal(tensor.view(torch.uint8), sent[name].view(torch.uint8)), name
