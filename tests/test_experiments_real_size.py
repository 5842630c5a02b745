"""The experiment of real size, small and on a CPU: two ranks, and a stand-in for vLLM.

This file is also the program of the ranks: ``torchrun … test_experiments_real_size.py FOLDER FAULT ARGUMENTS``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PATHS = [str(ROOT / folder) for folder in ("experiments", "benchmarks", "tests")]

SENT = {"nvfp4": "packed", "bf16": "plain"}
ORDER = [
    "budget", "engine", "build", "sync", "generate", "sync", "sleep", "first step", "traffic", "phases", "memory",
    "steps", "sync", "generate", "sleep", "steps", "sync", "generate",
]  # fmt: skip
"""What the rows of two rounds are of; behind them come those of `finish`."""


# The program of the ranks


def stand_in(folder: Path, fault: str) -> types.ModuleType:
    """In the place of ``vllm``, for rank 0; writes down how it was started."""
    import standin_generate
    from real_size_engine import Measured
    from transformers import AutoConfig, AutoModelForCausalLM

    import nvfp4_qat as nq

    class Worker(Measured, standin_generate.Worker):
        def real_size_memory(self):
            return {"ok": {"weights": sum(p.nbytes for p in self.model.parameters())}}

        def nvfp4_begin(self, *arguments):
            if fault == "sync":
                return {"error": "no room", "kind": "OutOfMemoryError"}
            return super().nvfp4_begin(*arguments)

    class LLM(standin_generate.LLM):
        def __init__(self, model, **options):
            (folder / "started.json").write_text(json.dumps({"options": options, "environment": dict(os.environ)}))
            if fault == "start":
                raise ValueError("no kernel for this GPU")
            self.calls, self.ended, self.paused, self.finish_reason = [], False, False, None
            self.enable_sleep_mode = options["enable_sleep_mode"]
            self.config = AutoConfig.from_pretrained(model)
            quantized = self.config.__dict__.pop("quantization_config", None) is not None
            other = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
            plan = nq.apply_qat(other, nq.QATConfig(enable=True))
            tensors = dict(nq.packed_weights(other))
            if not quantized:  # the names of a checkpoint
                slices = plan.checkpoint_slices
                tensors = {p.name: p.of(t).clone() for n, t in other.state_dict().items() for p in slices.get(n, ())}
            self.worker = Worker(tensors)
            self.llm_engine = SimpleNamespace(
                engine_core=SimpleNamespace(shutdown=self._shutdown), reset_encoder_cache=lambda: None
            )
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (folder / "pid").write_text(str(process.pid))
            self.process = process

        def _shutdown(self):
            super()._shutdown()
            self.process.kill()
            self.process.wait()

        def generate(self, prompts, sampling, use_tqdm=True):
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            self._called("generate", len(prompts))
            assert not self.paused and not self.worker.asleep, "asked while it could not answer"
            assert sampling.ignore_eos and not sampling.detokenize and not use_tqdm
            assert sampling.logprobs in (None, 0)
            scores = [{1: SimpleNamespace(logprob=-5.5)}] * sampling.max_tokens
            answer = SimpleNamespace(token_ids=[1] * sampling.max_tokens, logprobs=scores)
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    return module


def program(folder: str, fault: str, *arguments: str) -> int:
    import real_size

    sys.modules["vllm"] = stand_in(Path(folder), fault)
    if fault in ("trainer", "hangs") and os.environ["RANK"] == "1":

        def fails(*_):
            if fault == "hangs":
                time.sleep(600)
            raise torch.OutOfMemoryError("no memory for rank 1")

        real_size.Parts.divided = fails
    status = real_size.main(list(arguments))
    if os.environ["RANK"] == "0":
        (Path(folder) / "ended").touch()
    return status


# How it is started


def start(folder: Path, *arguments: str, fault: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    command += [str(folder), fault, "--tiny", "--out", str(folder / "rows.jsonl"), "--limit", "100", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def rows(folder: Path) -> list[dict]:
    file = folder / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def importable():
    """The files of experiments/ import each other by name, as they do when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        for path in PATHS[:2]:
            patch.syspath_prepend(path)
        yield


@pytest.fixture(scope="module", params=list(SENT))
def ran(request, tmp_path_factory):
    """An arm, and the folder of its run."""
    folder = tmp_path_factory.mktemp(request.param)
    status = start(folder, "--arm", request.param).wait(150)
    assert status == 0, (folder / "output").read_text()[-8000:]
    return request.param, folder


