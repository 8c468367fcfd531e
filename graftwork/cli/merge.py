"""`graftwork merge RECIPE OUT`, with every flag of mergekit: honoured, accepted without effect, or refused."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graftwork.cli.output import aligned, duration, plural, print_json, size
from graftwork.cli.problems import readable_errors, tell, usage_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftwork.cli.progress import ByteProgress
    from graftwork.merge.recipe import RecipeFile
    from graftwork.merge.run import MergeResult, Start

Choice = Literal["error", "base", "skip"]

_NO_EFFECT = {
    "read-to-gpu": "tensors are read into memory and go to the device in pieces",
    "low-cpu-memory": "memory does not grow with the models",
    "multi-gpu": "one device is used",
    "gpu-rich": "one device is used",
    "lazy-unpickle": "pickles are always read piece by piece",
    "async-write": "writing always overlaps with computing",
    "write-threads": "every thread writes what it computes; see --threads",
    "clone-tensors": "inputs are never changed",
    "lora-merge-cache": "models with adapters are never written to disk",
    "lora-merge-dtype": "models with adapters are never written to disk",
    "trust-remote-code": "code in model folders is copied, never run",
    "safe-serialization": "safetensors is the only output format",
    "unsafe-truncate-embeddings": "embeddings are not truncated unless asked to",
}
"""mergekit's flags that are accepted and change nothing, with the reason."""

_REFUSED = {
    "no-safe-serialization": "the output is always safetensors",
    "unsafe-truncate-embeddings": (
        "it keeps only the first rows, whatever tokens they stand for; use `tokenizer: {source: base}` in the recipe"
    ),
}

_SHOWN_WARNINGS = 20
_SHOWN_NAMES = 4


def _mergekit(name: str) -> Any:
    return typer.Option(f"--{name}/--no-{name}", hidden=True)


