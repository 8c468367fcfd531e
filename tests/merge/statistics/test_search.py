"""Searching for weights: it finds a clear optimum, and keeps equal weights where there is none."""

from __future__ import annotations

import pytest

from graftwork.merge.errors import TaskError
from graftwork.merge.statistics.search import search_weights


def scored(target, examples=10_000, slope=0.8):
    def score(weights):
        far = sum(abs(left - right) for left, right in zip(weights, target, strict=True))
        return [(round(examples * (0.95 - slope * far / 2)), examples)] * 2

    return score


def test_two_models_are_searched_on_a_grid():
    found = search_weights(2, scored((0.8, 0.2)))
    assert found.weights == found.best == pytest.approx((0.8, 0.2))
    assert found.evaluations == 11
    assert found.best_accuracy > found.uniform_accuracy


def test_more_models_are_searched_within_the_budget():
    found = search_weights(4, scored((0.7, 0.1, 0.1, 0.1)), budget=40)
    assert found.evaluations <= 40
    assert found.weights == found.best
    assert found.weights[0] > 0.5
    assert sum(found.weights) == pytest.approx(1.0)
    assert search_weights(4, scored((0.7, 0.1, 0.1, 0.1)), budget=40) == found


def test_equal_weights_stay_where_the_gain_is_within_chance():
    found = search_weights(4, scored((0.7, 0.1, 0.1, 0.1), examples=20, slope=0.1))
    assert found.best_accuracy >= found.uniform_accuracy
    assert found.weights == (0.25,) * 4


def test_a_search_without_data_or_choice_is_refused():
    with pytest.raises(TaskError, match="no validation examples"):
        search_weights(2, lambda weights: [(0, 0)])
    with pytest.raises(TaskError, match="two at least"):
        search_weights(1, scored((1.0,)))
