"""The one protocol by which a user hands over a model and data.

Whatever needs more than weights (evaluation, barriers, data-driven methods, federated clients) asks for a `Task`.
A user writes one in a file of their own and names it `file.py:name`:

    from graftwork.merge.task import Task

    def test():
        for start in range(0, len(images), 256):
            yield images[start : start + 256], labels[start : start + 256]

    digits = Task("digits", model=Network, batches=train, test=test)

A function that returns a task may take arguments: `file.py:name,size=3`. `hf:…` is a ready-made one, see
`graftwork.merge.ready_tasks`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from graftwork.merge.checkpoint import Checkpoint, listed, load_torch, quoted
from graftwork.merge.errors import GraftworkError, TaskError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batches = Callable[[], Iterable[tuple[Any, Any]]]
    """Called without arguments; gives (inputs, labels or None) in the same order at each call."""

READY = "hf"
"""What stands in the place of a file for a ready-made task."""
_READY_MODULE = "graftwork.merge.ready_tasks"

SHOWN_NAMES = 5
"""How many tensors a message about a checkpoint that does not fit names."""


@dataclass(frozen=True, slots=True)
class Task:
    """A model and the data on which it is judged or measured.

    Args:
        name: Its name in tables and files.
        model: Returns a fresh module whose state dict has the checkpoint's names.
        batches: Training data: an iterable of (inputs, labels or None), in the same order at each call.
        validation: Data on which parameters may be chosen.
        test: Data that only judges.
        unlabelled: Inputs without labels, for methods that adapt to a task's inputs.
        logits: `logits(module, inputs)`; by default `module(inputs)`.
        loss: `loss(logits, labels)`, the mean over a batch; by default cross-entropy.
        head: Name of the submodule whose input is the embedding.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: Batches
    validation: Batches | None = None
    test: Batches | None = None
    unlabelled: Batches | None = None
    logits: Callable[[nn.Module, Any], Tensor] | None = None
    loss: Callable[[Tensor, Any], Tensor] | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        """Refuse what could only fail later, far from the user's file."""
        if not isinstance(self.name, str) or not self.name:
            raise TaskError(f"cannot make a task: its name is {self.name!r}, not a text")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name" or (value is None and field.name not in {"model", "batches"}):
                continue
            if field.name == "head":
                if not isinstance(value, str):
                    raise TaskError(f'cannot make task "{self.name}": head is {_kind(value)}, not a submodule\'s name')
            elif not callable(value):
                hint = "; wrap it: `lambda: …`" if field.name in {"model", "batches", "validation", "test"} else ""
                raise TaskError(f'cannot make task "{self.name}": {field.name} is {_kind(value)}, not a function{hint}')


# ---------------------------------------------------------------------------------------------------------------------
# Finding what a user names


def load_task(spec: str, *, checkpoint: Path | str | None = None) -> Task:
    """Return the task that `file.py:name` or `package.module:name` names.

    The name is that of a `Task`, or of a function that returns one. Arguments of the function follow its name, as in
    `file.py:name,size=3,data=images.npz`; they become what the function's annotations or defaults say (int, float,
    bool, Path), else they are texts. `hf:KIND` is a function of `graftwork.merge.ready_tasks`.

    Args:
        spec: What names the task.
        checkpoint: The checkpoint at hand. A function that has an argument `checkpoint` gets it, unless the spec says
            another one.

    Raises:
        TaskError: There is no such file, module or name; arguments do not fit; the user's code fails; or what it gives
            is no task.
    """
    place, arguments = split_spec(spec)
    found = load_object(place)
    if not isinstance(found, Task) and callable(found):
        if checkpoint is not None and "checkpoint" in _parameters(found):
            arguments = {"checkpoint": str(checkpoint), **arguments}
        found = _call(spec, found, **_converted(spec, found, arguments))
    elif arguments:
        raise TaskError(f"cannot load task {quoted(spec)}: {quoted(place)} is {_kind(found)} and takes no arguments")
    if not isinstance(found, Task):
        raise TaskError(
            f"cannot load task {quoted(spec)}: it is {_kind(found)}, not a Task or a function that returns one"
        )
    return found