def merge(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; - reads it from stdin.", allow_dash=True)],
    out: Annotated[
        Path | None, typer.Argument(help="Where the output goes: a folder, or a file that ends in .safetensors.")
    ] = None,
    out_path: Annotated[Path | None, typer.Option("--out-path", help="OUT, as an option.", hidden=True)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start anew instead of going on with an interrupted merge.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", "-j", "--num-threads", min=1, help="CPU threads. [default: all cores]")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")] = "cpu",
    cuda: Annotated[
        bool, typer.Option("--cuda/--no-cuda", help="The same as --device cuda.", show_default=False)
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", "--out-shard-size", help="Largest file of the output: 5GB, 500M, 2GiB.")
    ] = "5GB",
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", "--random-seed", min=0, help="Seed of random masks, unless the recipe has one. [default: 0]"
        ),
    ] = None,
    on_mismatch: Annotated[
        Choice, typer.Option("--on-mismatch", help="Tensors whose shapes differ: stop, take the base's, or leave out.")
    ] = "error",
    on_missing: Annotated[
        Choice, typer.Option("--on-missing", help="Tensors that a model lacks: stop, take the base's, or leave out.")
    ] = "error",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .pth, .bin and .ckpt files, as data only.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let NaN and infinities of inputs pass into the output.")
    ] = False,
    allow_config: Annotated[
        list[str] | None,
        typer.Option("--allow-config", metavar="KEY", help="Only warn if this key of config.json differs. Repeatable."),
    ] = None,
    allow_crimes: Annotated[
        bool,
        typer.Option(
            "--allow-crimes/--no-allow-crimes",
            help="Only warn if the models' architectures differ.",
            show_default=False,
        ),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings about the recipe as errors.")] = False,
    copy_tokenizer: Annotated[
        bool, typer.Option("--copy-tokenizer/--no-copy-tokenizer", help="Copy tokenizer files into the output.")
    ] = True,
    tie: Annotated[
        bool, typer.Option("--tie", help="Take the embedding for the head of a model that lacks one without saying so.")
    ] = False,
    keep_tied: Annotated[
        bool,
        typer.Option("--keep-tied", help="Let an adapter on a tied head or embedding change both, as PEFT does."),
    ] = False,
    rename: Annotated[
        list[str] | None,
        typer.Option("--rename", metavar="OLD=NEW", help="Part of an adapter's module names in its base. Repeatable."),
    ] = None,
    layers_key: Annotated[
        str | None,
        typer.Option("--layers-key", metavar="KEY", help="Key of config.json with the number of the sliced layers."),
    ] = None,
    write_model_card: Annotated[
        bool, typer.Option("--write-model-card/--no-write-model-card", help="Write README.md into the output.")
    ] = True,
    intermediate_dir: Annotated[
        Path | None,
        typer.Option("--intermediate-dir", "-I", help="Keep the outputs of a recipe's named documents in this folder."),
    ] = None,
    lazy: Annotated[
        bool, typer.Option("--lazy/--no-lazy", help="Use intermediate outputs that are already there.")
    ] = True,
    prepared: Annotated[
        Path | None,
        typer.Option(
            "--prepared",
            metavar="DIR",
            help="Where aligned models, statistics and masks are kept for later runs. [default: OUT.made]",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--transformers-cache",
            metavar="DIR",
            help="Cache of the hub's repositories. [default: HF_HUB_CACHE, or where the hub's own library has it]",
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing from the hub; use what is in its cache.")
    ] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Print the plan, and all warnings.", show_default=False)
    ] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet/--no-quiet", "-q", help="No progress and no summary.", show_default=False)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary, or the plan, as JSON.")] = False,
    read_to_gpu: Annotated[bool | None, _mergekit("read-to-gpu")] = None,
    low_cpu_memory: Annotated[bool | None, _mergekit("low-cpu-memory")] = None,
    multi_gpu: Annotated[bool | None, _mergekit("multi-gpu")] = None,
    gpu_rich: Annotated[bool | None, _mergekit("gpu-rich")] = None,
    lazy_unpickle: Annotated[bool | None, _mergekit("lazy-unpickle")] = None,
    async_write: Annotated[bool | None, _mergekit("async-write")] = None,
    write_threads: Annotated[int | None, typer.Option("--write-threads", hidden=True)] = None,
    clone_tensors: Annotated[bool | None, _mergekit("clone-tensors")] = None,
    lora_merge_cache: Annotated[str | None, typer.Option("--lora-merge-cache", hidden=True)] = None,
    lora_merge_dtype: Annotated[str | None, typer.Option("--lora-merge-dtype", hidden=True)] = None,
    trust_remote_code: Annotated[bool | None, _mergekit("trust-remote-code")] = None,
    unsafe_truncate_embeddings: Annotated[bool | None, _mergekit("unsafe-truncate-embeddings")] = None,
    safe_serialization: Annotated[bool | None, _mergekit("safe-serialization")] = None,
) -> None:
    """Merge checkpoints as RECIPE says and write OUT.

    An interrupted merge goes on where it stopped when the same command runs again. RECIPE may be a mergekit
    configuration, and mergekit's other flags are accepted too; each says so if it has no effect here.
    """
    _answer_mergekit(
        {
            "read-to-gpu": read_to_gpu, "low-cpu-memory": low_cpu_memory, "multi-gpu": multi_gpu, "gpu-rich": gpu_rich,
            "lazy-unpickle": lazy_unpickle, "async-write": async_write, "write-threads": write_threads,
            "clone-tensors": clone_tensors, "lora-merge-cache": lora_merge_cache, "lora-merge-dtype": lora_merge_dtype,
            "trust-remote-code": trust_remote_code,
            "unsafe-truncate-embeddings": unsafe_truncate_embeddings, "safe-serialization": safe_serialization,
        }
    )  # fmt: skip
    if out is not None and out_path is not None:
        raise usage_error("OUT is given twice, as an argument and as --out-path")
    target = out or out_path
    if target is None and not dry_run:
        raise usage_error("OUT is missing: where does the output go?")
    if cuda and device != "cpu":
        raise usage_error("--cuda and --device say two things; give one")
    if re.fullmatch(r"cpu|auto|cuda(:\d+)?", device) is None:
        raise usage_error(f'--device "{device}" is none of cpu, cuda, cuda:N, auto')
    with readable_errors():
        from graftwork.merge.folder import parse_size
        from graftwork.merge.plan import Options
        from graftwork.merge.run import Settings
        from graftwork.merge.run import merge as run_merge

        if quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the library's own, if it fetches
        file = _load(recipe)
        options = Options(
            on_mismatch=on_mismatch,
            on_missing=on_missing,
            allow_pickle=allow_pickle,
            allow_architectures=allow_crimes,
            allow_config=tuple(allow_config or ()),
            allow_nonfinite=allow_nonfinite,
            strict=strict,
            seed=seed,
            copy_tokenizer=copy_tokenizer,
            tie=tie,
            keep_tied=keep_tied,
            rename=tuple(_renaming(item) for item in rename or ()),
            layers_key=layers_key,
            cache=cache,
            offline=offline,
        )
        settings = Settings(
            threads=threads,
            device="cuda" if cuda else device,
            max_shard_bytes=parse_size(max_shard_size),
            force=force,
            restart=restart,
            write_card=write_model_card,
            intermediate=intermediate_dir,
            reuse=lazy,
            prepared=prepared,
        )
        if dry_run or target is None:
            from graftwork.cli.plan import print_plans

            print_plans(file, target, options, settings, as_json=as_json, everything=verbose > 0)
            return
        watcher = _Watcher(quiet, verbose > 0, settings.threads)
        try:
            result = run_merge(
                file, target, options=options, settings=settings, progress=watcher.start,
                tell=(lambda line: None) if quiet else tell,
            )  # fmt: skip
        finally:
            watcher.stop()
        _report(result, watcher, as_json=as_json, quiet=quiet, verbose=verbose > 0)


