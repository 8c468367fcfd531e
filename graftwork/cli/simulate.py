"""`graftwork simulate NAME --algorithm A`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graftwork.cli.output import print_json, print_table, size
from graftwork.cli.problems import readable_errors, tell, usage_error

if TYPE_CHECKING:
    from graftwork.federated.runs import Experiment
    from graftwork.federated.strategy import Outcome

QUORUM_MISSED = 3

_SHOWN_FAILURES = 3


def simulate(
    name: Annotated[
        str | None, typer.Argument(help="digits, office, amazon, or file.py:federation ({site: Task}).")
    ] = None,
    algorithm: Annotated[
        str, typer.Option("--algorithm", "-a", help="fedavg, fedprox, fedbn, scaffold, local, fedka, fraug, ggeur, …")
    ] = "fedavg",
    rounds: Annotated[int | None, typer.Option("--rounds", "-r", min=1, help="Rounds. [default: 10]")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything that is drawn.")] = 0,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=0, help="Worker processes; 0: clients run in this one.")
    ] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.")] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with this run; only --rounds may be given besides.")
    ] = None,
    init: Annotated[Path | None, typer.Option("--init", help="A checkpoint with the model's start values.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="A folder of real domains.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="The domain without a site: the server has its inputs, unlabelled.")
    ] = None,
    partition: Annotated[
        str,
        typer.Option("--partition", help="domain, or dirichlet, quantity, domain+dirichlet with :alpha=0.5,sites=10."),
    ] = "domain",
    participation: Annotated[float, typer.Option("--participation", help="Share of the sites asked per round.")] = 1.0,
    aggregate: Annotated[
        str,
        typer.Option(
            "--aggregate",
            help="mean, median, trimmed_mean, krum, or a merge method: ties:density=0.3, fisher, regmean, permutation.",
        ),
    ] = "mean",
    one_shot: Annotated[
        bool, typer.Option("--one-shot", help="Sites train alone, each from a start of its own; one merge.")
    ] = False,
    spec: Annotated[
        Path | None, typer.Option("--spec", help="For --aggregate permutation: which units may be re-ordered (JSON).")
    ] = None,
    exchange: Annotated[
        list[str] | None, typer.Option("--exchange", help="Only tensors of such names travel: 'head.*'. Repeatable.")
    ] = None,
    quorum: Annotated[float, typer.Option("--quorum", help="Share of the asked sites that has to answer.")] = 0.5,
    on_quorum: Annotated[
        Literal["stop", "skip"], typer.Option("--on-quorum", help="If it is missed: stop the run, or skip the round.")
    ] = "stop",
    deadline: Annotated[float | None, typer.Option("--deadline", help="Seconds that a site has.")] = None,
    ask_again: Annotated[
        Literal["needed", "always", "never"],
        typer.Option("--ask-again", help="Ask a lost site again: if the quorum needs it, always, or never."),
    ] = "needed",
    clip_norm: Annotated[
        float, typer.Option("--clip-norm", min=0, help="Largest norm of what a site may change; 0: any.")
    ] = 0.0,
    noise_multiplier: Annotated[
        float,
        typer.Option("--noise-multiplier", min=0, help="Noise for differential privacy, per --clip-norm."),
    ] = 0.0,
    delta: Annotated[float, typer.Option("--delta", help="δ at which ε is told.")] = 1e-5,
    evaluate_every: Annotated[int, typer.Option("--evaluate-every", min=1, help="Rounds between evaluations.")] = 1,
    patience: Annotated[int, typer.Option("--patience", min=0, help="Stop after so many without a better one.")] = 0,
    keep_sites: Annotated[bool, typer.Option("--keep-sites", help="Keep the model that each site sent.")] = False,
    keep_rounds: Annotated[int, typer.Option("--keep-rounds", min=1, help="Rounds that are kept.")] = 3,
    backend: Annotated[
        Literal["inprocess", "ray"], typer.Option("--backend", help="ray: Flower's own simulation.")
    ] = "inprocess",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files for TensorBoard into RUN/tensorboard.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the algorithm, or data.KEY. Repeatable."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No lines per round.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Events as JSON lines on stderr instead of lines per round.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a federation on this machine."""
    if (name is None) == (resume is None):
        raise usage_error("give the name of a simulation, or --resume RUN")
    if resume is not None and out is not None:
        raise usage_error("--resume RUN goes on in RUN; leave out --out")
    if tensorboard and out is None and resume is None:
        raise usage_error("--tensorboard writes into the run folder; give --out")
    given: dict[str, str] = {}
    for item in settings or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise usage_error(f"--set {item}: write it as KEY=VALUE")
        given[key.strip()] = value.strip()
    if one_shot:
        if algorithm not in ("fedavg", "local", "one-shot"):
            raise usage_error(f"--one-shot is local training and one merge; leave out --algorithm {algorithm}")
        if rounds not in (None, 1):
            raise usage_error(f"--one-shot has one round; leave out --rounds {rounds}")
        algorithm = "one-shot"
    if algorithm == "one-shot" and init is not None and given.get("starts") != "common":
        raise usage_error("--init gives all sites the same start; add --set starts=common")
    if spec is not None:
        if aggregate.partition(":")[0] != "permutation":
            raise usage_error("--spec goes with --aggregate permutation")
        if "," in str(spec):
            raise usage_error(f"--spec {spec}: the name of the file has a comma; give it another name")
        aggregate += f"{',' if ':' in aggregate else ':'}spec={spec}"
    with readable_errors():
        _need_flower()
        from graftwork.federated.algorithms import create
        from graftwork.federated.domains import BUILT_IN, FederationSpec
        from graftwork.federated.errors import QuorumError
        from graftwork.federated.log import json_lines
        from graftwork.federated.runs import Experiment, RunFolder
        from graftwork.federated.server import simulate as run

        if resume is not None:
            import dataclasses

            experiment = RunFolder.open(resume).experiment()
            if rounds is not None:
                experiment = dataclasses.replace(experiment, rounds=rounds)
        else:
            assert name is not None
            options = {key.removeprefix("data."): value for key, value in given.items() if key.startswith("data.")}
            if name in BUILT_IN:
                options = {**create(algorithm).data_defaults(name, has_folder=data is not None), **options}
            experiment = Experiment(
                FederationSpec(name, seed, None if data is None else str(data), target, partition, options),
                algorithm=algorithm,
                settings={key: value for key, value in given.items() if not key.startswith("data.")},
                rounds=rounds or (1 if algorithm == "one-shot" else 10),
                participation=participation,
                quorum=quorum,
                on_quorum=on_quorum,
                deadline=deadline,
                ask_again=ask_again,
                clip_norm=clip_norm,
                noise_multiplier=noise_multiplier,
                delta=delta,
                aggregate=aggregate,
                exchange=tuple(exchange or ()),
                init=None if init is None else str(init),
                evaluate_every=evaluate_every,
                patience=patience,
                keep_sites=keep_sites,
                keep_rounds=keep_rounds,
            )
        place = resume or out
        if backend == "ray" and place is not None:
            from graftwork.federated.domains import build
            from graftwork.federated.ray import flwr_command

            tell(f"the same with Flower's own command: {flwr_command(place, len(build(experiment.federation).sites))}")

        def show(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
            if not quiet and not log_json:
                tell(_live(line, timing, experiment))

        try:
            with json_lines() if log_json else contextlib.nullcontext():
                outcome = run(
                    experiment,
                    place,
                    workers=workers,
                    backend=backend,
                    resume=resume is not None,
                    force=force,
                    observer=show,
                    tensorboard=tensorboard,
                )
        except QuorumError as error:
            for problem in error.problems:
                tell(f"error: {problem}")
            if place is not None:
                tell(f"go on with graftwork simulate --resume {place}, or skip such rounds with --on-quorum skip")
            raise typer.Exit(QUORUM_MISSED) from None
        if as_json:
            print_json({**outcome.summary, "out": None if place is None else str(place), "lines": outcome.lines})
            return
        _print(outcome, place)


def _need_flower() -> None:
    import importlib.util

    from graftwork.merge.errors import DependencyError

    if importlib.util.find_spec("flwr") is None:
        raise DependencyError('federations need Flower; install it with pip install "graftwork[federated]"')


def _live(line: Mapping[str, Any], timing: Mapping[str, Any], experiment: Experiment) -> str:
    """Return a round on one line: round, clients answered, loss, accuracy, seconds, bytes, who failed."""
    head = f"round {line['round']}/{experiment.rounds}  {line['answered']}/{line['asked']} sites"
    if "skipped" in line:
        return f"{head}  skipped: {line['skipped']}"
    parts = [head]
    if line.get("train_loss") is not None:
        parts.append(f"loss {line['train_loss']:.4f}")
    if isinstance(line.get("accuracy"), float):
        parts.append(f"accuracy {100 * line['accuracy']:.2f} %")
    if "epsilon" in line:
        parts.append(f"ε {line['epsilon']:.2f}")
    parts += [f"{timing['seconds']:.1f} s", size(timing["bytes"])]
    if "asked_again" in timing:
        parts.append(f"asked again: {', '.join(timing['asked_again'])}")
    failed = list(line.get("failed", {}).items())
    if failed:
        some = "; ".join(f"{site}: {reason}" for site, reason in failed[:_SHOWN_FAILURES])
        more = f" and {len(failed) - _SHOWN_FAILURES} more" if len(failed) > _SHOWN_FAILURES else ""
        parts.append(f"failed: {some}{more}")
    return "  ".join(parts)


def _print(outcome: Outcome, place: Path | None) -> None:
    summary = outcome.summary
    rows: list[tuple[str, str]] = [("algorithm", summary["algorithm"]), ("rounds", str(summary["rounds"]))]
    if summary["skipped_rounds"]:
        rows.append(("skipped rounds", str(summary["skipped_rounds"])))
    rows += [("sites", str(len(summary["sites"]))), ("parameters", f"{summary['parameters']:,}")]
    rows.append(("traffic", size(summary["bytes"])))
    if "accuracy" in summary:
        last = summary["mean_of_last"]
        rows += [
            ("judged on", summary["judged_on"]),
            ("accuracy", _percent(summary["accuracy"])),
            *_alone(outcome),
            (f"mean of last {last['rounds']}", _percent(last["accuracy"])),
        ]
        if "accuracy_adapted" in last:
            rows.append(("with its statistics", f"{_percent(last['accuracy_adapted'])} (batch norm of the target)"))
        rows.append(("best", f"{_percent(summary['best']['accuracy'])} in round {summary['best']['round']}"))
    private = summary.get("privacy", {})
    if "epsilon" in private:
        rows.append(
            ("privacy", f"ε {private['epsilon']:.3g} at δ {private['delta']:g}, for a site's part in the models")
        )
    if "statistics" in private:
        found = private["statistics"]
        rows.append(
            ("statistics", f"ε {found['epsilon']:.3g} at δ {found['delta']:g}, for an example; not the training")
        )
    if place is not None:
        rows += [("run", str(place)), ("report", str(place / "report.html"))]
    print_table(rows)


def _alone(outcome: Outcome) -> list[tuple[str, str]]:
    """Return how good the sites' models are that were merged once."""
    found = outcome.lines[-1].get("algorithm", {}) if outcome.lines else {}
    if "accuracy_alone" not in found:
        return []
    best = _percent(found["accuracy_of_best_alone"])
    return [("sites alone", f"{_percent(found['accuracy_alone'])} (mean; best {best})")]


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
