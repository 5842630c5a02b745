"""README and docs do what they say: their code runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvfp4_qat.cli import build_parser
from nvfp4_qat.config import QATConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A comment in front of a block says that it needs what a test machine may lack; such a block is only compiled.
NEEDS = re.compile(r"<!-- needs (a GPU|vLLM|verl|TRL)[^>]*-->\s*$")

# Runs the blocks of one page in one namespace, compiled under the page's name with its line numbers, so that a
# traceback points into the page.
RUNNER = """
import json, sys
namespace = {"__name__": "__main__"}
for page, line, code in json.load(sys.stdin):
    exec(compile("\\n" * line + code, page, "exec"), namespace)
"""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    blocks, lines = [], page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        fence = re.match(r"\s*```(\w*)", line)
        if fence and start is None:
            start, language = number, fence[1]
        elif fence:
            before = "\n".join(lines[max(0, start - 2) : start])
            needs = NEEDS.search(before)
            code = "\n".join(lines[start + 1 : number])
            blocks.append(Block(page, start + 1, language, code, needs[1] if needs else None))
            start = None
    assert start is None, f"{page} has a code block that does not end"
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON_PAGES = [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))]


def of_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def commands(block: Block) -> list[list[str]]:
    """A shell block as argument lists, comments and continuation lines resolved."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def process_group(world: int) -> list[dict[str, str]]:
    """What torchrun would set for each process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def test_every_block_names_its_language():
    known = {"python", "bash", "yaml", "text"}
    assert [str(block) for block in BLOCKS if block.language not in known] == []


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path):
    runnable = []
    for block in blocks_of(page):
        if block.language != "python":
            continue
        if block.needs:
            compile(block.code, str(block), "exec")
        else:
            runnable.append([str(page), block.line, block.code])
    (tmp_path / "blocks").write_text(json.dumps(runnable), encoding="utf-8")
    processes = []
    for ranks in process_group(2 if page.name == "distributed.md" else 1):
        with (tmp_path / "blocks").open() as blocks, (tmp_path / f"said-{ranks['RANK']}").open("w") as said:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", RUNNER],
                    stdin=blocks,
                    stdout=said,
                    stderr=said,
                    cwd=tmp_path,
                    env={**os.environ, **ranks},
                )
            )
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * len(codes), "\n".join(path.read_text() for path in sorted(tmp_path.glob("said-*")))


@pytest.mark.parametrize("block", of_language("yaml"), ids=str)
def test_yaml_blocks_are_configurations(block, tmp_path):
    (tmp_path / "recipe.yaml").write_text(block.code, encoding="utf-8")
    assert QATConfig.from_yaml(tmp_path / "recipe.yaml").enable


@pytest.mark.parametrize("block", of_language("bash"), ids=str)
def test_shell_commands_are_right(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(block):
        program, arguments = words[0], words[1:]
        if program == "nvfp4-qat":
            args = build_parser().parse_args(arguments)
            if arguments[0] == "plan" and args.model.startswith("tiny"):  # takes no time, so it runs
                assert args.command(args) == 0
                assert capsys.readouterr().out
        elif program == "make":
            known = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
            targets = [word for word in arguments if "=" not in word]
            assert targets and set(targets) <= known
        elif words[:2] == ["pip", "install"]:
            known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
            used = [
                extra for word in arguments for extras in re.findall(r"\[(.*?)\]", word) for extra in extras.split(",")
            ]
            assert set(used) <= known
        else:
            pytest.fail(f"{block}: no check for the command {program!r}; teach this test what it should be")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_the_result_table_is_that_of_the_committed_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import results

    readme = results.README.read_text(encoding="utf-8")
    assert results.BEGIN in readme and results.END in readme
    assert results.updated(readme) == readme, "run: python docs/results.py"


def test_the_verl_page_has_the_results_of_the_committed_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import verl_results

    page = verl_results.PAGE.read_text(encoding="utf-8")
    assert verl_results.BEGIN in page and verl_results.END in page
    assert verl_results.updated(page) == page, "run: python docs/verl_results.py"
    missing = [row["label"] for row in verl_results.rows() if not verl_results.metrics(row).exists()]
    assert missing == []


def test_the_versions_of_vllm_are_the_same_everywhere():
    from nvfp4_qat.vllm import SUPPORTED

    first, last = (".".join(map(str, version)) for version in SUPPORTED)
    after = f"{SUPPORTED[1][0]}.{SUPPORTED[1][1] + 1}"
    assert f'\nvllm = ["vllm>={first},<{after}"]\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for page in ("README.md", "docs/vllm.md", "CHANGELOG.md"):
        assert f"vLLM {first} to {last}" in (ROOT / page).read_text(encoding="utf-8"), page
    measured = re.search(r"(?m)^vllm==(.*)$", (ROOT / "constraints" / "vllm.txt").read_text(encoding="utf-8"))
    assert f"run on\nGPUs: {measured[1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
