"""``make test-vllm-sources``: the tests of this folder against vLLM's own Python files, on a machine without a GPU.

For each version of `VERSIONS`, ``.vllm-sources/`` gets the Python files of vLLM's wheel (`stubs` stands in for the
compiled ones) and a virtual environment with that version's dependencies, without those that only drive a GPU or that
nothing here imports. Versions with the same PyTorch share it. Then pytest runs there.

What came out is written to docs/results/vllm-sources.md, one row per version; a version that was not run keeps the row
that it had.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / ".vllm-sources"
RESULTS = ROOT / "docs" / "results" / "vllm-sources.md"


@dataclass(frozen=True)
class Version:
    """A vLLM release, and what it is tried with.

    Args:
        torch: the release that its metadata pins; without a GPU, whatever build pip finds for it.
        transformers: one that its metadata allows.
    """

    vllm: str
    torch: str
    transformers: str

    @property
    def folder(self) -> Path:
        return BUILD / self.vllm

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"


VERSIONS = (
    Version("0.15.0", "2.9.1", "4.57.6"),
    Version("0.20.2", "2.11.0", "5.9.0"),
    Version("0.24.0", "2.11.0", "5.9.0"),
    Version("0.26.0", "2.11.0", "5.9.0"),
    Version("0.33.0", "2.14.0", "5.20.2"),
)

WHEEL_TAGS = {
    "--platform": ["manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64", "manylinux1_x86_64"],
    "--abi": ["cp312", "abi3", "cp38"],
    "--python-version": ["3.12"],
    "--implementation": ["cp"],
}
"""Of vLLM's wheels: its Python files are wanted, whatever machine this is."""

KEPT = (".py", ".json", ".txt", "METADATA")

NOT_USED = {
    "certifi",
    "fastsafetensors",
    "flashinfer-cubin",
    "flashinfer-python",
    "humming-kernels",
    "instanttensor",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
    "nvtx",
    "pynvvideocodec",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
    "torchaudio",
    "torchcodec",
}
"""Dependencies whose pinned releases no test here needs: kernels, drivers, codecs, certificates."""


def prepare(version: Version) -> None:
    """Everything that a version's tests need; what is there already is kept."""
    base = BUILD / f"torch-{version.torch}"
    _once(base, lambda: _torch(base, version.torch))
    sources = version.folder / "sources"
    _once(sources, lambda: _sources(sources, version.vllm))
    venv = version.folder / "venv"
    _once(venv, lambda: _dependencies(venv, base, version))


def _once(folder: Path, make: Callable[[], None]) -> None:
    done = folder / ".complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make()
        done.touch()


def _torch(folder: Path, release: str) -> None:
    print(f"installing torch {release}", flush=True)
    _pip(_venv(folder), "install", f"torch=={release}")


