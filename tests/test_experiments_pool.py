"""How an experiment's processes end, and what a command refuses."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nvfp4_qat.alone import alone
from nvfp4_qat.errors import UserError
from nvfp4_qat.jsonl import read_rows

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

import pool  # noqa: E402
import run  # noqa: E402

CONFIG = """
model: tiny
settings: {steps: 1, prompts: 4, samples: 4, warmup_steps: 60, warmup_batch: 8, max_batches: 1, checkpoint_seconds: 0}
runs:
  bf16: {arm: bf16}
  qat: {arm: qat}
"""


def command(folder, *options):
    return [str(folder / "x.yaml"), "--out", str(folder / "out"), "--results", str(folder / "results"), *options]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def task(folder, name, code):
    script = folder / f"{name}.py"
    script.write_text(code)
    return pool.Task(name, script, [str(folder / f"{name}.pid")])


LEAVES_ONE_BEHIND = """
import subprocess, sys
child = subprocess.Popen(["sleep", "1000"])
open(sys.argv[1], "w").write(str(child.pid))
sys.exit({status})
"""

IGNORES = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(1000)
"""


def pids(folder, tasks):
    return [int((folder / f"{task.name}.pid").read_text()) for task in tasks]


@pytest.mark.parametrize(
    ("slots", "count", "expected"),
    [(["0", "1"] * 2, 3, "212"), (["5"] * 3, 2, "22"), (["5"], 2, "11"), (["0", "1"], 1, "1"), ([""], 1, " ")],
)
def test_processes_are_told_how_many_share_their_gpu(tmp_path, monkeypatch, slots, count, expected):
    monkeypatch.setenv(pool.SHARED, "7")
    code = f"import os, sys; open(sys.argv[1], 'w').write(os.environ[{pool.SHARED!r}])"
    tasks = [task(tmp_path, str(i), code) for i in range(count)]
    assert pool.Pool(slots, tmp_path, math.inf).finish(tasks, str)
    assert [(tmp_path / f"{t.name}.pid").read_text() for t in tasks] == [n.strip() for n in expected]


@pytest.mark.parametrize("status", [0, 1])
def test_nothing_is_left_of_a_process_that_ended_by_itself(tmp_path, status):
    tasks = [task(tmp_path, "one", LEAVES_ONE_BEHIND.format(status=status))]
    team = pool.Pool([""], tmp_path, math.inf)
    if status:
        with pytest.raises(UserError, match="one failed"):
            team.finish(tasks, str)
    else:
        assert team.finish(tasks, str)
    wait_for(lambda: not alive(*pids(tmp_path, tasks)), 5)


def test_processes_that_do_not_end_are_waited_for_together(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "GRACE", 2.0)
    tasks = [task(tmp_path, name, IGNORES) for name in "abcd"]
    team = pool.Pool([""] * 4, tmp_path, math.inf)
    begun = []

    def check():
        if all((tmp_path / f"{t.name}.pid").exists() and (tmp_path / f"{t.name}.pid").read_text() for t in tasks):
            begun.append(time.monotonic())
            raise KeyboardInterrupt

    monkeypatch.setattr(team.interrupts, "check", check)
    with pytest.raises(KeyboardInterrupt):
        team.finish(tasks, str)
    assert 1.9 < time.monotonic() - begun[0] < 4.0  # in turn it would be 8
    assert not any(map(alive, pids(tmp_path, tasks)))


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    tasks = [task(tmp_path, "a", IGNORES)]
    with pool.Interrupts() as interrupts:
        team = pool.Pool([""], tmp_path, math.inf, interrupts)
        code = f"""
import os, signal, sys, time
while not os.path.exists({str(tmp_path / "a.pid")!r}): time.sleep(0.05)
for number in (signal.SIGINT, signal.SIGINT):
    time.sleep(1.5)
    os.kill({os.getpid()}, number)
"""
        sender = subprocess.Popen([sys.executable, "-c", code])
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            team.finish(tasks, str)
        sender.wait()
    assert time.monotonic() - begun < pool.GRACE / 2 and not any(map(alive, pids(tmp_path, tasks)))


def test_sigterm_ends_runs_in_order(tmp_path):
    """Also where the shell that started the command has its children ignore Ctrl-C, as for one in the background."""
    (tmp_path / "x.yaml").write_text(
        CONFIG.replace("{steps: 1,", "{steps: 100000,").replace("warmup_steps: 60", "warmup_steps: 0")
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "run.py"), *command(tmp_path, "--runs", "bf16")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    folder = tmp_path / "out" / "bf16-s0"
    metrics = folder / "metrics-bf16.jsonl"
    wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n")))
    process.terminate()
    assert process.communicate(timeout=60)[1] == "interrupted; the same command goes on\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert json.loads((folder / "summary.json").read_text())["interrupted"] is True
    with alone(folder):  # nobody works there any more
        pass
    (row,) = read_rows(tmp_path / "results" / "x" / "runs.jsonl")  # and what there is has been collected
    assert row["run"] == "bf16-s0" and row["steps"] == len(read_rows(metrics))


