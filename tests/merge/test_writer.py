"""What an output looks like on disk, and how it comes into its place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from graftwork.merge import checkpoint as checkpoint_module
from graftwork.merge import run as run_module
from graftwork.merge import writer as writer_module
from graftwork.merge.checkpoint import Checkpoint, load_torch
from graftwork.merge.errors import CheckpointError, DataError, OutputError
from graftwork.merge.recipe import parse_recipe
from graftwork.merge.run import Interrupted, Settings, merge
from graftwork.merge.writer import CheckpointWriter, OutputTensor

RECIPE = "{merge_method: linear, models: [{model: L}, {model: R}], parameters: {weight: 1}}"
OTHER = "{merge_method: linear, models: [{model: L}, {model: R}], parameters: {weight: [1]}, exclude: [a]}"


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    made = {f"layers.{n}.w": torch.randn(64, 33, generator=generator).to(torch.bfloat16) for n in range(8)}
    made |= {"a": torch.randn(5, generator=generator), "n": torch.arange(3), "empty": torch.zeros(0, 4)}
    return made


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with two models."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("LR"):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(tensors(seed), tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "toy", "torch_dtype": "bfloat16"}')
    return tmp_path


def run(out="out", text=RECIPE, **settings):
    options = {name: settings.pop(name) for name in ("force", "threads") if name in settings}
    return merge(parse_recipe(text), out, settings=Settings(**settings), **{"threads": 1, **options})


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def weights(folder):
    return {name: data for name, data in tree(folder).items() if name.endswith((".safetensors", ".index.json"))}


def header_of(path):
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def expected():
    left, right = tensors(0), tensors(1)
    return {
        name: ((left[name].double() + right[name].double()) / 2).to(left[name].dtype) if name != "n" else left[name]
        for name in left
    }


def assert_is_the_merge(place):
    with Checkpoint.open(place) as found:
        values = load_torch(found)
    wanted = expected()
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        assert values[name].dtype == value.dtype
        assert values[name].shape == value.shape
        assert torch.allclose(values[name].double(), value.double(), rtol=2**-8, atol=1e-7)


def nothing_else(folder, *names):
    assert {path.name for path in Path(folder).iterdir()} == {"L", "R", *names}


# ---------------------------------------------------------------- files


def test_one_small_output_is_one_file(here):
    run()
    nothing_else(here, "out")
    assert set(tree("out")) == {"model.safetensors", "config.json", "graftwork_recipe.yml", "README.md"}
    assert_is_the_merge("out")
    assert_is_the_merge("out/model.safetensors")


def test_safetensors_itself_reads_the_output(here):
    run(max_shard_bytes=10_000)
    for path in Path("out").glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            for name in file.keys():  # noqa: SIM118
                assert torch.equal(file.get_tensor(name), load_torch(Checkpoint.open("out"))[name])


@pytest.mark.parametrize(("largest", "count"), [(10_000, 4), (4224, 9), (1, 11), (20_000, 2)])
def test_shards_hold_no_more_than_was_asked_for(here, largest, count):
    run(max_shard_bytes=largest)
    files = sorted(Path("out").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    held, total = {}, 0
    for path in files:
        header, start = header_of(path)
        assert header.pop("__metadata__")["format"] == "pt"
        assert start % 64 == 0
        size = path.stat().st_size - start
        assert size <= largest or len(header) == 1
        assert size == sum(end - begin for begin, end in (entry["data_offsets"] for entry in header.values()))
        total += size
        held |= dict.fromkeys(header, path.name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == total
    assert set(held) == set(tensors(0))
    assert_is_the_merge("out")


def test_a_single_file_can_be_the_output(here):
    run("out.safetensors", max_shard_bytes=1)
    nothing_else(here, "out.safetensors")
    assert_is_the_merge("out.safetensors")
    assert header_of("out.safetensors")[0]["__metadata__"]["format"] == "pt"


def test_missing_parent_folders_are_made(here):
    run("deep/er/out")
    assert_is_the_merge("deep/er/out")


def test_the_digest_is_of_the_contents_and_not_of_the_files(here):
    digests = {run("one").digest, run("two", max_shard_bytes=5000).digest, run("three.safetensors").digest}
    assert len(digests) == 1
    for place in ("one", "two", "three.safetensors"):
        with Checkpoint.open(place) as found:
            assert {found.content_digest()} == digests
            assert found.metadata["graftwork.digest"] in digests


@pytest.mark.parametrize("largest", [5_000_000_000, 6000])
def test_equal_runs_give_equal_files_whatever_the_threads_are(here, largest):
    run("one", max_shard_bytes=largest)
    for threads in (1, 2, 8):
        run("again", max_shard_bytes=largest, threads=threads, force=True)
        assert weights("again") == weights("one")
        assert tree("again").keys() == tree("one").keys()


def test_parents_are_named_with_the_digest_of_all_they_hold(here):
    run()
    header, _ = header_of("out/model.safetensors")
    parents = json.loads(header["__metadata__"]["graftwork.parents"])
    assert [parent["name"] for parent in parents] == ["L", "R"]
    for parent in parents:
        with Checkpoint.open(parent["name"]) as found:
            assert parent["digest"] == found.content_digest()


# ---------------------------------------------------------------- the place


def test_an_output_that_exists_is_not_touched(here):
    run()
    before = tree("out")
    with pytest.raises(OutputError, match="--force"):
        run(text=OTHER)
    assert tree("out") == before
    nothing_else(here, "out")


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_an_output_in_one_go(here, monkeypatch, exchange):
    monkeypatch.setattr(writer_module, "USE_EXCHANGE", exchange and writer_module.USE_EXCHANGE)
    run(text=OTHER, max_shard_bytes=1000)
    Path("out/notes.txt").write_text("old")
    run(force=True)
    nothing_else(here, "out")
    assert set(tree("out")) == {"model.safetensors", "config.json", "graftwork_recipe.yml", "README.md"}
    assert_is_the_merge("out")


def test_force_replaces_a_single_file(here):
    Path("out.safetensors").write_bytes(b"old")
    run("out.safetensors", force=True)
    assert_is_the_merge("out.safetensors")
    nothing_else(here, "out.safetensors")


def test_force_does_not_replace_what_is_no_model(here):
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds no model"):
        run(force=True)
    assert tree("out") == {"thesis.tex": b"years of work"}
    Path("file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        run("file", force=True)
    Path("link").symlink_to("L")
    with pytest.raises(OutputError):
        run("link", force=True)
    assert Path("link").is_symlink()


@pytest.mark.parametrize("out", ["L", "L/out", "./L/../L", "L/model.safetensors"])
def test_an_input_is_never_written_to(here, out):
    before = tree(".")
    with pytest.raises(OutputError, match="input"):
        run(out, force=True)
    assert tree(".") == before


@pytest.mark.parametrize("out", [".", "..", "L/..", "/"])
def test_an_output_needs_a_name(here, out):
    before = tree(".")
    with pytest.raises(OutputError) as caught:
        run(out, force=True)
    assert len(caught.value.problems) == 1
    assert tree(".") == before


def killed(event, about, *arguments, **settings):
    """Run a merge in a process that dies when it is about to do something."""
    process = os.fork()
    if process == 0:

        def watch(name, values):
            if name == event and any(about in str(value) for value in values):
                os._exit(9)

        sys.addaudithook(watch)
        try:
            run(*arguments, **settings)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def test_an_output_put_aside_by_a_crash_is_put_back(here, monkeypatch):
    """The fallback for systems that cannot exchange two folders moves the old output aside for a moment."""
    monkeypatch.setattr(writer_module, "USE_EXCHANGE", False)
    run(text=OTHER)
    before = tree("out")
    killed("os.rename", "out.partial", force=True)
    nothing_else(here, "out.partial", "out.replaced")
    with pytest.raises(OutputError, match="--force"):
        run()
    assert tree("out") == before
    run(force=True)
    assert_is_the_merge("out")
    nothing_else(here, "out")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("text", [RECIPE, OTHER])
def test_what_was_replaced_is_removed_by_the_next_run(here, monkeypatch, exchange, text):
    monkeypatch.setattr(writer_module, "USE_EXCHANGE", exchange and writer_module.USE_EXCHANGE)
    run(text=OTHER)
    killed("shutil.rmtree", "out.", force=True)
    nothing_else(here, "out", "out.partial" if exchange else "out.replaced")
    assert_is_the_merge("out")
    run(text=text, force=True)
    nothing_else(here, "out")
    assert not Path("out", writer_module.JOURNAL).exists()


PRECIOUS = {"journal.jsonl": b"my experiments", "config.json": b"{}", "model.safetensors": b"x"}


def precious(folder):
    Path(folder).mkdir()
    for name, data in PRECIOUS.items():
        (Path(folder) / name).write_bytes(data)


@pytest.mark.parametrize("exchange", [True, False])
def test_folders_that_only_have_the_names_of_ours_stay(here, monkeypatch, exchange):
    monkeypatch.setattr(writer_module, "USE_EXCHANGE", exchange and writer_module.USE_EXCHANGE)
    for name in ("out", "out.partial", "out.replaced"):
        precious(name)
    before = tree(".")
    writer_module.check_output(Path("out"), force=True)
    for settings in ({}, {"force": True}, {"force": True, "restart": True}):
        with pytest.raises(OutputError):
            run(**settings)
        assert tree(".") == before
    shutil.rmtree("out.partial")
    shutil.rmtree("out")
    run()
    assert_is_the_merge("out")
    assert tree("out.replaced") == PRECIOUS


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_comes_into_the_place_of_the_output_during_the_run_is_not_replaced(
    here, monkeypatch, exchange, locks, out
):
    monkeypatch.setattr(writer_module, "USE_EXCHANGE", exchange and writer_module.USE_EXCHANGE)
    monkeypatch.setattr(writer_module, "USE_LOCKS", locks)
    place = Path(out)

    def appear(*_):
        if place.suffix:
            place.write_bytes(b"mine")
        else:
            place.mkdir()
        return lambda size: None

    for moment in ("early", "late"):
        with monkeypatch.context() as patch:
            if moment == "late":
                patch.setattr(CheckpointWriter, "_check_place", appear)
            with pytest.raises(OutputError, match="move it away") as caught:
                merge(parse_recipe(RECIPE), out, threads=1, progress=appear if moment == "early" else None)
        assert f"11 of 11 tensors are finished in {out}.partial" in str(caught.value)
        assert len(caught.value.problems) == 1
        if place.suffix:
            assert place.read_bytes() == b"mine"
            place.unlink()
        else:
            place.rmdir()
    assert run(out).resumed == len(tensors(0))
    assert_is_the_merge(out)
    nothing_else(here, out)


def test_even_force_does_not_replace_what_is_no_model_and_came_during_the_run(here):
    def appear(*_):
        Path("out").mkdir()
        Path("out/thesis.tex").write_text("years of work")
        return lambda size: None

    with pytest.raises(OutputError, match="holds no model"):
        merge(parse_recipe(RECIPE), "out", force=True, threads=1, progress=appear)
    assert tree("out") == {"thesis.tex": b"years of work"}


def test_a_folder_that_may_not_be_written_to_is_refused_in_one_line(here):
    Path("locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(OutputError) as caught:
        run("locked/out")
    assert len(caught.value.problems) == 1


def test_a_file_as_parent_is_refused_in_one_line(here):
    Path("file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        run("file/out")


# ---------------------------------------------------------------- unfinished outputs


def unfinished(text=RECIPE, largest=5_000_000_000):
    """Leave an unfinished output: everything written and in the journal, nothing published."""
    from graftwork.merge import lineage
    from graftwork.merge.engine import Engine
    from graftwork.merge.plan import make_plan
    from graftwork.merge.run import _metadata, _stamps

    plan = make_plan(parse_recipe(text).recipes[0])
    digest = plan.digest()
    writer = CheckpointWriter(
        Path("out"), plan.outputs, _metadata(plan, digest, {}, lineage.EMPTY_DIGEST), plan_digest=digest,
        max_shard_bytes=largest, stamps=_stamps(plan),
    )  # fmt: skip
    Engine(plan.checkpoints, writer, plan.labels).run(plan.steps)
    writer.close()
    plan.close()


def test_an_unfinished_output_is_gone_on_with(here):
    run("whole")
    unfinished()
    assert not Path("out").exists()
    result = run()
    assert result.resumed == len(tensors(0))
    assert weights("out") == weights("whole")


def test_an_unfinished_output_of_something_else_is_not_mixed_in(here):
    unfinished()
    with pytest.raises(OutputError, match="--restart"):
        run(text=OTHER)
    assert Path("out.partial").exists()
    assert run(restart=True).resumed == 0
    assert_is_the_merge("out")
    nothing_else(here, "out")


def test_an_input_that_changed_in_between_is_noticed(here):
    unfinished()
    changed = tensors(0)
    changed["a"][0] += 1
    safetensors.torch.save_file(changed, "L/model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="other inputs"):
        run()


@pytest.mark.parametrize(("before", "after"), [(6000, 5_000_000_000), (5_000_000_000, 6000), (6000, 12_000)])
def test_other_shards_on_the_second_try_leave_no_files_of_the_first(here, before, after):
    run("whole", max_shard_bytes=after)
    unfinished(largest=before)
    run(max_shard_bytes=after)
    assert set(tree("out")) == set(tree("whole"))
    assert weights("out") == weights("whole")


def test_a_folder_of_someone_else_is_not_taken_for_an_unfinished_output(here):
    Path("out.partial").mkdir()
    Path("out.partial/letter.txt").write_text("x")
    with pytest.raises(OutputError, match="move it away"):
        run()
    assert tree("out.partial") == {"letter.txt": b"x"}


def test_an_input_that_changed_in_the_middle_is_noticed(here):
    """The plan knows only the ends of each tensor; the journal knows them whole."""
    big = torch.zeros(64, 4096)
    for name in "LR":
        safetensors.torch.save_file({"big": big, **tensors("LR".index(name))}, f"{name}/model.safetensors")
    unfinished()
    big[32] = 1
    safetensors.torch.save_file({"big": big, **tensors(0)}, "L/model.safetensors")
    run("whole")
    with pytest.raises(Interrupted):
        merge(parse_recipe(RECIPE), "out", threads=1, progress=stop)
    result = run()
    assert result.resumed == len(tensors(0))
    assert weights("out") == weights("whole")


def stop(*_):
    raise KeyboardInterrupt


def test_an_input_that_was_put_back_is_noticed(here):
    """Parts of two versions of an input may be in the journal, and the present one may be either."""
    values = {"a.big": torch.zeros(64, 4096), "b.big": torch.zeros(64, 4096), "c": torch.zeros(4)}
    place = Path("L/model.safetensors")
    for name in "LR":
        safetensors.torch.save_file(values, f"{name}/model.safetensors")
    old, time = place.read_bytes(), place.stat().st_mtime_ns
    run("whole")

    def stop_at(tensor):
        def observer(start):
            def count(size):
                if tensor in Path("out.partial", writer_module.JOURNAL).read_text():
                    raise KeyboardInterrupt

            return count

        return observer

    with pytest.raises(Interrupted):
        merge(parse_recipe(RECIPE), "out", threads=1, progress=stop_at('{"tensor": "a.big"'))
    values["a.big"][32] = values["b.big"][32] = 1
    safetensors.torch.save_file(values, place)
    with pytest.raises(Interrupted):
        merge(parse_recipe(RECIPE), "out", threads=1, progress=stop_at('{"tensor": "b.big"'))
    place.write_bytes(old)
    os.utime(place, ns=(time, time))
    run()
    assert weights("out") == weights("whole")


@pytest.mark.parametrize("out", ["s.safetensors"])
def test_the_remains_of_a_file_that_is_in_its_place_are_in_nobodys_way(here, out):
    killed("os.remove", writer_module.JOURNAL, out)
    assert tree(f"{out}.partial").keys() == {writer_module.JOURNAL}
    assert_is_the_merge(out)
    run(out, OTHER, force=True)
    nothing_else(here, out)


def test_ctrl_c_while_a_run_looks_at_what_is_finished(here, monkeypatch):
    unfinished()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "_digest", stop)
        with pytest.raises(Interrupted, match="run the same command again"):
            run()
    assert run().resumed == len(tensors(0))


def test_a_disk_that_is_full_on_the_second_try_costs_nothing_that_is_finished(here, monkeypatch):
    unfinished()
    shard = Path("out.partial/model.safetensors")
    os.truncate(shard, shard.stat().st_size - 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="no room") as caught:
            run()
    assert "what an earlier run finished stays in out.partial" in str(caught.value)
    assert run().resumed >= len(tensors(0)) - 1
    assert_is_the_merge("out")


def test_an_error_at_the_end_costs_nothing_that_is_finished(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_files", lambda *_: {"tokenizer.json": Path("L/tokenizer.json")})
        with pytest.raises(OutputError, match=r"L/tokenizer\.json: No such file") as caught:
            run()
    assert "run the same command again" in str(caught.value)
    assert run().resumed == len(tensors(0))
    assert_is_the_merge("out")


def test_more_files_than_may_be_open_are_named_as_the_reason(here, monkeypatch):
    real = os.open

    def limited(path, *arguments, **more):
        if "00005-of-" in str(path):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", limited)
        with pytest.raises(OutputError, match=r"11 files are all open at once.*--max-shard-size"):
            run(max_shard_bytes=1)
    nothing_else(here)


def test_an_output_that_is_still_linked_to_an_unfinished_one_is_not_written_to(here):
    """Where files can only be published by a link, a process may die before it removes the other name."""
    run("out.safetensors")
    before = Path("out.safetensors").read_bytes()
    killed("os.remove", writer_module.JOURNAL, "out.safetensors", force=True)
    os.link("out.safetensors", "out.safetensors.partial/out.safetensors")

    def observer(*_):
        assert Path("out.safetensors").read_bytes() == before
        return lambda size: None

    merge(parse_recipe(RECIPE), "out.safetensors", force=True, threads=1, progress=observer)
    assert Path("out.safetensors").read_bytes() == before
    nothing_else(here, "out.safetensors")


def test_values_that_cannot_be_merged_leave_nothing(here):
    broken = tensors(0)
    broken["layers.7.w"][0, 0] = float("nan")
    safetensors.torch.save_file(broken, "L/model.safetensors", {"format": "pt"})
    with pytest.raises(DataError):
        run()
    nothing_else(here)


def test_two_processes_do_not_write_one_output(here):
    unfinished()
    with Path("out.partial/.graftwork-journal.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is writing it"):
            run()
        assert Path("out.partial/.graftwork-journal.jsonl").exists()
    run()
    assert_is_the_merge("out")


# ---------------------------------------------------------------- systems that can do less


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        (writer_module, "USE_FALLOCATE"), (writer_module, "USE_EXCHANGE"), (writer_module, "USE_LOCKS"),
        (checkpoint_module, "USE_PREADV"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("threads", [1, 4])
def test_the_output_is_the_same_without(here, monkeypatch, module, flag, threads):
    run("whole", max_shard_bytes=6000)
    monkeypatch.setattr(module, flag, False)
    run(max_shard_bytes=6000, threads=threads)
    run(max_shard_bytes=6000, threads=threads, force=True)
    assert weights("out") == weights("whole")
    nothing_else(here, "out", "whole")


def test_everything_can_be_had_without_all_of_it(here, monkeypatch):
    for module, flag in (
        (writer_module, "USE_FALLOCATE"), (writer_module, "USE_EXCHANGE"), (writer_module, "USE_LOCKS"),
        (checkpoint_module, "USE_PREADV"),
    ):  # fmt: skip
        monkeypatch.setattr(module, flag, False)
    run(threads=4)
    assert_is_the_merge("out")


# ---------------------------------------------------------------- the writer alone


def test_a_header_that_grows_is_an_error_and_not_a_broken_file(here):
    writer = CheckpointWriter(Path("x"), [OutputTensor("a", "F32", (2,), 8)], {"k": "v" * 10}, plan_digest="p")
    writer.write("a", 0, memoryview(b"\0" * 8))
    with pytest.raises(RuntimeError, match="length"):
        writer.publish({"k": "v" * 100}, {})
    writer.abandon()
    nothing_else(here)


def test_nothing_unfinished_looks_like_a_checkpoint(here):
    writer = CheckpointWriter(Path("x"), [OutputTensor("a", "F32", (2,), 8)], {}, plan_digest="p")
    writer.write("a", 0, memoryview(b"\1" * 8))
    for path in (Path("x"), Path("x.partial"), *Path("x.partial").glob("*.safetensors")):
        with pytest.raises(CheckpointError):
            Checkpoint.open(path)
    writer.abandon()
