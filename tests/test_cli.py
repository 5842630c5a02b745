"""The command line: what it prints, what it writes, and how it ends when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from nvfp4_qat import cli, run_files
from nvfp4_qat.demo_config import ARMS, DemoConfig
from nvfp4_qat.errors import UserError

SMALL_DEMO = "--warmup-steps 1 --warmup-batch 4 --prompts 2 --samples 2 --max-batches 1 --quiet".split()


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command run in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse ends this way
        code = stop.code
    done = capsys.readouterr()
    return code, done.out, done.err


def heeding_interrupts():
    """What runs in the background may have been told to ignore them, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "nvfp4_qat", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding_interrupts,
        **options,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "tiny-moe"
    assert cli.main(["export", "--model", "tiny-moe", "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("command", ["plan", "export", "verify", "demo", "report", "bench"])
def test_help_has_examples_that_parse(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    examples = out.partition("examples:")[2].strip().splitlines()
    assert examples
    import shlex

    for line in examples:
        program, *arguments = shlex.split(line)
        assert program == "nvfp4-qat" and arguments[0] == command
        cli.build_parser().parse_args(arguments)


def test_plan_as_table_and_as_json(capsys):
    code, table, err = run(capsys, "plan", "--model", "tiny-moe")
    assert (code, err) == (0, "")
    assert "self_attn.q_proj" in table and "qkv_proj" in table and "tied to model.embed_tokens" in table

    code, out, _ = run(capsys, "plan", "--model", "tiny-moe", "--ignore", "re:.*self_attn", "--json")
    assert code == 0
    plan = json.loads(out)
    assert {entry["kind"] for entry in plan["quantized"]} == {"experts"}
    assert plan["quantized"][0]["checkpoint"][0] == "model.layers.0.mlp.experts.0.gate_proj.weight"
    skipped = {entry["name"]: entry["reason"] for entry in plan["skipped"]}
    assert "re:.*self_attn" in skipped["model.layers.0.self_attn.q_proj.weight"]
    assert "model.layers.0.self_attn.q_proj" in plan["ignore"]


def test_config_file_and_options_add_up(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("qat: {enable: false, ignore_patterns: [lm_head, embed_tokens, 're:.*self_attn']}\n")
    code, out, _ = run(capsys, "plan", "--model", "tiny", "--config", recipe, "--ignore", "layers.0", "--json")
    assert code == 0
    names = {entry["name"] for entry in json.loads(out)["quantized"]}
    assert names and not [n for n in names if "self_attn" in n or ".0." in n]


def test_a_pattern_that_matches_nothing_warns_in_one_line(capsys):
    code, _, err = run(capsys, "plan", "--model", "tiny", "--ignore", "no_such_layer")
    assert code == 0
    assert err.startswith("nvfp4-qat: warning: ") and "no_such_layer" in err and err.count("\n") == 1


def test_export_then_verify(checkpoint, capsys):
    code, out, _ = run(capsys, "verify", checkpoint)
    assert code == 0 and "equal to the checkpoint's record" in out
    code, out, _ = run(capsys, "verify", checkpoint, "--model", "tiny-moe", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["ok"] and result["against_model"] and result["quantized"] == 3 * (4 + 8 * 3)


def test_verify_takes_the_settings_of_the_export(tmp_path, capsys):
    out_dir = tmp_path / "ffn"
    options = ("--ignore", "re:.*self_attn", "--global-scale", "amax")
    code, out, _ = run(capsys, "export", "--model", "tiny", "--out", out_dir, *options, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["quantized"] == 4 * 3
    assert result["bytes"] == sum(file.stat().st_size for file in out_dir.iterdir())
    assert run(capsys, "verify", out_dir, "--model", "tiny")[0] == 0
    code, _, err = run(capsys, "verify", out_dir, "--model", "tiny", "--global-scale", "pow2")
    assert code == 1 and "global_scale" in err


def test_verify_names_what_was_changed(checkpoint, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (file,) = broken.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, err = run(capsys, "verify", broken)
    assert code == 1 and out == "" and "model." in err and "Traceback" not in err
    code, out, err = run(capsys, "verify", broken, "--json")
    assert code == 1 and json.loads(out)["ok"] is False and json.loads(out)["error"] in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["no-such-command"], "invalid choice"),
        (["plan"], "required: --model"),
        (["plan", "--model", "tiny", "--jso"], "unrecognized arguments: --jso"),
        (["plan", "--model", "tinny"], "no model 'tinny': did you mean 'tiny'?"),
        (["plan", "--model", "./no-such-model"], "no model directory ./no-such-model"),
        (["plan", "--model", "tiny", "--config", "none.yaml"], "cannot read none.yaml"),
        (["plan", "--model", "tiny", "--global-scale", "pow3"], "global_scale must be one of pow2, amax"),
        (["plan", "--model", "tiny", "--ignore", "k_proj"], "splits the fusion group"),
        (["plan", "--model", "tiny", "--ignore", "re:.*"], "nothing"),
        (["plan", "--model", "tiny", "--ignore", "re:("], "re:("),
        (["export", "--model", "tiny"], "required: --out"),
        (["verify", "no-such-directory"], "no-such-directory"),
        (["report", "no-such-directory"], "there is no directory no-such-directory"),
        (["demo", "--steps", "many"], "invalid int value: 'many'"),
        (["demo", "--steps", "0"], "steps must be at least 1"),
        (["demo", "--arms", "bf16,int4"], "arms must be some of bf16, noqat, qat, qat-ffn"),
        (["demo", "--model", "small", "--out", "run"], "its warm-up of up to 20,000 steps takes days on a CPU. Give "),
        (["demo", "--model", "small-moe", "--rollout", "builtin"], "the model 'small-moe' is for a GPU: "),
        (["demo", "--task", "chess", "--out", "run"], "unknown task 'chess'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("nvfp4-qat") and err.count("\n") == 1


def test_the_help_of_the_demo_says_what_is_the_default(capsys, tmp_path):
    from nvfp4_qat.demo_config import DemoConfig

    _, out, _ = run(capsys, "demo", "--help")
    text = " ".join(out.split())
    for said in (
        "steps of each arm (60)",
        "learning rate (5e-05)",
        "at that level while the trainer computes, 0 never (0)",
    ):
        assert said in text
    other = DemoConfig.for_model("some/model", tmp_path)
    assert f"Of smollm2 and models from elsewhere --steps {other.steps}, --prompts {other.prompts}" in text
    assert "Of small and small-moe --steps 200" in text and "(None)" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "--gpu", "8"), "--gpu 8 (did you mean --gpus?)"),
        (("demo", "--step=3"), "--step=3 (did you mean --steps?)"),
        (("plan", "extra"), "extra"),
        (("plan", "--xyzzy", "--json"), "--xyzzy"),
    ],
)
def test_an_unknown_option_points_to_the_help_of_its_command(arguments, said, capsys):
    command, *rest = arguments
    message = f"nvfp4-qat {command}: unrecognized arguments: {said}; see nvfp4-qat {command} --help\n"
    assert run(capsys, command, "--model", "tiny", *rest) == (2, "", message)


def test_w4a4_says_it_is_not_there_yet(tmp_path, capsys):
    (tmp_path / "w4a4.yaml").write_text("qat: {mode: w4a4}\n")
    code, _, err = run(capsys, "plan", "--model", "tiny", "--config", tmp_path / "w4a4.yaml")
    assert code == 2 and "not there yet" in err


def test_export_does_not_write_over_anything(tmp_path, monkeypatch, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    monkeypatch.setattr("nvfp4_qat.models.load_model", lambda *_: pytest.fail("loaded a model for nothing"))
    code, _, err = run(capsys, "export", "--model", "tiny", "--out", tmp_path)
    assert code == 2 and "not an empty directory" in err
    code, _, err = run(capsys, "export", "--model", "tiny", "--out", tmp_path / "kept.txt")
    assert code == 2 and "not an empty directory" in err
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("bad"), 2, "nvfp4-qat: bad\n"),
        (
            OSError(28, "No space left on device", "x.bin"),
            2,
            "nvfp4-qat: [Errno 28] No space left on device: 'x.bin'\n",
        ),
        (KeyboardInterrupt(), 130, "nvfp4-qat: interrupted\n"),
    ],
)
def test_errors_become_exit_codes(error, code, text, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("nvfp4_qat.report.write_report", fail)
    assert run(capsys, "report", "somewhere") == (code, "", text)


def test_bugs_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr("nvfp4_qat.report.write_report", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "report", "somewhere")


def test_every_setting_of_the_demo_is_an_option():
    options = {row[0] for row in cli.DEMO_SETTINGS}
    own = {"out", "model", "arms", "resume", "progress"}
    assert options | own == {field.name for field in dataclasses.fields(DemoConfig)}
    assert not options & own


def test_demo_options_reach_the_demo(monkeypatch, tmp_path, capsys):
    seen = []

    def run_demo(cfg):
        seen.append(cfg)
        raise UserError("enough")

    monkeypatch.setattr("nvfp4_qat.demo.run_demo", run_demo)
    options = {row[0]: row[1] for row in cli.DEMO_SETTINGS}
    values = {name: "7" if kind is not str else "sort" for name, kind in options.items()}
    values |= {
        "warmup_until": "0.5",
        "rollout": "vllm",
        "sleep": "2",
        "rollout_device": "cuda:0",
        "rollout_memory": "0.5",
    }
    arguments = [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), value)]
    run(capsys, "demo", "--out", tmp_path, "--arms", "qat,bf16", "--resume", "--quiet", *arguments)
    (cfg,) = seen
    assert {name: getattr(cfg, name) for name in values} == {
        name: options[name](value) for name, value in values.items()
    }
    assert (cfg.out, cfg.arms, cfg.resume, cfg.progress) == (tmp_path, ("qat", "bf16"), True, False)

    for more in (("--rollout", "vllm"), ("--warmup-steps", "20000")):  # where its warm-up does not take a CPU days
        seen.clear()
        run(capsys, "demo", "--model", "small", *more)
        assert len(seen) == 1

    seen.clear()
    run(capsys, "demo", "--model", "smollm2", "--tis", "none")
    (cfg,) = seen
    assert cfg == DemoConfig.for_model("smollm2", cfg.out, tis=None)  # what is not given is the model's preset
    assert str(cfg.out) == os.path.join("runs", "demo-smollm2")


