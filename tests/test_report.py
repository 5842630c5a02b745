"""The report from runs made up for the purpose: complete, cut short, one-armed, malformed, hostile."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from nvfp4_qat.charts import NARROW, Series, css_class, line_chart, moving_mean, power_of_ten
from nvfp4_qat.errors import UserError
from nvfp4_qat.report import write_report
from nvfp4_qat.report_page import byte_size, duration, headline, percent, ratio, render_page, small
from nvfp4_qat.run_files import load_run

PNG = b"\x89PNG\r\n\x1a\n"
K3 = {"bf16": 5e-5, "noqat": 2e-3, "qat": 4e-5, "qat-ffn": 4.5e-5}


def write_run(folder, arms=("bf16", "noqat", "qat"), steps=8, **summary):
    """A run as the demo writes it; ``summary`` overrides entries of summary.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for arm in arms:
        rows = [
            {
                "step": step,
                "reward": -1 + step / steps,
                "rollout_corr/k3_kl": K3[arm] * (1 + step % 2),
                "rollout_corr/kl": K3[arm],
                "rollout_corr/logprob_abs_diff": math.sqrt(K3[arm]),
                "sync_bytes": 4_000_000 if arm == "bf16" else 1_000_000,
                **({} if arm == "bf16" else {"flips/codes": 1e-4}),
            }
            for step in range(steps)
        ]
        (folder / f"metrics-{arm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries[arm] = {"k3_kl_mean": 1.5 * K3[arm], "reward_first": -0.9, "reward_last": -0.2, "sync_bytes": 1_000_000}
    entries.get("bf16", {})["sync_bytes"] = 4_000_000
    document = {"model": "tiny", "task": "sort", "steps": steps, "arms": entries, "seconds": 231.4, "note": ""}
    document |= {"config": {"lr": 1e-4, "task": "auto"}, "versions": {"torch": "2.13.0"}} | summary
    (folder / "summary.json").write_text(json.dumps(document))
    return folder


class Page(HTMLParser):
    """Parses a page, insists on balanced tags, and keeps its text and what it refers to."""

    def __init__(self, markup: str):
        super().__init__()
        self.text, self.references, self._open = "", [], []
        self.feed(markup)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert tag != "script"
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data


def rendered(folder):
    return Page(render_page(load_run(folder)))


def test_files_of_a_complete_run(tmp_path):
    path = write_report(write_run(tmp_path))
    assert path == tmp_path / "report.html"
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left
    assert path.read_text(encoding="utf-8") == render_page(load_run(tmp_path))


def test_complete_run(tmp_path):
    page = rendered(write_run(tmp_path))
    assert "Sampling in 4 bits without QAT: 50× the KL of training with it" in page.text
    assert page.references == []  # one file, no network
    for text in ("0.80×", "4.00×", "1 MB instead of 4 MB", "0.01 %", "3 min 51 s", "Versions", "2.13.0", "noqat"):
        assert text in page.text
    assert "not complete" not in page.text
    assert "qat-ffn" not in page.text  # an arm that did not run is not explained
    assert "task" in page.text and "auto" not in page.text  # the resolved task wins over the setting


def test_charts_show_every_arm_and_step(tmp_path):
    markup = render_page(load_run(write_run(tmp_path, steps=8)))
    first_chart = re.search(r"<svg.*?</svg>", markup, re.DOTALL)[0]
    assert first_chart.count('class="step"') == 8
    assert 'role="img"' in first_chart and "Means: bf16 7.5·10⁻⁵" in first_chart
    for arm in ("bf16", "noqat", "qat"):
        assert f'class="line s-{arm}"' in first_chart


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (("noqat", "bf16"), "40× the KL of bf16"),
        (("qat", "bf16"), "NVFP4 with QAT: 0.80× the KL of bf16"),
        (("qat",), "qat: mean k3 KL 6·10⁻⁵"),
        (("noqat", "qat", "qat-ffn"), "50× the KL of training with it"),
    ],
)
def test_headline_claims_only_what_ran(tmp_path, arms, expected):
    assert expected in rendered(write_run(tmp_path, arms)).text


def test_interrupted_run_without_summary(tmp_path):
    write_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    torn = '{"step": 0, "rollout_corr/k3_kl": 4e-5, "reward": 0}\n{"step": 1, "rol'
    (tmp_path / "metrics-qat.jsonl").write_text(torn)
    page = rendered(tmp_path)
    assert "not complete" in page.text and "bf16 8, noqat 8, qat 1" in page.text
    assert "75× the KL" in page.text  # from the rows: 1.5 · 2e-3 over 4e-5


def test_interrupted_run_says_how_far_it_came(tmp_path):
    page = rendered(write_run(tmp_path, steps=3))
    assert "not complete" not in page.text
    summary = json.loads((tmp_path / "summary.json").read_text()) | {"steps": 9, "interrupted": True}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "Steps finished of 9: bf16 3, noqat 3, qat 3" in rendered(tmp_path).text


def test_missing_and_strange_values_are_gaps(tmp_path):
    (tmp_path / "metrics-qat.jsonl").write_text(
        '{"step": 0}\n{"step": 1, "rollout_corr/k3_kl": NaN, "reward": null}\n'
        '{"step": 2, "rollout_corr/k3_kl": Infinity, "reward": "high"}\n'
        '{"step": 3, "rollout_corr/k3_kl": 0, "reward": true}\n'
    )
    write_report(tmp_path)
    page = rendered(tmp_path)
    assert "Nothing to draw." in page.text
    assert "mean k3 KL ∞" in page.text  # an overflow is not averaged away
    assert "nan" not in page.text.lower()


