"""The report of a run: one HTML file that needs nothing else, readable at a glance.

Pictures are inline SVG, drawn from `metrics.jsonl`; there is no script, no font and no resource from elsewhere.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.federated.runs import RunFolder, write_text

COLOURS = ("#2f6fab", "#c2571a", "#3f8f4f", "#8a4fa3", "#8c6d1f", "#b03060", "#4a7c8c", "#6b6b6b")

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.lead { color: #555; margin-top: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0; }
.fact { border: 1px solid #ddd; border-radius: .4rem; padding: .5rem .9rem; min-width: 7rem; }
.fact b { display: block; font-size: 1.3rem; } .fact span { color: #666; font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #444; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .2rem .7rem; text-align: right;
  border-bottom: 1px solid #eee; } th:first-child, td:first-child { text-align: left; }
.warn { color: #a33; }
"""


def write_report(folder: RunFolder) -> None:
    """Write `report.html` into a run folder."""
    write_text(folder.path / "report.html", page(folder.config(), folder.metrics(), folder.summary()))


def page(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> str:
    """Return the report as HTML."""
    experiment = config.get("experiment", {})
    federation = experiment.get("federation", {})
    rounds = [line for line in lines if line.get("round")]
    title = f"{experiment.get('algorithm', '?')} on {federation.get('name', '?')}"
    target = federation.get("target")
    lead = [f"{len(rounds)} rounds", f"seed {federation.get('seed', 0)}", f"partition {federation.get('partition')}"]
    if target:
        lead.append(f"target {target}: its inputs are known to the server, its labels only to this report")
    parts = [f"<h1>{_text(title)}</h1><p class='lead'>{_text(' · '.join(lead))}</p>", _facts(summary, rounds)]
    series = {
        "accuracy, judged on " + str((summary or {}).get("judged_on", "test data")): _values(rounds, "accuracy"),
        "server: batch norm statistics of the target": _values(rounds, "server", "accuracy_adapted"),
        "mean over sites": _values(rounds, "sites_accuracy") if target else [],
    }
    parts.append("<h2>Accuracy per round</h2>" + curves(series, percent=True))
    parts.append("<h2>Training loss per round</h2>" + curves({"mean over sites": _values(rounds, "train_loss")}))
    grid = _site_grid(rounds)
    if grid:
        parts.append("<h2>Accuracy of each site in each round</h2>" + grid)
    parts.append(_extra(rounds))
    parts.append(_failures(rounds))
    parts.append(_sites(config.get("federation", {})))
    parts.append(_settings(config))
    body = "\n".join(part for part in parts if part)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, percent: bool = False) -> str:
    """Return lines over rounds as an SVG picture, with a legend; a sentence where there is nothing to draw.

    Args:
        series: Points (round, value) by name; empty ones are left out.
        percent: Whether values are shares, drawn from 0 to 100 %.
    """
    held = {name: points for name, points in series.items() if points}
    if not held:
        return "<p>Nothing was measured.</p>"
    width, height, left, right, top, bottom = 860, 300, 56, 20, 14, 34
    first = min(x for points in held.values() for x, _ in points)
    last = max(x for points in held.values() for x, _ in points)
    low = 0.0 if percent else min(0.0, *(y for points in held.values() for _, y in points))
    high = 1.0 if percent else max(y for points in held.values() for _, y in points) * 1.05 or 1.0

    def x_of(value: float) -> float:
        return left + (value - first) / max(1, last - first) * (width - left - right)

    def y_of(value: float) -> float:
        return height - bottom - (value - low) / max(1e-12, high - low) * (height - top - bottom)

    drawn = [f"<svg viewBox='0 0 {width} {height + 20 * len(held)}' role='img'>"]
    for step in range(6):
        value = low + (high - low) * step / 5
        label = f"{100 * value:.0f} %" if percent else f"{value:.3g}"
        y = y_of(value)
        drawn.append(f"<line x1='{left}' y1='{y:.1f}' x2='{width - right}' y2='{y:.1f}' stroke='#e5e5e5'/>")
        drawn.append(f"<text x='{left - 8}' y='{y + 4:.1f}' text-anchor='end'>{label}</text>")
    for value in sorted({round(first + (last - first) * step / 6) for step in range(7)}):
        drawn.append(f"<text x='{x_of(value):.1f}' y='{height - 12}' text-anchor='middle'>{value}</text>")
    for number, (name, points) in enumerate(held.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        drawn.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        for x, y in points if len(points) <= 60 else points[-1:]:
            drawn.append(f"<circle cx='{x_of(x):.1f}' cy='{y_of(y):.1f}' r='2.5' fill='{colour}'/>")
        row = height + 14 + 20 * number
        drawn.append(f"<rect x='{left}' y='{row - 9}' width='14' height='4' fill='{colour}'/>")
        end = f"{100 * points[-1][1]:.1f} %" if percent else f"{points[-1][1]:.4g}"
        drawn.append(f"<text x='{left + 22}' y='{row - 2}'>{_text(name)}: {end} at the end</text>")
    drawn.append("</svg>")
    return "".join(drawn)


def _site_grid(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return sites × rounds as coloured cells; a cross where a site failed."""
    shown = [line for line in rounds if any("accuracy" in site for site in line.get("sites", {}).values())]
    sites = sorted({site for line in shown for site in line["sites"]})
    if not sites:
        return ""
    if len(shown) > 60:  # as many columns as can be told apart
        shown = [shown[round(i * (len(shown) - 1) / 59)] for i in range(60)]
    left, cell, wide = 120, 22, max(12.0, min(56.0, 720 / len(shown)))
    width, height = left + wide * len(shown) + 20, cell * len(sites) + 30
    drawn = [f"<svg viewBox='0 0 {width:.0f} {height}' role='img' style='max-width:{width:.0f}px'>"]
    for row, site in enumerate(sites):
        y = row * cell
        drawn.append(f"<text x='{left - 8}' y='{y + 15}' text-anchor='end'>{_text(site)}</text>")
        for column, line in enumerate(shown):
            value = line["sites"].get(site, {}).get("accuracy")
            x = left + column * wide
            note = line.get("failed", {}).get(site)
            told = f"{site}, round {line['round']}: " + (
                f"{100 * value:.1f} %" if value is not None else "not measured"
            )
            told += f"; {note}" if note else ""
            fill = "#eee" if value is None else _shade(value)
            drawn.append(
                f"<rect x='{x:.1f}' y='{y + 1}' width='{wide - 1:.1f}' height='{cell - 2}' fill='{fill}'>"
                f"<title>{_text(told)}</title></rect>"
            )
            if note:
                drawn.append(f"<text x='{x + wide / 2:.1f}' y='{y + 16}' text-anchor='middle' fill='#a33'>×</text>")
            elif value is not None and wide >= 26:
                ink = "#fff" if value > 0.55 else "#333"
                drawn.append(
                    f"<text x='{x + wide / 2:.1f}' y='{y + 15}' text-anchor='middle' style='fill:{ink}'>"
                    f"{100 * value:.0f}</text>"
                )
    for column, line in enumerate(shown):
        if len(shown) <= 20 or column % 5 == 0:
            x = left + (column + 0.5) * wide
            drawn.append(f"<text x='{x:.1f}' y='{height - 10}' text-anchor='middle'>{line['round']}</text>")
    drawn.append("</svg><p class='lead'>Per cent; the darker the better. × marks a site that failed in that round.</p>")
    return "".join(drawn)


def _shade(value: float) -> str:
    """Return a colour between white and blue."""
    share = min(1.0, max(0.0, value))
    white, blue = (244, 248, 252), (24, 78, 130)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(white, blue, strict=True))


def _facts(summary: Mapping[str, Any] | None, rounds: Sequence[Mapping[str, Any]]) -> str:
    if summary is None:
        return "<p class='warn'>The run is not over: these are the rounds so far.</p>"
    facts: list[tuple[str, str]] = []
    if "accuracy" in summary:
        last = summary["mean_of_last"]
        facts.append((f"{100 * last['accuracy']:.1f} %", f"accuracy, mean of the last {last['rounds']} rounds"))
        if "accuracy_adapted" in last:
            facts.append(
                (f"{100 * last['accuracy_adapted']:.1f} %", "the same with the target's batch norm statistics")
            )
    facts += [
        (str(summary["rounds"]), "rounds" + (", stopped early" if summary.get("stopped_early") else "")),
        (str(len(summary["sites"])), "sites"),
        (f"{summary['parameters']:,}", "parameters"),
        (f"{summary['bytes'] / 1e6:,.1f} MB", "traffic"),
    ]
    failures = sum(len(line.get("failed", {})) for line in rounds)
    if failures or summary.get("skipped_rounds"):
        facts.append((str(failures), f"failures, {summary.get('skipped_rounds', 0)} rounds skipped"))
    cards = "".join(f"<div class='fact'><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in facts)
    return f"<div class='facts'>{cards}</div>"


def _extra(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return what the algorithm itself measured, one picture for shares and small tables for the rest."""
    names = sorted({name for line in rounds for name in line.get("algorithm", {})})
    if not names:
        return ""
    shares: dict[str, list[tuple[float, float]]] = {}
    others: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        points = _values(rounds, "algorithm", name)
        if not points:
            continue
        is_share = all(-1 <= value <= 1 for _, value in points) and ("accuracy" in name or "vote" in name)
        (shares if is_share else others)[name.replace("_", " ")] = points
    drawn = "<h2>What the algorithm measured</h2>"
    if shares:
        drawn += curves(shares, percent=True)
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{points[0][1]:.4g}</td><td>{points[-1][1]:.4g}</td></tr>"
        for name, points in others.items()
    )
    if rows:
        drawn += f"<table><tr><th></th><th>first round</th><th>last round</th></tr>{rows}</table>"
    return drawn


def _failures(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td>{line['round']}</td><td>{_text(site or 'server')}</td><td>{_text(str(reason))}</td></tr>"
        for line in rounds
        for site, reason in line.get("failed", {}).items()
    ]
    if not rows:
        return ""
    more = f"<p>and {len(rows) - 50} more</p>" if len(rows) > 50 else ""
    head = "<h2>Who failed, and why</h2><table><tr><th>round</th><th>site</th><th>reason</th></tr>"
    return f"{head}{''.join(rows[:50])}</table>{more}"


def _sites(record: Mapping[str, Any]) -> str:
    sites = record.get("sites", {})
    if not sites or not any(site.get("classes") for site in sites.values()):
        return ""
    count = max(len(site.get("classes", [])) for site in sites.values())
    head = "".join(f"<th>{number}</th>" for number in range(count))
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{site.get('examples', '')}</td>"
        + "".join(f"<td>{value}</td>" for value in site.get("classes", []))
        + "</tr>"
        for name, site in sites.items()
    )
    return f"<h2>Training examples per site and class</h2><table><tr><th></th><th>all</th>{head}</tr>{rows}</table>"


def _settings(config: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(name.replace('_', ' '))}</td><td>{_text(str(value))}</td></tr>"
        for name, value in config.get("settings", {}).items()
    )
    return f"<h2>Settings</h2><table>{rows}</table>" if rows else ""


def _values(rounds: Sequence[Mapping[str, Any]], *path: str) -> list[tuple[float, float]]:
    """Return (round, value) of the rounds that have a finite value there."""
    found = []
    for line in rounds:
        value: Any = line
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            found.append((float(line["round"]), float(value)))
    return found


def _text(value: str) -> str:
    return html.escape(value)
