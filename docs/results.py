"""Write the README's result table from the committed runs: ``python docs/results.py``.

Every run under ``docs/results/<name>/`` gives a row; a test compares the README with what this prints.
"""

import math
from pathlib import Path

from markers import between

from nvfp4_qat.report_page import byte_size, duration, ratio, small
from nvfp4_qat.run_files import Run, load_run, number

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- results: written by docs/results.py -->", "<!-- results end -->"

HEAD = ["run", "k3 KL bf16", "no QAT", "QAT", "no QAT / QAT", "QAT / bf16", "bytes a sync, bf16 → NVFP4", "steps, time"]


def row(name: str, run: Run) -> list[str]:
    """One run as cells of the table."""
    arms = {arm: run[arm] for arm in ("bf16", "noqat", "qat")}
    kl = [small(arm.k3_kl if arm else math.nan) for arm in arms.values()]
    sizes = [byte_size(arm.sync_bytes if arm else math.nan) for arm in (arms["bf16"], arms["qat"])]
    ratios = [f"**{ratio(run.k3_ratio('noqat', 'qat'))}**", ratio(run.k3_ratio("qat", "bf16"))]
    length = f"{run.summary.get('steps', '?')}, {duration(number(run.summary.get('seconds')))}"
    link = f"[{run.summary.get('model', name)}](docs/results/{name}/summary.json)"
    return [link, *kl, *ratios, " → ".join(sizes), length]


def table() -> str:
    """The whole table in Markdown, and below it what each run says must be known about its model."""
    folders = sorted(path.parent for path in DOCS.glob("results/*/summary.json"))
    if not folders:
        return "No run has been committed yet."
    runs = {folder.name: load_run(folder) for folder in folders}
    lines = [HEAD, ["---"] * len(HEAD), *(row(name, run) for name, run in runs.items())]
    notes = [f"- {run.note}" for run in runs.values() if run.note]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in lines] + ["", *notes] * bool(notes))


def updated(readme: str) -> str:
    """The README with the table between its markers renewed."""
    return between(readme, BEGIN, END, f"\n{table()}\n")


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
