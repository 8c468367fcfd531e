"""A model of a run as a folder of its own, which any program that reads safetensors can load.

The shared model of a kept round, or the model of one site: the shared one with the entries that the site keeps to
itself, or, in a run with `--keep-sites`, what the site sent.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Algorithm, select
from graftwork.federated.client import PrivateState
from graftwork.federated.errors import FederationError
from graftwork.federated.runs import RunFolder, write_text
from graftwork.merge import lineage
from graftwork.merge.artifact import parent_of, save_artifact
from graftwork.merge.checkpoint import Checkpoint, listed, load_torch, quoted
from graftwork.merge.errors import CheckpointError, OutputError, did_you_mean
from graftwork.merge.folder import output_config, side_files
from graftwork.merge.writer import check_output

if TYPE_CHECKING:
    from torch import Tensor

LAST, BEST = "last", "best"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: The folder, or the file.
        round: The round that the model is of.
        accuracy: How it was judged in that round; None if it was not.
        judged_on: On what.
        site: Whose model it is; None for the shared one.
        digest: Its content digest.
        notes: What a user should know.
    """

    path: Path
    round: int
    accuracy: float | None
    judged_on: str
    site: str | None
    digest: str
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "out": str(self.path),
            "round": self.round,
            "accuracy": self.accuracy,
            "judged_on": self.judged_on,
            "site": self.site,
            "digest": self.digest,
            "notes": list(self.notes),
        }


def export_model(
    folder: RunFolder, out: Path, *, round: str = LAST, site: str | None = None, force: bool = False
) -> Exported:
    """Write a model of a run.

    Args:
        folder: The run.
        out: The folder to write, or a file whose name ends in `.safetensors`.
        round: `last`, `best` (by accuracy on test data) or a number.
        site: The site whose own model is wanted.
        force: Replace a model in `out`.

    Raises:
        FederationError: The round is not kept, or there is no such model.
        OutputError: It cannot be written.
    """
    check_output(out, force=force, inputs=[folder.path])
    experiment = folder.experiment()
    algorithm = create(experiment.algorithm, experiment.settings)
    number = _round_number(folder, round)
    line = next((line for line in folder.metrics() if line.get("round") == number), {})
    is_final = folder.summary() is not None and round == LAST and site is None
    source = folder.path / "model.safetensors" if is_final else folder.round_folder(number) / "global.safetensors"
    if not source.is_file():
        source = folder.round_folder(number) / "global.safetensors"
    with Checkpoint.open(source, what=f"round {number} of the run") as checkpoint:
        model = load_torch(checkpoint)
        name = f"{folder.path.resolve().name}/{'final' if is_final else f'round-{number:04}'}"
        parents = [{**parent_of(checkpoint, name), "parents": folder.parents()}]
    notes: list[str] = []
    if site is None:
        _check_shared(folder, algorithm)
        accuracy, judged_on = line.get("accuracy"), _judged_on(folder)
    else:
        model |= _own_entries(folder, algorithm, number, site, notes)
        accuracy, judged_on = line.get("sites", {}).get(site, {}).get("accuracy"), f"the test data of {site}"
    if round == BEST:
        notes.append("the round was chosen by its accuracy on test data, so that figure is optimistic")
    exported = Exported(
        out, number, accuracy if isinstance(accuracy, float) else None, judged_on, site, "", tuple(notes)
    )
    return _write(folder, algorithm, exported, model, parents, experiment.init)


def _round_number(folder: RunFolder, wanted: str) -> int:
    """Return the number of the round that is meant, if it is kept."""
    kept = [number for number in folder.rounds() if number > 0]
    doing = f"cannot export round {wanted} of {folder.path}"
    if not kept:
        raise FederationError(f"{doing}: no round is kept; the run has not finished its first one")
    if wanted == LAST:
        return kept[-1]
    if wanted == BEST:
        judged = [
            (-float(line["accuracy"]), int(line["round"]))
            for line in folder.metrics()
            if isinstance(line.get("accuracy"), int | float)
        ]
        if not judged:
            raise FederationError(f"{doing}: no round was judged; say its number, or last")
        number = min(judged)[1]
    elif wanted.isascii() and wanted.isdigit():
        number = int(wanted)
    else:
        raise FederationError(f"{doing}: write best, last, or a number{did_you_mean(wanted, (BEST, LAST))}")
    if number not in kept:
        raise FederationError(
            f"{doing}: round {number} is not kept; {_numbers(kept)} {'is' if len(kept) == 1 else 'are'} "
            "(a run keeps its best round and the newest --keep-rounds)"
        )
    return number


def _numbers(rounds: list[int]) -> str:
    return ", ".join(map(str, rounds))


def _check_shared(folder: RunFolder, algorithm: Algorithm) -> None:
    """Refuse a shared model that is not meant to be used."""
    if algorithm.is_personal:
        sites = _private_sites(folder)
        raise FederationError(
            f"cannot export the shared model of {algorithm.name}: part of the model stays on each site, and the shared "
            f"part alone is of no use; name a site with --site"
            + (f": {listed(sites, 20)}" if sites else ", where their private state is")
        )


def _private_sites(folder: RunFolder) -> list[str]:
    try:
        return sorted(path.name for path in folder.private.iterdir() if path.is_dir())
    except OSError:
        return []


