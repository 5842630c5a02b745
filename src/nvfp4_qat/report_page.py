"""The report's page: a `Run` as one HTML text without script or network.

Style sheet (``report.css``) and charts (`nvfp4_qat.charts`) are inline, what comes from a file is escaped, and every
chart has its numbers as text for readers who cannot see it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import NARROW, WIDE, Series, css_class, line_chart, moving_mean, plain_number, power_of_ten
from .run_files import (
    ABS_DIFF,
    ARMS,
    FLIPPED_CODES,
    K3_KL,
    REWARD,
    SYNC_BYTES,
    SYNC_SECONDS,
    SYNC_VERSION,
    Run,
    known,
    number,
)


def headline(run: Run) -> str:
    """The run in one sentence, as HTML; it claims no more than the arms that ran allow."""
    without, floor = run.k3_ratio("noqat", "qat"), run.k3_ratio("qat", "bf16")
    if known(without):
        return f"Sampling in 4 bits without QAT: <strong>{ratio(without)} the KL</strong> of training with it"
    if known(run.k3_ratio("noqat", "bf16")):
        above = ratio(run.k3_ratio("noqat", "bf16"))
        return f"Sampling in 4 bits without QAT: <strong>{above} the KL</strong> of bf16"
    if known(floor):
        return f"NVFP4 with QAT: <strong>{ratio(floor)} the KL</strong> of bf16"
    measured = [arm for arm in run.arms if known(arm.k3_kl)]
    if measured:
        return f"{escape(measured[0].name)}: mean k3 KL <strong>{small(measured[0].k3_kl)}</strong>"
    return "A run without a measured KL"


def render_page(run: Run) -> str:
    """The whole page as text."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    origin = "".join(f" · {key} {escape(str(run.summary[key]))}" for key in ("model", "task") if key in run.summary)
    title = re.sub(r"<[^>]+>", "", headline(run))
    texts = {"warning": run.warning, "note": run.note}
    notices = "".join(f'<p class="notice {css}">{escape(text)}</p>' for css, text in texts.items() if text)
    body = f"""
<p class="eyebrow">nvfp4-qat · reinforcement learning with 4-bit rollouts{origin}</p>
<h1>{headline(run)}</h1>
<p class="lead">{_lead(run)}</p>
{notices}
{_stats(run)}
{_charts(run)}
{_card("Numbers", "Means over all steps unless a column says otherwise.", _summary_table(run) + _step_table(run))}
{_card("The arms", "All start from the same weights, prompts and seeds.", _arm_list(run))}
<div class="grid-2">
{_facts("Settings", _settings(run.summary))}
{_facts("Versions", run.summary.get("versions"))}
</div>"""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>{body}\n</main>\n</body>\n</html>\n"
    )


def _lead(run: Run) -> str:
    parts = [f"{escape(arm.name)} {small(arm.k3_kl)}" for arm in run.arms if known(arm.k3_kl)]
    means = f"Mean k3 KL: {', '.join(parts)}." if len(parts) > 1 else ""
    return (
        "The KL divergence between the policy that samples and the policy that is trained is the error that importance "
        f"weights have to repair and that, left alone, makes reinforcement learning drift. {means}"
    )


