"""Laws of permutations, what they do to tensors, and their files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.merge.alignment.apply import (
    apply_permutation,
    axis_index,
    check_permutation,
    compose,
    identity,
    inverse,
    load_permutation,
    moved_share,
    random_permutation,
    save_permutation,
    unfold,
    unfold_product,
)
from graftwork.merge.alignment.spec import PermutationSpec
from graftwork.merge.artifact import save_artifact
from graftwork.merge.errors import CheckpointError, MismatchError, OutputError

SPEC = PermutationSpec.from_json("""{
  "groups": {"G": 3, "Q": {"size": 2, "within": "G"}, "V": {"size": 4, "within": "G"}, "C": 5,
             "R": {"size": 6, "pinned": "kept"}},
  "tensors": {"q": [["G", "Q", 4], "R"], "v": [["G", "V"], "C"], "o": ["C", ["G", "Q", "V"]], "flat": [null, ["C", 3]],
              "last": [[2, "C"]], "joined": [{"segments": ["C", ["G", "V"], 2, "C"]}], "square": ["C", "C"]},
  "source": "by hand"
}""")
SHAPES = {"q": (24, 6), "v": (12, 5), "o": (5, 24), "flat": (2, 15), "last": (10,), "joined": (24,), "square": (5, 5)}

seeds = st.integers(0, 2**32)


def tensors(seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def same(left, right):
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


def slowly(name, values, permutation):
    """Apply a permutation by loops, as the contract says it: an independent reference."""
    out = np.empty_like(values)
    axes = SPEC.tensors[name].axes
    for place in np.ndindex(*values.shape):
        source = []
        for axis, position in zip(axes, place, strict=True):
            if axis is None:
                source.append(position)
                continue
            start = 0
            for segment in axis:
                lengths = [item if isinstance(item, int) else SPEC.groups[item].size for item in segment]
                if position - start < np.prod(lengths):
                    break
                start += int(np.prod(lengths))
            digits = np.unravel_index(position - start, lengths)
            moved = []
            for factor, digit in zip(segment, digits, strict=True):
                if isinstance(factor, int):
                    moved.append(digit)
                    continue
                group, block = SPEC.groups[factor], 0
                if group.within is not None:
                    block = digits[segment.index(group.within)]
                moved.append(permutation[factor][block * group.size + digit])
            source.append(start + int(np.ravel_multi_index(moved, lengths)))
        out[place] = values[tuple(source)]
    return out


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_every_form_of_axis_is_re_ordered_as_the_contract_says(seed):
    permutation, values = random_permutation(SPEC, seed), tensors()
    found = apply_permutation(SPEC, permutation, values)
    assert same(found, {name: slowly(name, values[name], permutation) for name in values})


@settings(deadline=None, max_examples=25)
@given(seeds, seeds)
def test_composed_permutations_do_what_one_after_the_other_does(one, other):
    first, then, values = random_permutation(SPEC, one), random_permutation(SPEC, other), tensors()
    by_turns = apply_permutation(SPEC, then, apply_permutation(SPEC, first, values))
    assert same(by_turns, apply_permutation(SPEC, compose(SPEC, first, then), values))


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_the_inverse_brings_everything_back(seed):
    permutation, values = random_permutation(SPEC, seed), tensors()
    back = inverse(SPEC, permutation)
    assert same(apply_permutation(SPEC, back, apply_permutation(SPEC, permutation, values)), values)
    assert same(compose(SPEC, permutation, back), identity(SPEC))
    assert same(compose(SPEC, back, permutation), identity(SPEC))


def test_the_identity_and_an_empty_permutation_change_nothing():
    values = tensors()
    assert same(apply_permutation(SPEC, identity(SPEC), values), values)
    assert same(apply_permutation(SPEC, {}, values), values)
    assert axis_index(SPEC, {}, "v", 0) is None
    assert axis_index(SPEC, random_permutation(SPEC, 1), "flat", 0) is None


def test_random_permutations_depend_on_the_seed_alone_and_spare_what_is_pinned():
    assert same(random_permutation(SPEC, 3), random_permutation(SPEC, 3))
    assert not same(random_permutation(SPEC, 3), random_permutation(SPEC, 4))
    assert (random_permutation(SPEC, 3)["R"] == np.arange(6)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool,
                                   torch.float8_e4m3fn, torch.float8_e5m2])  # fmt: skip
def test_any_torch_dtype_is_moved_bit_by_bit(dtype):
    permutation = random_permutation(SPEC, 5)
    values = {name: (torch.from_numpy(value) * 3).to(dtype) for name, value in tensors().items()}
    found = apply_permutation(SPEC, permutation, values)
    words = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[next(iter(values.values())).element_size()]
    for name, value in values.items():
        assert found[name].dtype == dtype
        wanted = slowly(name, value.view(words).numpy(), permutation)
        assert (found[name].view(words).numpy() == wanted).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.int64])
def test_raw_words_of_numpy_are_moved_bit_by_bit(dtype):
    permutation, values = (
        random_permutation(SPEC, 5),
        {name: (value * 50).astype(dtype) for name, value in tensors().items()},
    )
    found = apply_permutation(SPEC, permutation, values)
    assert all(found[name].dtype == dtype for name in values)
    assert same(found, {name: slowly(name, values[name], permutation) for name in values})


@pytest.mark.parametrize("group", ["V", "Q", "C"])
def test_an_unfolded_tensor_has_everything_re_ordered_but_the_group(group):
    permutation, values = random_permutation(SPEC, 7), tensors()
    moved = apply_permutation(SPEC, permutation, values)
    size = SPEC.groups[group].size
    order = permutation[group].reshape(-1, size)
    assert {use.tensor for use in SPEC.uses(group)} >= {"o"}
    for use in SPEC.uses(group):
        if use.tensor == "square" or (use.tensor == "joined" and group == "C"):
            continue  # the group acts twice
        before = unfold(SPEC, permutation, use, values[use.tensor])
        after = unfold(SPEC, None, use, moved[use.tensor])
        assert before.shape == after.shape == (SPEC.blocks(group), size, values[use.tensor].size // order.size) or (
            use.tensor == "joined"
        )
        assert (np.take_along_axis(before, order[:, :, None], axis=1) == after).all()
        assert (unfold(SPEC, permutation, use, torch.from_numpy(values[use.tensor])).numpy() == before).all()


def test_the_best_order_of_an_unfolded_group_is_the_planted_one():
    permutation, values = random_permutation(SPEC, 11), tensors()
    moved = apply_permutation(SPEC, permutation, values)
    score = sum(
        np.einsum(
            "kia,kja->kij",
            unfold(SPEC, None, use, moved[use.tensor]),
            unfold(SPEC, permutation, use, values[use.tensor]),
        )
        for use in SPEC.uses("V")
    )
    assert (score.argmax(axis=2).reshape(-1) == permutation["V"]).all()


def test_factors_come_apart_with_inner_groups_in_place():
    values = tensors()
    use = next(use for use in SPEC.uses("G") if use.tensor == "o")
    permutation = random_permutation(SPEC, 2)
    found = unfold_product(SPEC, permutation, use, values["o"])
    assert found.shape == (3, 2, 4, 5)
    wanted = values["o"][permutation["C"]].reshape(5, 3, 2, 4).transpose(1, 2, 3, 0)
    assert (found == wanted).all()


def test_a_group_on_both_axes_of_a_tensor_is_applied_on_the_other_one():
    values, permutation = tensors(), random_permutation(SPEC, 2)
    use = next(use for use in SPEC.uses("C") if use.tensor == "square" and use.axis == 0)
    assert (unfold(SPEC, permutation, use, values["square"])[0] == values["square"][:, permutation["C"]]).all()


def test_the_share_of_moved_units_is_counted_in_all_blocks():
    permutation = identity(SPEC)
    permutation["V"] = np.array([0, 1, 2, 3, 1, 0, 2, 3, 0, 1, 2, 3])
    assert moved_share(SPEC, permutation, "V") == pytest.approx(2 / 12)
    assert moved_share(SPEC, {}, "V") == 0


@pytest.mark.parametrize(
    ("group", "vector", "expected"),
    [
        ("C", [0, 1, 2, 3, 3], 'group "C" does not have each of its 5 units once'),
        ("C", [0, 1, 2, 3], "int64 of shape [4], not 5 numbers"),
        ("V", [0, 1, 2, 3], "int64 of shape [4], not 12 numbers"),
        ("V", [0, 1, 2, 3] * 2 + [0, 0, 1, 2], "does not have each of its 4 units once"),
        ("R", [1, 0, 2, 3, 4, 5], 're-orders "R", which is pinned (kept)'),
        ("X", [0], 'has the group "X", which the model\'s spec lacks'),
    ],
)
def test_what_is_no_permutation_is_refused(group, vector, expected):
    with pytest.raises(MismatchError) as caught:
        check_permutation(SPEC, {group: np.array(vector)})
    (problem,) = caught.value.problems
    assert problem.startswith("cannot use this permutation: ")
    assert expected in problem


RECORDS = {"a": {"name": "a", "digest": "a" * 32}, "b": {"name": "b", "digest": "b" * 32}}


def test_a_file_of_a_permutation_says_all_that_is_needed(tmp_path):
    place, permutation = tmp_path / "p.safetensors", random_permutation(SPEC, 1)
    save_permutation(place, SPEC, permutation, **RECORDS, method="match_weights", settings={"seed": 1})
    found = load_permutation(place)
    assert found.spec == SPEC
    assert same(found.permutation, permutation)
    assert (found.digest_a, found.digest_b) == ("a" * 32, "b" * 32)
    assert found.settings == {"seed": 1}
    before = place.read_bytes()
    with pytest.raises(OutputError, match="--force"):
        save_permutation(place, SPEC, permutation, **RECORDS, method="match_weights", settings={"seed": 1})
    save_permutation(place, SPEC, permutation, **RECORDS, method="match_weights", settings={"seed": 1}, force=True)
    assert place.read_bytes() == before


def test_groups_that_were_left_out_are_written_in_their_old_order(tmp_path):
    save_permutation(tmp_path / "p.safetensors", SPEC, {}, **RECORDS, method="none", settings={})
    assert same(load_permutation(tmp_path / "p.safetensors").permutation, identity(SPEC))


def test_other_files_are_no_permutations(tmp_path):
    place = tmp_path / "p.safetensors"
    save_artifact(place, {"x": np.zeros(3)}, kind="fisher", method="?", settings={})
    with pytest.raises(CheckpointError, match="not 'permutation'"):
        load_permutation(place)
    save_artifact(place, {"x": np.zeros(3)}, kind="permutation", method="?", settings={}, force=True)
    with pytest.raises(CheckpointError, match="its metadata lack spec, digest_a, digest_b"):
        load_permutation(place)
    bad = {**identity(SPEC), "C": np.zeros(5, dtype=np.int64)}
    save_artifact(place, bad, kind="permutation", method="?", settings={}, force=True, spec=SPEC.to_json(),
                  digest_a="a", digest_b="b")  # fmt: skip
    with pytest.raises(MismatchError, match="each of its 5 units once"):
        load_permutation(place)
