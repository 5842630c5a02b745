"""The page of experiments, from rows whose numbers are known."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_rows import evaluation_row, paired_row, write, write_everything, write_experiment

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

import claims  # noqa: E402
import figures  # noqa: E402
import sections  # noqa: E402
import words  # noqa: E402
from common import append  # noqa: E402
from intervals import Estimate, ratio_of_runs  # noqa: E402
from page import updated  # noqa: E402
from rows import Results, last_quarter  # noqa: E402
from section_arms import K3, comparison, evaluations, served  # noqa: E402
from section_contract import contract, paired  # noqa: E402

from nvfp4_qat.jsonl import read_rows  # noqa: E402

ARMS = {arm: arm for arm in ("bf16", "noqat", "qat")}


def cells(table):
    """A Markdown table's rows, as lists of cells."""
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line][2:]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_everything(folder)
    return folder


def test_sections_of_single_files(tmp_path):
    where = {"gpu": "NVIDIA H200", "torch": "2.11.0", "date": "2026-01-02 03:04"}
    row = {
        "quantizer": "ours", "package": "nvfp4-qat", "version": "0.1.0", "global_scale": "fusion group",
        "weight_error": 0.009, "bits_per_weight": 4.5005, "perplexity": 1.5, "kl": 2e-3, "kl_ratio": 1.0,
        "kl_ratio_95": [1.0, 1.0], "model": "small", "sequences": 4, "tokens": 1234, **where,
    }  # fmt: skip
    append(tmp_path / "quantizers.jsonl", [row])
    about = {"model": "Qwen/X", "gpus": 4, "masters": "fp32", "tokens": 4096, "vllm": "0.24.0", **where}
    workers = [{"weights_loaded": 4 << 30, "kv_cache": 1 << 30, "graphs": 1 << 20}, {}]
    workers[1] = {**workers[0], "weights_loaded": 5 << 30}
    append(tmp_path / "real_size.jsonl", [
        {"arm": "nvfp4", "what": "steps", "round": 1, "seconds": 9.0, **about},
        {"arm": "nvfp4", "what": "steps", "round": 2, "seconds": 2.5, **about},
        {"arm": "bf16", "what": "steps", "round": 1, "seconds": 3.0, **about},
        {"arm": "nvfp4", "what": "generate", "tokens_per_second": 12345.0, "workers": workers, **about},
    ])  # fmt: skip
    _, quality, size = sections.sections(tmp_path)
    assert "| small | ours (0.1.0) | fusion group | 0.900 % | 1.5000 |" in quality.table
    assert "4 right answers (1,234 tokens)" in quality.text
    assert "| a whole step | 3.00 s | 2.50 s |" in size.table and "| tokens a second | – | 12,345 |" in size.table
    assert "| engine: weights | – | 5.37 GB |" in size.table


def test_a_run_at_real_size_that_ended_early_is_not_filled_up_with_an_earlier_one(tmp_path):
    where = {"gpu": "NVIDIA H200", "torch": "2.11.0", "date": "2026-01-02 03:04", "vllm": "0.24.0", "gpus": 4}
    about = {"model": "Qwen/X", "masters": "fp32", "tokens": 4096, **where}
    run = [{"what": "budget"}, {"what": "steps", "seconds": 9.0}, {"what": "generate", "tokens_per_second": 12345.0}]
    again = [{"what": "budget"}, {"what": "steps", "seconds": 2.5}]
    append(tmp_path / "real_size.jsonl", [{"arm": "nvfp4", **row, **about} for row in (*run, *again)])
    append(tmp_path / "real_size.jsonl", [{"arm": "bf16", **row, **about} for row in run])
    *_, size = sections.sections(tmp_path)
    assert "| a whole step | 9.00 s | 2.50 s |" in size.table and "| tokens a second | 12,345 | – |" in size.table


def test_seconds_of_runs_that_shared_a_gpu_are_called_that(tmp_path):
    said = {None: "How many runs shared a GPU was not recorded.", 1: "", 4: "of a GPU that up to 4 runs shared."}
    for count, expected in said.items():
        told = words.sharing([{"runs_on_gpu": count}] * 2)
        assert told.endswith(expected) and bool(told) == bool(expected)
    assert words.sharing([{"runs_on_gpu": 2}, {"run": "older"}]).endswith(
        ", of some runs it was not recorded how many."
    )
    write_experiment(tmp_path / "dense", ARMS)
    assert (
        "Seconds are those of a GPU that up to 3 runs shared."
        in comparison("x", Results("dense", tmp_path), list(ARMS), "x.png").text
    )