def test_report_and_demo_know_the_same_arms():
    assert tuple(run_files.ARMS) == ARMS


def test_demo_then_report(tmp_path, capsys):
    out = tmp_path / "run"
    options = (*SMALL_DEMO, "--steps", 1, "--cache", tmp_path / "cache", "--out", out)
    code, text, _ = run(capsys, "demo", "--arms", "noqat,qat", *options)
    assert code == 0
    assert "noqat" in text and "k3 KL noqat/qat" in text and str(out / "report.html") in text

    code, text, _ = run(capsys, "demo", "--arms", "noqat,qat", *options, "--resume", "--json")
    assert code == 0 and json.loads(text) == json.loads((out / "summary.json").read_text())

    (out / "report.html").unlink()
    code, text, _ = run(capsys, "report", out)
    assert (code, text) == (0, f"{out / 'report.html'}\n")
    assert (out / "report.html").exists() and (out / "curves.png").exists()


def test_interrupting_the_demo_leaves_a_report(tmp_path):
    out = tmp_path / "run"
    options = (*SMALL_DEMO, "--steps", 5000, "--cache", tmp_path / "cache")
    process = started("demo", "--arms", "bf16", "--out", out, *options)
    deadline = time.monotonic() + 120
    while not (out / "metrics-bf16.jsonl").exists() or not (out / "metrics-bf16.jsonl").read_text().count("\n"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:  # Python drops an interrupt that comes while a finalizer runs
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # Where it comes while a finalizer runs, Python says so itself.
    ours = re.sub(r"Exception ignored .*?KeyboardInterrupt: *\n", "", err, flags=re.DOTALL)
    assert "Traceback" not in ours and "--resume continues" in err and err.endswith("nvfp4-qat: interrupted\n")
    assert "not complete" in (out / "report.html").read_text(encoding="utf-8")


def test_a_closed_pipe_is_no_error():
    process = started("plan", "--model", "tiny", "--json")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert err == ""


def test_python_dash_m_and_version(capsys):
    from nvfp4_qat import __version__

    process = started("--version")
    assert process.communicate(timeout=60)[0] == f"nvfp4-qat {__version__}\n"
    assert process.returncode == 0
