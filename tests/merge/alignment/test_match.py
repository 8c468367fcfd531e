"""One checkpoint aligned to another through files: what is written, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.merge.alignment.apply import apply_permutation, identity, inverse, load_permutation, random_permutation
from graftwork.merge.alignment.families import RESIDUAL, family_spec
from graftwork.merge.alignment.match import align_checkpoints, find_spec, permutation_place, write_reordered
from graftwork.merge.alignment.spec import PermutationSpec, shapes_of
from graftwork.merge.checkpoint import Checkpoint, load_torch
from graftwork.merge.errors import CheckpointError, DataError, MismatchError, OutputError, RecipeError, TaskError
from graftwork.merge.task import Task
from graftwork.merge.verify import verify
from tests.merge.alignment.architectures import (
    CONFIGS,
    Chain,
    DigitsLeNet,
    Llama,
    ResNet,
    network,
    output,
    trained_like,
)

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "checkpoints" / "digits_lenet"


def network_state(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    state = trained_like(ResNet((8, 12), (1, 1))).state_dict()
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def save(path, state, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt", **metadata})
    return path


def same(left, right):
    """Say whether two models are equal bit by bit."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(
            left[name].view(words[left[name].element_size()]), right[name].view(words[left[name].element_size()])
        )
        for name in left
    )


def is_sound(path):
    with Checkpoint.open(path) as found:
        return not verify(found).problems


def align(folder, a, b, out="out.safetensors", spec=None, **keywords):
    with Checkpoint.open(a) as first, Checkpoint.open(b) as second:
        return align_checkpoints(first, second, folder / out, spec or find_spec(first), **keywords)


@pytest.fixture
def shuffled(tmp_path):
    """a.safetensors, and its copy b.safetensors in another order; with the spec and that order."""

    def make(dtype=torch.float32):
        state = network_state(dtype)
        spec = family_spec(shapes_of(state))
        order = random_permutation(spec, 5)
        save(tmp_path / "a.safetensors", state)
        save(tmp_path / "b.safetensors", apply_permutation(spec, order, state))
        return state, spec, order

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_shuffled_copy_is_brought_back_bit_by_bit(tmp_path, shuffled, dtype):
    state, spec, order = shuffled(dtype)
    result = align(tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), state)
    if dtype != torch.float8_e4m3fn:  # eight bits leave units that are equal
        found = load_permutation(tmp_path / "out.permutation.safetensors").permutation
        assert all((found[name] == inverse(spec, order)[name]).all() for name in spec.groups)
    assert result.matching.distance_after == 0
    assert {group.name: group.size for group in result.groups} == {name: g.size for name, g in spec.groups.items()}
    assert all(group.moved > 0 and group.gain > 0 and not group.pinned for group in result.groups)


