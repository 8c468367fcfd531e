from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.merge.methods.registry import Parameter
from graftwork.merge.parameters import (
    ParameterProblem,
    convert,
    nearest_key,
    normalise,
    position,
    resolve,
    unmatched_filters,
)

WEIGHT = Parameter("weight", "share", per_model=True)
DENSITY = Parameter("density", "kept share", default=1.0, per_model=True, minimum=0, maximum=1)
COUNT = Parameter("max_iter", "steps", type=int, default=10, minimum=0)
FLAG = Parameter("normalize", "divide", type=bool, default=True)
WORD = Parameter("rescale", "how", type=(True, False, "density"), default=True)


def value(setting, parameter=WEIGHT, name="layers.0.mlp.w", at=0.0):
    return resolve(parameter, [("parameters", {parameter.name: setting})], name=name, position=at)


# Position.


def test_layers_stand_from_zero_to_one():
    assert [position(index, 5) for index in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_an_only_layer_stands_at_one():
    assert position(0, 1) == 1


def test_a_layer_outside_the_stack_has_no_position():
    with pytest.raises(ValueError, match="layer 3 is not one of 3"):
        position(3, 3)


# Gradients.


def test_three_values_over_six_layers():
    found = [value([0.25, 0.5, 1], at=position(index, 6)) for index in range(6)]
    assert found == pytest.approx([0.25, 0.35, 0.45, 0.6, 0.8, 1.0], abs=1e-12)


def test_a_tensor_outside_the_layers_takes_the_first_value():
    assert value([0.25, 0.5, 1], name="lm_head.weight", at=0.0) == 0.25


def test_a_gradient_of_one_value_is_that_value():
    assert [value([0.3], at=t) for t in (0.0, 0.5, 1.0)] == [0.3] * 3


def test_words_and_booleans_step_instead_of_blending():
    assert [value([True, False], FLAG, at=t) for t in (0.0, 0.99, 1.0)] == [True, True, False]
    assert [value(["density", True], WORD, at=t) for t in (0.0, 0.5, 1.0)] == ["density", "density", True]


@pytest.mark.parametrize("count", [2, 3, 7, 23, 50, 99])
def test_a_word_for_each_layer_reaches_exactly_its_layer(count):
    words = [index % 2 == 0 for index in range(count)]
    assert [value(words, FLAG, at=position(index, count)) for index in range(count)] == words


def test_whole_numbers_stay_whole():
    assert [value([10, 20], COUNT, at=t) for t in (0.0, 0.33, 1.0)] == [10, 13, 20]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0, 1))
def test_a_gradient_stays_between_its_values(values, t):
    found = value(values, at=t)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_a_gradient_with_a_value_for_each_layer_gives_that_value(values):
    for index, expected in enumerate(values):
        assert value(values, at=position(index, len(values))) == pytest.approx(expected, abs=1e-9)


# Filters and scopes.


def test_the_first_matching_filter_counts():
    setting = [{"filter": "mlp", "value": 0.5}, {"filter": "mlp.w", "value": 0.1}, {"value": 0.9}]
    assert value(setting) == 0.5
    assert value(setting, name="layers.0.attn.w") == 0.9


def test_the_value_of_a_filter_may_be_a_gradient():
    assert value([{"filter": "mlp", "value": [0, 1]}], at=0.25) == 0.25


@pytest.mark.parametrize("wanted", [None, "", "*"])
def test_filters_that_match_everything(wanted):
    assert value({"filter": wanted, "value": 0.5}) == 0.5


@pytest.mark.parametrize("setting", [[{"filter": "mlp", "value": 0.5}], {"filter": "mlp", "value": 0.5}])
def test_without_a_match_the_next_scope_is_asked(setting):
    scopes = [("models[0].parameters", {"weight": setting}), ("parameters", {"weight": 0.125})]
    assert resolve(WEIGHT, scopes, name="layers.0.mlp.w", position=0) == 0.5
    assert resolve(WEIGHT, scopes, name="layers.0.attn.w", position=0) == 0.125


def test_an_empty_list_yields_nothing():
    scopes = [("models[0].parameters", {"weight": []}), ("parameters", {"weight": 0.125})]
    assert resolve(WEIGHT, scopes, name="x", position=0) == 0.125


def test_the_nearest_scope_wins_even_with_zero():
    scopes = [("models[0].parameters", {"weight": 0}), ("parameters", {"weight": 1})]
    assert resolve(WEIGHT, scopes, name="x", position=0) == 0


def test_the_default_is_last():
    assert resolve(DENSITY, [("parameters", {})], name="x", position=0) == 1.0


