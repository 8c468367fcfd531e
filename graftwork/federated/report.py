"""The report of a run: one HTML file that needs nothing else, readable at a glance by somebody who knows no paper.

What was run, how it came out in a sentence, curves, sites × rounds, where sites lie in feature space, what the
algorithm measured, who failed. Pictures are inline SVG, drawn from the run folder; there is no script, no font and no
resource from elsewhere. While the run goes on, the page is made anew after each round, and loads itself again.
"""

from __future__ import annotations

import contextlib
import html
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.federated.runs import RunFolder, Status, write_text

if TYPE_CHECKING:
    from graftwork.federated.strategy import Observer

COLOURS = ("#2f6fab", "#c2571a", "#3f8f4f", "#8a4fa3", "#8c6d1f", "#b03060", "#4a7c8c", "#6b6b6b")

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } p.lead, p.note { color: #555; } p.note { font-size: .9rem; }
.verdict { border-left: .3rem solid #2f6fab; background: #f3f7fb; padding: .7rem 1rem; margin: 1rem 0;
  font-size: 1.08rem; max-width: 50rem; }
.verdict.warn { border-color: #a33; background: #fbf3f3; } .verdict p { margin: 0; max-width: none; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0; }
.fact { border: 1px solid #ddd; border-radius: .4rem; padding: .5rem .9rem; min-width: 7rem; }
.fact b { display: block; font-size: 1.3rem; } .fact span { color: #666; font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #444; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .2rem .7rem; text-align: right;
  border-bottom: 1px solid #eee; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; } summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; }
details { margin: 2.2rem 0 0; } dt { font-weight: 600; margin-top: .4rem; } dd { margin: 0 0 0 1rem; }
"""

_REFRESH_SECONDS = 5
_SHARE_OF_TIME = 0.1


@dataclass(frozen=True)
class Run:
    """What a report is made from.

    Args:
        config: What `config.json` holds.
        lines: The lines of `metrics.jsonl`.
        summary: The summary; None while the run is not over.
        status: How the run stands.
        planned: How many rounds there will be.
        failure: Why it stopped.
        features: What `features.feature_map` gave.
    """

    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None = None
    status: Status = "finished"
    planned: int = 0
    failure: Sequence[str] = ()
    features: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> list[Mapping[str, Any]]:
        """The lines of rounds; what came before the first is left out."""
        return [line for line in self.lines if line.get("round")]

    @property
    def experiment(self) -> Mapping[str, Any]:
        """What was run."""
        found = self.config.get("experiment", {})
        return found if isinstance(found, Mapping) else {}

    @property
    def target(self) -> str | None:
        """The domain without a site."""
        found = self.experiment.get("federation", {}).get("target")
        return None if found is None else str(found)

    @property
    def data(self) -> Mapping[str, Any]:
        """Sizes of the sites' data."""
        found = self.config.get("federation", {})
        return found if isinstance(found, Mapping) else {}

    @classmethod
    def read(cls, folder: RunFolder) -> Run:
        """Return what a run folder holds."""
        return cls(
            folder.config(),
            folder.metrics(),
            folder.summary(),
            folder.status,
            folder.planned(),
            folder.failure(),
            folder.features(),
        )


def write_report(folder: RunFolder) -> None:
    """Write `report.html` into a run folder, beside its place and renamed."""
    write_text(folder.path / "report.html", page(Run.read(folder)))


@contextlib.contextmanager
def followed(
    folder: RunFolder, rounds: int, observer: Observer | None = None, *, tensorboard: bool = False
) -> Iterator[Observer]:
    """Hold a run while it goes on, and give an observer that keeps its report, and perhaps event files, up to date.

    Where rounds are short, some are passed over until the next one, so that writing takes a tenth of the time at most.
    The report is written once more at the end, however that comes.

    Args:
        folder: The run.
        rounds: How many rounds there will be.
        observer: Told of each round too.
        tensorboard: Whether to write event files.
    """
    with contextlib.ExitStack() as afterwards, folder.working(rounds), contextlib.ExitStack() as meanwhile:
        afterwards.callback(write_report, folder)
        add = None
        if tensorboard:
            from graftwork.federated.tensorboard import FOLDER, event_files

            first = max(folder.rounds(), default=0) + 1
            add = meanwhile.enter_context(event_files(folder.path / FOLDER, first))
        not_before = 0.0

        def observe(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
            nonlocal not_before
            if add is not None:
                add(line, timing)
            if observer is not None:
                observer(line, timing)
            started = time.monotonic()
            if started >= not_before:
                write_report(folder)
                now = time.monotonic()
                not_before = now + (now - started) / _SHARE_OF_TIME

        write_report(folder)
        yield observe


def page(run: Run) -> str:
    """Return the report as HTML."""
    name = str(run.experiment.get("federation", {}).get("name", "")).split("/")[-1]
    title = f"{_title(run)} on {name}"
    rounds = run.rounds
    judged = "the target's test data" if run.target else str((run.summary or {}).get("judged_on", "test data"))
    series = {
        f"shared model, on {judged}": _values(rounds, "accuracy"),
        "the same after adapting its batch norm statistics to the target": _values(
            rounds, "server", "accuracy_adapted"
        ),
        "mean over the sites' own test data": _values(rounds, "sites_accuracy") if run.target else [],
    }
    parts = [
        f"<h1>{_text(title)}</h1>",
        _what_was_run(run),
        _verdict(run),
        _facts(run),
        "<h2>Accuracy after each round</h2>" + curves(series, percent=True),
        "<h2>Training loss in each round</h2>" + curves({"mean over sites": _values(rounds, "train_loss")}),
    ]
    grid = _site_grid(rounds)
    if grid:
        parts.append("<h2>Accuracy on each site after each round</h2>" + grid)
    parts += [
        _feature_pictures(run.features),
        _extra(rounds),
        _failures(rounds),
        _sites(run.data),
        _settings(run),
        _GLOSSARY,
    ]
    body = "\n".join(part for part in parts if part)
    again = f"<meta http-equiv='refresh' content='{_REFRESH_SECONDS}'>" if run.status == "running" else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'>{again}"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _title(run: Run) -> str:
    algorithm = _algorithm(run)
    name = str(run.experiment.get("algorithm", "federation"))
    return algorithm.title or name if algorithm is not None else name


def _algorithm(run: Run) -> Any:
    """Return the run's algorithm; None if this version has none of the name."""
    from graftwork.federated.algorithms import create
    from graftwork.merge.errors import GraftworkError

    try:
        return create(str(run.experiment.get("algorithm", "")))
    except GraftworkError:
        return None


def _what_was_run(run: Run) -> str:
    """Return sentences on who did what."""
    sites = run.data.get("sites") or (run.summary or {}).get("sites") or {}
    count = len(sites)
    who = f"{count} sites" if count > 1 else "One site" if count == 1 else "Sites"
    examples = [site.get("examples") for site in sites.values()] if isinstance(sites, Mapping) else []
    known = [int(value) for value in examples if isinstance(value, int | float)]
    each = f", each with {_range(known)} training examples of its own" if known else ""
    parts = [f"{who}{each}, train one model together and send parameters, never data, to a server."]
    if run.target:
        parts.append(
            f"The model is meant for a domain without a site, <b>{_text(run.target)}</b>: the server has its inputs, "
            "and its labels serve this report only."
        )
    algorithm = _algorithm(run)
    if algorithm is not None:
        said = " ".join((type(algorithm).__doc__ or "").split("\n\n")[0].split())
        paper = re.search(r"arxiv\.org/abs/([\d.]+)", algorithm.reference)
        source = f" (arXiv {paper[1]})" if paper else ""
        parts.append(f"<b>{_text(algorithm.title or algorithm.name)}</b>{_text(source)}: {_text(said)}")
    experiment = run.experiment
    how = [f"seed {experiment.get('federation', {}).get('seed', 0)}"]
    how += [f"data shared out by {experiment.get('federation', {}).get('partition', 'domain')}"]
    if experiment.get("aggregate", "mean") != "mean":
        how.append(f"replies merged by {experiment['aggregate']}")
    if experiment.get("participation", 1) != 1:
        how.append(f"{100 * float(experiment['participation']):.0f} % of the sites in each round")
    return f"<p class='lead'>{' '.join(parts)}</p><p class='note'>{_text(', '.join(how)).capitalize()}.</p>"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _verdict(run: Run) -> str:
    """Return how it came out, in a few sentences."""
    rounds = run.rounds
    points = _values(rounds, "accuracy")
    said: list[str] = []
    if run.status == "failed":
        reason = run.failure[0] if run.failure else "for an error"
        said.append(f"The run stopped after round {len(rounds)}: {reason}.".replace("..", "."))
    elif run.status == "interrupted":
        said.append(f"The run was interrupted after round {len(rounds)} of {run.planned}; it can be resumed.")
    elif run.status == "running":
        said.append(f"The run is going on: round {len(rounds)} of {run.planned} is done.")
    if points:
        last = [value for _, value in points[-5:]]
        now = math.fsum(last) / len(last)
        of = f"mean of the last {len(last)} rounds" if len(last) > 1 else f"round {points[-1][0]:.0f}"
        what = "The shared model" if not _is_personal(run) else "Each site's own version of the model, on average,"
        data = f"the test examples of {run.target}" if run.target else "the test examples"
        text = f"{what} gets {100 * now:.1f} % of {data} right ({of})"
        if len(points) > 5:
            text += f", {100 * points[0][1]:.1f} % after round {points[0][0]:.0f}"
        classes = run.data.get("classes")
        text += f"; guessing among {classes} classes gives {100 / classes:.0f} %." if classes else "."
        said.append(text)
        said.append(_trend([value for _, value in points]))
        said.append(_spread(rounds))
    failed = sum(len(line.get("failed", {})) for line in rounds)
    skipped = sum("skipped" in line for line in rounds)
    if failed or skipped:
        more = f", and {skipped} rounds were skipped" if skipped else ""
        said.append(f"{failed} answers failed{more}; see below who and why.")
    elif rounds:
        said.append("All sites answered in all rounds.")
    if (run.summary or {}).get("stopped_early"):
        said.append("It stopped early because it did not get better.")
    kind = "verdict warn" if run.status in ("failed", "interrupted") or skipped else "verdict"
    return f"<div class='{kind}'><p>{_text(' '.join(filter(None, said)) or 'No round is done yet.')}</p></div>"


def _is_personal(run: Run) -> bool:
    algorithm = _algorithm(run)
    return algorithm is not None and bool(algorithm.is_personal)


def _trend(values: Sequence[float]) -> str:
    """Return whether accuracy was still changing, as the last two fifths of the rounds say; empty for short runs."""
    if len(values) < 5:
        return ""
    part = max(2, len(values) // 5)
    before, after = values[-2 * part : -part], values[-part:]
    change = math.fsum(after) / part - math.fsum(before) / part
    if change > 0.01:
        return "Accuracy was still rising at the end; more rounds may help."
    if change < -0.01:
        return "Accuracy fell towards the end; fewer rounds, or a smaller learning rate, may help."
    return "Accuracy has levelled off."


def _spread(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return which sites it works best and worst for."""
    for line in reversed(rounds):
        held = {
            site: float(numbers["accuracy"])
            for site, numbers in line.get("sites", {}).items()
            if isinstance(numbers.get("accuracy"), int | float)
        }
        if len(held) > 1:
            best, worst = max(held, key=lambda site: held[site]), min(held, key=lambda site: held[site])
            return (
                f"Among the sites it works best on {best} ({100 * held[best]:.0f} %) and worst on {worst} "
                f"({100 * held[worst]:.0f} %)."
            )
    return ""


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
    for value in _ticks(first, last):
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


def _ticks(first: float, last: float) -> list[int]:
    """Return about eight whole numbers of equal distance between two."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if (last - first) / step <= 10)
    return [value for value in range(math.ceil(first), math.floor(last) + 1) if value % step == 0 or step == 1]


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
    drawn = [f"<svg viewBox='0 0 {width:.0f} {height}' role='img' style='max-width:{width:.0f}px;display:block'>"]
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
    drawn.append(
        "</svg><p class='note'>Per cent of the site's own test data; the darker the better. × marks a site that failed "
        "in that round.</p>"
    )
    return "".join(drawn)


def _shade(value: float) -> str:
    """Return a colour between white and blue."""
    share = min(1.0, max(0.0, value))
    white, blue = (244, 248, 252), (24, 78, 130)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(white, blue, strict=True))


def _facts(run: Run) -> str:
    """Return the most important numbers as cards."""
    rounds, summary = run.rounds, run.summary or {}
    facts: list[tuple[str, str]] = []
    if "accuracy" in summary:
        last = summary["mean_of_last"]
        facts.append((f"{100 * last['accuracy']:.1f} %", f"accuracy, mean of the last {last['rounds']} rounds"))
        if "accuracy_adapted" in last:
            facts.append(
                (f"{100 * last['accuracy_adapted']:.1f} %", "the same after adapting batch norm to the target")
            )
    facts.append((f"{len(rounds)}" if run.summary else f"{len(rounds)} of {run.planned}", "rounds"))
    sites = len(run.data.get("sites") or summary.get("sites") or ())
    if sites:
        facts.append((str(sites), "sites"))
    if "parameters" in summary:
        facts.append((f"{summary['parameters']:,}", "parameters"))
    traffic = sum(int(line.get("bytes", 0)) for line in run.lines)
    if traffic:
        facts.append((f"{traffic / 1e6:,.1f} MB", "sent and received"))
    cards = "".join(f"<div class='fact'><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in facts)
    return f"<div class='facts'>{cards}</div>"


_PLOT, _GAP = 400, 40


def _feature_pictures(found: Mapping[str, Any]) -> str:
    """Return where sites' examples lie, before and after: by site, and by class."""
    if not found:
        return ""
    head = "<h2>How alike the sites look to the model</h2>"
    if "problem" in found:
        return f"{head}<p class='note'>Not drawn: {_text(str(found['problem']))}</p>"
    names, sites, labels = found["names"], found["site"], found["label"]
    rows: list[tuple[str, Sequence[int], Sequence[str]]] = [("coloured by site", sites, COLOURS)]
    classes = max(labels, default=-1) + 1
    if 1 < classes <= 20 and min(labels) >= 0:
        hues = [f"hsl({round(360 * number / classes)} 60% {45 + 12 * (number % 2)}%)" for number in range(classes)]
        rows.append(("the same points, coloured by class", labels, hues))
    width, tall = 2 * _PLOT + _GAP, _PLOT * 0.7
    height = len(rows) * (tall + _GAP) + 10
    drawn = [f"<svg viewBox='0 0 {width} {height:.0f}' role='img'>"]
    for down, (title, groups, colours) in enumerate(rows):
        for across, (moment, word) in enumerate((("start", "before the first round"), ("end", "at the end"))):
            left, top = across * (_PLOT + _GAP), down * (tall + _GAP) + 24
            drawn.append(f"<text x='{left}' y='{top - 8:.0f}'>{_text(word)}, {_text(title)}</text>")
            drawn.append(
                f"<rect x='{left}' y='{top:.0f}' width='{_PLOT}' height='{tall:.0f}' fill='#fafafa' stroke='#ddd'/>"
            )
            for (x, y), group, site in zip(found[moment]["points"], groups, sites, strict=True):
                at = (left + _PLOT * (0.5 + 0.47 * x), top + tall * (0.5 - 0.46 * y))
                drawn.append(
                    _dot(at, colours[group % len(colours)], is_target=found["is_target"][site], name=names[site])
                )
    drawn.append("</svg>")
    legend = " &nbsp; ".join(
        f"<span style='color:{COLOURS[number % len(COLOURS)]}'>{'◇' if found['is_target'][number] else '●'}</span> "
        f"{_text(name)}{' (the target)' if found['is_target'][number] else ''}"
        for number, name in enumerate(names)
    )
    before, after = found["start"]["told_apart"], found["end"]["told_apart"]
    if after < before - 0.02:
        change = "so sites look more alike to the model than before"
    elif after > before + 0.02:
        change = "so sites look less alike to the model than before"
    else:
        change = "so nothing has changed"
    return (
        f"{head}<p class='note'>Every dot is a test example, placed by what the model's last layer sees of it (the two "
        "directions of largest variance). Where the colours of sites mix, the model treats sites alike; where the "
        f"colours of classes part, it can tell classes. {legend}</p>{''.join(drawn)}<p>The nearest other example comes "
        f"from the same site for {100 * before:.0f} % of the examples before the first round and for "
        f"{100 * after:.0f} % at the end, {change}; if nobody could tell sites apart "
        f"it would be {100 / len(names):.0f} %.</p>"
    )


def _dot(at: tuple[float, float], colour: str, *, is_target: bool, name: str) -> str:
    x, y = at
    told = f"<title>{_text(name)}</title>"
    if is_target:
        points = f"{x:.1f},{y - 4.5:.1f} {x + 4.5:.1f},{y:.1f} {x:.1f},{y + 4.5:.1f} {x - 4.5:.1f},{y:.1f}"
        return f"<polygon points='{points}' fill='none' stroke='{colour}' stroke-width='1.6'>{told}</polygon>"
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.2' fill='{colour}' fill-opacity='.75'>{told}</circle>"


_EXPLAINED: Mapping[str, str] = {
    "accuracy_of_mean": "accuracy of the sites' mean, before the server's own steps",
    "accuracy_of_sites": "mean accuracy of the sites' models on the server's test data",
    "group_effect": "what averaging gains over the sites' own models, in accuracy",
    "vote_coverage": "share of the target's inputs on which enough sites' models agree",
    "vote_agreement": "how far the voting models agree, where they do",
    "voters": "sites whose models vote",
    "fine_tuning_loss": "loss of the server's training on voted labels",
}
"""What algorithms measure, in words; `_adapted` behind a name is explained once for all."""


def _explained(name: str) -> str:
    known = _EXPLAINED.get(name.removesuffix("_adapted"))
    adapted = ", with batch norm statistics of the target" if name.endswith("_adapted") else ""
    return (known or name.removesuffix("_adapted").replace("_", " ")) + adapted


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
        (shares if is_share else others)[_explained(name)] = points
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
    return f"<h2>Training examples of each site, by class</h2><table><tr><th></th><th>all</th>{head}</tr>{rows}</table>"


def _settings(run: Run) -> str:
    plain = {name: value for name, value in run.experiment.items() if name not in ("federation", "settings")}
    every = {**plain, **run.config.get("settings", {})}
    rows = "".join(
        f"<tr><td>{_text(name.replace('_', ' '))}</td><td class='text'>{_text(_setting(value))}</td></tr>"
        for name, value in every.items()
    )
    return f"<details><summary>Settings</summary><table>{rows}</table></details>" if rows else ""


def _setting(value: Any) -> str:
    if value is None or value in ("", [], ()):
        return "–"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


_GLOSSARY = """<details><summary>Words on this page</summary><dl>
<dt>site</dt><dd>who has data and trains on them; the data stay there</dd>
<dt>server</dt><dd>merges the models that sites send into one, and sends it back</dd>
<dt>round</dt><dd>the server sends the model, sites train it, the server merges what they send back</dd>
<dt>target</dt><dd>a domain nobody trains on with labels; the model is judged on its test data</dd>
<dt>accuracy</dt><dd>share of test examples that the model classifies rightly</dd>
<dt>loss</dt><dd>what training makes small: how unlikely the model finds the right answers</dd>
<dt>batch norm statistics</dt><dd>means and variances inside the model; those of other data can be put in without labels
</dd></dl></details>"""


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