def test_running_statistics_are_written_with_their_units(tmp_path, shuffled):
    state, *_ = shuffled()
    align(tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    statistics = [name for name in state if "running" in name]
    before = load_file(tmp_path / "b.safetensors")
    assert statistics
    assert all(torch.equal(found[name], state[name]) for name in statistics)
    assert not any(torch.equal(before[name], state[name]) for name in statistics)


def test_what_is_written_says_where_it_comes_from(tmp_path, shuffled):
    shuffled()
    result = align(tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors", seed=3, restarts=2)
    with Checkpoint.open(tmp_path / "a.safetensors") as a, Checkpoint.open(tmp_path / "b.safetensors") as b:
        digests = {"a.safetensors": a.content_digest(), "b.safetensors": b.content_digest()}
    with Checkpoint.open(result.out) as out:
        assert out.metadata["graftwork.kind"] == "model"
        assert out.metadata["graftwork.method"] == "match"
        assert out.metadata["graftwork.digest"] == out.content_digest() == result.digest
        parents = json.loads(out.metadata["graftwork.parents"])
        assert json.loads(out.metadata["graftwork.recipe"]) == {"method": "weights", "restarts": 2, "seed": 3}
    assert [(parent["name"], parent["digest"]) for parent in parents] == [
        (name, digests[name]) for name in ("b.safetensors", "a.safetensors")
    ]
    permutation = load_permutation(result.permutation_file)
    assert (permutation.digest_a, permutation.digest_b) == (digests["a.safetensors"], digests["b.safetensors"])
    assert permutation.spec == result.spec
    assert is_sound(result.out)
    assert str(tmp_path).encode() not in result.out.read_bytes()


def test_equal_alignments_give_equal_files(tmp_path, shuffled):
    shuffled()
    state = network_state(seed=9)
    save(tmp_path / "c.safetensors", state)
    for out in ("one.safetensors", "two.safetensors"):
        align(tmp_path, tmp_path / "a.safetensors", tmp_path / "c.safetensors", out)
    for one, two in (("one", "two"), ("one.permutation", "two.permutation")):
        assert (tmp_path / f"{one}.safetensors").read_bytes() == (tmp_path / f"{two}.safetensors").read_bytes()


def test_an_aligned_model_computes_what_it_did(tmp_path):
    module, inputs, _, _ = network("resnet-bottleneck")
    other = network("resnet-bottleneck", seed=1)[0]
    save(tmp_path / "a.safetensors", module.state_dict())
    save(tmp_path / "b.safetensors", other.state_dict())
    result = align(tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    expected = output(other, inputs)
    found = output(other, inputs, load_file(tmp_path / "out.safetensors"))
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert result.matching.distance_after < 0.99 * result.matching.distance_before
    assert sum(group.moved for group in result.groups) > 1


@pytest.mark.skipif(not REAL.is_dir(), reason="the real checkpoints are not in ../shared/data/checkpoints")
@pytest.mark.parametrize("pair", ["mnist", "svhn"])
def test_real_networks_come_nearer_and_compute_what_they_did(tmp_path, pair):
    result = align(tmp_path, REAL / f"{pair}_a.safetensors", REAL / f"{pair}_b.safetensors")
    assert result.matching.distance_ratio <= 0.8705
    module = DigitsLeNet().double()
    inputs = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = output(module, inputs, read(REAL / f"{pair}_b.safetensors"))
    after = output(module, inputs, read(tmp_path / "out.safetensors"))
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


def llama_folder(folder, seed, shards=1):
    """Write a model folder as transformers does, in several files if asked for; return its state."""
    torch.manual_seed(seed)
    state = {name: value.to(torch.bfloat16) for name, value in trained_like(Llama(), seed).state_dict().items()}
    names = sorted(state)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIGS["llama"], "hidden_size": 16}))
    (folder / "tokenizer.json").write_text('{"mine": true}')
    if shards == 1:
        save(folder / "model.safetensors", state)
        return state
    files = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    places = {name: files[number % shards] for number, name in enumerate(names)}
    for file in files:
        save(folder / file, {name: state[name] for name in names if places[name] == file})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("out", ["aligned", "aligned.safetensors"])
