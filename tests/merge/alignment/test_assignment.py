"""Linear assignment: exact whatever the matrix, faithful to the order so far, and usable as a start for the next."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from graftwork.merge.alignment import assignment
from graftwork.merge.alignment.assignment import Assignment, solve_assignment
from graftwork.merge.errors import DataError, DependencyError

KINDS = ("uniform", "normal", "tied", "whole numbers", "rank one", "low rank", "planted", "constant", "offsets", "dead")


def score_of(kind: str, size: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    random = np.random.default_rng(seed)
    normal = random.standard_normal((size, size))
    match kind:
        case "uniform":
            score = random.random((size, size))
        case "normal":
            score = normal
        case "tied":
            score = random.integers(0, 3, (size, size)).astype(float)
        case "whole numbers":
            score = random.integers(-(10**6), 10**6, (size, size)).astype(float)
        case "rank one":
            score = np.outer(random.standard_normal(size), random.standard_normal(size)) + 1e-3 * normal
        case "low rank":
            gains = 1 + 0.25 * random.standard_normal((2, size, 6))
            score = gains[0] @ gains[1].T + 1e-3 * normal
        case "planted":
            rows = random.standard_normal((size, 64))
            score = rows @ rows[random.permutation(size)].T + 0.1 * normal
        case "constant":
            score = np.full((size, size), 0.3)
        case "offsets":
            score = normal * 1e-2 + 100 * random.standard_normal((size, 1)) + 100 * random.standard_normal(size)
        case _:
            score = normal * (random.random(size) < 0.5)[:, None]
    return score.astype(dtype)


def optimum(score: np.ndarray) -> float:
    rows, columns = linear_sum_assignment(score.astype(np.float64), maximize=True)
    return float(score[rows, columns].sum(dtype=np.float64))


def assert_optimal(score: np.ndarray, solved: Assignment) -> None:
    size = len(score)
    assert sorted(solved.columns) == list(range(size))
    slack = 2e-9 * size * float(np.abs(score).max())
    assert abs(solved.value - optimum(score)) <= slack
    assert solved.value == pytest.approx(float(score[np.arange(size), solved.columns].sum(dtype=np.float64)))


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 150),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_own_solver_finds_what_scipy_finds(kind: str, size: int, seed: int, dtype: type) -> None:
    score = score_of(kind, size, seed, dtype)
    assert_optimal(score, solve_assignment(score, solver="own"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["own", "lapx", "scipy", "auto"])
def test_every_solver_is_exact(kind: str, solver: assignment.Solver) -> None:
    if solver == "lapx":
        pytest.importorskip("lap")
    score = score_of(kind, 200, 1)
    assert_optimal(score, solve_assignment(score, solver=solver))


def test_small_problems_are_solved_as_by_trying_every_order() -> None:
    for seed, kind in itertools.product(range(20), KINDS):
        score = score_of(kind, 5, seed, np.float64)
        best = max(
            float(score[np.arange(5), list(order)].sum(dtype=np.float64)) for order in itertools.permutations(range(5))
        )
        for solver in ("own", "scipy"):
            assert solve_assignment(score, solver=solver).value == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_duals_prove_the_optimum(kind: str) -> None:
    score = score_of(kind, 150, 4, np.float64)
    solved = solve_assignment(score, solver="own")
    assert solved.duals is not None
    reduced = score - solved.duals
    bound = reduced.max(axis=1).sum() + solved.duals.sum()  # no order can have more than this
    assert solved.value == pytest.approx(bound, abs=1e-8 * len(score) * np.abs(score).max())


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), change=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))
def test_prices_of_a_similar_problem_are_a_start_and_no_more(kind: str, seed: int, change: float) -> None:
    score = score_of(kind, 90, seed)
    first = solve_assignment(score, solver="own")
    noise = np.random.default_rng(seed + 1).standard_normal(score.shape).astype(np.float32)
    other = score + np.float32(change * score.std()) * noise
    assert_optimal(other, solve_assignment(other, current=first.columns, duals=first.duals, solver="own"))
    senseless = np.random.default_rng(seed).standard_normal(90) * 1e3
    assert_optimal(other, solve_assignment(other, current=first.columns, duals=senseless, solver="own"))


@pytest.mark.parametrize("solver", ["own", "scipy"])
@pytest.mark.parametrize("kind", ["tied", "constant", "dead", "normal"])
def test_an_order_that_is_as_good_is_kept(kind: str, solver: assignment.Solver) -> None:
    score = score_of(kind, 100, 7)
    best = solve_assignment(score, solver="own").columns
    again = solve_assignment(score, current=best, solver=solver)
    np.testing.assert_array_equal(again.columns, best)
    assert again.gain == 0.0


@pytest.mark.parametrize("solver", ["own", "scipy"])
def test_dead_units_keep_their_place_while_others_move(solver: assignment.Solver) -> None:
    random = np.random.default_rng(0)
    score = np.zeros((80, 80), np.float32)
    order = random.permutation(40)
    score[:40, :40] = -1
    score[np.arange(40), order] = 1
    solved = solve_assignment(score, current=np.arange(80), solver=solver)
    np.testing.assert_array_equal(solved.columns, np.concatenate([order, np.arange(40, 80)]))


def test_gain_is_what_the_new_order_has_more() -> None:
    score = score_of("normal", 60, 3)
    current = np.random.default_rng(1).permutation(60)
    solved = solve_assignment(score, current=current)
    before = score[np.arange(60), current].sum(dtype=np.float64)
    assert solved.gain == pytest.approx(solved.value - before, rel=1e-6)
    assert solved.gain > 0


def test_tiny_problems() -> None:
    assert list(solve_assignment(np.ones((1, 1), np.float32), solver="own").columns) == [0]
    assert solve_assignment(np.ones((0, 0), np.float32)).value == 0.0


def test_what_is_no_score_is_refused() -> None:
    with pytest.raises(ValueError, match="square float matrix, not float32 of shape"):
        solve_assignment(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="int64"):
        solve_assignment(np.ones((2, 2), np.int64))
    for bad in (np.nan, np.inf, -np.inf):
        score = np.ones((30, 30), np.float32)
        score[3, 4] = bad
        with pytest.raises(DataError, match="NaN or infinity"):
            solve_assignment(score)


def test_missing_lapx_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assignment._lapx_module.cache_clear()

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(assignment.importlib, "import_module", missing)
    with pytest.raises(DependencyError, match=r'pip install "graftwork\[alignment\]"'):
        solve_assignment(np.ones((30, 30), np.float32), solver="lapx")
    assignment._lapx_module.cache_clear()
