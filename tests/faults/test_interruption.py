"""Whatever stops a merge, nothing that looks like a result is left, and a second run ends where one run would have.

A child process compiles what it needs, then forks once per order; the forked process merges and is killed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import CheckpointError, OutputError
from graftwork.merge.recipe import parse_recipe
from graftwork.merge.run import Interrupted, Settings, merge

RECIPE = """
{merge_method: ties, base_model: B, models: [{model: L}, {model: R}], parameters: {weight: .5, density: .3},
 exclude: [x*]}
"""
TENSORS = 150
SIDE = 181  # 150 · 181² bfloat16 numbers: 10 MB in each of three inputs
SHARD = 3_000_000

CHILD = """
import json, os, signal, sys
from graftwork.merge.recipe import parse_recipe
from graftwork.merge.run import Settings, merge

recipe = sys.argv[1]
merge(parse_recipe(recipe), "warm", threads=1, settings=Settings(max_shard_bytes=3_000_000))
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    process = os.fork()
    if process == 0:
        if order["event"]:
            count = 0

            def watch(event, arguments):
                global count
                if event == order["event"] and any(order["about"] in str(item) for item in arguments):
                    count += 1
                    if count > order["skip"]:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
        merge(parse_recipe(recipe), "out", threads=1, settings=Settings(max_shard_bytes=3_000_000, **order["settings"]))
        os._exit(0)
    print("pid", process, flush=True)
    sys.stdin.readline()  # until then a dead process keeps its number, so that no other can be killed in its place
    print("status", os.waitpid(process, 0)[1], flush=True)
"""


def weights(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if "safetensors" in path.name}


def run(out="out", recipe=RECIPE, progress=None, **settings):
    return merge(
        parse_recipe(recipe), out, threads=1, progress=progress,
        settings=Settings(**{"max_shard_bytes": SHARD, **settings}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with three models, and the result of an undisturbed run."""
    folder = tmp_path_factory.mktemp("interruption")
    generator = torch.Generator().manual_seed(0)
    base = {f"t{n:03}": torch.randn(SIDE, SIDE, generator=generator) for n in range(TENSORS)}
    base |= {"x.table": torch.randn(999, generator=generator), "count": torch.arange(5)}
    for name in "BLR":
        if name != "B":
            moved = {key: value for key, value in base.items() if value.is_floating_point()}
            noise = {key: torch.randn(value.shape, generator=generator) / 20 for key, value in moved.items()}
        values = {
            key: (value + (noise[key] if name != "B" else 0)).to(torch.bfloat16) if value.is_floating_point() else value
            for key, value in base.items()
        }
        (folder / name).mkdir()
        safetensors.torch.save_file(values, folder / name / "model.safetensors", {"format": "pt"})
    here = Path.cwd()
    os.chdir(folder)
    run("whole")
    os.chdir(here)
    return folder


@pytest.fixture
def here(workshop, tmp_path, monkeypatch):
    """An empty working directory from which the models can be named."""
    for name in ("B", "L", "R", "whole"):
        (tmp_path / name).symlink_to(workshop / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Victims:
    """Merges in processes of their own, to be killed."""

    def __init__(self, folder):
        self.folder = folder
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, RECIPE], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.child.stdout.readline() == "ready\n"
        started = time.monotonic()
        self.start()
        assert self.ended() == 0
        self.seconds = time.monotonic() - started
        shutil.rmtree(folder / "out")

    def start(self, event="", about="", skip=0, **settings):
        order = {"event": event, "about": about, "skip": skip, "settings": settings}
        return self.ask(json.dumps(order), "pid")

    def ended(self):
        return self.ask("end", "status")

    def ask(self, line, wanted):
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        word, number = self.child.stdout.readline().split()
        assert word == wanted
        return int(number)

    def kill(self, process):
        assert process > 1
        os.kill(process, signal.SIGKILL)
        return self.ended()

    def close(self):
        self.child.stdin.close()
        self.child.wait()
        self.child.stdout.close()