def test_the_page_is_that_of_the_committed_rows():
    page = (ROOT / "docs" / figures.PAGE).read_text(encoding="utf-8")
    made = sections.sections()
    assert updated(page, made, figures.FOLDER, "experiments/figures.py") == page, "run: python experiments/figures.py"
    pictures = {section.picture.file for section in made if section.picture is not None}
    assert {file.name for file in (ROOT / "docs" / figures.FOLDER).glob("*")} == pictures


def test_readme_s_headline_is_that_of_the_committed_rows():
    readme = figures.README.read_text(encoding="utf-8")
    assert figures.with_headline(readme) == readme, "run: python experiments/figures.py"


def test_readme_s_headline(everything, tmp_path):
    readme = f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n"
    assert figures.with_headline(readme, tmp_path) == f"before\n{figures.BEGIN}\n{figures.END}\nafter\n"
    made = figures.with_headline(readme, everything)
    assert made.startswith(f"before\n{figures.BEGIN}\n| model | ") and made.endswith(f"{figures.END}\nafter\n")
    assert [row[0] for row in cells(made.partition("\n| ---")[2].partition("\n\n")[0])] != []
    assert re.search(r"\| Qwen3 of 65 M parameters \| 2 × 200 \| .* \| \*\*1\d\d×\*\*; seeds 1\d\d, 1\d\d \|", made)
    with pytest.raises(SystemExit, match="lost the markers"):
        figures.with_headline("no markers")


def test_all_sections_and_pictures(everything, tmp_path):
    made = sections.sections(everything)
    assert len(made) == 11 and made[0].title == "What was claimed, what came out"
    assert all("nan" not in section.table + section.text for section in made)
    for file, (experiment, names) in sections.CURVES.items():
        results = Results(experiment, everything)
        figures.draw_curves(results, [name for name in names if name in results.names()], tmp_path / file)
        assert (tmp_path / file).stat().st_size > 50_000


def test_claims_without_rows_are_not_run(tmp_path):
    made = claims.claims(*(Results(name, tmp_path) for name in ("dense", "moe", "smollm2")))
    assert {tuple(row[2:]) for row in cells(made.table)} == {("not run", "–")}


def test_claims_are_answered(tmp_path):
    write_experiment(tmp_path / "dense", ARMS)
    rows = [evaluation_row(f"{arm}-s{s}", 200, "bf16", 0.5 if arm == "noqat" else 0.8) for arm in ARMS for s in (0, 1)]
    write(tmp_path / "dense/measured.jsonl", [*rows, paired_row("qat-s0", 200, ratio=1.2), paired_row("qat-s1", 200)])
    made = claims.claims(*(Results(name, tmp_path) for name in ("dense", "moe", "smollm2")))
    found = {(row[0], row[2].split(" ")[0]): row[2:] for row in cells(made.table) if row[1].startswith("Qwen3 of")}
    answers = {claim: held for (claim, _), (_, held) in found.items()}
    assert answers[claims.FACTOR] == "yes" and answers[claims.FLOOR] == "–"
    (kernels,) = (text for (claim, _), (text, _) in found.items() if claim == claims.KERNELS)
    assert kernels.startswith("1.1") and kernels.endswith("; seeds 1.200, 1.000") and answers[claims.KERNELS] == "no"
    reward = next(text for (claim, _), (text, _) in found.items() if claim == claims.REWARD)
    assert re.fullmatch(r"\S+ \(.*\); seeds \S+, \S+; blocks of 6 steps", reward) and answers[claims.REWARD] == "yes"
    offline = {arm: held for (claim, arm), (_, held) in found.items() if claim == claims.OFFLINE}
    assert offline == {"no": "no", "QAT": "yes"}  # "no QAT" is 30 points below
    # An arm that was not evaluated is told, and is no yes.
    write(tmp_path / "dense/measured.jsonl", [row for row in rows if row["run"].startswith(("bf16-s", "noqat-s"))])
    made = claims.claims(*(Results(name, tmp_path) for name in ("dense", "moe", "smollm2")))
    offline = [row[2:] for row in cells(made.table) if row[0] == claims.OFFLINE]
    assert offline[1:] == [["QAT not evaluated", "–"], ["not run", "–"]] and offline[0][1] == "no"


def test_the_whole_interval_decides():
    cases = {(-0.04, 0.05): "yes", (-0.06, 0.0): "open", (-0.2, -0.06): "no", (0.06, 0.2): "open"}
    assert {ends: claims.within(Estimate(0.0, *ends), 0.05) for ends in cases} == cases
    assert claims.within(Estimate(0.0), 0.05) == "open"


def held(folder, claim):
    made = claims.claims(*(Results(name, folder) for name in ("dense", "moe", "smollm2")))
    return next(tuple(row[2:]) for row in cells(made.table) if row[0] == claim)