# What a run gives


def test_rows_come_in_order_and_say_where_they_are_from(ran):
    arm, folder = ran
    found = rows(folder)
    hand_over = ["sleep", "generate"] if arm == "nvfp4" else []
    assert [row["what"] for row in found] == [*ORDER, *hand_over, "sync", "syncs", "verify", "mismatch"]
    for row in found:
        assert row["experiment"] == "real_size" and (row["arm"], row["gpus"], row["masters"]) == (arm, 2, "fp32")
        assert {"gpu", "torch", "date", "commit", "vllm"} <= row.keys()
        for name in (name for name in row if name.endswith("_samples")):
            median = row[name.removesuffix("_samples")]
            assert row[name] and min(row[name]) <= median <= max(row[name])


def test_the_engine_has_the_trainer_s_weights_after_every_sync(ran):
    arm, folder = ran
    found = rows(folder)
    syncs = [row for row in found if row["what"] == "sync"]
    assert [row["version"] for row in syncs[:4]] == [1, 2, 3, 4] and found[-2]["check"] == "ok"
    handed_over = [row for row in found if row["what"] == "syncs"][0].get("from_gathered_seconds_samples", [])
    assert len(handed_over) == (arm == "nvfp4") and syncs[-1]["version"] == 5 + len(handed_over)
    assert all(row["new_tokens"] == 16 for row in found if row["what"] == "generate")
    assert found[-1]["scored_tokens"] == 12 and 0 < found[-1]["logprob_abs_diff"] < 2


def test_bytes_are_those_that_were_expected(ran):
    arm, folder = ran
    by_name = {row["what"]: row for row in rows(folder)}
    expected = by_name["budget"]["traffic_bytes"]
    assert by_name["sync"]["bytes"] == pytest.approx(expected["sync"], rel=0.001)
    assert by_name["traffic"]["gathered_bytes"] == expected["all-gathers of a step"]
    assert by_name["traffic"]["block_received_bytes"] == expected["all-gather of a block"]
    memory, (moment, held) = by_name["memory"], next(iter(by_name["budget"]["moments"].items()))
    assert moment.startswith("train (") and memory["masters_bytes"] == held["masters"] == memory["gradients_bytes"]
    assert memory["optimizer_bytes"] == pytest.approx(2 * memory["masters_bytes"], rel=0.001)
    assert (memory["packed_shards_bytes"] > 0) == (arm == "nvfp4") == ("packed_shards" in held)


def test_steps_are_taken_apart(ran):
    arm, folder = ran
    by_name = {row["what"]: row for row in rows(folder)}
    phases = {name for name in by_name["phases"] if name.endswith("_seconds")}
    assert phases == {f"{name}_seconds" for name in ("forward", "backward", "clip", "optimizer")} | (
        {"pack_seconds"} if arm == "nvfp4" else set()
    )
    assert 0 < by_name["steps"]["loss"] < by_name["first step"]["loss"] < 6
    experts = by_name["first step"]["experts"]
    assert experts["layers"] == 2 and experts["used_share"] == 1 and experts["largest_load"] < 3


def test_the_engine_s_processes_know_nothing_of_the_launcher(ran):
    _, folder = ran
    started = json.loads((folder / "started.json").read_text())
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = started["environment"]
    assert not [name for name in found if name in launcher or name.startswith("TORCHELASTIC")]
    assert "CUDA_VISIBLE_DEVICES" not in found or found["CUDA_VISIBLE_DEVICES"] == os.environ["CUDA_VISIBLE_DEVICES"]
    assert (found["VLLM_WORKER_MULTIPROC_METHOD"], found["VLLM_ALLREDUCE_USE_SYMM_MEM"]) == ("spawn", "0")
    options = started["options"]
    assert (options["tensor_parallel_size"], options["enable_sleep_mode"], options["load_format"]) == (2, True, "dummy")
    assert options["worker_extension_cls"] == "real_size_engine.Measured"
    assert options["compilation_config"] == {"cudagraph_capture_sizes": [1, 2, 4]}
    assert (folder / "ended").exists() and not alive(int((folder / "pid").read_text()))


# What ends early