_ARGUMENT = re.compile(r",(?=[A-Za-z_]\w*=)")


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Return what names the task, and the arguments that follow it.

    Raises:
        TaskError: An argument is given twice.
    """
    place, *pairs = _ARGUMENT.split(spec)
    arguments: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key in arguments:
            raise TaskError(f"cannot load task {quoted(spec)}: {key} is given twice")
        arguments[key] = value
    return place, arguments


def files_of(spec: str) -> list[Path]:
    """Return the files and folders that a spec names: the Python file, and arguments that are paths of something."""
    place, arguments = split_spec(spec)
    named = [place, place.rpartition(":")[0], *arguments.values()]
    return [path for name in named if name and (path := Path(name).expanduser()).exists()]


def _converted(spec: str, function: Callable[..., Any], arguments: Mapping[str, str]) -> dict[str, Any]:
    """Return arguments as values of the types that the function wants."""
    parameters = _parameters(function)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    values: dict[str, Any] = {}
    for key, text in arguments.items():
        parameter = parameters.get(key)
        if parameter is None and not takes_any:
            hint = did_you_mean(key, parameters) or f"; it has {listed(list(parameters), 12) or 'none'}"
            raise TaskError(f"cannot load task {quoted(spec)}: there is no argument {quoted(key)}{hint}")
        wanted = _types(parameter)
        try:
            values[key] = _value(text, wanted)
        except ValueError:
            kinds = " or ".join(_SPOKEN[kind] for kind in wanted if kind in _SPOKEN)
            raise TaskError(f"cannot load task {quoted(spec)}: {key} is {quoted(text)}, not {kinds}") from None
    return values


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SPOKEN: Mapping[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}


def _value(text: str, wanted: Sequence[Any]) -> Any:
    if bool in wanted:
        if text.lower() not in _TRUTH:
            raise ValueError
        return _TRUTH[text.lower()]
    if str in wanted:
        return text
    for kind in (int, float, Path):
        if kind in wanted:
            return kind(text)
    return text


def _types(parameter: inspect.Parameter | None) -> tuple[Any, ...]:
    """Return the types that an argument may have, by its annotation or else its default."""
    if parameter is None:
        return (str,)
    if parameter.annotation is parameter.empty:
        return (type(parameter.default),)
    return typing.get_args(parameter.annotation) or (parameter.annotation,)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function, eval_str=True).parameters
    except (ValueError, TypeError, NameError):
        pass
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):
        return {}


def load_federation(spec: str) -> Mapping[str, Task] | Callable[[str], Task]:
    """Return the tasks of all sites that `file.py:name` names: `{site: Task}`, or a function from site to task.

    The name is that of such a mapping, of a function of one argument (the site), or of a function without arguments
    that returns either.

    Raises:
        TaskError: As `load_task`.
    """
    found = load_object(spec)
    if callable(found) and not _needed(found):
        found = _call(spec, found)
    if isinstance(found, Mapping):
        return _checked_sites(spec, found)
    if callable(found) and not isinstance(found, Task) and len(_needed(found)) == 1:
        site_task = found

        def task_of(site: str) -> Task:
            task = _call(spec, site_task, site)
            if not isinstance(task, Task):
                raise TaskError(f"cannot load site {quoted(site)} of {quoted(spec)}: it is {_kind(task)}, not a Task")
            return task

        return task_of
    raise TaskError(
        f"cannot load sites {quoted(spec)}: it is {_kind(found)}, not a mapping from site to Task "
        "or a function that takes a site"
    )


def load_object(spec: str) -> Any:
    """Return the object that `file.py:name` or `package.module:name` names, whatever it is.

    A file's folder is searched for its imports *after* everything that is installed, so that a `random.py` beside it
    hides nothing; the working directory likewise for modules.

    Raises:
        TaskError: There is no such file, module or name, or the user's code fails when it is loaded.
    """
    place, separator, name = spec.rpartition(":")
    if place == READY:
        place, name = _READY_MODULE, name.replace("-", "_")
    if not separator or not place or not name:
        raise TaskError(f"cannot load {quoted(spec)}: write file.py:name or package.module:name")
    is_file = place.endswith(".py") or "/" in place or os.sep in place
    module = _module_from_file(spec, Path(place)) if is_file else _module_by_name(spec, place)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            if spec.startswith(f"{READY}:"):
                kinds = [kind.replace("_", "-") for kind in module.__all__]
                hint = did_you_mean(name.replace("_", "-"), kinds) or f"; there are {', '.join(kinds)}"
                raise TaskError(f"cannot load {quoted(spec)}: there is no such ready-made task{hint}") from None
            known = [known for known in vars(module) if not known.startswith("_")]
            raise TaskError(
                f"cannot load {quoted(spec)}: {quoted(place)} has no {quoted(part)}{did_you_mean(part, known)}"
            ) from None
    return found


def _module_from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        if path.is_dir():
            raise TaskError(f"cannot load {quoted(spec)}: {quoted(path)} is a folder; name a file in it")
        near = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise TaskError(f"cannot load {quoted(spec)}: there is no file {quoted(path)}{did_you_mean(path.name, near)}")
    path = path.resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(f"cannot load {quoted(spec)}: {quoted(path)}: {error.strerror}") from None
    # Named after its content as well as its path: one file that is named twice is run once, an edited one again.
    digest = hashlib.sha256(os.fsencode(path) + b"\0" + content).hexdigest()[:16]
    module_name = f"graftwork_user_{path.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    _search_last(path.parent)
    specification = importlib.util.spec_from_file_location(module_name, path)
    if specification is None or specification.loader is None:
        raise TaskError(f"cannot load {quoted(spec)}: {quoted(path)} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = module
    try:
        specification.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        raise_user_failure(error, f"cannot load {quoted(spec)}", path)
    return module


def _module_by_name(spec: str, name: str) -> ModuleType:
    _search_last(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            file = Path(*name.split(".")).with_suffix(".py")
            hint = f"; there is a file: {file}:{spec.rpartition(':')[2]}" if file.is_file() else ""
            raise TaskError(f"cannot load {quoted(spec)}: there is no module {quoted(error.name)}{hint}") from None
        raise_user_failure(error, f"cannot load {quoted(spec)}")
    except (ValueError, TypeError) as error:  # "..name" and the like
        raise TaskError(f"cannot load {quoted(spec)}: {quoted(name)} is no module's name ({error})") from None
    except BaseException as error:
        raise_user_failure(error, f"cannot load {quoted(spec)}")


_USER_FOLDERS: list[str] = []


def _search_last(folder: Path) -> None:
    """Let imports find the modules of `folder`, after everything installed but before other users' folders.

    Two tasks in two folders may each have a `models.py` beside them; the second must not get the first one's.
    """
    own = str(folder)
    if own in sys.path and own not in _USER_FOLDERS:
        return
    others = [other for other in _USER_FOLDERS if other != own]
    sys.path[:] = [entry for entry in sys.path if entry not in _USER_FOLDERS] + [own, *others]
    _USER_FOLDERS[:] = [own, *others]
    importlib.invalidate_caches()
    siblings = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/__init__.py")}
    hidden = {name for name in siblings if _home(sys.modules.get(name)) in others}
    for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
        del sys.modules[name]


def _home(module: ModuleType | None) -> str | None:
    """Return the folder on the search path in which a top-level module was found."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    return str(Path(file).parent.parent if Path(file).name == "__init__.py" else Path(file).parent)