def _own_entries(
    folder: RunFolder, algorithm: Algorithm, number: int, site: str, notes: list[str]
) -> dict[str, Tensor]:
    """Return a site's own entries of the model at the end of a round."""
    sent = folder.round_folder(number) / "sites" / f"{site}.safetensors"
    names = {name for line in folder.metrics() for name in line.get("sites", {})} | set(_private_sites(folder))
    doing = f"cannot export the model of site {quoted(site)} in round {number}"
    if names and site not in names:
        raise FederationError(f"{doing}: there is no such site{did_you_mean(site, names)}; there are {listed(names)}")
    store = PrivateState(folder.private / site, folder.experiment().identity)
    private, stamp = store.load(number + 1)
    own = select(private, "model")
    kept = store.rounds()
    if own:
        if stamp < number:
            notes.append(f"the site's own entries are of round {stamp}: it took no part since")
        return own
    if sent.is_file():
        notes.append("this is what the site sent, before it was merged")
        with Checkpoint.open(sent, what=f"what site {site} sent") as checkpoint:
            return load_torch(checkpoint)
    if algorithm.is_personal and kept:
        raise FederationError(
            f"{doing}: its private entries are kept of {'round' if len(kept) == 1 else 'rounds'} "
            f"{_numbers(kept)} only; choose such a round, which the run keeps too: {_numbers(folder.rounds())}"
        )
    if algorithm.is_personal:
        raise FederationError(f"{doing}: nothing of it is in {folder.private}; only runs on one machine keep it there")
    raise FederationError(
        f"{doing}: with {algorithm.name} all sites share one model; leave out --site, or run with --keep-sites to keep "
        "what each one sends"
    )


def _judged_on(folder: RunFolder) -> str:
    target = folder.experiment().federation.target
    if target is not None:
        return f"the test data of {target}"
    return str((folder.summary() or {}).get("judged_on", "test data"))


def _write(
    folder: RunFolder,
    algorithm: Algorithm,
    exported: Exported,
    model: dict[str, Tensor],
    parents: list[dict[str, Any]],
    init: str | None,
) -> Exported:
    """Write the folder beside its place and rename it."""
    out, notes = exported.path, list(exported.notes)
    more: Any = {"round": str(exported.round), "run": folder.path.resolve().name, "judged_on": exported.judged_on}
    if exported.site is not None:
        more["site"] = exported.site
    if exported.accuracy is not None:
        more["accuracy"] = repr(exported.accuracy)
    is_file = out.suffix == ".safetensors"
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    file = out if is_file else partial / "model.safetensors"
    try:
        if not is_file:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        digest = save_artifact(
            file, model, kind="model", method=algorithm.name, settings=algorithm.settings.record(), parents=parents,
            force=is_file, **more,
        )  # fmt: skip
        if not is_file:
            _copy_sides(init, partial, model, notes)
            with Checkpoint.open(file) as written:
                tree = lineage.tree(written.metadata, out.name)
            write_text(partial / "README.md", _card(folder, algorithm, exported, tree, notes))
            _publish(partial, out)
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {error.strerror or error}; check the path and its permissions"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, exported.round, exported.accuracy, exported.judged_on, exported.site, digest, tuple(notes))


def _copy_sides(init: str | None, folder: Path, model: dict[str, Tensor], notes: list[str]) -> None:
    """Put the start model's `config.json` and what belongs to it beside the weights, if it was a model folder."""
    if init is None:
        return
    source = Path(init)
    if not source.exists():
        notes.append(f"the start model {init} is not there any more, so there is no config.json; run this where it is")
        return
    if not (source / "config.json").is_file():
        return
    dtypes = {str(value.dtype).removeprefix("torch.") for value in model.values() if value.is_floating_point()}
    try:
        text = (source / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {quoted(source / 'config.json')}: {error}") from None
    (folder / "config.json").write_text(
        output_config(text, dtype=dtypes.pop() if len(dtypes) == 1 else None, notes=notes), encoding="utf-8"
    )
    for name in side_files(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _publish(partial: Path, out: Path) -> None:
    if out.exists():
        aside = out.with_name(f".{out.name}.{os.getpid()}.replaced")
        os.rename(out, aside)
        try:
            os.rename(partial, out)
        except OSError:
            os.rename(aside, out)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(partial, out)


def _card(folder: RunFolder, algorithm: Algorithm, exported: Exported, tree: list[str], notes: list[str]) -> str:
    """Return the text of `README.md`."""
    from graftwork import __version__

    experiment, config = folder.experiment(), folder.config()
    sites = list(config.get("federation", {}).get("sites", {})) or list((folder.summary() or {}).get("sites", ()))
    title = f"[{algorithm.title}]({algorithm.reference})" if algorithm.reference else algorithm.title or algorithm.name
    whose = f"the model of site {exported.site}" if exported.site else "the shared model"
    rows = [
        ("run", folder.path.resolve().name),
        ("simulation", experiment.federation.name.split("/")[-1]),
        ("target", experiment.federation.target or "none"),
        ("sites", ", ".join(sites[:20]) + (f" and {len(sites) - 20} more" if len(sites) > 20 else "") or "unknown"),
        ("seed", str(experiment.seed)),
        ("aggregation", experiment.aggregate),
        ("round", f"{exported.round} of {folder.planned()}"),
        ("accuracy", "not measured" if exported.accuracy is None else f"{100 * exported.accuracy:.2f} %"),
        ("measured on", exported.judged_on),
    ]
    settings = [f"| {name} | {value} |" for name, value in algorithm.settings.record().items()]
    return "\n".join(
        [
            "---", "library_name: safetensors", "tags:", "- federated-learning", "- graftwork", "---", "",
            f"# {exported.path.name}", "",
            f"Trained by federated learning with graftwork {__version__} by {title} (`{algorithm.name}`): {whose}.", "",
            "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
            *(f"Note: {note}.\n" for note in notes),
            "## Lineage", "", "```", *tree, "```", "",
            "## Settings", "", "| | |", "|---|---|", *settings, "",
        ]
    )  # fmt: skip
