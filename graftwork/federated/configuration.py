"""`federation.toml`: what `graftwork serve` runs, for whom, and on which port.

    sites = ["amsterdam", "berlin", "cracow"]
    task = "task.py:task"              # the model
    algorithm = "fedka"
    rounds = 20
    out = "run"

    [settings]                         # of the algorithm
    learning_rate = 0.01

    [server]
    names = ["fl.example.org"]         # by which sites call it
    port = 9092

Instead of `task`, a table `[simulation]` takes a built-in one. Paths are relative to the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from graftwork.federated.authority import Certificates, is_host, is_site_name
from graftwork.federated.domains import BUILT_IN, Federation, FederationSpec, build
from graftwork.federated.errors import FederationError
from graftwork.federated.runs import Experiment
from graftwork.federated.toml_file import read_toml
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import GraftworkError, did_you_mean
from graftwork.merge.task import load_task

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

PORT = 9092
WAIT_SECONDS = 600.0
ON_SITES = "on-sites"
"""Name of a federation whose data only the sites know."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerPlace:
    """Where the server is, and how it proves that.

    Args:
        host: The address on which it listens.
        port: Its only port.
        names: Names and addresses by which sites call it.
        keys: The key folder.
        own: Certificates from another authority; None: the key folder's.
        wait: Seconds for which sites are waited for at the start.
        insecure: Neither TLS nor keys; on the loopback address only.
    """

    host: str = "0.0.0.0"
    port: int = PORT
    names: tuple[str, ...] = ()
    keys: Path = Path("keys")
    own: Certificates | None = None
    wait: float = WAIT_SECONDS
    insecure: bool = False


@dataclass(frozen=True)
class Description:
    """What a `federation.toml` says.

    Args:
        path: The file.
        sites: Names of the sites, sorted.
        experiment: What is run; its federation is a built-in simulation or a task of the server's.
        task: `file.py:name` of the model's task, with an absolute path; empty with a simulation.
        server_task: Likewise of the server's own data; empty if it has none.
        out: The run folder.
        server: Where the server is.
    """

    path: Path
    sites: tuple[str, ...]
    experiment: Experiment
    task: str = ""
    server_task: str = ""
    out: Path = Path("run")
    server: ServerPlace = field(default_factory=ServerPlace)

    def federation(self) -> Federation:
        """Return what the strategy needs of the federation: the sites' names, the model, the server's data.

        Raises:
            GraftworkError: The task cannot be loaded.
        """
        return server_federation(self.sites, self.experiment.federation, self.task, self.server_task)


def server_federation(sites: Sequence[str], spec: FederationSpec, task: str, server_task: str) -> Federation:
    """Return what the strategy needs: of the sites' tasks it uses the model alone."""
    if task:
        model = load_task(task)
        own = load_task(server_task) if server_task else None
        return Federation(spec.name, dict.fromkeys(sorted(sites), model), own, {"sites": {site: {} for site in sites}})
    built = build(spec)
    some = next(iter(built.sites.values()))
    record = {**built.record, "sites": {site: built.record.get("sites", {}).get(site, {}) for site in sorted(sites)}}
    return Federation(
        built.name, {site: built.sites.get(site, some) for site in sorted(sites)}, built.server, record,
        built.sites_are_judged,
    )  # fmt: skip


def record_for_sites(experiment: Experiment) -> str:
    """Return the experiment as JSON, in one form, without what only the server can read."""
    spec = dataclasses.replace(experiment.federation, data=None)
    if spec.name not in BUILT_IN:
        spec = dataclasses.replace(spec, name=ON_SITES)
    record = dataclasses.replace(experiment, federation=spec, init=None).record()
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


# ---------------------------------------------------------------------------------------------------------------------
# Reading the file


def read_federation(path: Path) -> Description:
    """Return what a `federation.toml` says.

    Raises:
        FederationError: It cannot be read, or says something wrong; every problem at once.
    """
    return _checked(path.absolute(), read_toml(path))