def test_a_missing_value_names_where_it_could_stand():
    with pytest.raises(ParameterProblem, match=r"^weight has no value; give it as models\[0\].parameters.weight or"):
        resolve(WEIGHT, [("models[0].parameters", {}), ("parameters", {})], name="x", position=0)


def test_a_wrong_value_names_its_scope():
    with pytest.raises(ParameterProblem, match=r'^parameters.weight: must be a number, not "abc"$'):
        value("abc")


@pytest.mark.parametrize("setting", [[{"filter": "x"}], {"filter": "layers"}, [1, {"value": 2}], {"value": []}])
def test_malformed_settings_are_problems(setting):
    with pytest.raises(ParameterProblem):
        value(setting)


# Types.


@pytest.mark.parametrize(("given", "wanted"), [(1, 1.0), ("1e-10", 1e-10), (" 2 ", 2.0), ("-.5", -0.5), (0.25, 0.25)])
def test_numbers_may_be_numeric_text(given, wanted):
    assert convert(WEIGHT, given) == wanted


@pytest.mark.parametrize("given", [True, None, "", "x", "nan", math.nan, math.inf, "1_0", "٣", {}, [], 10**400, b"1"])
def test_what_is_no_finite_number_is_refused(given):
    with pytest.raises(ParameterProblem, match=r"^must be a (finite )?number, not "):
        convert(WEIGHT, given)


@pytest.mark.parametrize("given", [True, 1, 1.0, "true", "True", "1", "1.0"])
def test_true_has_several_forms(given):
    assert convert(FLAG, given) is True


@pytest.mark.parametrize("given", [False, 0, 0.0, "false", "0"])
def test_false_has_several_forms(given):
    assert convert(FLAG, given) is False


@pytest.mark.parametrize("given", [2, 0.5, "maybe", None, []])
def test_other_values_are_neither_true_nor_false(given):
    with pytest.raises(ParameterProblem, match="must be true or false"):
        convert(FLAG, given)


def test_whole_numbers():
    assert convert(COUNT, "12") == 12
    assert isinstance(convert(COUNT, 12.0), int)
    with pytest.raises(ParameterProblem, match="must be a whole number"):
        convert(COUNT, 0.5)


def test_ranges():
    with pytest.raises(ParameterProblem, match=r"^must be from 0 to 1, not 1.5$"):
        convert(DENSITY, 1.5)
    with pytest.raises(ParameterProblem, match=r"^must be at least 0, not -1$"):
        convert(COUNT, -1)


def test_words_get_a_suggestion():
    assert convert(WORD, "density") == "density"
    assert convert(WORD, 0) is False
    with pytest.raises(
        ParameterProblem, match=r'one of true, false, "density", not "densty"; did you mean "density"\?'
    ):
        convert(WORD, "densty")


# Checking a whole setting.


def test_every_wrong_value_of_a_setting_is_named_by_its_place():
    setting = [{"filter": "a", "value": ["x", 1]}, {"filter": 3, "value": 0.5}, {"filtr": "b", "value": None}, 7]
    _, problems, _ = normalise(WEIGHT, setting)
    assert [path for path, _ in problems] == ["[0].value[0]", "[1].filter", "[2]", "[2].value", "[3]"]


def test_a_normalised_setting_has_the_same_values():
    setting = [{"filter": "mlp", "value": ["0.5", 1]}, {"value": "1e-1"}]
    found, problems, warnings = normalise(WEIGHT, setting)
    assert found == ({"value": (0.5, 1.0), "filter": "mlp"}, {"value": 0.1})
    assert not problems
    assert not warnings


def test_a_strange_key_beside_value_is_a_warning():
    _, problems, warnings = normalise(WEIGHT, {"value": 1, "comment": "x"})
    assert not problems
    assert len(warnings) == 1


def test_filters_that_match_nothing_are_named():
    names = ["model.layers.0.mlp.down_proj.weight"]
    scopes = [("parameters", {"t": ({"filter": "down_porj", "value": 1.0}, {"filter": r"layers\.0", "value": 1.0})})]
    first, second = unmatched_filters(scopes, names)
    assert first == 'parameters.t: the filter "down_porj" matches no tensor; did you mean "down_proj"?'
    assert "plain part of a name" in second


# Misspellings.


@pytest.mark.parametrize(
    ("word", "key"),
    [("densty", "density"), ("dtpye", "dtype"), ("paramters", "parameters"), ("layer_rnage", "layer_range"),
     ("Weight", "weight"), ("base-model", "base_model")],
)  # fmt: skip
def test_misspellings(word, key):
    assert nearest_key(word, ["name", "t", key]) == key


@pytest.mark.parametrize("word", ["tol", "note", "s", "foo", "", "embed_slerp"])
def test_other_words_are_no_misspellings(word):
    assert nearest_key(word, ["name", "t", "density", "parameters", "merge_method"]) is None
