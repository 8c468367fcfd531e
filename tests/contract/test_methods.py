"""What every merge method must do: the table's laws, the identities between methods, and the bars of accuracy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from graftwork.merge.divergence import divergence
from graftwork.merge.dtypes import promoted
from graftwork.merge.errors import RecipeError
from graftwork.merge.memory import merge_arrays
from graftwork.merge.methods import registry
from tests.contract.table import ROWS, W, broken, chosen, laws, merged, values_of, words_of
from tests.reference import divergence_of_rows, excess, reference, reference_model, ulp

GENERATOR = np.random.default_rng(41)
SHAPE = (12, 16)
BASE = GENERATOR.normal(size=SHAPE)
COMMON = GENERATOR.normal(size=SHAPE) * 0.2
MODELS = [BASE + COMMON + GENERATOR.normal(size=SHAPE) * size for size in (0.3, 0.2, 0.4)]
EXTRA = GENERATOR.normal(size=SHAPE)
ALL = [(row, dict(row.parameters)) for row in ROWS]


def over(cases):
    return pytest.mark.parametrize(("row", "parameters"), cases, ids=[row.label for row, _ in cases])


def result(row, parameters, base=BASE, models=None, **options):
    models = MODELS[: row.models] if models is None else models
    return merged(row.method, base if row.base else None, models, parameters, **options)


def is_near(row, left, right):
    return np.max(np.abs(left - right)) <= row.tolerance * max(np.max(np.abs(right)), 1e-300)


def assert_near(row, left, right):
    difference = np.max(np.abs(left - right)) / np.max(np.abs(right))
    assert difference <= row.tolerance, f"{row.label} is off by {difference:.3g}"


# ---------------------------------------------------------------- the table itself


def reads_files(name):
    """Say whether a method needs what was measured or learned; these have tests of their own, with such files."""
    return bool(registry.get(name).statistics or registry.get(name).shared)


def test_every_method_has_a_row():
    assert {row.method for row in ROWS} == {name for name in registry.names() if not reads_files(name)}


def test_every_parameter_with_an_effect_is_in_some_row():
    given = {(row.method, name) for row in ROWS for name in (*row.parameters, *row.neutral)}
    optional = {"dot_threshold", "nu", "max_iter", "tol", "seed", "scope", "lambda", "normalize", "rescale", "weight"}
    for name in {row.method for row in ROWS}:
        for parameter in registry.get(name).parameters.values():
            if parameter.has_effect and parameter.name not in optional:
                assert (name, parameter.name) in given


@over(ALL)
def test_shape_and_dtype_are_kept_and_values_are_finite(row, parameters):
    for shape in ((), (1,), (5, 1), (1, 5), (0,), (3, 0), (2, 3, 2, 2)):
        generator = np.random.default_rng(3)
        inputs = [generator.normal(size=shape) for _ in range(row.models + 1)]
        output = merge_arrays(
            row.method,
            [{"tensor": ("F64", model)} for model in inputs[1:]],
            {"tensor": ("F64", inputs[0])} if row.base else None,
            parameters=parameters,
        )["tensor"]
        assert output.shape == shape
        assert output.dtype == np.float64
        assert np.isfinite(output).all()


@over(ALL)
def test_a_second_run_gives_the_same_bits(row, parameters):
    assert result(row, parameters).tobytes() == result(row, parameters).tobytes()


# ---------------------------------------------------------------- laws


@over(laws("A"))
def test_a_if_every_input_is_the_base_so_is_the_result(row, parameters):
    for dtype in ("F64", "F32", "BF16", "F16"):
        base = values_of(words_of(BASE, dtype), dtype)
        output = result(row, parameters, base, [base] * row.models, dtype=dtype)
        if dtype in ("BF16", "F16"):
            assert np.array_equal(output, base)
        else:
            assert np.all(np.abs(output - base) <= (1 if dtype == "F32" else 4) * ulp(base, dtype))


@over(laws("B"))
def test_b_if_all_models_agree_the_result_is_what_they_are(row, parameters):
    assert_near(row, result(row, parameters, models=[MODELS[0]] * row.models), MODELS[0])


@over(laws("C"))
def test_c_the_order_of_the_models_does_not_matter(row, parameters):
    order = list(reversed(range(row.models))) if row.models < 3 else [2, 0, 1]
    permuted = result(
        row, chosen(row.method, parameters, order), models=[MODELS[number] for number in order], streams=order
    )
    assert_near(row, permuted, result(row, parameters))


@over(laws("D"))
def test_d_a_common_tensor_is_only_added(row, parameters):
    moved = result(row, parameters, BASE + EXTRA, [model + EXTRA for model in MODELS[: row.models]])
    assert_near(row, moved, result(row, parameters) + EXTRA)


@over(laws("E"))
def test_e_units_do_not_matter(row, parameters):
    scaled = result(row, parameters, 8 * BASE, [8 * model for model in MODELS[: row.models]])
    assert_near(row, scaled, 8 * result(row, parameters))


@over(laws("F"))
def test_f_the_sign_of_everything_does_not_matter(row, parameters):
    negated = result(row, parameters, -BASE, [-model for model in MODELS[: row.models]])
    assert_near(row, negated, -result(row, parameters))


def tripled(parameters):
    return {**parameters, "weight": tuple(3 * value for value in parameters["weight"])}


@over(laws("G"))
def test_g_only_the_ratios_of_weights_matter(row, parameters):
    assert_near(row, result(row, tripled(parameters)), result(row, parameters))


@over(laws("V"))
def test_v_three_times_the_weights_go_three_times_as_far(row, parameters):
    assert_near(row, result(row, tripled(parameters)) - BASE, 3 * (result(row, parameters) - BASE))


@over(laws("H"))
def test_h_what_a_model_of_weight_zero_holds_does_not_matter(row, parameters):
    last = row.models - 1
    idle = {**parameters, "weight": (*parameters["weight"][:last], 0.0)}
    if row.models == 2:
        assert_near(row, result(row, idle), MODELS[0])
        return
    assert_near(row, result(row, idle), result(row, idle, models=[*MODELS[:last], BASE + 0.3 * EXTRA]))


@over([(row, parameters) for row, parameters in laws("H") if row.label in ("linear", "ties", "della", "karcher")])
def test_h_a_model_of_weight_zero_is_as_if_absent(row, parameters):
    """Two models are kernels of their own, which take long to compile: some methods speak for all."""
    idle = {**parameters, "weight": (*parameters["weight"][:2], 0.0)}
    fewer = result(row, chosen(row.method, parameters, (0, 1)), models=MODELS[:2], streams=(0, 1))
    assert_near(row, result(row, idle), fewer)


@over(laws("I"))
def test_i_a_model_may_be_split_in_two_halves(row, parameters):
    whole = chosen(row.method, parameters, (0, 1, 1))
    first, second, _ = whole["weight"]
    split = {**whole, "weight": (first, second / 2, second / 2)}
    whole["weight"] = (first, second, 0.0)
    models = [MODELS[0], MODELS[1], MODELS[1]]
    assert_near(
        row,
        result(row, split, models=models, streams=(0, 1, 1)),
        result(row, whole, models=models, streams=(0, 1, 1)),
    )


@over(laws("J"))
def test_j_one_more_model_that_is_the_base_changes_nothing(row, parameters):
    models = [*MODELS[:2], BASE]
    if "weight" in parameters:
        idle = {**parameters, "weight": (*parameters["weight"][:2], 0.0)}
        assert_near(row, result(row, parameters, models=models), result(row, idle, models=models))
        return
    fewer = result(row, chosen(row.method, parameters, (0, 1)), models=MODELS[:2], streams=(0, 1))
    assert_near(row, result(row, parameters, models=models), fewer)


@over(laws("K"))
def test_k_one_model_of_weight_one_is_the_result(row, parameters):
    single = chosen(row.method, parameters, (0,))
    if "weight" in single:
        single["weight"] = (1.0,)
    assert_near(row, result(row, single, models=MODELS[:1]), MODELS[0])


def orthogonal(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


@over(laws("L"))
def test_l_orthogonal_maps_of_the_flat_tensor_commute(row, parameters):
    rotation = orthogonal(BASE.size, 5)

    def rotated(array):
        return (rotation @ array.reshape(-1)).reshape(SHAPE)

    output = result(row, parameters, rotated(BASE), [rotated(model) for model in MODELS[: row.models]])
    assert_near(row, output, rotated(result(row, parameters)))


@over(laws("M"))
def test_m_orthogonal_maps_of_rows_and_columns_commute(row, parameters):
    left, right = orthogonal(SHAPE[0], 6), orthogonal(SHAPE[1], 7)
    output = result(row, parameters, left @ BASE @ right, [left @ model @ right for model in MODELS[: row.models]])
    assert_near(row, output, left @ result(row, parameters) @ right)


@over(laws("N"))
def test_n_the_order_of_the_elements_does_not_matter(row, parameters):
    order = np.random.default_rng(8).permutation(BASE.size)

    def shuffled(array):
        return array.reshape(-1)[order].reshape(SHAPE)

    output = result(row, parameters, shuffled(BASE), [shuffled(model) for model in MODELS[: row.models]])
    assert_near(row, output, shuffled(result(row, parameters)))


@over(laws("O"))
def test_o_every_entry_lies_between_the_inputs(row, parameters):
    output = result(row, parameters)
    inputs = np.stack([*MODELS[: row.models], *([BASE] if row.base else [])])
    slack = 1e-14 * np.max(np.abs(inputs))
    assert np.all(output >= inputs.min(0) - slack)
    assert np.all(output <= inputs.max(0) + slack)


@over(laws("P"))
def test_p_lambda_scales_the_distance_from_the_base(row, parameters):
    factor = "lambda" if "lambda" in registry.get(row.method).parameters else "scale"
    full = result(row, {**parameters, factor: 1.0}) - BASE
    assert_near(row, result(row, {**parameters, factor: 0.25}) - BASE, 0.25 * full)


LAW_TESTS = {
    "A": test_a_if_every_input_is_the_base_so_is_the_result,
    "B": test_b_if_all_models_agree_the_result_is_what_they_are,
    "D": test_d_a_common_tensor_is_only_added,
    "E": test_e_units_do_not_matter,
    "F": test_f_the_sign_of_everything_does_not_matter,
    "G": test_g_only_the_ratios_of_weights_matter,
    "J": test_j_one_more_model_that_is_the_base_changes_nothing,
    "K": test_k_one_model_of_weight_one_is_the_result,
    "L": test_l_orthogonal_maps_of_the_flat_tensor_commute,
    "N": test_n_the_order_of_the_elements_does_not_matter,
    "O": test_o_every_entry_lies_between_the_inputs,
    "V": test_v_three_times_the_weights_go_three_times_as_far,
}
NOT = [(letter, row, parameters) for letter in LAW_TESTS for row, parameters in broken(letter)]


@pytest.mark.parametrize(("letter", "row", "parameters"), NOT, ids=[f"{letter}-{row.label}" for letter, row, _ in NOT])
def test_laws_that_are_not_claimed_do_not_hold(letter, row, parameters):
    if letter == "J" and row.models == 2:  # it takes no third model: the second one is the base
        output = result(row, parameters, models=[MODELS[0], BASE])
        assert not is_near(row, output, MODELS[0])
        return
    with pytest.raises(AssertionError):
        LAW_TESTS[letter](row, parameters)


# ---------------------------------------------------------------- identities


def near(left, right, tolerance=1e-12):
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * np.max(np.abs(right)))


def of(method, parameters=None, base=BASE, models=None, **options):
    return merged(method, base, MODELS if models is None else models, parameters or {}, **options)


DENSITY_FAMILY = ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear")


def test_density_one_makes_the_family_one():
    dense = {"weight": W, "density": 1.0}
    plain = of("task_arithmetic", {"weight": W})
    for method in ("dare_linear", "breadcrumbs", "della_linear"):
        near(of(method, dense), plain)
    near(of("della", dense), of("ties", dense))
    summed = of("ties", {**dense, "normalize": False})
    for method in ("dare_ties", "breadcrumbs_ties"):
        near(of(method, dense), summed)


@pytest.mark.parametrize("method", DENSITY_FAMILY)
def test_density_zero_gives_the_base(method):
    assert np.array_equal(of(method, {"weight": W, "density": 0.0}), BASE)


def test_select_topk_zero_gives_the_base():
    assert np.array_equal(of("sce", {"select_topk": 0.0}), BASE)


@pytest.mark.parametrize("select", ["entries", "weights"])
def test_sce_that_selects_nothing_gives_the_base(select):
    settings = {"select_topk": 0.5, "select": select}
    assert np.array_equal(of("sce", settings, BASE[:1, :1], [model[:1, :1] for model in MODELS]), BASE[:1, :1])


def test_normalized_task_arithmetic_is_linear():
    near(of("task_arithmetic", {"weight": W, "normalize": True}), of("linear", {"weight": W}, None))


def test_consensus_is_nothing_where_all_changes_have_one_sign():
    models = [BASE + np.abs(model - BASE) for model in MODELS]
    dense = {"weight": W, "density": 1.0}
    near(of("ties", dense, models=models), of("task_arithmetic", {"weight": W, "normalize": True}, models=models))
    near(of("dare_ties", dense, models=models), of("task_arithmetic", {"weight": W}, models=models))


def test_slerp_read_from_the_other_end_is_the_same_arc():
    near(of("slerp", {"t": 0.3}, BASE, MODELS[:1]), of("slerp", {"t": 0.7}, MODELS[0], [BASE]))


@pytest.mark.parametrize(("t", "end"), [(0.0, BASE), (1.0, MODELS[0])], ids=["base", "model"])
def test_slerp_ends_at_its_ends(t, end):
    near(of("slerp", {"t": t}, BASE, MODELS[:1]), end)


def test_slerp_between_unit_vectors_is_a_unit_vector():
    unit = [array / np.linalg.norm(array) for array in (BASE, EXTRA)]
    assert abs(np.linalg.norm(of("slerp", {"t": 0.37}, unit[0], unit[1:])) - 1) < 1e-14


@pytest.mark.parametrize("base", [None, BASE], ids=["values", "deltas"])
def test_nuslerp_ends_at_its_second_model(base):
    near(of("nuslerp", {"weight": (0.0, 1.0)}, base, MODELS[:2]), MODELS[1])


def test_three_means_of_two_vectors_of_equal_norm_are_one():
    first, second = (array / np.linalg.norm(array) for array in (MODELS[0], EXTRA))
    halves = {"weight": (0.5, 0.5)}
    near(of("nuslerp", halves, None, [first, second]), of("multislerp", halves, None, [first, second]))
    near(of("karcher", {}, None, [first, second]), of("multislerp", halves, None, [first, second]), 1e-9)


def test_multislerp_of_multiples_of_one_change_is_their_mean():
    factors = np.array([0.5, 1.0, 2.5])
    models = [BASE + factor * COMMON for factor in factors]
    near(of("multislerp", {"weight": W}, models=models), BASE + np.dot(W, factors) * COMMON)


def test_model_stock_of_orthogonal_changes_is_the_base():
    changes = orthogonal(BASE.size, 9)[:3].reshape(3, *SHAPE)
    near(of("model_stock", models=[BASE + change for change in changes]), BASE)


def test_ram_of_disjoint_changes_is_their_sum():
    owner = np.arange(BASE.size).reshape(SHAPE) % 3
    models = [BASE + np.where(owner == number, MODELS[number] - BASE, 0) for number in range(3)]
    near(of("ram", {"epsilon": 0.0}, models=models), sum(model - BASE for model in models) + BASE)


def test_ramplus_without_reinforcement_is_ram():
    near(of("ramplus_tl", {"r": 0.0, "epsilon": 0.15}), of("ram", {"epsilon": 0.15}))


def test_nearswap_never_moves_farther_than_t():
    assert np.max(np.abs(of("nearswap", {"t": 0.05}, models=MODELS[:1]) - BASE)) <= 0.05 + 1e-15
    near(of("nearswap", {"t": 10.0}, models=MODELS[:1]), MODELS[0])
    assert np.array_equal(of("nearswap", {"t": -1.0}, models=MODELS[:1]), BASE)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_rescaling_keeps_the_l1_norm_of_a_change(method):
    output = of(method, {"weight": 1.0, "density": 0.4}, models=MODELS[:1])
    assert math.isclose(np.abs(output - BASE).sum(), np.abs(MODELS[0] - BASE).sum(), rel_tol=1e-12)


def test_dare_with_its_published_scale_is_task_arithmetic_on_average():
    settings = {"weight": 1.0, "density": 0.5, "rescale": "density"}
    names = [f"tensor.{number}" for number in range(3000)]
    stored = dict.fromkeys(names, ("F64", MODELS[0]))
    output = merge_arrays("dare_linear", [stored], dict.fromkeys(names, ("F64", BASE)), parameters=settings)
    change = MODELS[0] - BASE
    mean = np.mean([output[name] - BASE for name in names], axis=0)
    assert np.max(np.abs(mean - change) / (np.abs(change) / math.sqrt(len(names)))) < 4.5


def test_a_reinforced_change_is_bounded():
    factors = reference("ramplus_tl", BASE, MODELS, r=0.4, alpha=2.0, epsilon=0.15).details["factors"]
    assert np.all((factors >= 1) & (factors <= 1.8))


def test_the_geometric_median_is_not_moved_by_an_outlier():
    generator = np.random.default_rng(12)
    for count in (100, 10_000):
        honest = [generator.normal(size=count) for _ in range(4)]
        spread = math.sqrt(np.mean([model @ model for model in honest]))
        models = [*honest, 50 * generator.normal(size=count)]
        clean = of("geometric_median", {"weight": (1.0, 1.0, 1.0, 1.0, 0.0)}, np.zeros(count), models)
        attacked = of("geometric_median", {}, np.zeros(count), models)
        assert np.linalg.norm(attacked - clean) < 0.5 * spread


@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher", "geometric_median"])
def test_weights_that_cancel_cannot_be_normalized(method):
    with pytest.raises(RecipeError, match="sum to zero"):
        of(method, {"weight": (1.0, -1.0)}, None, MODELS[:2])


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_a_spread_beyond_certainty_is_refused(method):
    with pytest.raises(RecipeError, match="keep probabilities"):
        of(method, {"weight": 1.0, "density": 0.1, "epsilon": 0.15})


@pytest.mark.parametrize("method", ["ties", "della"])
@pytest.mark.parametrize("factor", [1e-60, 1e-46, 1e39, 1e200])
def test_weights_of_any_size_can_be_normalized(method, factor):
    settings = {"density": 0.5, "epsilon": 0.1} if method == "della" else {"density": 0.5}
    for dtype in ("F32", "F64"):
        wanted = of(method, {**settings, "weight": W}, dtype=dtype)
        found = of(method, {**settings, "weight": tuple(factor * value for value in W)}, dtype=dtype)
        near(found, wanted, 1e-6 if dtype == "F32" else 1e-12)


@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs", "task_arithmetic", "linear"])
def test_normalized_sums_take_weights_of_any_size(method):
    base = None if method == "linear" else BASE
    wanted = of(method, {"weight": W, "normalize": True}, base, dtype="F32")
    huge = tuple(1e39 * value for value in W)
    near(of(method, {"weight": huge, "normalize": True}, base, dtype="F32"), wanted, 1e-6)
    with pytest.raises(RecipeError, match="float32"):
        of(method, {"weight": huge, "normalize": False}, base)


def test_karcher_of_a_zero_tensor_and_one_without_weight_is_zero():
    found = of("karcher", {"weight": (1.0, 0.0)}, None, [np.zeros(SHAPE), MODELS[0]])
    assert np.array_equal(found, np.zeros(SHAPE))


def test_the_divergence_of_rows_does_not_see_what_is_added_to_a_row():
    generator = np.random.default_rng(23)
    base = generator.integers(-256, 256, (40, 50)) / 256
    for size in (1e-6, 1e-2, 1.0, 20.0):
        model = base + np.round(generator.normal(size=base.shape) * size * 2**30) / 2**30
        wanted = divergence(model[None], base)
        np.testing.assert_allclose(wanted, divergence_of_rows(model, base), rtol=1e-11)
        for shift in (-800.0, 60.0, 800.0):
            for left, right in ((model + shift, base), (model, base + shift)):
                np.testing.assert_allclose(divergence(left[None], right), wanted, rtol=1e-9 if size > 1e-6 else 1e-6)


def test_the_divergence_of_rows_that_are_far_apart_is_finite():
    generator = np.random.default_rng(24)
    base, model = generator.normal(size=(2, 30, 50)) * 1000
    with np.errstate(all="raise", under="ignore"):
        found = divergence(model[None], base)
    np.testing.assert_allclose(found, divergence_of_rows(model, base), rtol=1e-11)


def test_arcee_fusion_takes_entries_where_a_row_is_shifted():
    small = BASE + (MODELS[0] - BASE) / 100
    plain = of("arcee_fusion", models=[small])
    base, model = BASE.copy(), small.copy()
    base[0] -= 64
    found = of("arcee_fusion", None, base, [model])
    assert np.isfinite(found).all()
    assert np.count_nonzero(found != base) > 0
    assert np.count_nonzero(plain != BASE) > 0


# ---------------------------------------------------------------- accuracy

SMALL = {
    "scalar": (), "one": (1,), "column": (37, 1), "line": (1, 37), "empty": (0,), "image": (6, 5, 3, 3),
    "matrix": (127, 33), "frozen": (9, 7), "one_frozen": (11, 13),
}  # fmt: skip
LARGE = {"large": (3, 90_001)}  # more than one span, and not a whole number of blocks
INPUTS = {
    # label: dtypes of base and models in turn, output dtype, shapes
    "F32": (["F32"], None, SMALL),
    "BF16": (["BF16"], None, {**SMALL, **LARGE}),
    "F16": (["F16"], None, SMALL),
    "F64": (["F64"], None, SMALL),
    "mixed": (["BF16", "F32", "F16", "F8_E4M3"], "BF16", SMALL),
    "F8": (["F8_E4M3", "F8_E5M2"], None, SMALL),
    "to-F8_E4M3": (["F32"], "F8_E4M3", SMALL),
    "to-F8_E5M2": (["BF16"], "F8_E5M2", SMALL),
    "F64-to-F16": (["F64"], "F16", SMALL),
}


def stored_inputs(label, count, seed=17):
    """Return (base, models, shapes, output dtype), tensors being (dtype, words)."""
    codes, out, shapes = (INPUTS | INPUTS_OF_SOME)[label]
    generator = np.random.default_rng(seed)
    model_size = 0.02 if "F8" not in label else 1.0
    base, models = {}, [{} for _ in range(count)]
    for name, shape in shapes.items():
        values = generator.normal(size=shape) * model_size
        common = generator.normal(size=shape) * model_size / 10
        base[name] = (codes[0], words_of(values, codes[0]))
        stored = values_of(base[name][1], codes[0])
        for number, model in enumerate(models):
            code = codes[(number + 1) % len(codes)]
            if name == "frozen" or (name == "one_frozen" and number == 0):
                code, changed = codes[0], stored
            else:
                changed = values + common + generator.normal(size=shape) * model_size * (1 + number) / 40
            model[name] = (code, words_of(changed, code))
    return base, models, shapes, out


def widened(tensors):
    return {name: values_of(words, dtype) for name, (dtype, words) in tensors.items()}


def within_the_bar(row, parameters, label, count):
    base, models, shapes, out = stored_inputs(label, count)
    output = merge_arrays(row.method, models, base if row.base else None, dtype=out, parameters=parameters)
    wide = any(code == "F64" for code in (INPUTS | INPUTS_OF_SOME)[label][0])
    expected = reference_model(
        row.method,
        widened(base) if row.base else None,
        [widened(model) for model in models],
        scores="float64" if wide and row.method != "sce" else "float32",
        **parameters,
    )
    for name, shape in shapes.items():
        inputs = [model[name][0] for model in models] + ([base[name][0]] if row.base else [])
        dtype = out or promoted(inputs)
        assert output[name].shape == shape
        found, wanted = values_of(output[name], dtype), expected[name]
        election = wanted.details.get("election")
        if election is not None:  # where votes cancel to within float64 rounding, either sign is right
            tied = (np.abs(election) <= 1e-13 * wanted.details["election_magnitude"]) & (election != 0)
            assert np.count_nonzero(tied) <= 1e-3 * tied.size + 1
            found = np.where(tied, wanted.value, found)
        if row.method == "arcee_fusion" and wanted.value.size:
            score, threshold = wanted.details["score"], wanted.details["threshold"]
            at = np.abs(score - threshold) <= 2.0**-30 * abs(threshold)
            choices = np.stack([widened(base)[name], widened(models[0])[name]])
            found = np.where(at & (found == choices).any(0), wanted.value, found)
        error = excess(wanted, found, dtype)
        assert error <= 1, f"{row.label} on {name} {shape}: {error:.3g} times the bar"


INPUTS_OF_SOME = {"F32-to-F64": (["F32"], "F64", SMALL)}


@over(ALL)
@pytest.mark.parametrize("label", INPUTS)
def test_every_entry_is_within_half_an_ulp_of_the_exact_result(row, parameters, label):
    within_the_bar(row, parameters, label, row.models)


NINE = [
    (row, {name: (tuple(value) * 3 if isinstance(value, tuple) else value) for name, value in row.parameters.items()})
    for row in ROWS
    if row.label in ("linear", "ties", "karcher")
]


@over(NINE)
def test_nine_models_are_as_accurate_as_three(row, parameters):
    within_the_bar(row, parameters, "F16", 9)


@over([(row, parameters) for row, parameters in ALL if row.label in ("linear", "ties", "dare_linear", "sce")])
def test_float32_inputs_can_make_a_float64_output(row, parameters):
    within_the_bar(row, parameters, "F32-to-F64", row.models)


ONE = [
    (row, chosen(row.method, row.parameters, (0,))) for row in ROWS if row.models == 3 and row.method != "model_stock"
]


@over(ONE)
def test_one_model_is_as_accurate_as_three(row, parameters):
    within_the_bar(row, parameters, "F64", 1)


# ---------------------------------------------------------------- random masks


def test_random_masks_are_those_of_the_published_generator():
    """The words of SplitMix64 at known places decide what is kept, whatever the dtype."""
    cases = [
        (0, "model.embed_tokens.weight", 0, 0, 0x854F99CE),
        (0, "model.embed_tokens.weight", 0, 1, 0xAEAA9152),
        (0, "model.embed_tokens.weight", 1, 0, 0x2F9F172A),
        (42, "layer.0.weight", 3, 7, 0x960C6291),
    ]
    for seed, name, stream, element, word in cases:
        for density, kept in ((word / 2**32, False), ((word + 1) / 2**32, True)):
            settings = {"weight": 1.0, "density": density, "seed": seed, "rescale": False}
            for dtype in ("F32", "BF16"):
                output = merged(
                    "dare_linear", np.zeros(8), [np.ones(8)], settings, dtype=dtype, name=name, streams=(stream,)
                )
                assert bool(output[element]) is kept


def test_levels_of_keep_probability_follow_the_rank_within_a_row():
    """della with the mask made visible: zeros for the base, the model's magnitudes as ranks."""
    generator = np.random.default_rng(19)
    model = generator.normal(size=(64, 129)) + 3
    settings = {"weight": 1.0, "density": 0.5, "epsilon": 0.4, "rescale": False}
    output = merged("della", np.zeros(model.shape), [model], settings, dtype="F32")
    stored = values_of(words_of(model, "F32"), "F32")
    expected = reference("della", np.zeros(model.shape), [stored], **settings)
    assert np.array_equal(output != 0, expected.details["masks"][0])
    rates = [(output != 0)[np.argsort(np.argsort(stored, 1), 1) // 43 == third].mean() for third in range(3)]
    assert all(low < high for low, high in pairwise(rates))