def _checked(path: Path, content: Mapping[str, Any]) -> Description:
    from pydantic import ValidationError

    problems: list[str] = []
    wrong: set[str] = set()
    try:
        values = _forms()[0].model_validate(dict(content)).model_dump(exclude_none=True)
    except ValidationError as error:
        problems += _spoken(error)
        wrong = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        values = {key: value for key, value in content.items() if key not in wrong}
    place = values.get("server", {})
    if "server" not in wrong:
        problems += _wrong_places(place, path.parent)
    problems += _contradictions(values, wrong)
    experiment: Experiment | None = None
    if not problems:
        try:
            experiment = _experiment(values, path.parent)
            _check_algorithm(experiment)
        except GraftworkError as error:
            problems += [problem.removeprefix("cannot run: ") for problem in error.problems]
    if problems or experiment is None:
        raise FederationError(*(f"{path.name}: {problem}" for problem in problems))
    return Description(
        path,
        tuple(sorted(values["sites"])),
        experiment,
        _absolute(values.get("task", ""), path.parent),
        _absolute(values.get("server_task", ""), path.parent),
        path.parent / values.get("out", "run"),
        _place(place, path.parent),
    )


@lru_cache(maxsize=1)
def _forms() -> tuple[type[BaseModel], dict[str, list[str]]]:
    """Return the form of the file and the known keys of each table; made late, since pydantic is slow to import."""
    from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, create_model

    strict = ConfigDict(extra="forbid", strict=True)
    hints = get_type_hints(Experiment)
    of_experiment: dict[str, Any] = {}
    for item in dataclasses.fields(Experiment):
        kind = hints[item.name]
        if item.name in ("federation", "settings", "algorithm"):
            continue
        if get_origin(kind) is tuple:
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        of_experiment[item.name] = (kind | None, None)

    class Simulation(BaseModel):
        model_config = strict
        name: str
        target: str | None = None
        partition: str | None = None
        data: str | None = None
        options: dict[str, Any] | None = None

    class Server(BaseModel):
        model_config = strict
        host: str | None = None
        port: int | None = Field(None, ge=1, le=65535)
        names: list[StrictStr] | None = None
        keys: str | None = None
        certificate: str | None = None
        certificate_key: str | None = None
        certificate_authority: str | None = None
        wait: float | None = Field(None, gt=0)
        insecure: StrictBool | None = None

    form = create_model(
        "FederationFile",
        __config__=strict,
        sites=(list[StrictStr], ...),
        task=(str | None, None),
        server_task=(str | None, None),
        algorithm=(str | None, None),
        seed=(int | None, None),
        out=(str | None, None),
        settings=(dict[str, Any] | None, None),
        simulation=(Simulation | None, None),
        server=(Server | None, None),
        **of_experiment,
    )
    known = {
        "": list(form.model_fields),
        "simulation": list(Simulation.model_fields),
        "server": list(Server.model_fields),
    }
    return form, known


_KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