@pytest.fixture(scope="module")
def prepared(workshop):
    made = Victims(workshop)
    yield made
    made.close()


@pytest.fixture
def victims(prepared):
    yield prepared
    for name in ("out", "out.partial", "out.replaced"):
        shutil.rmtree(prepared.folder / name, ignore_errors=True)


def journal_lines(folder):
    path = folder / "out.partial" / ".graftwork-journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_nothing_to_be_taken_for_a_result(folder):
    """Headers are written when everything else is."""
    complete = journal_lines(folder) == TENSORS + 3
    parts = () if complete else (folder / "out.partial", *(folder / "out.partial").glob("*"))
    for path in (folder / "out", *parts):
        with pytest.raises(CheckpointError):
            Checkpoint.open(path)


def assert_the_second_run_ends_as_one_would_have(folder, monkeypatch, finished):
    monkeypatch.chdir(folder)
    result = run()
    assert result.resumed >= finished
    assert weights("out") == weights("whole")
    assert not Path("out.partial").exists()


DELAYS = np.random.default_rng(2024).permutation(np.linspace(0.02, 0.95, 12)).tolist()


@pytest.mark.parametrize("share", DELAYS, ids=lambda share: f"{share:.2f}")
def test_killed_after_some_time(victims, monkeypatch, share):
    process = victims.start()
    time.sleep(share * victims.seconds)
    status = victims.kill(process)
    if status == 0 or (victims.folder / "out").exists():  # it was faster this time
        assert weights(victims.folder / "out") == weights(victims.folder / "whole")
        return
    assert status == signal.SIGKILL
    finished = max(0, journal_lines(victims.folder) - 1)
    assert_nothing_to_be_taken_for_a_result(victims.folder)
    assert_the_second_run_ends_as_one_would_have(victims.folder, monkeypatch, finished)


@pytest.mark.parametrize("lines", [1, 2, 3, 17, 60, 101, 140, TENSORS + 2])
def test_killed_when_the_journal_has_some_lines(victims, monkeypatch, lines):
    process = victims.start()
    deadline = time.monotonic() + 60
    while journal_lines(victims.folder) < lines and time.monotonic() < deadline:
        if (victims.folder / "out").exists():
            break
    status = victims.kill(process)
    if status == 0 or (victims.folder / "out").exists():
        assert weights(victims.folder / "out") == weights(victims.folder / "whole")
        return
    finished = journal_lines(victims.folder) - 1
    assert lines - 1 <= finished <= TENSORS + 2
    assert_nothing_to_be_taken_for_a_result(victims.folder)
    assert_the_second_run_ends_as_one_would_have(victims.folder, monkeypatch, finished)


@pytest.mark.parametrize(
    ("event", "about", "skip"),
    [
        ("os.mkdir", "out.partial", 0), ("open", ".graftwork-journal.jsonl", 0), ("open", "-of-", 0),
        ("open", "-of-", 2), ("open", "index.json", 0), ("open", "README.md", 0), ("os.rename", "out.partial", 0),
    ],
)  # fmt: skip
def test_killed_at_a_step_of_opening_or_publishing(victims, monkeypatch, event, about, skip):
    victims.start(event, about, skip)
    assert victims.ended() == signal.SIGKILL
    assert not (victims.folder / "out").exists()
    finished = max(0, journal_lines(victims.folder) - 1)
    assert_the_second_run_ends_as_one_would_have(victims.folder, monkeypatch, finished)


def test_killed_when_the_output_has_just_come_into_its_place(victims, monkeypatch):
    """It is whole, and the last trace of the run is swept up by the next one."""
    victims.start("os.remove", ".graftwork-journal.jsonl")
    assert victims.ended() == signal.SIGKILL
    monkeypatch.chdir(victims.folder)
    assert weights("out") == weights("whole")
    with pytest.raises(OutputError, match="--force"):
        run()
    assert run(force=True).resumed == 0
    assert weights("out") == weights("whole")
    assert not Path("out/.graftwork-journal.jsonl").exists()