def _stats(run: Run) -> str:
    cells = []
    without, floor = run.k3_ratio("noqat", "qat"), run.k3_ratio("qat", "bf16")
    if known(without):
        cells.append(("k3 KL without QAT", ratio(without), "of the KL with QAT"))
    if known(floor):
        cells.append(("k3 KL with QAT", ratio(floor), "of the KL of bf16"))
    packed, full = run["qat"] or run["noqat"], run["bf16"]
    if packed and full and packed.sync_bytes > 0 and known(full.sync_bytes):
        fewer = full.sync_bytes / packed.sync_bytes
        sizes = f"{byte_size(packed.sync_bytes)} instead of {byte_size(full.sync_bytes)}"
        cells.append(("Fewer bytes a sync", f"{fewer:.2f}×", sizes))
    if packed and known(packed.flipped_codes):
        cells.append(("4-bit codes that change", percent(packed.flipped_codes), "of all codes, per step"))
    if known(seconds := number(run.summary.get("seconds"))):
        cells.append(("Whole run", duration(seconds), f"{len(run.arms)} arms"))
    items = (f"<div class='stat'><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in cells)
    return f'<dl class="stats">{"".join(items)}</dl>' if cells else ""


def _charts(run: Run) -> str:
    def chart(key: str, title: str, describe: str, *, log: bool, size: tuple[int, int] = NARROW) -> str:
        series = [Series(a.name, a.column("step"), a.column(key), moving_mean(a.column(key), log)) for a in run.arms]
        svg = line_chart(series, title=title, description=describe, fmt=small, log=log, size=size)
        return f'<div class="scroll">{svg}</div>'

    def listed(values: Mapping[str, str]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    means = listed({a.name: small(a.k3_kl) for a in run.arms})
    rewards = listed({a.name: f"{small(a.reward('first'))} to {small(a.reward('last'))}" for a in run.arms})
    distances = listed({a.name: small(a.mean(ABS_DIFF, "logprob_abs_diff_mean")) for a in run.arms})
    flips = listed({a.name: percent(a.flipped_codes) for a in run.arms})
    kl_sizes = {"on-desk": WIDE, "on-phone": NARROW}  # the style sheet shows one of them
    kl = "".join(
        f'<div class="{css}">{chart(K3_KL, "k3 KL per step", f"Means: {means}", log=True, size=size)}</div>'
        for css, size in kl_sizes.items()
    )
    reward = chart(REWARD, "Reward per step", f"First to last quarter: {rewards}", log=False)
    distance = chart(ABS_DIFF, "Distance of log-probabilities per step", f"Means: {distances}", log=True)
    cards = [
        _card("Reward", "Mean over the batch.", reward),
        _card("Mean |log-probability difference|", "Per response token, logarithmic axis.", distance),
        _card("What a sync carries", "Bytes sent to the rollout engine after every optimizer step.", _bars(run)),
    ]
    if any(known(arm.flipped_codes) for arm in run.arms):
        changed = chart(FLIPPED_CODES, "Changed codes per step", f"Means: {flips}", log=True)
        cards.append(_card("4-bit codes changed since the last sync", "Fraction of all codes.", changed))
    if any(known(arm.sync_seconds) for arm in run.arms):
        medians = listed({a.name: small(a.sync_seconds) for a in run.arms})
        seconds = chart(SYNC_SECONDS, "Seconds of a sync per step", f"Medians: {medians}", log=True)
        cards.append(_card("Seconds of a sync", "Packing, sending and loading; without sleeping and waking.", seconds))
    subtitle = (
        "k3 estimate of KL(rollout ‖ trainer) per response token, logarithmic axis; lower is better. "
        "Thin lines are single steps, strong lines moving means."
    )
    return _card("Mismatch between sampler and trainer", subtitle, kl) + f'<div class="grid-2">{"".join(cards)}</div>'


def _bars(run: Run) -> str:
    sizes = {arm.name: arm.sync_bytes for arm in run.arms if known(arm.sync_bytes)}
    if not sizes:
        return '<p class="empty">Nothing to draw.</p>'
    largest = max(*sizes.values(), 1.0)
    rows = (
        f'<span class="arm {css_class(name)}">{escape(name)}</span>'
        f'<span class="bar {css_class(name)}"><span style="width:{100 * size / largest:.1f}%"></span></span>'
        f'<span class="value">{byte_size(size)}</span>'
        for name, size in sizes.items()
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def _card(title: str, subtitle: str, content: str) -> str:
    return f'<section class="card"><h2>{title}</h2><p>{subtitle}</p>{content}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = (f'<tr><th scope="row">{r[0]}</th>' + "".join(f"<td>{c}</td>" for c in r[1:]) + "</tr>" for r in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _arm_name(name: str) -> str:
    return f'<span class="arm {css_class(name)}">{escape(name)}</span>'


def _summary_table(run: Run) -> str:
    head = ["arm", "steps", "k3 KL", "relative to bf16", "KL", "mean |Δ log p|", "reward, first quarter"]
    head += ["reward, last quarter", "rise in standard errors", "bytes a sync", "codes changed a step"]
    told = any(known(arm.sync_version) for arm in run.arms)
    head += ["seconds a sync, median", "last version"] if told else []
    rows = [
        [
            _arm_name(arm.name),
            str(len(arm.rows)),
            small(arm.k3_kl),
            ratio(run.k3_ratio(arm.name, "bf16")),
            small(arm.mean("rollout_corr/kl", "kl_mean")),
            small(arm.mean(ABS_DIFF, "logprob_abs_diff_mean")),
            small(arm.reward("first")),
            small(arm.reward("last")),
            small(number(arm.summary.get("reward_rise_in_standard_errors"))),
            byte_size(arm.sync_bytes),
            percent(arm.flipped_codes),
            *([small(arm.sync_seconds), small(arm.sync_version)] if told else []),
        ]
        for arm in run.arms
    ]
    return _table(head, rows)


def _step_table(run: Run) -> str:
    """The charts' numbers as a table, folded away: for readers who cannot see a chart, and for copying."""
    arms = [arm for arm in run.arms if arm.rows]
    steps = sorted({step for arm in arms for step in arm.column("step") if known(step)})
    shown = steps[:: math.ceil(len(steps) / 200)] if steps else []
    by_step = {arm.name: dict(zip(arm.column("step"), arm.rows, strict=True)) for arm in arms}
    kinds = {K3_KL: ("k3 KL", small), REWARD: ("reward", small)}
    if any(known(arm.sync_version) for arm in arms):
        kinds |= {SYNC_SECONDS: ("sync seconds", small), SYNC_BYTES: ("sync bytes", byte_size)}
        kinds |= {SYNC_VERSION: ("version", small)}
    head = ["step", *(f"{escape(a.name)} {kind}" for kind, _ in kinds.values() for a in arms)]
    rows = []
    for step in shown:
        cells = [form(number(by_step[a.name].get(step, {}).get(key))) for key, (_, form) in kinds.items() for a in arms]
        rows.append([f"{step:g}", *cells])
    return f"<details><summary>Every step as a table</summary>{_table(head, rows)}</details>" if rows else ""


def _arm_list(run: Run) -> str:
    items = (f"<dt>{_arm_name(a.name)}</dt><dd>{ARMS[a.name]}</dd>" for a in run.arms if a.name in ARMS)
    return f'<dl class="arms">{"".join(items)}</dl>'


def _settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    first = {key: summary[key] for key in ("model", "task", "steps", "seconds") if key in summary}
    rest: dict[str, Any] = {}
    for key, value in summary.items():
        if key not in {"arms", "versions", "circumstances", "note", "k3_kl_ratios", "interrupted"}:
            rest |= value if isinstance(value, dict) else {key: value}
    return first | {key: value for key, value in rest.items() if key not in first}


def _facts(title: str, facts: Any) -> str:
    if not isinstance(facts, Mapping) or not facts:
        return ""
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return f'<section class="card"><h2>{title}</h2><p></p><dl class="facts">{items}</dl></section>'


def small(value: float) -> str:
    """Three significant digits, small numbers as 4.81·10⁻⁵."""
    if not math.isfinite(value):
        return "∞" if known(value) else "–"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return plain_number(value)
    exponent = math.floor(math.log10(abs(value)))
    return f"{plain_number(value / 10.0**exponent)}·{power_of_ten(10.0**exponent)}"


def ratio(value: float) -> str:
    """A factor, without decimals from 10 on."""
    if not math.isfinite(value):
        return small(value)
    return f"{value:.0f}×" if value >= 10 else f"{value:.2f}×"


def byte_size(value: float) -> str:
    """Decimal units, three significant digits."""
    if not math.isfinite(value):
        return small(value)
    power = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(value: float) -> str:
    """Seconds as a person says them."""
    if not math.isfinite(value):
        return small(value)
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.3g} %" if math.isfinite(value) else small(value)
