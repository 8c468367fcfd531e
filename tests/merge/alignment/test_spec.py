"""What a spec says, how it is written down, and what is wrong with others."""

from __future__ import annotations

import json

import pytest

from graftwork.merge.alignment.spec import (
    Group,
    PermutationSpec,
    TensorAxes,
    concatenation,
    plain,
    product,
)
from graftwork.merge.errors import MismatchError, RecipeError

HEADS = {
    "groups": {
        "G": 2,
        "Q": {"size": 3, "within": "G"},
        "V": {"size": 4, "within": "G"},
        "C": 5,
        "R": {"size": 6, "pinned": "kept"},
    },
    "tensors": {
        "q": [["G", "Q", 4], "R"],
        "k": [["G", 4], "R"],
        "v": [["G", "V"], "R"],
        "o": ["R", ["G", "Q", "V"]],
        "flat": [None, ["C", 9]],
        "last": [[7, "C"]],
        "joined": [{"segments": ["C", ["G", "V"], 8, "C"]}],
        "mean": ["C"],
        "count": [],
    },
    "uncounted": ["mean", "count"],
    "pinned": [["q", 0, "rotary positions"]],
    "tied": {"head": "flat"},
    "source": "by hand",
}
SHAPES = {
    "q": (24, 6),
    "k": (8, 6),
    "v": (8, 6),
    "o": (6, 24),
    "flat": (11, 45),
    "last": (35,),
    "joined": (26,),
    "mean": (5,),
    "count": (),
}


def spec(**changes):
    return PermutationSpec.from_json(json.dumps({**HEADS, **changes}))


def problems(error, call, *arguments, **keywords):
    with pytest.raises(error) as caught:
        call(*arguments, **keywords)
    assert all("\n" not in line for line in caught.value.problems)
    return list(caught.value.problems)


def test_a_spec_survives_its_json():
    found = spec()
    assert PermutationSpec.from_json(found.to_json()) == found
    assert PermutationSpec.from_json(found.to_json()).to_json() == found.to_json()
    assert found.tensors["o"].axes == ((("R",),), (("G", "Q", "V"),))
    assert found.tensors["joined"].axes == ((("C",), ("G", "V"), (8,), ("C",)),)
    assert found.tensors["mean"] == TensorAxes((plain("C"),), counted=False)
    assert found.groups["V"] == Group(4, "G")
    assert found.pinned == {("q", 0): "rotary positions"}
    assert found.source == "by hand"


def test_forms_that_functions_make_are_those_of_the_json():
    assert plain(None) is None
    assert plain("C") == (("C",),)
    assert product("C", 9) == (("C", 9),)
    assert product("C", 1) == plain("C")
    assert concatenation(plain("C"), product("G", "V"), 8, plain("C")) == spec().tensors["joined"].axes[0]


def test_lengths_follow_from_the_forms():
    found = spec().verified(SHAPES)
    assert {
        name: [found.axis_length(axis) for axis in tensor.axes] for name, tensor in found.tensors.items()
    } == {name: [None if (name, number) == ("flat", 0) else length for number, length in enumerate(shape)]
          for name, shape in SHAPES.items()}  # fmt: skip


def test_a_spec_knows_where_each_group_acts():
    found = spec()
    assert {(use.tensor, use.axis, use.segment, use.factor) for use in found.uses("V")} == {
        ("joined", 0, 1, 1),
        ("o", 1, 0, 2),
        ("v", 0, 0, 1),
    }
    assert [use.segment for use in found.uses("C") if use.tensor == "joined"] == [0, 3]
    assert "mean" in {use.tensor for use in found.uses("C")}
    assert "mean" not in {use.tensor for use in found.uses("C", counted=True)}
    assert found.blocks("V") == 2
    assert found.blocks("G") == 1
    assert found.inner_groups("G") == ("Q", "V")
    assert found.free_groups == ("G", "Q", "V", "C")


def test_a_tensor_tied_to_one_that_is_there_is_not_counted_twice():
    found = PermutationSpec.from_json('{"groups": {"R": 3}, "tensors": {"wte": [null, "R"], "head": [null, "R"]}, '
                                      '"tied": {"head": "wte"}}')  # fmt: skip
    assert [use.tensor for use in found.uses("R", counted=True)] == ["wte"]
    for name in ("wte", "head"):  # either name will do
        assert list(found.verified({name: (9, 3)}).tensors) == [name]
    assert problems(MismatchError, found.verified, {"other": (2, 2)})[0].endswith("which the spec names")