@pytest.mark.parametrize(
    ("event", "about"), [("os.remove", ".graftwork-journal.jsonl"), ("shutil.rmtree", "out.partial")]
)
def test_killed_while_an_output_is_replaced(victims, monkeypatch, event, about):
    """There is always a whole output, the old or the new one, and a further run goes through."""
    monkeypatch.chdir(victims.folder)
    run("out", RECIPE.replace("density: .3", "density: .9"))
    old = weights("out")
    victims.start(event, about, force=True)
    assert victims.ended() == signal.SIGKILL
    assert weights("out") in (old, weights("whole"))
    run("out", force=True)
    assert weights("out") == weights("whole")
    assert not Path("out.partial").exists()


# ---------------------------------------------------------------- damaged leftovers


def stop_after(tensors, error=KeyboardInterrupt):
    """Return a progress observer that interrupts the run when so many tensors are in the journal."""

    def observer(*_):
        def count(size):
            if journal_lines(Path.cwd()) > tensors:
                raise error

        return count

    return observer


def interrupted(tensors):
    with pytest.raises(Interrupted) as caught:
        run(progress=stop_after(tensors))
    assert "run the same command again" in str(caught.value)
    assert not Path("out").exists()


def test_ctrl_c_keeps_what_is_finished(here):
    interrupted(40)
    result = run()
    assert result.resumed == 40
    assert weights("out") == weights("whole")


def test_a_journal_line_cut_off_in_the_middle_costs_one_tensor(here):
    interrupted(40)
    journal = Path("out.partial/.graftwork-journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])
    assert run().resumed == 39
    assert weights("out") == weights("whole")


def test_what_is_finished_after_such_a_cut_is_not_lost_to_a_second_stop(here):
    interrupted(40)
    journal = Path("out.partial/.graftwork-journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])
    interrupted(90)
    assert run().resumed >= 89
    assert weights("out") == weights("whole")


JUNK = [b"", b"\0" * 300, b'{"plan"', b"not json\n", b"\xff\xfe\n", b"[1]\n", b'{"plan": 3}\n']


@pytest.mark.parametrize("junk", JUNK)
def test_a_journal_of_junk_is_never_believed(here, junk):
    interrupted(40)
    Path("out.partial/.graftwork-journal.jsonl").write_bytes(junk)
    try:
        assert run().resumed == 0
    except OutputError as error:  # it names another plan: the user decides
        assert "--restart" in str(error)  # noqa: PT017
        assert run(restart=True).resumed == 0
    assert weights("out") == weights("whole")


@pytest.mark.parametrize(
    "entry",
    [
        {"tensor": "t000", "digest": "00" * 16, "inputs": []}, {"tensor": "nothing", "digest": "00" * 16, "inputs": []},
        {"tensor": "t000", "digest": "xyz", "inputs": []}, {"tensor": "t000", "digest": "00", "inputs": [7]},
        {"tensor": 3},
    ],
)  # fmt: skip
def test_a_false_line_in_the_journal_is_never_believed(here, entry):
    interrupted(3)
    journal = Path("out.partial/.graftwork-journal.jsonl")
    first, *_ = journal.read_text().splitlines()
    journal.write_text(first + "\n" + json.dumps(entry) + "\n")
    assert run().resumed == 0
    assert weights("out") == weights("whole")


def test_finished_tensors_whose_bytes_were_damaged_are_made_again(here):
    interrupted(40)
    shard = Path("out.partial") / sorted(weights("out.partial"))[0]
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 3)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert run().resumed == 39
    assert weights("out") == weights("whole")


@pytest.mark.parametrize("damage", ["truncated", "removed", "longer"])
def test_a_damaged_file_of_an_unfinished_output_is_made_again(here, damage):
    interrupted(70)
    shard = Path("out.partial") / sorted(weights("out.partial"))[0]
    if damage == "removed":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size + (1000 if damage == "longer" else -1_000_000))
    run()
    assert weights("out") == weights("whole")