FAULTS = {
    "start": "no kernel for this GPU",
    "sync": "no room",
    "trainer": "no memory for rank 1",
    "killed": "Signal 9",
    "hangs": "Timeout (0:00:25)!",
}
"""What goes wrong, and what is said of it."""


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Folders of runs that failed, with the exit code of each and the seconds that it took; all at once."""
    folders = {fault: tmp_path_factory.mktemp(fault) for fault in FAULTS}
    began = time.monotonic()
    processes = {
        fault: start(folder, *(["--limit", "25"] if fault == "hangs" else []), fault=fault)
        for fault, folder in folders.items()
    }
    found = {}
    for fault, process in processes.items():
        try:
            status = process.wait(170)
        finally:
            process.kill()
        found[fault] = folders[fault], status, time.monotonic() - began
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_ends_all_and_the_engine_s_processes(fault, failed):
    folder, status, seconds = failed[fault]
    output = (folder / "output").read_text()
    assert status != 0 and FAULTS[fault] in output, output[-4000:]
    assert seconds < 170
    written = [row["what"] for row in rows(folder)]
    behind = {"start": "budget", "sync": "build", "trainer": "traffic", "killed": "sync"}
    assert written == ORDER[: len(written)] and written[-1] == behind.get(fault, written[-1])
    if (folder / "pid").exists():
        pid = int((folder / "pid").read_text())
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        with contextlib.ExitStack() as stack:
            if alive(pid):
                stack.callback(os.kill, pid, signal.SIGKILL)
                pytest.fail("a process of the engine outlived the run")


# Parts of it


def test_the_budget_of_the_real_model_fits_with_what_the_script_takes_by_default(importable):
    import real_size
    from common import World

    world, bare = World(0, 4, torch.device("cpu"), None), real_size.Bare.of(real_size.parse([]))

    def expected(*arguments):
        return real_size.expected(real_size.parse(list(arguments)), world, bare)

    for arm, left in (("nvfp4", 10.2), ("bf16", 13.5)):
        budget = expected("--arm", arm)
        assert budget.fits and budget.left / 2**30 == pytest.approx(left, abs=0.1)
        assert set(budget.moments) > {"sync", "generate"} and ("hand over" in budget.moments) == (arm == "nvfp4")
        assert f"left of {139.8:.2f}" in budget.table()
    awake = expected("--sleep", "0")
    assert not awake.fits and "--masters bf16" in awake.refusal()
    assert expected("--sleep", "0", "--masters", "bf16").fits


def test_what_the_real_engine_is_started_with(importable):
    import real_size
    from common import World

    args = real_size.parse(["--engine-options", '{"disable_custom_all_reduce": true}', "--expert-parallel"])
    found = real_size.options(args, World(0, 4, torch.device("cpu"), None)).arguments()
    assert (found["tensor_parallel_size"], found["enable_expert_parallel"], found["max_num_seqs"]) == (4, True, 256)
    assert found["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert found["kv_cache_memory_bytes"] == 16 << 30 and found["disable_custom_all_reduce"] is True
    eager = real_size.options(real_size.parse(["--eager"]), World(0, 1, torch.device("cpu"), None)).arguments()
    assert eager["enforce_eager"] and "compilation_config" not in eager


def test_scores_of_tokens_are_what_the_loss_is_the_mean_of(importable):
    from real_size_scores import Loss
    from real_size_trainer import configuration
    from transformers import AutoModelForCausalLM

    config = configuration("tiny-moe", None)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.__class__ = type("Model", (Loss, type(model)), {})
    tokens = torch.randint(256, (3, 9))
    with torch.no_grad():
        scores, loss = model(tokens, each=True), model(tokens)
        logits = model.lm_head(model.model(input_ids=tokens[:, :-1]).last_hidden_state)
    assert scores.shape == (3, 8) and -scores.mean() == pytest.approx(loss.item(), rel=1e-6)
    assert scores[2, 5] == pytest.approx(logits[2, 5].log_softmax(-1)[tokens[2, 6]].item(), rel=1e-5)


def test_weights_have_the_scales_that_let_experts_share_tokens(importable):
    from real_size_trainer import deviation

    assert deviation("model.embed_tokens.weight", 48, 2048) == 1.0
    assert deviation("model.layers.3.mlp.gate.weight", 48, 2048) == pytest.approx(2048**-0.5)
    assert deviation("model.layers.3.mlp.experts.gate_up_proj", 48, 2048) == 0.02
    for name in ("self_attn.o_proj.weight", "mlp.experts.down_proj"):
        assert deviation(f"model.layers.3.{name}", 50, 2048) == pytest.approx(0.002)


if __name__ == "__main__":
    sys.path[:0] = PATHS
    from real_size_ranks import run

    run(lambda: program(*sys.argv[1:]))