def _renaming(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not old or not equals:
        raise usage_error(f'--rename "{text}" is not OLD=NEW, such as --rename vit.layers=vit.encoder.layer')
    return old, new


def _answer_mergekit(given: dict[str, Any]) -> None:
    """Say of each of mergekit's flags that it has no effect, or refuse it."""
    for name, value in given.items():
        if value is None:
            continue
        flag = f"no-{name}" if value is False else name
        if flag in _REFUSED:
            raise usage_error(f"--{flag} is not supported: {_REFUSED[flag]}")
        tell(f"--{flag} has no effect here: {_NO_EFFECT[name]}")


def _load(recipe: Path) -> RecipeFile:
    from graftwork.merge.recipe import load_recipe, parse_recipe

    if str(recipe) != "-":
        return load_recipe(recipe)
    from graftwork.merge.errors import RecipeError

    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"stdin: is not UTF-8 text (byte {error.start})") from None
    return parse_recipe(text, source="stdin")


@dataclass(slots=True)
class _Watcher:
    """Tells what a run is about to do, and shows how far it is."""

    quiet: bool
    verbose: bool
    threads: int | None
    warnings: list[str] = field(default_factory=list)
    copied: int = 0
    _progress: ByteProgress | None = None

    def start(self, start: Start) -> Callable[[int], None]:
        """Print what there is to say about a plan; return what counts bytes."""
        from graftwork.cli.plan import plan_lines, plan_record
        from graftwork.cli.progress import ByteProgress

        self.stop()
        record = plan_record(start.plan, self.threads)
        self.copied = record["tensors"]["copied"]
        if self.verbose:
            for line in plan_lines({**record, "warnings": []}, everything=True):
                tell(line)
        shown = record["warnings"] if self.verbose else record["warnings"][:_SHOWN_WARNINGS]
        for warning in shown:
            tell(f"warning: {warning}")
        if len(shown) < len(record["warnings"]):
            tell(f"warning: and {len(record['warnings']) - len(shown)} more; --verbose shows all")
        self.warnings += record["warnings"]
        if start.tensors_done and not self.quiet:
            tell(f"resuming: {start.tensors_done} of {plural(len(start.plan.steps), 'tensor')} are done")
        self._progress = ByteProgress(start.size, shown=not self.quiet, share=start.share)
        self._progress.__enter__()
        self._progress.skip(start.size_done)
        return self._progress.advance

    def stop(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


def _report(result: MergeResult, watcher: _Watcher, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print what was done: one summary on stdout, remarks on stderr."""
    plan = result.plan
    shown = result.notes if verbose else result.notes[:_SHOWN_NAMES]
    for note in shown:
        tell(f"note: {note}")
    if len(shown) < len(result.notes):
        tell(f"note: and {len(result.notes) - len(shown)} more; --verbose shows all")
    passed = plan.bytes_read + plan.bytes_written
    speed = passed / max(result.seconds, 1e-9)
    merged = len(plan.steps) - watcher.copied
    if as_json:
        print_json(
            {
                "out": str(result.out),
                "method": plan.method_name,
                "tensors": {"merged": merged, "copied": watcher.copied, "resumed": result.resumed},
                "parameters": plan.elements,
                "digest": result.digest,
                "bytes_read": plan.bytes_read,
                "bytes_written": plan.bytes_written,
                "seconds": round(result.seconds, 3),
                "megabytes_per_second": round(speed / 1e6, 1),
                "warnings": watcher.warnings,
                "notes": result.notes,
                "evaluations": [item.record() for item in result.evaluations],
            }
        )
        return
    if quiet:
        return
    resumed = f", {result.resumed:,} of them by an earlier run" if result.resumed else ""
    rows = [
        ["output", str(result.out)],
        ["method", plan.method_name],
        ["tensors", f"{merged:,} merged, {watcher.copied:,} copied{resumed}"],
        ["parameters", f"{plan.elements:,}"],
        ["digest", result.digest],
        ["time", f"{duration(result.seconds)}, {size(speed)}/s"],
    ]
    for item in result.evaluations:
        accuracy = "no accuracy" if item.accuracy is None else f"accuracy {100 * item.accuracy:.2f} %"
        rows.append([item.task, f"{accuracy}, loss {item.loss:.4g} on {plural(item.examples, 'example')}"])
    for line in aligned(rows):
        print(line)