# ---------------------------------------------------------------- inputs and disks that fail


def test_an_input_that_is_cut_off_while_merging_is_an_error_and_leaves_nothing(here):
    Path("R").unlink()
    shutil.copytree(Path("whole").resolve().parent / "R", "R")

    def observer(*_):
        def count(size):
            if journal_lines(here) > 20:
                os.truncate("R/model.safetensors", 2_000_000)

        return count

    before = {path.name for path in here.iterdir()}
    with pytest.raises(CheckpointError, match="it has changed since it was opened") as caught:
        run(progress=observer)
    assert len(caught.value.problems) == 1
    assert {path.name for path in here.iterdir()} == before


LIMITED = """
import resource, sys
from graftwork.merge.errors import GraftworkError
from graftwork.merge.recipe import parse_recipe
from graftwork.merge.run import Settings, merge
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    merge(parse_recipe(sys.argv[1]), sys.argv[2], threads=2, settings=Settings(force=True))
except GraftworkError as error:
    print(type(error).__name__, *error.problems, sep="\\n")
"""


def merge_in_a_child(out, limit=0):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, RECIPE, str(out), str(limit)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def assert_says_there_is_no_room(lines, out):
    kind, line = lines
    assert kind == "OutputError"
    assert line.startswith(f"cannot write {out}: it needs ")
    assert "no room" in line


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_may_not_grow_is_an_error_and_leaves_nothing(here, exists):
    before = {}
    if exists:
        run(recipe=RECIPE.replace("density: .3", "density: .9"))
        before = weights("out")
    assert_says_there_is_no_room(merge_in_a_child("out", 1_000_000), "out")
    assert not Path("out.partial").exists()
    assert Path("out").exists() == exists
    if exists:
        assert weights("out") == before


@pytest.fixture
def mount(tmp_path):
    """Mount small file systems; only a privileged user may."""
    mounted = []

    def make(name, options):
        path = tmp_path / name
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a small file system")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_is_an_error_and_leaves_nothing(here, mount, exists):
    disk = mount("disk", "size=14m")
    out = disk / "out"
    before = {}
    if exists:
        run(out, RECIPE.replace("density: .3", "density: .9"))
        before = weights(out)
    else:
        (disk / "ballast").write_bytes(bytes(6_000_000))
    assert_says_there_is_no_room(merge_in_a_child(out), out)
    assert {path.name for path in disk.iterdir()} == ({"out"} if exists else {"ballast"})
    if exists:
        assert weights(out) == before


def test_a_disk_that_fills_up_while_writing_is_an_error_and_leaves_nothing(here, mount, monkeypatch):
    """Where space cannot be reserved, it may be gone when it is needed."""
    from graftwork.merge import writer

    monkeypatch.setattr(writer, "USE_FALLOCATE", False)
    disk = mount("disk", "size=14m")

    def observer(*_):
        def count(size):
            if journal_lines(disk) > 20 and not (disk / "ballast").exists():
                with (disk / "ballast").open("wb") as file:
                    try:
                        file.write(bytes(20_000_000))
                    except OSError:
                        return

        return count

    with pytest.raises(OutputError, match="no room") as caught:
        run(disk / "out", progress=observer)
    assert len(caught.value.problems) == 1
    assert {path.name for path in disk.iterdir()} == {"ballast"}


def test_a_read_only_disk_is_refused_in_one_line(here, mount):
    disk = mount("disk", "size=14m,ro")
    with pytest.raises(OutputError) as caught:
        run(disk / "out")
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(f"cannot write {disk / 'out'}: ")


def test_too_many_open_files_is_an_error_in_one_line(here):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(soft) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[20], hard))
    try:
        with pytest.raises((OutputError, CheckpointError)) as caught:
            run(max_shard_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(caught.value.problems) == 1
    assert not Path("out").exists()
    assert not Path("out.partial").exists()
