"""The ``nvfp4-qat`` command: plan, export, verify, demo, report, bench.

Exit codes: 0 it worked; 1 a check failed (every difference is listed); 2 bad usage or input, one line on stderr that
says what is wrong and how to mend it; 130 interrupted. A traceback means a bug. Results go to stdout, anything else to
stderr. Nothing heavy is imported before a command needs it, so ``--help`` is quick.
"""

import argparse
import difflib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from .cli_options import (
    BENCH_SETTINGS,
    DEMO_SETTINGS,
    MODEL_HELP,
    capacity_options,
    capacity_settings,
    config_options,
    demo_options,
    flag,
    json_option,
    metavar,
    model_option,
    names,
    numbers,
)
from .demo_config import ARMS
from .errors import MismatchError, UserError

if TYPE_CHECKING:
    from .config import QATConfig
    from .models import LoadedModel
    from .plan import QuantPlan

PROGRAM = "nvfp4-qat"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    try:
        args = _parsed(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command: Callable[[argparse.Namespace], int] = args.command
            code = command(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _complain(error, 2)
    except MismatchError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # `nvfp4-qat plan … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a directory without permission
        return _complain(error, 2)


def _complain(what: object, code: int) -> int:
    print(f"{PROGRAM}: {what}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings meant for the user as one line, others as Python shows them."""
    text = f"{PROGRAM}: warning: {message}\n"
    if category is not UserWarning:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, and which takes no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Say which arguments are not known, and the option that the first one may have meant."""
        first = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
        close = difflib.get_close_matches(first, [name for name in self._option_string_actions if len(name) > 2], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:  # argparse would point to the help of the whole program
        args.parser.refuse(unknown)
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; needs no torch."""
    from . import __version__

    parser = _Parser(
        prog=PROGRAM,
        description="NVFP4 quantization-aware training: what would be 4-bit, checkpoints, and a demonstration.",
        epilog="exit codes: 0 ok, 1 a check failed, 2 bad usage or input, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(run: Callable[[argparse.Namespace], int], name: str, summary: str, *examples: str) -> _Parser:
        command: _Parser = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="\n".join(["examples:", *(f"  {PROGRAM} {name} {example}".rstrip() for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=run, parser=command)
        return command

    plan = add(
        _plan,
        "plan",
        "list which weights of a model would be 4-bit and why the others are not, or what training would take of GPUs",
        "--model tiny-moe",
        "--model Qwen/Qwen3-8B --ignore 're:.*self_attn' --json",
        "--model Qwen/Qwen3-235B-A22B --gpus 64 --nodes 8 --tensor-parallel 4",
        "--model Qwen/Qwen2.5-32B --gpus 16 --separate --rollout-gpus 8 --gpu-memory 80",
    )
    model_option(plan)
    config_options(plan)
    capacity_options(plan)
    json_option(plan)

    export = add(
        _export,
        "export",
        "quantize a model and write a compressed-tensors checkpoint that vLLM and transformers read",
        "--model smollm2 --out smollm2-nvfp4",
        "--model ./my-model --config qat.yaml --out my-model-nvfp4",
    )
    model_option(export)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory to write to")
    config_options(export)
    json_option(export)

    verify = add(
        _verify,
        "verify",
        "check every byte of a checkpoint, against its own record or the model it was exported from",
        "smollm2-nvfp4",
        "smollm2-nvfp4 --model smollm2",
    )
    verify.add_argument("checkpoint", type=Path, metavar="DIR", help="directory that export wrote")
    verify.add_argument("--model", help=f"compare with this model's weights, byte for byte: {MODEL_HELP}")
    config_options(verify, "With --model; what is not given is as it was at the export.")
    json_option(verify)

    demo = add(
        _demo,
        "demo",
        "run reinforcement learning with bf16 and 4-bit rollouts, with QAT and without, and report the mismatch",
        "",
        "--model smollm2 --arms bf16,noqat,qat --out runs/smollm2",
        "--model tiny-moe --steps 40 --seed 1",
        "--out runs/smollm2 --model smollm2 --resume",
    )
    demo.add_argument("--model", default="tiny", help=f"{MODEL_HELP} (default: tiny)")
    demo.add_argument("--out", type=Path, metavar="DIR", help="directory of the results (default: runs/demo-MODEL)")
    demo.add_argument("--arms", type=names, default=argparse.SUPPRESS, help=f"some of {','.join(ARMS)}")
    demo.add_argument("--resume", action="store_true", help="continue the run in --out, with the same settings")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    json_option(demo)
    demo_options(demo)

    report = add(
        _report,
        "report",
        "draw report.html and curves.png of a run again, finished or not",
        "runs/demo",
    )
    report.add_argument("run", type=Path, metavar="DIR", help="the --out directory of a demo run")

    bench = add(
        _bench,
        "bench",
        "measure what a vLLM engine takes of a GPU in bf16 and in NVFP4, with random weights: nothing is downloaded",
        "memory --model Qwen/Qwen3-30B-A3B",
        "memory --model Qwen/Qwen3-8B --utilization 0.5 --decode 1,64 --out memory.jsonl",
    )
    bench.add_argument("what", choices=["memory"], help="memory: of weights, KV cache and the rest, and decoding speed")
    model_option(bench)
    bench.add_argument("--precisions", type=names, default=("bf16", "nvfp4"), help="bf16,nvfp4 (default), or one")
    bench.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line for each precision")
    engine = bench.add_argument_group("engine")
    for name, kind, default, help in BENCH_SETTINGS:
        engine.add_argument(flag(name), type=kind, default=default, metavar=metavar(kind), help=f"{help} ({default})")
    engine.add_argument("--decode", type=numbers, default=(1, 32, 256), help="sequences to time (1,32,256)")
    engine.add_argument("--eager", action="store_true", help="without CUDA graphs")
    config_options(bench)
    json_option(bench)
    return parser


def _config(args: argparse.Namespace) -> "QATConfig":
    from .config import QATConfig

    config = QATConfig() if args.config is None else QATConfig.from_yaml(args.config)
    patterns = (*config.ignore_patterns, *(p for p in args.ignore if p not in config.ignore_patterns))
    policy = args.global_scale or config.global_scale
    # Whoever asks for a plan or an export wants it, whatever the recipe's own switch says.
    return replace(config, enable=True, ignore_patterns=patterns, global_scale=policy)


def _plan(args: argparse.Namespace) -> int:
    from .plan import QuantPlan

    config, settings = _config(args), capacity_settings(args)
    setup = None
    if settings is not None:
        from .capacity import Setup

        setup = Setup(**settings)
    model = _without_weights(args.model)
    plan = QuantPlan.from_model(model, config)
    if setup is None:
        print(json.dumps(_plan_as_dict(args.model, plan), indent=2) if args.json else plan)
        return 0
    from .capacity_table import Capacity

    capacity = Capacity.of(args.model, model, plan, setup)
    found = {"model": args.model, "parameters": plan.parameters, **capacity.as_dict()}
    print(json.dumps(found, indent=2) if args.json else capacity.table())
    return 0


def _without_weights(spec: str) -> Any:
    """A model on the meta device; those whose configuration is shipped need no network, whoever published them."""
    from .models import load_model
    from .shipped_configs import shipped

    try:
        return load_model(spec, meta=True).model
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # not on the hub, or no network
            raise UserError(f"{error} Their architecture alone: {', '.join(shipped())}.") from error
        raise


def _plan_as_dict(model: str, plan: "QuantPlan") -> dict[str, Any]:
    return {
        "model": model,
        "parameters": plan.parameters,
        "quantized": [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "group": entry.group,
                "kind": entry.kind,
                "checkpoint": [piece.name for piece in entry.checkpoint],
            }
            for entry in plan.quantized
        ],
        "skipped": [{"name": entry.name, "shape": list(entry.shape), "reason": entry.reason} for entry in plan.skipped],
        "ignore": list(plan.ignore_list()),
    }


def _prepared(model: str, config: "QATConfig") -> "LoadedModel":
    """A model with its weights, and QAT applied."""
    from .core import apply_qat
    from .models import load_model

    loaded = load_model(model)
    apply_qat(loaded.model, config)
    return loaded


def _export(args: argparse.Namespace) -> int:
    from .checkpoint import save_checkpoint
    from .core import qat_plan

    out: Path = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # said before a model is loaded for nothing
        raise UserError(f"{out} exists and is not an empty directory: choose another one, or remove it first")
    loaded = _prepared(args.model, _config(args))
    save_checkpoint(loaded.model, out, tokenizer=loaded.tokenizer)
    quantized = sum(len(entry.checkpoint) for entry in qat_plan(loaded.model).quantized)  # experts one by one
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if args.json:
        result = {"checkpoint": str(out), "model": args.model, "quantized": quantized, "bytes": size}
        print(json.dumps(result | {"note": loaded.note}, indent=2))
    else:
        print(f"{out}: {quantized} weights in NVFP4, {size / 1e6:.1f} MB in all")
        if loaded.note:
            print(loaded.note)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .checkpoint import verify_checkpoint
    from .stored_checkpoint import open_checkpoint

    model = None
    try:
        if args.model is not None:
            asked = args.config is not None or args.ignore or args.global_scale
            config = _config(args) if asked else open_checkpoint(args.checkpoint).settings
            model = _prepared(args.model, config).model
        done = verify_checkpoint(args.checkpoint, model=model)
    except MismatchError as error:
        if args.json:
            print(json.dumps({"checkpoint": str(args.checkpoint), "ok": False, "error": str(error)}, indent=2))
        raise
    if args.json:
        print(json.dumps({"checkpoint": str(args.checkpoint), "ok": True, **asdict(done)}, indent=2))
    else:
        counts = f"{done.tensors} tensors, {done.quantized} weights in NVFP4, {done.nbytes / 1e6:.1f} MB"
        against = f"equal to {args.model}, byte for byte" if done.against_model else "equal to the checkpoint's record"
        print(f"{args.checkpoint}: {counts}: {against}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from .demo import run_demo
    from .demo_config import FOR_A_GPU, DemoConfig

    out: Path = args.out or Path("runs") / f"demo-{Path(args.model).name}"
    given = {name: getattr(args, name) for name in ("arms", *(row[0] for row in DEMO_SETTINGS)) if hasattr(args, name)}
    cfg = DemoConfig.for_model(args.model, out, resume=args.resume, progress=not args.quiet, **given)
    if cfg.model in FOR_A_GPU and cfg.rollout == "builtin" and "warmup_steps" not in given:
        raise UserError(
            f"the model '{cfg.model}' is for a GPU: its warm-up of up to {cfg.warmup_steps:,} steps takes days on a "
            "CPU. Give --rollout vllm on a machine with a GPU, a number of --warmup-steps, or --model tiny"
        )
    try:
        summary = run_demo(cfg)
    except KeyboardInterrupt:
        if (out / "config.json").exists():
            print(f"{PROGRAM}: what is finished is in {out}; --resume continues", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps(summary, indent=2))
        return 0
    for name, arm in summary["arms"].items():
        print(
            f"{name:<8} k3 KL {arm['k3_kl_mean']:.2e}   reward {arm['reward_first']:+.3f} → {arm['reward_last']:+.3f}"
        )
    for arms, ratio in summary["k3_kl_ratios"].items():
        if ratio is not None:
            print(f"k3 KL {arms}: {ratio:.3g}")
    if summary["note"]:
        print(summary["note"])
    print(f"report: {out / 'report.html'}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .engine_memory import EngineSettings, measure_engines

    fields = (*(row[0] for row in BENCH_SETTINGS), "decode", "eager")
    settings = EngineSettings(**{name: getattr(args, name) for name in fields})
    found = measure_engines(
        args.model, _config(args), settings, args.precisions, args.out, lambda line: print(line, file=sys.stderr)
    )
    print(json.dumps(found.rows(), indent=2) if args.json else found.table())
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import write_report

    print(write_report(args.run))
    return 0