def test_sizes_of_groups_may_be_left_to_the_shapes():
    short = json.dumps({name: axes for name, axes in HEADS["tensors"].items() if name in {"flat", "last", "mean"}})
    found = PermutationSpec.from_json(short, shapes=SHAPES)
    assert found.groups == {"C": Group(5)}
    (problem,) = problems(RecipeError, PermutationSpec.from_json, short)
    assert 'the size of group "C" cannot be told' in problem


def test_pinning_leaves_the_original_alone():
    found = spec()
    pinned = found.pin({"C": "it was asked for"})
    assert pinned.free_groups == ("G", "Q", "V")
    assert pinned.groups["C"].pinned == "it was asked for"
    assert "C" in found.free_groups
    (problem,) = problems(RecipeError, found.pin, {"D": "?"})
    assert problem == 'cannot pin "D": the permutation spec has no such group'
    with pytest.raises(TypeError):
        found.groups["C"] = Group(1)


def test_every_misfit_is_one_line_with_tensor_and_axis():
    shapes = {**SHAPES, "q": (25, 6), "mean": (5, 1), "extra.weight": (3, 4), "scalar": ()}
    del shapes["flat"]
    found = problems(MismatchError, spec().verified, shapes, what='"b.safetensors"')
    assert len(found) == 4
    assert all(line.startswith('cannot align "b.safetensors" with this permutation spec: ') for line in found)
    text = "\n".join(found)
    assert '"q" axis 0 has 25 entries, but its form ["G", "Q", 4] has 24 (group "G" has 2, "Q" has 3)' in text
    assert '"mean" has 2 axes [5, 1], the spec has 1' in text
    assert 'it lacks the tensor "flat", which the spec names' in text
    assert 'does not cover "extra.weight" [3, 4]' in text
    assert "scalar" not in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tensors": {"q": ["X"]}, "groups": {}}, 'the size of group "X" cannot be told from any tensor'),
        ({"groups": {**HEADS["groups"], "G": 0}}, 'group "G" has the size 0'),
        (
            {"groups": {**HEADS["groups"], "V": {"size": 4, "within": "nobody"}}},
            'is within "nobody", which is no group',
        ),
        ({"groups": {**HEADS["groups"], "V": {"size": 4, "within": "Q"}}}, "one level is all there is"),
        ({"tensors": {"v": ["V", "G"]}}, '"v" axis 0 has "V", whose order depends on "G", but not that group itself'),
        ({"tensors": {"v": [["C", "C"]]}}, "has a group twice in one product"),
        ({"tensors": {"v": [["C", 0]]}}, "has a factor below 1"),
        ({"tensors": {"v": [{"parts": ["C"]}]}}, '"v" axis 0 is an object of 1 keys, not {"segments": [form, …]}'),
        ({"tensors": {"v": [1.5]}}, '"v" axis 0 has 1.5, not null, a group, a length, or a list of these'),
        ({"tensors": {"v": "C"}}, '"v" has "C", not a list of axes'),
        ({"tensors": []}, '"tensors" is [], not an object'),
        ({"uncounted": ["mena"]}, 'did you mean "mean"?'),
        ({"pinned": [["q", 7, "why"]]}, 'the pinned axis 7 of "q" is none of its 2'),
        ({"pinned": [["q"]]}, '"pinned" has ["q"], not [tensor, axis, reason]'),
        ({"tensor": {}}, 'unknown key "tensor"; did you mean "tensors"?'),
        ({"groups": {**HEADS["groups"], "C": "five"}}, 'group "C" has "five", not a size'),
    ],
)
def test_what_is_wrong_with_a_spec_file_is_said(changes, expected):
    if isinstance(changes.get("tensors"), dict):
        changes = {"uncounted": [], "pinned": [], **changes}
    found = problems(RecipeError, spec, **changes)
    assert all(line.startswith("cannot read this file as a permutation spec: ") for line in found)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "holds [], not an object"),
        ("3", "holds 3"),
        ('{"tensors": {}, "tensors": {}}', "twice"),
    ],
)
def test_what_is_no_spec_at_all_is_said(text, expected):
    (problem,) = problems(RecipeError, PermutationSpec.from_json, text, what='"spec.json"')
    assert problem.startswith('cannot read "spec.json" as a permutation spec: ')
    assert expected in problem
