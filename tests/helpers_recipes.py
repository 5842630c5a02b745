"""The recipes' scripts and files of data: what the tests of recipes share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

RECIPES = Path(__file__).parent.parent / "recipes"


def load(name: str) -> ModuleType:
    """A script of the recipes as a module."""
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for a class's module
    spec.loader.exec_module(module)
    return module


def bash(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with no variables but these."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    variables = {**kept, "PYTHON": sys.executable, **variables}
    return subprocess.run([RECIPES / script, *arguments], capture_output=True, text=True, env=variables)


def python_that(tmp_path: Path, code: int) -> tuple[Path, Path]:
    """A `python` that notes its arguments and exits, and what it has noted."""
    log, program = tmp_path / "log", tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {code}\n')
    program.chmod(0o755)
    return program, log


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as lines of JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