def test_each_seed_s_own_interval_decides_about_the_factor(tmp_path):
    write_experiment(tmp_path / "dense", ARMS)
    metrics = read_rows(tmp_path / "dense/metrics.jsonl")

    def scaled(seed, by):
        for row in metrics:
            if row["run"] == f"noqat-s{seed}":
                row[K3] *= by
        write(tmp_path / "dense/metrics.jsonl", metrics)
        return held(tmp_path, claims.FACTOR)[1]

    assert [scaled(0, 0.1), scaled(1, 0.1)] == ["open", "no"]


def test_unfinished_runs_leave_claims_open(tmp_path):
    write_experiment(tmp_path / "dense", ARMS, cut={"qat-s1": 180})
    file = tmp_path / "dense/runs.jsonl"
    assert held(tmp_path, claims.REWARD)[1] == "yes"
    write(file, [{**run, "config": {"steps": 200}} for run in read_rows(file)])
    for claim in (claims.FACTOR, claims.FLOOR, claims.REWARD):
        text, answer = held(tmp_path, claim)
        assert text.endswith("; unfinished: qat-s1: 180 of 200 steps") and answer == "open"
    assert "2 × 180 (unfinished)" in claims.headline([Results("dense", tmp_path)])


def test_a_claim_rests_on_the_steps_of_its_own_runs(tmp_path):
    """And not on those that an arm which it does not speak of has made."""
    answers = {}
    for name, cut in (("whole", {}), ("cut", {"qat-ffn-s0": 60, "qat-ffn-s1": 100})):
        write_experiment(tmp_path / name / "dense", {**ARMS, "qat-ffn": "qat-ffn"}, cut=cut)
        answers[name] = [held(tmp_path / name, claim) for claim in (claims.FACTOR, claims.FLOOR, claims.REWARD)]
        answers[name].append(claims.headline([Results("dense", tmp_path / name)]))
    assert answers["cut"] == answers["whole"] and "2 × 200" in answers["cut"][-1]


def test_runs_that_are_not_measured_to_their_end_leave_claims_open(tmp_path):
    write_experiment(tmp_path / "dense", ARMS)
    steps = {"qat-s0": (20, 200), "qat-s1": (20,)}
    paired_rows = [paired_row(run, step) for run, there in steps.items() for step in there]
    evaluated = [evaluation_row(f"{arm}-s{s}", 200, "bf16", 0.8) for arm in ARMS for s in (0, 1)]
    file = tmp_path / "dense/measured.jsonl"
    write(file, [*paired_rows, *(row for row in evaluated if row["run"] != "qat-s1")])
    text, answer = held(tmp_path, claims.KERNELS)
    assert text.endswith("; not measured to the end: qat-s1") and answer == "open"
    made = claims.claims(*(Results(name, tmp_path) for name in ("dense", "moe", "smollm2")))
    offline = [row[2:] for row in cells(made.table) if row[0] == claims.OFFLINE]
    assert offline[0][1] == "yes"  # without QAT
    assert offline[1][0].endswith("; not measured to the end: qat-s1") and offline[1][1] == "open"
    write(file, [*paired_rows, paired_row("qat-s1", 200), *evaluated])
    assert held(tmp_path, claims.KERNELS)[1] == "yes"


def test_settings_are_said_as_far_as_rows_have_them():
    config = {"model": "small", "task": "auto", "prompts": 16, "samples": 16, "minibatches": 4, "lr": 1e-5, "tis": 2.0}
    said = words.settings([{"config": {**config, "warmup_until": 0.4}, "note": "made here from random"}])
    assert said.startswith("made here from random. Warmed up on the task until") and "a chance of 40 %" in said
    assert "Task: chain, responses of at most 56 tokens. A step: 16 prompts × 16 samples, 4 minibatches" in said
    assert "learning rate 1·10⁻⁵. Truncated importance sampling: bound 2, on in every arm" in said
    assert "sampling: off." in words.settings([{"config": {**config, "tis": None}}])
    assert words.settings([{"run": "bf16-s0"}]) == ""


def test_runs_have_the_order_of_the_experiments(tmp_path):
    names = {
        "bf16": "bf16",
        "bf16-fast": "bf16",
        "noqat": "noqat",
        "qat": "qat",
        "qat-fast": "qat",
        "qat-ffn": "qat-ffn",
    }
    write_experiment(tmp_path / "dense", names, steps=1)
    assert Results("dense", tmp_path).names() == ["bf16", "noqat", "qat", "qat-ffn", "bf16-fast", "qat-fast"]


def test_nothing_is_minus_zero():
    assert [words.signed(x) for x in (-0.0001, -0.01, 0.01)] == ["0.000", "−0.010", "+0.010"]
    assert [words.signed_points(x) for x in (-0.0001, 0.012)] == ["0.0", "+1.2"]