def _needed(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without which `function` cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _call(spec: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    needed = [name for name in _needed(function)[len(arguments) :] if name not in named]
    if needed:
        raise TaskError(
            f"cannot load {quoted(spec)}: it needs arguments ({', '.join(needed)}); give them defaults, or "
            f"values after its name, as in {spec},{needed[0]}=…"
        )
    try:
        return function(*arguments, **named)
    except BaseException as error:
        raise_user_failure(error, f"cannot load {quoted(spec)}")


def _checked_sites(spec: str, sites: Mapping[Any, Any]) -> Mapping[str, Task]:
    if not sites:
        raise TaskError(f"cannot load sites {quoted(spec)}: there are none")
    problems = [
        f"cannot load sites {quoted(spec)}: {_kind(site)} {site!r} names a site, not a text"
        for site in sites
        if not isinstance(site, str)
    ]
    problems += [
        f"cannot load sites {quoted(spec)}: site {quoted(site)} is {_kind(task)}, not a Task"
        for site, task in sites.items()
        if not isinstance(task, Task)
    ]
    if problems:
        raise TaskError(*problems)
    return cast("Mapping[str, Task]", sites)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    if isinstance(value, type):
        return f"the class {name}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


# ---------------------------------------------------------------------------------------------------------------------
# Failures of the user's own code


def user_failure(error: BaseException, file: Path | None = None) -> str:
    """Return one line on an exception in a user's code: file and line, its type, and the first line of its text.

    Args:
        error: What was raised.
        file: The user's file; the innermost line in its folder is named. By default the innermost line that is neither
            ours nor in an installed package.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    if file is not None:
        own = [frame for frame in frames if Path(frame.filename).is_relative_to(file.parent)]
    else:
        ours = str(Path(__file__).parents[1])
        own = [
            frame
            for frame in frames
            if not frame.filename.startswith((ours, "<")) and "site-packages" not in frame.filename
        ]
    place = own[-1] if own else frames[-1] if frames else None
    where = f"{place.filename}:{place.lineno}: " if place else ""
    text = str(error).strip().split("\n", maxsplit=1)[0]
    return f"{where}{type(error).__name__}{': ' if text else ''}{text}"


def raise_user_failure(error: BaseException, doing: str, file: Path | None = None) -> NoReturn:
    """Raise a failure of the user's code as a TaskError; an interrupt and our own errors pass."""
    if isinstance(error, GraftworkError) or not isinstance(error, Exception | SystemExit):
        raise error
    raise TaskError(f"{doing}: {user_failure(error, file)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# A task's model with a checkpoint's values


def fit(task: Task, checkpoint: Checkpoint | Mapping[str, Tensor], *, name: str | None = None) -> nn.Module:
    """Return a fresh module of the task with the checkpoint's values, cast to the module's own dtypes.

    Args:
        task: Whose model.
        checkpoint: An open checkpoint, or a state dict.
        name: What messages call the checkpoint; by default its path.

    Raises:
        TaskError: Names or shapes differ; the message has the first of each kind.
    """
    from torch import nn

    if name is None:
        name = str(checkpoint.path) if isinstance(checkpoint, Checkpoint) else "the checkpoint"
    doing = f"cannot load {quoted(name)} into the model of task {quoted(task.name)}"
    try:
        module = task.model()
    except BaseException as error:
        raise_user_failure(error, f"cannot make the model of task {quoted(task.name)}")
    if not isinstance(module, nn.Module):
        raise TaskError(f"cannot use task {quoted(task.name)}: model() returns {_kind(module)}, not a torch.nn.Module")
    wanted: dict[str, Tensor] = module.state_dict()
    shapes = (
        {key: entry.shape for key, entry in checkpoint.tensors.items()}
        if isinstance(checkpoint, Checkpoint)
        else {key: tuple(tensor.shape) for key, tensor in checkpoint.items()}
    )
    # Shapes are known from the header: a checkpoint that does not fit is refused before its values are read.
    problems = _misfits(wanted, shapes)
    if problems:
        raise TaskError(*(f"{doing}: {problem}" for problem in problems), f"see its tensors: graftwork inspect {name}")
    tensors = load_torch(checkpoint) if isinstance(checkpoint, Checkpoint) else checkpoint
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not (wanted[key].is_floating_point() or wanted[key].is_complex()):
            raise TaskError(
                f"{doing}: {quoted(key)} is {tensor.dtype} in the checkpoint, {wanted[key].dtype} in the model"
            )
    try:
        module.load_state_dict(dict(tensors), strict=False)
    except Exception as error:
        raise TaskError(f"{doing}: {user_failure(error)}") from error
    return module


def _misfits(wanted: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return what differs between a module's tensors and a checkpoint's, one line per kind of difference."""
    # A file holds tied tensors once; the others get their values through the shared storage.
    storage = {key: (tensor.data_ptr(), tuple(tensor.shape)) for key, tensor in wanted.items()}
    present = {storage[key] for key in wanted if key in shapes and wanted[key].numel()}
    missing = [key for key in wanted if key not in shapes and storage[key] not in present]
    unexpected = [key for key in shapes if key not in wanted]
    problems = []
    if missing:
        problems.append(f"{_count(missing, 'is', 'are')} missing from the checkpoint: {listed(missing, SHOWN_NAMES)}")
    if unexpected:
        problems.append(f"{_count(unexpected, 'is', 'are')} not in the model: {listed(unexpected, SHOWN_NAMES)}")
    differing = [key for key in wanted if key in shapes and tuple(shapes[key]) != tuple(wanted[key].shape)]
    if differing:
        some = ", ".join(
            f"{quoted(key)} {tuple(shapes[key])} in the checkpoint, {tuple(wanted[key].shape)} in the model"
            for key in differing[:SHOWN_NAMES]
        )
        more = f" and {len(differing) - SHOWN_NAMES} more" if len(differing) > SHOWN_NAMES else ""
        problems.append(f"{_count(differing, 'has', 'have')} another shape: {some}{more}")
    prefix = _prefix_between(list(wanted), list(shapes))
    if prefix and unexpected:
        longer, shorter = ("checkpoint", "model") if prefix[0] else ("model", "checkpoint")
        problems.append(
            f"the names in the {longer} have {quoted(prefix[0] or prefix[1])} in front of those in the {shorter}; "
            "save the inner module's state dict, or let the task's model have the same structure"
        )
    return problems


def _prefix_between(wanted: list[str], found: list[str]) -> tuple[str, str] | None:
    """Return (what the checkpoint has in front, what the model has in front) if most names differ by that alone."""
    for longer, shorter, in_checkpoint in ((found, wanted, True), (wanted, found, False)):
        if not shorter:
            continue
        for name in longer:
            if name.endswith("." + shorter[0]):
                prefix = name[: -len(shorter[0])]
                known = set(longer)
                if 2 * sum(prefix + key in known for key in shorter) > len(shorter):
                    return (prefix, "") if in_checkpoint else ("", prefix)
    return None


def _count(names: Sequence[str], one: str, many: str) -> str:
    return f"1 tensor {one}" if len(names) == 1 else f"{len(names)} tensors {many}"