def test_summary_alone_is_enough(tmp_path):
    write_run(tmp_path)
    for file in tmp_path.glob("metrics-*"):
        file.unlink()
    assert "50× the KL" in rendered(tmp_path).text


def test_one_step(tmp_path):
    folder = write_run(tmp_path, steps=1)
    write_report(folder)
    assert 'class="dot s-qat"' in render_page(load_run(folder))


def test_a_long_run_stays_small(tmp_path):
    run = load_run(write_run(tmp_path, ("qat", "noqat", "bf16", "qat-ffn"), steps=2000))
    assert len(render_page(run)) < 2_500_000


def test_text_from_files_is_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    both = {hostile: hostile}
    write_run(tmp_path, model=hostile, task=hostile, note=hostile, config=both, versions=both)
    (tmp_path / "metrics-<img src=x>&.jsonl").write_text('{"step": 0, "rollout_corr/k3_kl": 1e-3, "reward": 1}\n')
    page = rendered(tmp_path)  # fails on a script element
    assert page.text.count(hostile) >= 7
    assert "<img src=x>&" in page.text


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: d.rmdir(), "there is no directory"),
        (lambda d: None, "holds no finished step"),
        (lambda d: (d / "metrics-qat.jsonl").write_text(""), "holds no finished step"),
        (
            lambda d: (d / "metrics-qat.jsonl").write_text('{"st\n{"step": 1}\n'),
            "line 1 is not a JSON object",
        ),
        (lambda d: (d / "summary.json").write_text("{"), "summary.json is not JSON"),
        (lambda d: (d / "summary.json").write_text("[]"), "is not the summary of a run"),
        (lambda d: (d / "summary.json").write_text('{"arms": 3}'), "is not the summary of a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, prepare, message):
    folder = tmp_path / "run"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(UserError, match=message):
        write_report(folder)
    assert not list(tmp_path.rglob("*.html"))


def test_arms_have_a_fixed_order(tmp_path):
    run = load_run(write_run(tmp_path, ("qat-ffn", "qat", "noqat", "bf16")))
    assert [arm.name for arm in run.arms] == ["bf16", "noqat", "qat", "qat-ffn"]
    assert run["none"] is None and math.isnan(run.k3_ratio("none", "qat"))
    assert "50×" in headline(run)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (small, 4.812e-5, "4.81·10⁻⁵"),
        (small, 0.0, "0"),
        (small, 0.543, "0.543"),
        (small, -1.25, "−1.25"),
        (small, 12345.0, "1.23·10⁴"),
        (ratio, 0.951, "0.95×"),
        (ratio, 1.0, "1.00×"),
        (ratio, 49.4, "49×"),
        (byte_size, 12.0, "12 B"),
        (byte_size, 1037936, "1.04 MB"),
        (byte_size, 2.5e12, "2.5 TB"),
        (byte_size, 0.0, "0 B"),
        (small, math.inf, "∞"),
        (ratio, math.inf, "∞"),
        (duration, 59.4, "59 s"),
        (duration, 231.4, "3 min 51 s"),
        (duration, 7260.0, "2 h 1 min"),
        (percent, 6.8e-5, "0.0068 %"),
        (percent, 1.0, "100 %"),
        (power_of_ten, 1e-4, "10⁻⁴"),
        (power_of_ten, 2e-4, "2·10⁻⁴"),
        (power_of_ten, 1e12, "10¹²"),
    ],
)
def test_numbers_as_text(write, value, text):
    assert write(value) == text


@pytest.mark.parametrize("write", [small, ratio, byte_size, duration, percent])
def test_a_missing_number_is_a_dash(write):
    assert write(math.nan) == "–"


def test_moving_mean():
    assert moving_mean([1, 2, 3, 4]) == [1.5, 2, 3, 3.5]
    assert moving_mean([1, math.nan, 3]) == [1, 2, 3]
    assert moving_mean([1e-4, 1e-2], log=True) == pytest.approx([1e-3, 1e-3])
    assert moving_mean([0.0, 1e-2, -1.0], log=True) == pytest.approx([1e-2] * 3)
    assert math.isnan(moving_mean([math.nan])[0])
    assert len(moving_mean(list(range(64)))) == 64 and moving_mean(list(range(64)))[32] == 32


def coordinates(svg, css):
    path = re.search(rf'class="line {css}" d="([^"]*)"', svg)[1]
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]], path


def test_chart_geometry():
    chart = line_chart(
        [Series("a", [0, 1, 2, 3], [1.0, 10.0, math.nan, 1000.0])],
        title="t",
        description="d",
        fmt=str,
        log=True,
        size=NARROW,
    )
    points, path = coordinates(chart, "s-a")
    assert path.count("M") == 2  # the gap breaks the line
    (x0, y0), (x1, y1), (x3, y3) = points
    assert x1 - x0 == pytest.approx((x3 - x0) / 3, abs=0.1)
    assert y0 - y1 == pytest.approx((y0 - y3) / 3, abs=0.1)  # equal factors are equal distances
    assert y3 < y1 < y0 <= NARROW[1] and x3 <= NARROW[0]


def test_labels_do_not_overlap_or_leave_the_chart():
    names = [f"arm{i}" for i in range(8)]
    chart = line_chart([Series(n, [0, 1], [1.0, 1.0]) for n in names], title="t", description="d", fmt=str, size=NARROW)
    heights = sorted(float(y) for y in re.findall(r'<text class="label s-arm\d" x="430" y="([\d.]+)">', chart))
    assert len(heights) == 8
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 16.9
    assert heights[-1] <= NARROW[1] and heights[0] >= 0


def test_css_class_is_always_valid():
    assert css_class('q a"t<') == "s-q-a-t-"