def test_arms_are_compared_over_the_steps_they_share(tmp_path):
    write_experiment(tmp_path / "dense", ARMS, cut={"qat-s0": 120})
    results = Results("dense", tmp_path)
    common = results.common(list(ARMS), "reward")
    assert {(name, seed): len(run) for name, runs in common.items() for seed, run in runs.items()} == {
        (name, seed): 200 if seed else 120 for name in ARMS for seed in (0, 1)
    }
    assert common["bf16"][0] == list(results.points("bf16", "reward")[0].values())[:120]
    assert len(last_quarter(common)["bf16"][0]) == 30
    first, _ = comparison("x", results, list(ARMS), "x.png").table.split("\n\n")
    assert {row[1] for row in cells(first)} == {"120 + 200"}
    assert [row[3].count(",") for row in cells(first)] == [1, 1, 1]  # each seed's own number


def test_a_seed_that_one_arm_lacks_is_not_compared(tmp_path):
    write_experiment(tmp_path / "dense", ARMS)
    rows = [row for row in (tmp_path / "dense/runs.jsonl").read_text().splitlines() if '"qat-s1"' not in row]
    (tmp_path / "dense/runs.jsonl").write_text("\n".join(rows) + "\n")
    kl = Results("dense", tmp_path).common(list(ARMS), K3)
    assert list(kl["qat"]) == [0] and list(kl["bf16"]) == [0, 1]
    found = ratio_of_runs(kl["qat"], kl["bf16"])
    assert found.value == pytest.approx(np.mean(kl["qat"][0]) / np.mean(kl["bf16"][0]))


def test_evaluations_are_compared_problem_by_problem(everything):
    table = cells(evaluations("x", Results("dense", everything)).table)
    assert [row[0] for row in table][:3] == ["before the first step", "bf16", "no QAT"]
    assert table[1][2:4] == ["–", "–"] and table[2][3].count(",") == 1
    assert [row[0] for row in table].count("before the first step") == 1


def test_a_run_that_was_evaluated_before_its_last_step_is_left_out(tmp_path):
    write_experiment(tmp_path / "dense", ARMS, seeds=(0,))
    rows = [evaluation_row(f"{arm}-s0", 180 if arm == "qat" else 200, "bf16", 0.8) for arm in ARMS]
    write(tmp_path / "dense/measured.jsonl", rows)
    results = Results("dense", tmp_path)
    assert [bool(results.answers(arm, "bf16")) for arm in ARMS] == [True, True, False]


def test_variants_that_differ_in_nothing_are_given_no_ratio(everything):
    dense = Results("dense", everything)
    table = {row[1]: row[2:] for row in cells(contract([dense]).table)}
    ends = {words: row[-1] for words, row in table.items()}
    assert sum(end == "no difference on these weights" for end in ends.values()) == 2
    assert table["engine rounds the master weights itself (compressed-tensors)"][1].startswith("values: 2.5 %, code ")
    assert ends["engine rounds the master weights itself (compressed-tensors)"] == "90 (90 – 90)"
    scored, decoded = (cells(table)[0] for table in paired([dense]).table.split("\n\n"))
    assert scored[1] == "21" and scored[5] == "1.020 (1.020 – 1.020)"  # eleven of the first seed, ten of the second
    assert "H100" in contract([dense]).text


def test_decoding_and_what_is_between_the_engines(tmp_path):
    write_experiment(tmp_path / "dense", ARMS)
    row = paired_row("qat-s0", 20)
    for column in ("k3_bf16_sampled", "lengths_bf16", "k3_engines", "apart"):
        row.pop(column, None)
    new = {"lengths_bf16": [2 * n for n in row["lengths"]], "k3_bf16_sampled": row["k3_sampled"],
           "k3_engines": [n * 3e-5 for n in row["lengths"]], "apart": 0.25}  # fmt: skip
    for more, expected in (({}, ["–"] * 4), (new, ["2.00 (2.00 – 2.00)", "3·10⁻⁵", "0.25"])):
        write(tmp_path / "dense/measured.jsonl", [{**row, **more}])
        (found,) = cells(paired([Results("dense", tmp_path)]).table.split("\n\n")[1])
        assert found[-len(expected) :] == expected


def test_accuracy_is_compared_as_it_is_served(everything):
    table = cells(served([Results(name, everything) for name in ("dense", "smollm2")]).table)
    assert [row[1:3] for row in table[:4]] == [
        ["QAT, in NVFP4", "bf16 arm, in bf16"],
        ["no QAT, in NVFP4", "bf16 arm, in bf16"],
        ["bf16 arm, rounded plainly, in NVFP4", "bf16 arm, in bf16"],
        ["QAT, in NVFP4", "QAT of FFN only, in NVFP4, attention in bf16"],
    ]
    assert all(re.fullmatch(r"\S+ \(\S+ – \S+\)", row[5]) for row in table)