def _sources(folder: Path, release: str) -> None:
    print(f"downloading vLLM {release}", flush=True)
    tags = [word for option, values in WHEEL_TAGS.items() for value in values for word in (option, value)]
    _pip(Path(sys.executable), "download", "--no-deps", "--only-binary=:all:", *tags, "-d", folder, f"vllm=={release}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(KEPT)])
    wheel.unlink()


def _dependencies(folder: Path, base: Path, version: Version) -> None:
    print(f"installing the dependencies of vLLM {version.vllm}", flush=True)
    python = _venv(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (shared,) = base.glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(f"{shared}\n")
    pins = [f"torch=={version.torch}", f"transformers=={version.transformers}"]
    _pip(python, "install", *pins, "pytest>=8", *_needed(version))


def _needed(version: Version) -> Iterator[str]:
    """What vLLM's metadata asks for, without extras and without `NOT_USED`."""
    (metadata,) = version.folder.glob("sources/vllm-*.dist-info/METADATA")
    for line in metadata.read_text().splitlines():
        if not line.startswith("Requires-Dist: "):
            continue
        needed = Requirement(line.partition(": ")[2])
        wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if wanted and needed.name.lower().replace("_", "-") not in {*NOT_USED, "torch", "transformers"}:
            needed.marker = None
            yield str(needed)


def _venv(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def _pip(python: Path, *arguments: object) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True)


@dataclass(frozen=True)
class Outcome:
    """What came out for a version.

    Args:
        row: of the table.
        notes: on what did not pass, one line for each reason.
        failed: how many tests.
    """

    row: str
    notes: list[str]
    failed: int


def run(version: Version, arguments: Iterable[str]) -> Outcome:
    """Run a version's tests."""
    report = version.folder / "report.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE / "stubs", version.folder / "sources", ROOT / "src"))),
        "VLLM_SOURCES": version.vllm,
        "VLLM_CACHE_ROOT": str(version.folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    options = [f"--confcutdir={HERE}", f"--junit-xml={report}", "-p", "no:cacheprovider"]
    command = [version.python, "-m", "pytest", HERE, *options, *arguments]
    subprocess.run(command, cwd=HERE, env=environment, check=False)

    counts = Counter({"passed": 0, "failed": 0, "skipped": 0})
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        counts[outcome] += 1
        if bad is not None:
            reason = (bad.get("message") or "").strip().partition("\n")[0]
            reasons.setdefault((outcome, reason[:400]), []).append(str(case.get("name")))
    notes = [f"- {len(names)} {outcome}, the first `{names[0]}`: {why}" for (outcome, why), names in reasons.items()]
    cells = [version.vllm, _installed(version, "torch"), _installed(version, "transformers"), *counts.values()]
    row = "| " + " | ".join(map(str, [*cells, datetime.date.today().isoformat()])) + " |"
    return Outcome(row, notes, counts["failed"])


def _installed(version: Version, package: str) -> str:
    code = f"import {package}; print({package}.__version__)"
    return subprocess.run([version.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


HEAD = """\
# Live updates against vLLM's Python files

`make test-vllm-sources` wrote this. It takes the Python files of each vLLM release as they are in its wheel, and
stand-ins for the compiled ones (`tests/vllm_sources/stubs` says what is true to the original and what is not). It
builds small random models on a CPU and gives them new weights in place. The bytes that kernels would read are then
compared with those of a freshly loaded model, and their addresses with those from before. That kernels compute with
them is not shown here: it takes a GPU.

How a layer looked before processing is found by constructing the model once more (`live_vllm_forms`). Where vLLM keeps
a record of it, the two are compared; 0.15.0 keeps none.

| vLLM | torch | transformers | passed | failed | skipped | date |
| --- | --- | --- | --- | --- | --- | --- |
"""


def write(rows: dict[str, str], notes: dict[str, list[str]]) -> None:
    text = HEAD + "".join(f"{rows[v.vllm]}\n" for v in VERSIONS if v.vllm in rows)
    for version in VERSIONS:
        if notes.get(version.vllm):
            text += f"\n## {version.vllm}: what did not pass\n\n" + "".join(f"{n}\n" for n in notes[version.vllm])
    RESULTS.write_text(text, encoding="utf-8")


def read() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Rows and notes of the last results, by version."""
    rows: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    version = ""
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []:
        if line.startswith("## "):
            version = line.removeprefix("## ").partition(":")[0]
        elif line.startswith("- "):
            notes.setdefault(version, []).append(line)
        elif line.startswith("| ") and line[2].isdigit():
            rows[line.split()[1]] = line
    return rows, notes


def main() -> None:
    known = [version.vllm for version in VERSIONS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of vLLM; all of them if left out: {known}")
    parser.add_argument("--pytest", default="", metavar="OPTIONS", help="of pytest; results are then only shown")
    parser.add_argument("--prepare", action="store_true", help="download and install only")
    asked = parser.parse_args()
    if unknown := set(asked.versions) - set(known):
        parser.error(f"not among {', '.join(known)}: {', '.join(sorted(unknown))}")
    outcomes: dict[str, Outcome] = {}
    for version in VERSIONS:
        if asked.versions and version.vllm not in asked.versions:
            continue
        prepare(version)
        if asked.prepare:
            continue
        print(f"vLLM {version.vllm}", flush=True)
        outcomes[version.vllm] = run(version, asked.pytest.split())
    if not asked.prepare and not asked.pytest:
        rows, notes = read()
        rows |= {version: outcome.row for version, outcome in outcomes.items()}
        notes |= {version: outcome.notes for version, outcome in outcomes.items()}
        write(rows, notes)
    sys.exit(any(outcome.failed for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