def test_folders_in_shards_are_aligned_with_their_side_files(tmp_path, out):
    state = llama_folder(tmp_path / "a", 0)
    llama_folder(tmp_path / "b", 0, shards=3)
    spec = family_spec(shapes_of(state), config=CONFIGS["llama"]).pin({RESIDUAL: "kept"})
    order = random_permutation(spec, 2)
    with Checkpoint.open(tmp_path / "b") as b:
        write_reordered(b, tmp_path / "shuffled", spec, order, parents=[], settings={})
    assert same({**state, **apply_permutation(spec, order, state)}, read(tmp_path / "shuffled"))
    result = align(tmp_path, tmp_path / "a", tmp_path / "shuffled", out)
    assert same(read(tmp_path / out), state)
    assert {group.name: group.pinned != "" for group in result.groups}[RESIDUAL]
    assert result.permutation_file == tmp_path / "aligned.permutation.safetensors"
    if out == "aligned":
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert (tmp_path / out / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()
        assert is_sound(tmp_path / out)


def read(path):
    with Checkpoint.open(path) as found:
        return load_torch(found)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    module = Chain([f"fc{number}" for number in range(9)], [512] * 10)
    save(tmp_path / "a.safetensors", module.state_dict())
    size = 512 * 512 * 4
    spec = family_spec(shapes_of(module.state_dict()))
    with Checkpoint.open(tmp_path / "a.safetensors") as found:
        tracemalloc.start()
        try:
            write_reordered(
                found, tmp_path / "out.safetensors", spec, random_permutation(spec, 0), parents=[], settings={}
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 5 * size


# ---------------------------------------------------------------------------------------------------------------------
# Which spec is used

MAKE = """
import torch
from torch import nn


def make():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 6)


def bare():
    return make()[0]


def fails():
    raise ValueError("no data here")


network = make()[0]
"""


@pytest.fixture
def sequential(tmp_path):
    (tmp_path / "net.py").write_text(MAKE)
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).state_dict()
    return save(tmp_path / "a.safetensors", state)


def found_spec(path, **keywords):
    with Checkpoint.open(path) as checkpoint:
        return find_spec(checkpoint, **keywords)


def test_a_spec_comes_from_a_file_a_module_a_family_or_the_names(tmp_path, sequential):
    by_names = found_spec(sequential)
    assert by_names.source == "mlp"
    traced = found_spec(sequential, module=f"{tmp_path / 'net.py'}:make")
    assert traced.source == "traced"
    assert traced.tensors == by_names.tensors
    (tmp_path / "spec.json").write_text(by_names.to_json())
    assert found_spec(sequential, file=tmp_path / "spec.json") == by_names
    (tmp_path / "short.json").write_text(
        '{"0.weight": ["hidden", null], "0.bias": ["hidden"], "2.weight": [null, "hidden"], "2.bias": [null]}'
    )
    short = found_spec(sequential, file=tmp_path / "short.json")
    assert {name: group.size for name, group in short.groups.items()} == {"hidden": 8}


def test_the_model_of_a_task_is_traced_where_names_say_nothing(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    path = save(tmp_path / "odd.safetensors", Odd().state_dict())
    task = Task("odd", Odd, lambda: [(torch.randn(3, 6), torch.zeros(3, dtype=torch.int64))])
    with pytest.raises(MismatchError, match="--module"):
        found_spec(path)
    spec = found_spec(path, task=task)
    assert (spec.source, list(spec.groups)) == ("traced", ["first"])
    empty = Task("empty", Odd, lambda: [])
    with pytest.raises(TaskError, match='cannot trace the model of task "empty"'):
        found_spec(path, task=empty)


def test_a_residual_stream_is_freed_on_request_only(tmp_path):
    llama_folder(tmp_path / "a", 0)
    assert RESIDUAL not in found_spec(tmp_path / "a").free_groups
    assert RESIDUAL in found_spec(tmp_path / "a", residual=True).free_groups


def refusal(error, call, *arguments, **keywords):
    with pytest.raises(error) as caught:
        call(*arguments, **keywords)
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bare", "it returns Sequential, not (module, example inputs)"),
        ("fails", "ValueError: no data here"),
        ("network", "it is no function"),
        ("maker", 'has no "maker"; did you mean "make"?'),
    ],
)
def test_a_module_that_cannot_be_had_is_one_line(tmp_path, sequential, name, expected):
    (problem,) = refusal(TaskError, found_spec, sequential, module=f"{tmp_path / 'net.py'}:{name}")
    assert expected in problem


def test_a_traced_module_of_another_architecture_is_refused(tmp_path, sequential):
    other = save(tmp_path / "other.safetensors", Chain(("0", "2"), (6, 9, 3)).state_dict())
    problems = refusal(MismatchError, found_spec, other, module=f"{tmp_path / 'net.py'}:make")
    assert any('"0.weight" axis 0 has 9 entries, but its group "0" has 8' in problem for problem in problems)


def test_a_spec_file_that_is_wrong_is_refused(tmp_path, sequential):
    (problem,) = refusal(CheckpointError, found_spec, sequential, file=tmp_path / "none.json")
    assert "none.json" in problem
    file = tmp_path / "spec.json"
    file.write_text('{"groups": {"h": 8}, "tensors": {"0.weight": ["h", null], "0.bais": ["h"]}}')
    problems = refusal(MismatchError, found_spec, sequential, file=file)
    assert any(
        'it lacks the tensor "0.bais", which the spec names; did you mean "0.bias"?' in item for item in problems
    )
    assert any('does not cover "2.weight" [3, 8]' in item for item in problems)
    file.write_text("{")
    (problem,) = refusal(RecipeError, found_spec, sequential, file=file)
    assert "not JSON" in problem


# ---------------------------------------------------------------------------------------------------------------------
# What is refused leaves nothing behind


def test_other_architectures_and_nan_are_refused_and_nothing_is_written(tmp_path, shuffled):
    state, *_ = shuffled()
    other = save(tmp_path / "other.safetensors", ResNet((8, 14), (1, 1)).state_dict())
    problems = refusal(MismatchError, align, tmp_path, tmp_path / "a.safetensors", other)
    assert any('"layer2.0.conv1.weight" axis 0 has 14 entries' in problem for problem in problems)
    assert all("other.safetensors" in problem for problem in problems)
    state["layer1.0.conv1.weight"][1, 2] = float("nan")
    bad = save(tmp_path / "bad.safetensors", state)
    (problem,) = refusal(DataError, align, tmp_path, tmp_path / "a.safetensors", bad)
    assert '"layer1.0.conv1.weight" holds NaN' in problem
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "bad.safetensors",
        "other.safetensors",
    ]