def _spoken(error: ValidationError) -> list[str]:
    known = _forms()[1]
    found = []
    for item in error.errors():
        place = ".".join(map(str, item["loc"]))
        table, _, key = place.rpartition(".")
        if item["type"] == "extra_forbidden":
            others = known.get(table, [])
            elsewhere = [name for name, keys in known.items() if key in keys and name != table]
            hint = did_you_mean(key, others)
            if elsewhere:
                hint = f"; it belongs into [{elsewhere[0]}]" if elsewhere[0] else "; it belongs before all tables"
            found.append(f"there is no key {quoted(place)}{hint or '; there are ' + listed(others, 40)}")
        elif item["type"] == "missing":
            example = ' = ["amsterdam", "berlin"]' if key == "sites" else ""
            found.append(f"lacks {place}{example}")
        elif item["type"] in _KINDS:
            found.append(f"{place} is {_shown(item['input'])}, not {_KINDS[item['type']]}")
        else:
            found.append(f"{place} is {_shown(item['input'])}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else repr(value)


def _contradictions(values: Mapping[str, Any], wrong: set[str]) -> list[str]:
    """Return what is wrong with values that have the right types."""
    problems = []
    sites = values.get("sites", [])
    if "sites" in values and not sites:
        problems.append("sites is empty; name at least one site")
    problems += [f"sites: {quoted(site)} names files; use letters, digits, '.', '_', '-'" for site in sites
                 if not is_site_name(site)]  # fmt: skip
    problems += [f"sites: {quoted(site)} is named twice" for site in sorted(set(sites)) if sites.count(site) > 1]
    given = [key for key in ("task", "simulation") if key in values or key in wrong]
    if len(given) == 2:
        problems.append("has both task and [simulation]; keep one")
    elif not given:
        problems.append('lacks task = "file.py:name" (or a table [simulation])')
    if "server_task" in values and "simulation" in values:
        problems.append("server_task belongs to a task; a simulation has its own target for the server")
    for key in ("task", "server_task"):
        if key in values and ":" not in values[key]:
            problems.append(f"{key} is {quoted(values[key])}; write file.py:name or package.module:name")
    simulation = values.get("simulation", {})
    if "name" in simulation and simulation["name"] not in BUILT_IN:
        hint = did_you_mean(simulation["name"], BUILT_IN) or f"; there are {listed(BUILT_IN)}"
        problems.append(f"simulation.name: there is no simulation {quoted(simulation['name'])}{hint}")
    return problems


def _wrong_places(place: Mapping[str, Any], folder: Path) -> list[str]:
    problems = []
    host = place.get("host", ServerPlace.host)
    if not is_host(host):
        problems.append(f"server.host is {quoted(host)}, which is no address")
    unknown = [name for name in place.get("names", ()) if not is_host(name)]
    problems += [f"server.names: {quoted(name)} is neither a host name nor an address" for name in unknown]
    own = [key for key in ("certificate", "certificate_key", "certificate_authority") if key in place]
    if own and len(own) < 3:
        problems.append(
            f"server: {listed(own)} without the others; certificate, certificate_key and certificate_authority belong "
            "together"
        )
    problems += [f"server.{key}: there is no file {quoted(folder / place[key])}" for key in own
                 if not (folder / place[key]).is_file()]  # fmt: skip
    if place.get("insecure"):
        if host not in _LOOPBACK:
            problems.append(
                f'server.insecure needs host = "127.0.0.1", not {quoted(host)}: without TLS and keys, whoever reaches '
                "the port takes part"
            )
        if own:
            problems.append(f"server: {listed(own)} and insecure contradict each other")
    return problems


def _experiment(values: Mapping[str, Any], folder: Path) -> Experiment:
    from graftwork.federated.algorithms import create

    simulation = values.get("simulation")
    seed = values.get("seed", 0)
    if simulation is not None:
        data = simulation.get("data")
        spec = FederationSpec(
            simulation["name"],
            seed,
            None if data is None else str(folder / data),
            simulation.get("target"),
            simulation.get("partition", "domain"),
            {
                **create(values.get("algorithm", "fedavg")).data_defaults(
                    simulation["name"], has_folder=data is not None
                ),
                **simulation.get("options", {}),
            },
        )
    else:
        spec = FederationSpec(values["task"], seed)
    names = {item.name for item in dataclasses.fields(Experiment)} - {"federation"}
    given = {key: value for key, value in values.items() if key in names}
    if "exchange" in given:
        given["exchange"] = tuple(given["exchange"])
    if "init" in given:
        given["init"] = str(folder / given["init"])
    return Experiment(spec, **given)


def _check_algorithm(experiment: Experiment) -> None:
    from graftwork.federated.aggregation import Aggregation
    from graftwork.federated.algorithms import create

    create(experiment.algorithm, experiment.settings)
    Aggregation.parse(experiment.aggregate)


def _place(place: Mapping[str, Any], folder: Path) -> ServerPlace:
    own = None
    if "certificate" in place:
        own = Certificates(
            folder / place["certificate_authority"], folder / place["certificate"], folder / place["certificate_key"]
        )
    given = {key: place[key] for key in ("host", "port", "insecure") if key in place}
    return ServerPlace(
        **given,
        names=tuple(place.get("names", ())),
        keys=folder / place.get("keys", "keys"),
        own=own,
        wait=float(place.get("wait", WAIT_SECONDS)),
    )


def _absolute(spec: str, folder: Path) -> str:
    """Return `file.py:name` with the file's whole path; a module's name stays."""
    place, _, name = spec.rpartition(":")
    return f"{folder / place}:{name}" if place.endswith(".py") or "/" in place else spec
