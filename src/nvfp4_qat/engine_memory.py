"""What of a GPU's memory an engine's weights, KV cache and the rest take, in bf16 and in NVFP4.

Each precision gets a process of its own (`engine_probe`), which starts vLLM with random weights of the model's shapes,
so that nothing is downloaded, and one after the other, so that each has the GPU to itself.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .config import QATConfig
from .errors import UserError
from .jsonl import append_rows
from .models import load_model
from .plan import QuantPlan

PRECISIONS = ("bf16", "nvfp4")

ROWS = (
    ("weights_bytes", "weights"),
    ("kv_cache_bytes", "KV cache"),
    ("activation_bytes", "peak activation"),
    ("non_torch_bytes", "non-torch"),
    ("graph_bytes", "CUDA graphs"),
)
"""Fields of a measurement, and what the table calls them."""

GIB = 1 << 30


@dataclass(frozen=True)
class EngineSettings:
    """How the engine is started, and what it is timed at.

    Args:
        utilization: share of the GPU's memory that it may take.
        batched_tokens: most tokens of a forward; peak activation grows with it.
        sequences: most sequences at once.
        length: most tokens of a sequence.
        decode: numbers of sequences for which decoding is timed.
        tokens: generated per sequence in the timed part.
        repeats: of each time; the median counts.
        eager: without CUDA graphs.
    """

    utilization: float = 0.9
    batched_tokens: int = 32768
    sequences: int = 256
    length: int = 4096
    decode: Sequence[int] = (1, 32, 256)
    tokens: int = 128
    repeats: int = 3
    eager: bool = False


@dataclass(frozen=True)
class EngineMemory:
    """A model's engine in several precisions.

    Args:
        model: its name.
        settings: of the engines.
        found: by precision, what `engine_probe.probe` returned; bytes.
    """

    model: str
    settings: EngineSettings
    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One for each precision, for a file of results."""
        settings = {**asdict(self.settings), "decode": list(self.settings.decode)}
        return [{"model": self.model, "precision": p, **found, "settings": settings} for p, found in self.found.items()]

    def table(self) -> str:
        """Gibibytes and tokens a second, and how the last precision differs from the first."""
        names = list(self.found)
        lines = [["", *names, *(["difference"] if len(names) > 1 else [])]]
        for key, title in ROWS:
            values = [self.found[name][key] / GIB for name in names]
            lines.append([f"{title}, GiB", *(f"{v:.2f}" for v in values), *_apart(values, "{:+.2f}")])
        for n in self.settings.decode:
            values = [self.found[name]["decode_tokens_per_second"][str(n)]["median"] for name in names]
            title = f"decoding {n} sequence{'s' * (n > 1)}, tokens/s"
            factor = [f"× {values[-1] / values[0]:.2f}"] if len(values) > 1 else []
            lines.append([title, *(f"{v:.0f}" for v in values), *factor])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def _apart(values: Sequence[float], form: str) -> list[str]:
    return [form.format(values[-1] - values[0])] if len(values) > 1 else []


def measure_engines(
    model: str,
    config: QATConfig,
    settings: EngineSettings,
    precisions: Sequence[str] = PRECISIONS,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> EngineMemory:
    """Start an engine in each precision and read what it takes.

    Args:
        model: as for `load_model`; only its configuration is used.
        config: what is 4-bit.
        settings: of the engines.
        precisions: some of `PRECISIONS`.
        out: a file to which each precision's row is appended as a line of JSON as soon as it is measured.
        say: told what is being done; an engine takes minutes.

    Raises:
        UserError: an unknown precision, or vLLM or a GPU is missing, or the engine does not start.
    """
    unknown = sorted(set(precisions) - set(PRECISIONS))
    if unknown or not precisions:
        raise UserError(f"precisions are {' and '.join(PRECISIONS)}, not {', '.join(unknown) or 'none'}")
    loaded = load_model(model, meta=True)
    plan = QuantPlan.from_model(loaded.model, config)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nvfp4-qat-") as folder:
        for precision in precisions:
            directory = Path(folder, precision)
            write_config(directory, loaded.model, plan if precision == "nvfp4" else None)
            say(f"{precision}: starting vLLM with random weights, measuring its memory and decoding …")
            found[precision] = _probe(directory, settings, precision)
            if out is not None:
                append_rows(out, EngineMemory(loaded.name, settings, {precision: found[precision]}).rows())
    return EngineMemory(loaded.name, settings, found)


def write_config(directory: Path, model: Any, plan: QuantPlan | None) -> None:
    """Write the ``config.json`` of a model that is quantized by ``plan``, or not."""
    directory.mkdir(parents=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if plan is not None:
        config.quantization_config = plan.quantization_config()
    config.save_pretrained(directory)


def _probe(directory: Path, settings: EngineSettings, precision: str) -> dict[str, Any]:
    """`engine_probe.probe` in a process of its own."""
    answer, log = directory / "answer.json", directory / "log.txt"
    command = [
        sys.executable,
        "-m",
        "nvfp4_qat.engine_probe",
        str(directory),
        json.dumps(asdict(settings)),
        str(answer),
    ]
    # An engine core in the probe's own process: its memory is counted there, and it ends with it.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code or not answer.exists():
        raise UserError(f"the {precision} engine did not start (exit code {code}): {_reason(log)}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _reason(log: Path) -> str:
    """The last line that names an error, or the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it said nothing"])[-1][:500]
