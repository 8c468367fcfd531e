"""A site's own description of itself: whose data, what is computed on, and what may leave.

    # site.toml
    task = "task.py:hospital"      # relative to this file; a Task, or a function that returns one
    device = "auto"                # cpu, cuda, cuda:1, auto
    precision = "float32"          # or bfloat16, float16: of forward passes
    deterministic = false
    algorithms = ["fedavg", "fedbn"]      # what may be asked of this site; left out: anything
    exchange = ["head.*"]                 # tensors that may leave, at most; left out: whatever the algorithm sends

    [arguments]                    # of the function that `task` names
    folder = "/data/scans"

Instead of `task`, `simulation = "digits"` with `domain = "rotate"` takes a site of a built-in simulation; `[arguments]`
are then its data options. Nothing that a server sends can change any of this, or name code.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.federated.algorithms import names as algorithm_names
from graftwork.federated.compute import PRECISIONS, Compute
from graftwork.federated.errors import FederationError
from graftwork.federated.toml_file import read_toml
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import GraftworkError, did_you_mean
from graftwork.merge.task import Task, load_object, raise_user_failure

if TYPE_CHECKING:
    from pydantic import ValidationError

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Description:
    """What a `site.toml` says, checked but not acted on.

    Args:
        path: The file.
        site: The site's name; empty if the file does not say.
        task: `file.py:name` with an absolute path, or `package.module:name`; empty with `simulation`.
        simulation: A built-in simulation; empty with `task`.
        domain: Which of its sites.
        seed: By which its data are drawn.
        data: A folder of real domains for it.
        target: Its domain without a site.
        partition: How its data are shared out.
        arguments: Of the function that `task` names, or the simulation's data options.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        precision: Of forward passes.
        deterministic: Whether operators have to give the same bits each time.
        algorithms: What may be asked of the site; empty: anything.
        exchange: Patterns of tensors that may leave; None: whatever the algorithm sends.
        init: A checkpoint with start values for what never travels.
    """

    path: Path
    site: str = ""
    task: str = ""
    simulation: str = ""
    domain: str = ""
    seed: int = 0
    data: str | None = None
    target: str | None = None
    partition: str = "domain"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    precision: str = "float32"
    deterministic: bool = False
    algorithms: tuple[str, ...] = ()
    exchange: tuple[str, ...] | None = None
    init: str | None = None


@dataclass(frozen=True)
class Site:
    """A site that can work: its task is loaded, its device is there.

    Args:
        site: Its name.
        task: Its model and data.
        compute: Device, precision, deterministic operators.
        algorithms: What may be asked of it; empty: anything.
        exchange: Patterns of tensors that may leave; None: whatever the algorithm sends.
        init: A checkpoint with start values for what never travels.
        path: The file that says so.
    """

    site: str
    task: Task
    compute: Compute = field(default_factory=Compute)
    algorithms: tuple[str, ...] = ()
    exchange: tuple[str, ...] | None = None
    init: str | None = None
    path: Path = Path("site.toml")

    @property
    def device(self) -> str:
        """The torch device."""
        return self.compute.device

    @property
    def precision(self) -> str:
        """The precision of forward passes."""
        return self.compute.precision

    @property
    def deterministic(self) -> bool:
        """Whether operators have to give the same bits each time."""
        return self.compute.deterministic

    def refuse_algorithm(self, name: str) -> None:
        """Raise if the site does not take part in an algorithm (or in a preset of it).

        Raises:
            FederationError: It does not.
        """
        if self.algorithms and not any(name == each or name.startswith(f"{each}-") for each in self.algorithms):
            raise FederationError(
                f"site {quoted(self.site)} takes part in {listed(self.algorithms)} only, not in {quoted(name)}, as its "
                "own file says"
            )

    def refuse_tensors(self, names: Iterable[str]) -> None:
        """Raise if a reply holds tensors that may not leave the site.

        Args:
            names: Flat names, such as `model/head.weight`. A pattern is compared with them, and with the model's own
                names (`head.weight`).

        Raises:
            FederationError: Some may not.
        """
        if self.exchange is None:
            return
        kept = [name for name in names if not self.may_leave(name)]
        if kept:
            raise FederationError(
                f"site {quoted(self.site)} does not let {listed(kept, 3)} leave: its own file allows "
                f"{listed(self.exchange) or 'nothing'}; nothing was sent"
            )

    def may_leave(self, name: str) -> bool:
        """Return whether a tensor may leave the site."""
        if self.exchange is None:
            return True
        plain = name.removeprefix("model/")
        return any(fnmatch.fnmatchcase(each, pattern) for pattern in self.exchange for each in {name, plain})


def load_site(path: Path | str, name: str = "") -> Site:
    """Return the site that a `site.toml` describes, with its task loaded.

    Args:
        path: The file.
        name: The site's name by its keys; the file may repeat it.

    Raises:
        GraftworkError: The file, the task or the device is wrong; every problem of the file at once.
    """
    from graftwork.merge.device import chosen_device

    said = read_site(Path(path))
    if name and said.site and said.site != name:
        raise FederationError(
            f"{quoted(said.path)} says site {quoted(said.site)}, the keys belong to site {quoted(name)}; take the "
            "other file or the other keys"
        )
    site = name or said.site
    if not site:
        raise FederationError(f'{quoted(said.path)} does not name its site; add site = "NAME"')
    compute = Compute(chosen_device(said.device), said.precision, said.deterministic)
    task = task_of(said, site)
    return Site(site, task, compute, said.algorithms, said.exchange, said.init, said.path)


def read_site(path: Path) -> Description:
    """Return what a `site.toml` says.

    Raises:
        FederationError: It cannot be read, or says something wrong; every problem at once.
    """
    return _checked(path.absolute(), read_toml(path))


def _checked(path: Path, content: Mapping[str, Any]) -> Description:
    from pydantic import ValidationError

    form = _form()
    problems: list[str] = []
    values: dict[str, Any] = {}
    try:
        values = form.model_validate(dict(content)).model_dump(exclude_none=True)
    except ValidationError as error:
        problems += _problems(error, list(form.model_fields))
        wrong = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        values = {key: value for key, value in content.items() if key not in wrong}
    problems += _contradictions(values, known_wrong=bool(problems))
    if problems:
        raise FederationError(*(f"{path.name}: {problem}" for problem in problems))
    for key in ("algorithms", "exchange"):
        if key in values:
            values[key] = tuple(values[key])
    for key in ("data", "init"):
        if key in values:
            values[key] = str(path.parent / values[key])
    if "task" in values:
        values["task"] = _absolute(values["task"], path.parent)
    return Description(path, **values)


def _form() -> Any:
    """Return the form of the file; made here, since pydantic is slow to import."""
    from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr

    class SiteFile(BaseModel):
        model_config = ConfigDict(extra="forbid")

        site: StrictStr | None = None
        task: StrictStr | None = None
        simulation: StrictStr | None = None
        domain: StrictStr | None = None
        seed: StrictInt | None = None
        data: StrictStr | None = None
        target: StrictStr | None = None
        partition: StrictStr | None = None
        arguments: dict[str, Any] | None = None
        device: StrictStr | None = None
        precision: StrictStr | None = None
        deterministic: StrictBool | None = None
        algorithms: list[StrictStr] | None = None
        exchange: list[StrictStr] | None = None
        init: StrictStr | None = None

    return SiteFile


_KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list of texts",
    "dict_type": "a table",
}


def _problems(error: ValidationError, known: list[str]) -> list[str]:
    found = []
    for item in error.errors():
        place = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            found.append(
                f"there is no key {quoted(place)}{did_you_mean(place, known) or '; there are ' + listed(known, 20)}"
            )
        else:
            wanted = _KINDS.get(item["type"], item["msg"])
            found.append(f"{place} is {item['input']!r}, not {wanted}")
    return found


_OF_SIMULATIONS = ("domain", "seed", "data", "target", "partition")


def _contradictions(values: Mapping[str, Any], *, known_wrong: bool) -> list[str]:
    """Return what is wrong with values that have the right types."""
    from graftwork.federated.domains import BUILT_IN

    problems = []
    if "task" in values and "simulation" in values:
        problems.append("has both task and simulation; keep one")
    elif "task" not in values and "simulation" not in values and not known_wrong:
        problems.append('lacks task = "file.py:name" (or simulation = "digits" with a domain)')
    if "task" in values:
        if ":" not in values["task"]:
            problems.append(f"task is {quoted(values['task'])}; write file.py:name or package.module:name")
        lost = [key for key in _OF_SIMULATIONS if key in values]
        if lost and "simulation" not in values:
            problems.append(f"{listed(lost)} belongs to a simulation, not to a task; put it under [arguments]")
    simulation = values.get("simulation")
    if simulation is not None and simulation not in BUILT_IN:
        hint = did_you_mean(simulation, BUILT_IN) or f"; there are {listed(BUILT_IN)}"
        problems.append(f"there is no simulation {quoted(simulation)}{hint}")
    if "site" in values and not SITE_NAME.fullmatch(values["site"]):
        problems.append(f"site is {quoted(values['site'])}; use letters, digits, '.', '_', '-'")
    device = values.get("device", "auto")
    if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", device):
        problems.append(f"device is {quoted(device)}; write cpu, cuda, cuda:1 or auto")
    precision = values.get("precision", "float32")
    if precision not in PRECISIONS:
        hint = did_you_mean(precision, PRECISIONS) or f"; there are {listed(PRECISIONS)}"
        problems.append(f"precision is {quoted(precision)}{hint}")
    for name in values.get("algorithms", ()):
        base = name
        while base not in algorithm_names() and "-" in base:
            base = base.rpartition("-")[0]
        if base not in algorithm_names():
            hint = did_you_mean(name, algorithm_names()) or f"; there are {listed(algorithm_names(), 20)}"
            problems.append(f"algorithms: there is no algorithm {quoted(name)}{hint}")
    return problems


def _absolute(spec: str, folder: Path) -> str:
    """Return `file.py:name` with the file's whole path; a module's name stays."""
    place, _, name = spec.rpartition(":")
    return f"{folder / place}:{name}" if place.endswith(".py") or "/" in place else spec


def task_of(said: Description, site: str) -> Task:
    """Return the task of a site.

    Raises:
        GraftworkError: It cannot be loaded.
    """
    if said.simulation:
        return _simulated(said, site)
    found = load_object(said.task)
    if isinstance(found, Task):
        if said.arguments:
            raise FederationError(
                f"{said.path.name}: {quoted(said.task)} is a Task and takes no [arguments]; name a function that "
                "returns a Task"
            )
        return found
    if not callable(found):
        raise FederationError(
            f"{said.path.name}: {quoted(said.task)} is {type(found).__name__}, not a Task or a function that gives one"
        )
    _check_arguments(said, found)
    try:
        task = found(**said.arguments)
    except BaseException as error:
        raise_user_failure(error, f"cannot load task {quoted(said.task)}")
    if isinstance(task, Mapping) and isinstance(task.get(site), Task):
        return task[site]  # type: ignore[no-any-return]
    if not isinstance(task, Task):
        what = f"a mapping without the site {quoted(site)}" if isinstance(task, Mapping) else type(task).__name__
        raise FederationError(f"{said.path.name}: {quoted(said.task)} returns {what}, not a Task")
    return task


def _check_arguments(said: Description, function: Any) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    names = [each.name for each in named]
    problems = [
        f"{said.path.name}: {quoted(said.task)} has no argument {quoted(key)}"
        f"{did_you_mean(key, names) or '; it has ' + (listed(names, 20) or 'none')}"
        for key in said.arguments
        if key not in names and not takes_any
    ]
    problems += [
        f"{said.path.name}: {quoted(said.task)} needs the argument {quoted(each.name)}; put it under [arguments]"
        for each in named
        if each.default is each.empty and each.name not in said.arguments
    ]
    if problems:
        raise FederationError(*problems)


def _simulated(said: Description, site: str) -> Task:
    from graftwork.federated.domains import FederationSpec, build

    spec = FederationSpec(said.simulation, said.seed, said.data, said.target, said.partition, said.arguments)
    try:
        sites = build(spec).sites
    except GraftworkError as error:
        raise FederationError(*(f"{said.path.name}: {problem}" for problem in error.problems)) from None
    wanted = said.domain or site
    if wanted not in sites:
        hint = did_you_mean(wanted, sites) or f"; there are {listed(sites, 20)}"
        how = "domain" if said.domain else "the site's name, which stands for the domain,"
        raise FederationError(
            f"{said.path.name}: {how} is {quoted(wanted)}, which {said.simulation} does not have{hint}"
        )
    return sites[wanted]