def test_outputs_that_exist_are_kept_unless_forced(tmp_path, shuffled):
    shuffled()
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    place = permutation_place(tmp_path / "out.safetensors")
    place.write_text("mine")
    (problem,) = refusal(OutputError, align, tmp_path, a, b)
    assert "out.permutation.safetensors: it exists" in problem
    assert not (tmp_path / "out.safetensors").exists()
    align(tmp_path, a, b, force=True)
    assert load_permutation(place).permutation
    (problem,) = refusal(OutputError, align, tmp_path, a, b)
    assert "--force" in problem
    for out in ("a.safetensors", "b.safetensors"):
        refusal(OutputError, align, tmp_path, a, b, out, force=True)
    refusal(OutputError, align, tmp_path, a, b, "x.safetensors", permutation_file=tmp_path / "x.safetensors")
    refusal(OutputError, align, tmp_path, a, b, "x.safetensors", permutation_file=tmp_path / "x.txt")


def test_an_interrupted_write_goes_on_where_it_stopped(tmp_path, shuffled):
    state, spec, order = shuffled()
    written = []

    def stop(count):
        written.append(count)
        if len(written) == 5:
            raise KeyboardInterrupt

    keywords = {"parents": [], "settings": {}}
    with Checkpoint.open(tmp_path / "a.safetensors") as found:
        with pytest.raises(KeyboardInterrupt):
            write_reordered(found, tmp_path / "out.safetensors", spec, order, **keywords, written=stop)
        assert not (tmp_path / "out.safetensors").exists()
        reads = []
        read_bytes = found.read
        found.read = lambda name: reads.append(name) or read_bytes(name)
        write_reordered(found, tmp_path / "out.safetensors", spec, order, **keywords)
    assert len(reads) == len(state) - 5
    assert same(load_file(tmp_path / "out.safetensors"), {**state, **apply_permutation(spec, order, state)})
    assert not (tmp_path / "out.safetensors.partial").exists()


def test_packed_values_cannot_be_re_ordered(tmp_path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [4, 2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "packed.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    spec = PermutationSpec.from_json('{"groups": {"h": 4}, "tensors": {"w": ["h", null]}}')
    with Checkpoint.open(path) as found:
        for order, refused in (({"h": np.array([1, 0, 2, 3])}, True), ({}, False)):
            if refused:
                (problem,) = refusal(
                    DataError, write_reordered, found, tmp_path / "o.safetensors", spec, order, parents=[], settings={}
                )
                assert "F4" in problem
                assert not list(tmp_path.glob("o.safetensors*"))
            else:
                write_reordered(found, tmp_path / "o.safetensors", spec, order, parents=[], settings={})


def test_matching_by_data_needs_a_task(tmp_path, shuffled):
    shuffled()
    for method in ("activations", "ste"):
        (problem,) = refusal(
            TaskError, align, tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors", method=method
        )
        assert problem == f"cannot match by {method}: that needs data; give --task file.py:name"


@pytest.mark.parametrize("method", ["activations", "ste"])
def test_methods_with_data_go_through_the_same_files(tmp_path, method):
    torch.manual_seed(0)
    modules = [Chain(("fc0", "fc1", "fc2"), (6, 16, 16, 3)) for _ in range(2)]
    spec = family_spec(shapes_of(modules[0].state_dict()))
    shuffled = apply_permutation(spec, random_permutation(spec, 3), modules[0].state_dict())
    save(tmp_path / "a.safetensors", modules[0].state_dict())
    save(tmp_path / "b.safetensors", shuffled)
    inputs = torch.randn(64, 6)
    labels = inputs[:, :3].argmax(1)
    task = Task("own", lambda: Chain(("fc0", "fc1", "fc2"), (6, 16, 16, 3)), lambda: [(inputs, labels)])
    result = align(tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors", method=method, task=task)
    assert same(read(tmp_path / "out.safetensors"), modules[0].state_dict())
    assert load_permutation(result.permutation_file).settings["method"] == method
    assert not all((load_permutation(result.permutation_file).permutation[name] == identity(spec)[name]).all()
                   for name in spec.groups)  # fmt: skip
