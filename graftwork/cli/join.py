"""`graftwork join --keys DIR --data site.toml`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork.cli.output import plural, print_json, print_table, size
from graftwork.cli.problems import USER_ERROR, readable_errors, tell, usage_error

if TYPE_CHECKING:
    from graftwork.federated.explain import Explanation
    from graftwork.federated.preflight import Check
    from graftwork.federated.supernode import Tell


def join(
    keys: Annotated[Path, typer.Option("--keys", "-k", help="The site's key folder, as the server made it.")],
    data: Annotated[Path, typer.Option("--data", "-d", help="site.toml: the site's task, device and limits.")],
    server: Annotated[
        str | None, typer.Option("--server", "-s", help="host:port. [default: as the key folder says]")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Private state. [default: ~/.local/state/graftwork/SITE]"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what is wrong, and stop there.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what would leave the site, and stop there. Nothing is sent.")
    ] = False,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", "-a", help="Of --explain. [default: what site.toml allows, or fedavg]")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the algorithm of --explain. Repeatable."),
    ] = None,
    aggregate: Annotated[
        str, typer.Option("--aggregate", help="How the server aggregates, for --explain: some ways ask for statistics.")
    ] = "mean",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show everything that Flower says.")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object per line, for machines.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what --check and --explain find as JSON.")] = False,
) -> None:
    """Take part in a federation as a site, until stopped with Ctrl-C."""
    if check and explain:
        raise usage_error("give --check or --explain, not both")
    if (algorithm or settings) and not explain:
        raise usage_error("--algorithm and --set belong to --explain: in a run the server names the algorithm")
    if as_json and not (check or explain):
        raise usage_error("--json belongs to --check and --explain; for a running site there is --log-json")
    with readable_errors():
        from graftwork.cli.simulate import _need_flower

        _need_flower()
        if explain:
            _explain(keys, data, algorithm, _settings(settings or []), aggregate, as_json)
            return
        place = state.absolute() if state is not None else None
        if check:
            from graftwork.federated.preflight import all_checks

            checks = all_checks(keys, data, lambda name: place if place is not None else default_state(name), server)
            _show_checks(checks, as_json)
            if any(each.found == "wrong" for each in checks):
                raise typer.Exit(USER_ERROR)
            return
        # What reads the data takes memory that a process which only waits should not keep.
        checks = _checks_of_another_process(keys, data, server, state)
        # A server that is down may come up; everything else has to be right now.
        if any(each.found == "wrong" and each.name != "server" for each in checks):
            _show_checks(checks, as_json=False)
            raise typer.Exit(USER_ERROR)
        from graftwork.federated.preflight import address_of, check_keys
        from graftwork.federated.site import read_site
        from graftwork.federated.supernode import Joining, supervise

        found, _ = check_keys(keys)
        assert found is not None  # or the checks would have said so
        joining = Joining(
            address_of(server, found),
            found,
            data.absolute(),
            place if place is not None else default_state(found.site),
            read_site(data).deterministic,
            verbose,
        )
        say = _teller(found.site, log_json)
        what = next(each.text for each in checks if each.name == "data")
        say("joining", f"joining {joining.server} as {found.site} with {what}; Ctrl-C stops it")
        supervise(joining, say)


def _explain(
    keys: Path, data: Path, algorithm: str | None, settings: dict[str, str], aggregate: str, as_json: bool
) -> None:
    from graftwork.federated.errors import FederationError
    from graftwork.federated.explain import explain
    from graftwork.federated.preflight import check_keys
    from graftwork.federated.site import load_site

    found, checks = check_keys(keys)
    if found is None:
        raise FederationError(*(f"{each.name}: {each.text}" for each in checks if each.found == "wrong"))
    site = load_site(data, found.site)
    names = [algorithm] if algorithm else list(site.algorithms) or ["fedavg"]
    explanations = [explain(site, name, settings, aggregate=aggregate) for name in names]
    if as_json:
        print_json([asdict(each) for each in explanations])
        return
    for number, each in enumerate(explanations):
        if number:
            print()
        _show_explanation(each)


def _show_explanation(found: Explanation) -> None:
    print(f"{found.site} in {found.algorithm}: what would leave, message by message. Nothing was sent.")
    for departure in found.departures:
        numbers = ", ".join(departure.numbers)
        print(f"\n{departure.when}: {plural(len(departure.tensors), 'tensor')}, {size(departure.bytes)}")
        rows = [
            (
                "  " + each.name,
                _shape(each.shape),
                each.dtype,
                size(each.bytes),
                "" if each.may_leave else "NOT ALLOWED",
            )
            for each in departure.tensors
        ]
        print_table(rows, right=[3])
        print(f"  and the numbers {numbers}")
    print(f"\nstays on the site: {plural(len(found.stays), 'tensor')}, and all data")
    print_table(
        [("  " + each.name, _shape(each.shape), each.dtype, size(each.bytes)) for each in found.stays], right=[3]
    )
    if found.refused:
        print(
            f"\n{plural(len(found.refused), 'tensor')} would be refused, as `exchange` in the site's file says: the "
            "site would send an error instead of such a reply"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def default_state(site: str) -> Path:
    """Return where a site's private state is if nobody says so."""
    import os

    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser().absolute() / "graftwork" / site


def _checks_of_another_process(keys: Path, data: Path, server: str | None, state: Path | None) -> list[Check]:
    """Return what `--check` finds, run as a command of its own."""
    import json
    import subprocess
    import sys

    from graftwork.federated.errors import FederationError
    from graftwork.federated.preflight import Check

    command = [
        sys.executable,
        "-m",
        "graftwork.cli",
        "join",
        "--check",
        "--json",
        "--keys",
        str(keys),
        "--data",
        str(data),
    ]
    command += [] if server is None else ["--server", server]
    command += [] if state is None else ["--state", str(state)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    try:
        said = json.loads(done.stdout)
        return [Check(each["check"], each["found"], each["text"]) for each in said["checks"]]
    except (ValueError, KeyError, TypeError):
        raise FederationError(
            f"the checks ended with exit code {done.returncode} and without a result; see what "
            "graftwork join --check says"
        ) from None


def _settings(given: list[str]) -> dict[str, str]:
    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise usage_error(f"--set {item}: write it as KEY=VALUE")
        found[key.strip()] = value.strip()
    return found


def _teller(site: str, log_json: bool) -> Tell:
    """Return what writes events as lines on stderr, with the time."""
    import datetime
    import json

    def say(event: str, text: str, *, is_problem: bool = False) -> None:
        now = datetime.datetime.now(datetime.UTC)
        if log_json:
            level = "warning" if is_problem else "info"
            line = {"time": now.isoformat(timespec="milliseconds"), "level": level, "event": event, "site": site}
            tell(json.dumps({**line, "text": text}, ensure_ascii=False))
        else:
            mark = "problem: " if is_problem else ""
            tell(f"{now:%Y-%m-%d %H:%M:%S}Z {site}: {mark}{text}")

    return say


def _show_checks(checks: list[Check], as_json: bool) -> None:
    wrong = sum(each.found == "wrong" for each in checks)
    if as_json:
        rows = [{"check": each.name, "found": each.found, "text": each.text} for each in checks]
        print_json({"ready": wrong == 0, "checks": rows})
        return
    print_table([(each.found, each.name, each.text) for each in checks])
    print()
    print("ready to join" if wrong == 0 else f"not ready: {wrong} wrong")