def test_runs_end_in_order_when_their_command_is_killed(tmp_path):
    (tmp_path / "x.yaml").write_text(
        CONFIG.replace("{steps: 1,", "{steps: 100000,").replace("warmup_steps: 60", "warmup_steps: 0")
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "run.py"), *command(tmp_path, "--runs", "bf16")],
        stdout=subprocess.DEVNULL,
    )
    folder = tmp_path / "out" / "bf16-s0"
    metrics = folder / "metrics-bf16.jsonl"
    wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n")))
    process.kill()
    process.wait()

    def free():
        with suppress(UserError), alone(folder):
            return True
        return False

    wait_for(free, 30)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is True and summary["arms"]["bf16"]["steps"] == len(read_rows(metrics))
    assert (folder / "report.html").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment whose warm-up took two commands."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "x.yaml").write_text(CONFIG)

    class Clock:
        """The time is up when there is something of a warm-up."""

        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic():
            return time.monotonic() + (1e6 if list((folder / "out" / "cache").glob("*.partial")) else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "time", Clock)
        assert run.main(command(folder, "--minutes", "100")) == run.UNFINISHED
    (partial,) = (folder / "out" / "cache").glob("*.partial")
    assert 0 < torch.load(partial, weights_only=True)["step"] < 60
    assert run.main(command(folder)) == 0
    assert not partial.exists()
    return folder


def starting(folder, name):
    return json.loads((folder / "out" / name / "config.json").read_text())["starting_weights"]


def begin_elsewhere(folder, name):
    """Let a run say that it began from what another machine warmed up."""
    path = folder / "out" / name / "config.json"
    other = {"starting_weights": {"sha256": "f" * 64, "file": "warmup-tiny-other.pt"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))


def test_a_warm_up_may_take_several_commands(finished):
    assert starting(finished, "bf16-s0") == starting(finished, "qat-s0")
    rows = [json.loads(line) for line in (finished / "results" / "x" / "runs.jsonl").read_text().splitlines()]
    assert [row["starting_weights"] for row in rows] == [starting(finished, "bf16-s0")["sha256"]] * 2


def test_runs_that_began_from_different_weights_are_not_compared(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    begin_elsewhere(tmp_path, "qat-s0")
    shutil.rmtree(tmp_path / "results")
    assert run.main(command(tmp_path)) == 2
    message = capsys.readouterr().err
    sha256 = starting(finished, "bf16-s0")["sha256"][:12]
    assert f"weights to begin from differ ({sha256}: bf16-s0; ffffffffffff: qat-s0)" in message
    assert not (tmp_path / "results").exists()


def test_a_run_is_not_added_on_another_machine(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    begin_elsewhere(tmp_path, "bf16-s0")
    shutil.rmtree(tmp_path / "out" / "qat-s0")
    assert run.main(command(tmp_path)) == 2
    message = capsys.readouterr().err
    assert "warm-up failed" in message and "(ffffffffffff: bf16-s0; " in message and ": now): they were" in message
    assert not (tmp_path / "out" / "qat-s0").exists()


def test_what_there_is_is_collected_where_a_run_fails(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copy(finished / "x.yaml", tmp_path)
    (tmp_path / "out" / "qat-s0" / "summary.json").unlink()

    def fails(*_):
        raise UserError("qat-s0 failed")

    monkeypatch.setattr(run.Pool, "finish", fails)
    assert run.main(command(tmp_path)) == 2 and capsys.readouterr().err == "error: qat-s0 failed\n"
    assert [row["run"] for row in read_rows(tmp_path / "results" / "x" / "runs.jsonl")] == ["bf16-s0"]


def planned(folder, monkeypatch, *options):
    """What a command would start."""
    found = []
    monkeypatch.setattr(run.Pool, "finish", lambda pool, tasks, say: found.extend(task.name for task in tasks))
    run.main(command(folder, *options))
    return found


def test_a_run_is_finished_when_its_summary_knows_of_all_steps(finished, tmp_path, monkeypatch):
    """A process may be killed between the last row and the summary."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert planned(tmp_path, monkeypatch) == []
    file = tmp_path / "out" / "qat-s0" / "summary.json"
    summary = json.loads(file.read_text())
    summary["arms"]["qat"]["steps"] = 0
    file.write_text(json.dumps(summary))
    assert planned(tmp_path, monkeypatch) == ["qat-s0"]


def test_nothing_is_warmed_up_for_runs_that_have_their_weights(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("bf16-s0", "qat-s0"):
        (tmp_path / "out" / name / "summary.json").unlink()
    assert planned(tmp_path, monkeypatch) == ["bf16-s0", "qat-s0"]
    shutil.rmtree(tmp_path / "out" / "qat-s0")  # one that has not begun could begin from others
    assert planned(tmp_path, monkeypatch)[0] == "warm-up"
    shutil.rmtree(tmp_path / "out" / "cache")
    assert planned(tmp_path, monkeypatch, "--runs", "bf16")[0] == "warm-up"


def test_a_run_that_another_command_is_at_work_on(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out" / "qat-s0" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "out" / "logs")
    with alone(tmp_path / "out" / "qat-s0"):
        assert run.main(command(tmp_path)) == 2
        assert capsys.readouterr().err.startswith("error: another process is at work on ")
        assert not (tmp_path / "out" / "logs").exists()  # and nothing has been started
        assert run.main(command(tmp_path, "--runs", "bf16")) == 0  # others are free
    assert run.main(command(tmp_path)) == 0


@pytest.mark.parametrize("gpu", [False, True])
def test_what_vllm_needs_is_said_before_anything_is_started(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    monkeypatch.setattr(run, "Pool", lambda *_: pytest.fail("something is to be started"))
    (tmp_path / "x.yaml").write_text(CONFIG.replace("bf16}", "bf16, rollout: vllm}"))
    assert run.main(command(tmp_path)) == 2
    done = capsys.readouterr()
    assert done.out == "" and done.err == (
        "error: these runs need an NVIDIA GPU and vLLM: pip install '.[vllm,demo]' on a machine with an H100 or H200\n"
    )
    assert not (tmp_path / "out").exists()
