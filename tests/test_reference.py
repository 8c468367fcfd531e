"""The reference is right: closed forms, the identities between methods, and the table of random words."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from tests.reference import (
    METHODS,
    allowed,
    divergence_of_rows,
    draw,
    excess,
    keep_threshold,
    name_hash,
    random_word,
    random_words,
    reference,
    reference_model,
    rounded,
    stream_key,
    ulp,
)

GENERATOR = np.random.default_rng(20)
BASE = GENERATOR.normal(size=(12, 16))
MODELS = [BASE + GENERATOR.normal(size=(12, 16)) * scale for scale in (0.1, 0.2, 0.15, 0.3)]
WEIGHT = [0.5, 0.3, 0.2, 0.4]
DENSITY_FAMILY = ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear")


def merge(method, base=BASE, models=MODELS, **parameters):
    return reference(method, base, models, **parameters).value


def same(left, right, tolerance=1e-12):
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * max(1.0, float(np.max(np.abs(right)))))


ELSEWHERE = {"consensus_ta", "consensus_ties", "emr", "iso_c", "iso_cts", "pcb", "tall_masks", "tsv_m"}
"""Methods for which not all laws of this page hold; `tests/contract` says which do."""


def calls():
    """Every method with usual parameters, as (name, number of models, parameters)."""
    family = {"weight": 0.3, "density": 0.5}
    yield from ((name, 4, family) for name in DENSITY_FAMILY)
    yield "task_arithmetic", 4, {"weight": 0.3}
    yield "linear", 4, {"weight": 1.0}
    yield "slerp", 1, {"t": 0.4}
    yield "nuslerp", 2, {"weight": 0.5}
    yield "multislerp", 4, {"weight": 0.25}
    yield from ((name, 4, {}) for name in ("karcher", "model_stock", "sce", "ram", "ramplus_tl", "geometric_median"))
    yield "nearswap", 1, {"t": 0.1}
    yield "arcee_fusion", 1, {}
    yield "passthrough", 1, {}


# --- Number formats


def test_rounding_is_to_nearest_even_and_happens_once():
    assert rounded(1 + 2.0**-8 + 2.0**-40, "BF16") == 1 + 2.0**-7  # through float32 it would be 1
    assert rounded(1 + 2.0**-8, "BF16") == 1
    assert rounded(1 + 3 * 2.0**-8, "BF16") == 1 + 2.0**-6
    assert rounded(2.0**-134, "BF16") == 0
    assert rounded(-1.5 * 2.0**-133, "BF16") == -(2.0**-132)
    assert rounded(3.4e38, "BF16") == math.inf
    assert rounded(464.0, "F8_E4M3") == 448
    assert math.isnan(float(rounded(465.0, "F8_E4M3")))
    assert rounded(-61440.0, "F8_E5M2") == -math.inf


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("F32", np.float32), ("F16", np.float16)])
def test_rounding_agrees_with_numpy(dtype, numpy_dtype):
    values = np.random.default_rng(3).normal(size=4000) * 10.0 ** np.random.default_rng(4).integers(-9, 4, size=4000)
    assert np.array_equal(rounded(values, dtype), values.astype(numpy_dtype).astype(np.float64))


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("BF16", "bfloat16"), ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")]
)
def test_rounding_of_float32_values_agrees_with_torch(dtype, torch_dtype):
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(5)
    values = (generator.normal(size=20000) * 2.0 ** generator.integers(-18, 8, size=20000)).astype(np.float32)
    if dtype == "F8_E4M3":
        values = np.clip(values, -448, 448)
    theirs = torch.from_numpy(values).to(getattr(torch, torch_dtype)).to(torch.float64).numpy()
    assert np.array_equal(rounded(values.astype(np.float64), dtype), theirs)


def test_ulp_is_the_distance_between_neighbours():
    assert ulp(1.0, "BF16") == 2.0**-7
    assert ulp(0.999, "BF16") == 2.0**-8
    assert ulp(0.0, "BF16") == 2.0**-133
    assert ulp(0.0, "F8_E4M3") == 2.0**-9
    assert ulp(0.0, "F16") == 2.0**-24
    assert np.array_equal(ulp(MODELS[0], "F64"), np.spacing(np.abs(MODELS[0])))


def test_a_correctly_rounded_result_meets_the_bar_and_the_next_number_does_not():
    result = reference("linear", None, MODELS, weight=WEIGHT)
    for dtype in ("BF16", "F16", "F32", "F8_E4M3"):
        output = rounded(result.value, dtype)
        assert excess(result, output, dtype) <= 1
    assert excess(result, rounded(result.value, "BF16") + ulp(result.value, "BF16"), "BF16") > 1
    assert np.all(allowed(result, output, "F8_E4M3") >= 2.0**-10)


# --- Random words

NAMES = ("model.embed_tokens.weight", "layer.0.weight", "")


def test_words_are_those_of_splitmix64():
    assert [draw(1234567, i) for i in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [name_hash(name) for name in NAMES] == [0x2AE5039BAC43D4FC, 0x4D26E678D42D570D, 0x141CFC9842C4B0E3]
    assert [int(keep_threshold(p)) for p in (0.1, 0.3, 0.9)] == [429496730, 1288490189, 3865470566]
    assert [int(keep_threshold(p)) for p in (-0.1, 0.0, 1.0, 1.5)] == [0, 0, 2**32, 2**32]


@pytest.mark.parametrize(
    ("seed", "name", "stream", "element", "key", "word", "kept"),
    [
        (0, NAMES[0], 0, 0, 0x173FD1E723B6F69D, 0x854F99CE, False),
        (0, NAMES[0], 0, 1, 0x173FD1E723B6F69D, 0xAEAA9152, False),
        (0, NAMES[0], 1, 0, 0xD46E53C08C43484E, 0x2F9F172A, True),
        (42, NAMES[1], 3, 7, 0x483127602DA2F077, 0x960C6291, False),
        (42, NAMES[1], 3, 8589934597, 0x483127602DA2F077, 0xBD6CE044, False),
        (2**64 - 1, NAMES[2], 0, 123456789, 0xD21859FBE9C12FFA, 0x94EBF091, False),
    ],
)
def test_table_of_random_words(seed, name, stream, element, key, word, kept):
    assert stream_key(seed, name, stream) == key
    assert random_word(key, element) == word
    assert (word < int(keep_threshold(0.3))) is kept


def test_words_of_many_elements_are_the_words_of_each():
    key = stream_key(7, "a.weight", 2)
    assert [int(word) for word in random_words(key, 101)] == [random_word(key, element) for element in range(101)]


# --- Laws that hold for every method


@pytest.mark.parametrize(("method", "count", "parameters"), list(calls()))
def test_models_equal_to_the_base_give_the_base(method, count, parameters):
    same(merge(method, models=[BASE] * count, **parameters), BASE, 1e-14)


@pytest.mark.parametrize(("method", "count", "parameters"), list(calls()))
def test_all_inputs_times_eight_give_the_result_times_eight(method, count, parameters):
    if method in ("ram", "ramplus_tl"):
        pytest.skip("its epsilon is absolute")
    if method == "arcee_fusion":
        pytest.skip("softmax is not homogeneous")
    larger = {key: value * 8 if (method, key) == ("nearswap", "t") else value for key, value in parameters.items()}
    expected = 8 * merge(method, models=MODELS[:count], **parameters)
    assert np.array_equal(merge(method, base=8 * BASE, models=[8 * x for x in MODELS[:count]], **larger), expected)


@pytest.mark.parametrize(("method", "count", "parameters"), list(calls()))
@pytest.mark.parametrize("shape", [(), (1,), (7, 1), (1, 7), (0,), (2, 3, 4, 5)])
def test_any_shape_is_kept(method, count, parameters, shape):
    size = math.prod(shape)
    base, *models = (np.array(x.reshape(-1)[:size]).reshape(shape) for x in (BASE, *MODELS[:count]))
    result = reference(method, base, models, **parameters)
    assert result.value.shape == result.magnitude.shape == shape
    assert np.all(np.isfinite(result.value))
    assert np.all(result.magnitude >= np.abs(result.value) * (1 - 1e-12))


def test_every_method_is_exercised():
    assert {method for method, _, _ in calls()} == set(METHODS) - ELSEWHERE
    assert len(METHODS) == 29


# --- The family


def test_closed_forms_of_task_arithmetic():
    expected = BASE + 0.7 * sum(w * (x - BASE) for w, x in zip(WEIGHT, MODELS, strict=True))
    same(merge("task_arithmetic", weight=WEIGHT, **{"lambda": 0.7}), expected)
    same(merge("task_arithmetic", weight=WEIGHT, normalize=True), merge("linear", weight=WEIGHT))


def test_density_one_removes_the_masks():
    plain = merge("task_arithmetic", weight=WEIGHT)
    for method in ("dare_linear", "breadcrumbs", "della_linear"):
        same(merge(method, weight=WEIGHT), plain)
    voted = merge("ties", weight=WEIGHT, normalize=False)
    for method in ("dare_ties", "breadcrumbs_ties"):
        same(merge(method, weight=WEIGHT), voted)
    same(merge("della", weight=WEIGHT), merge("ties", weight=WEIGHT))


@pytest.mark.parametrize("method", DENSITY_FAMILY)
def test_density_zero_gives_the_base(method):
    assert np.array_equal(merge(method, weight=WEIGHT, density=0.0), BASE)


def test_ties_by_hand():
    base, models = np.zeros(4), [np.array([4.0, -1.0, 2.0, 0.5]), np.array([-1.0, -3.0, 2.0, 0.25])]
    result = reference("ties", base, models, weight=1.0, density=0.5)
    # The first model keeps 4 and 2, the second -3 and 2.
    assert np.array_equal(result.value, [4.0, -3.0, 2.0, 0.0])
    assert result.details["cuts"] == [(2.0, 2), (2.0, 2)]


def test_equal_scores_are_kept_from_the_lower_index():
    result = reference("ties", np.zeros(5), [np.array([1.0, -1.0, 1.0, -1.0, 1.0])], weight=1.0, density=0.4)
    assert np.array_equal(result.details["masks"][0], [True, True, False, False, False])
    assert result.details["cuts"] == [(1.0, 1)]


def test_breadcrumbs_drops_the_largest_before_it_counts():
    delta = np.arange(1.0, 11.0)
    result = reference("breadcrumbs", np.zeros(10), [delta], weight=1.0, density=0.5, gamma=0.2)
    assert np.array_equal(result.value, [0, 0, 0, 4, 5, 6, 7, 8, 0, 0])
    crowded = reference("breadcrumbs", np.zeros(10), [delta], weight=1.0, density=0.9, gamma=0.2)
    assert np.array_equal(crowded.value, [*range(1, 10), 0])


def test_scores_of_float32_inputs_are_differences_rounded_to_float32():
    base = np.array([1.0, 1.0, 0.0]).astype(np.float32).astype(np.float64)
    model = np.array([1.0 + 2.0**-23, 2.0**-26, 1.0])  # |d| of the second is 1 - 2⁻²⁶, in float32 exactly 1
    result = reference("ties", base, [model], weight=1.0, density=0.34)
    assert np.array_equal(result.details["masks"][0], [False, True, False])
    wider = reference("ties", base, [model], weight=1.0, density=0.34, scores="float64")
    assert np.array_equal(wider.details["masks"][0], [False, False, True])


def test_scope_model_counts_over_sorted_names():
    base = {"b": np.zeros(2), "a": np.zeros(2)}
    model = {"b": np.array([3.0, 1.0]), "a": np.array([1.0, 2.0])}
    whole = reference_model("ties", base, [model], weight=1.0, density=0.75, scope="model")
    assert np.array_equal(whole["a"].value, [1.0, 2.0])
    assert np.array_equal(whole["b"].value, [3.0, 0.0])
    each = reference_model("ties", base, [model], weight=1.0, density=0.5)
    assert np.array_equal(each["a"].value, [0.0, 2.0])


def test_rescaling_keeps_the_norm_of_the_difference():
    for method in ("dare_linear", "della_linear", "breadcrumbs"):
        out = merge(method, models=MODELS[:1], weight=1.0, density=0.6, rescale=True)
        assert np.sum(np.abs(out - BASE)) == pytest.approx(np.sum(np.abs(MODELS[0] - BASE)), rel=1e-12)


def test_dare_by_density_is_unbiased():
    seeds = 400
    total = sum(
        merge("dare_linear", weight=WEIGHT, density=0.5, rescale="density", seed=seed) - BASE for seed in range(seeds)
    )
    spread = np.sqrt(sum((w * (x - BASE)) ** 2 for w, x in zip(WEIGHT, MODELS, strict=True)) / seeds)
    expected = merge("task_arithmetic", weight=WEIGHT) - BASE
    assert np.max(np.abs(total / seeds - expected) / spread) < 4.5


def test_della_keeps_large_differences_more_often():
    base, model = np.zeros((4000, 5)), np.tile(np.arange(1.0, 6.0), (4000, 1))
    result = reference("della_linear", base, [model], weight=1.0, density=0.5, epsilon=0.3, rescale=False)
    same(np.mean(result.details["masks"][0], axis=0), [0.2, 0.35, 0.5, 0.65, 0.8], 0.04)
    with pytest.raises(ValueError, match="epsilon"):
        reference("della", base, [model], weight=1.0, density=0.9, epsilon=0.1)


def test_della_ranks_along_axis_one():
    model = np.arange(24.0).reshape(2, 3, 4)
    ranks = reference("della", np.zeros((2, 3, 4)), [model], weight=1.0, density=0.5).details["ranks"][0]
    assert np.array_equal(ranks, np.broadcast_to(np.arange(3)[None, :, None], (2, 3, 4)))


# --- Averages and interpolations


def by_hand_slerp(a, b, t):
    angle = math.acos(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def test_slerp_is_the_textbook_formula():
    far = GENERATOR.normal(size=(12, 16))
    same(merge("slerp", models=[far], t=0.3), by_hand_slerp(BASE, far, 0.3))
    same(merge("slerp", base=far, models=[BASE], t=0.7), by_hand_slerp(BASE, far, 0.3))
    same(merge("slerp", models=[far], t=0.0), BASE)
    same(merge("slerp", models=[far], t=1.0), far)
    near = BASE + 1e-3 * far
    same(merge("slerp", models=[near], t=0.3), 0.7 * BASE + 0.3 * near)
    same(merge("slerp", models=[near], t=0.3, dot_threshold=1.0), by_hand_slerp(BASE, near, 0.3), 1e-10)
    same(merge("slerp", models=[-BASE], t=0.3), 0.4 * BASE)
    same(merge("slerp", base=0 * BASE, models=[far], t=0.3), 0.3 * far)


def test_nuslerp_interpolates_differences_or_values():
    one, two = MODELS[:2]
    same(merge("nuslerp", base=None, models=[one, two], weight=[0.6, 0.2]), by_hand_slerp(one, two, 0.25))
    expected = BASE + by_hand_slerp(one - BASE, two - BASE, 0.25)
    same(merge("nuslerp", models=[one, two], weight=[0.6, 0.2]), expected)
    same(merge("nuslerp", models=[one, two], weight=[0, 1]), two)
    rows = merge("nuslerp", base=None, models=[one, two], weight=[0.6, 0.2], nuslerp_flatten=False)
    same(rows[3], by_hand_slerp(one[3], two[3], 0.25))
    columns = merge(
        "nuslerp", base=None, models=[one, two], weight=[0.6, 0.2], nuslerp_flatten=False, nuslerp_row_wise=True
    )
    same(columns[:, 3], by_hand_slerp(one[:, 3], two[:, 3], 0.25))


def test_the_spherical_means_of_two_equally_long_vectors_agree():
    one, two = (x / np.linalg.norm(x) for x in (MODELS[0], GENERATOR.normal(size=(12, 16))))
    middle = merge("nuslerp", base=None, models=[one, two], weight=0.5)
    assert np.linalg.norm(middle) == pytest.approx(1, rel=1e-14)
    same(merge("multislerp", base=None, models=[one, two], weight=0.5), middle)
    same(merge("karcher", base=None, models=[one, two]), middle, 1e-9)


def test_karcher_matches_steps_on_the_vectors_themselves():
    vectors = [GENERATOR.normal(size=40) for _ in range(3)]
    units = [v / np.linalg.norm(v) for v in vectors]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(10):
        tangent = np.zeros(40)
        for unit in units:
            angle = math.acos(unit @ mean)
            tangent += angle / math.sin(angle) * (unit - (unit @ mean) * mean) / 3
        length = np.linalg.norm(tangent)
        if length < 1e-5:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean /= np.linalg.norm(mean)
    expected = mean * np.mean([np.linalg.norm(v) for v in vectors])
    same(merge("karcher", base=None, models=vectors), expected)


def test_multislerp_of_parallel_differences_is_the_weighted_mean():
    delta = MODELS[0] - BASE
    models = [BASE + k * delta for k in (1.0, 2.0, 5.0)]
    same(merge("multislerp", models=models, weight=[1, 2, 1]), BASE + 2.5 * delta)
    same(merge("multislerp", models=[BASE] * 3, weight=[1, 2, 1]), BASE)


def test_model_stock_of_orthogonal_and_of_equal_differences():
    delta = np.zeros((3, 4))
    one, two = delta.copy(), delta.copy()
    one[0], two[1] = 1.0, 1.0
    same(merge("model_stock", base=np.ones((3, 4)), models=[one + 1, two + 1]), np.ones((3, 4)))
    same(merge("model_stock", models=[MODELS[0]] * 3), MODELS[0])
    cosine = np.sum((MODELS[0] - BASE) * (MODELS[1] - BASE))
    cosine /= np.linalg.norm(MODELS[0] - BASE) * np.linalg.norm(MODELS[1] - BASE)
    t = max(0.0, 2 * cosine / (1 + cosine))
    same(merge("model_stock", models=MODELS[:2]), t * (MODELS[0] + MODELS[1]) / 2 + (1 - t) * BASE)
    row = merge("model_stock", models=MODELS, filter_wise=True)[5]
    same(row, merge("model_stock", base=BASE[5], models=[x[5] for x in MODELS]))


def test_the_geometric_median_balances_its_unit_vectors():
    result = reference("geometric_median", BASE, MODELS, weight=WEIGHT)
    pulls = [
        w * (x - result.value) / np.linalg.norm(x - result.value) for w, x in zip(WEIGHT, MODELS, strict=True)
    ]  # fmt: skip
    assert np.linalg.norm(sum(pulls)) < 1e-6
    same(merge("geometric_median", base=None, weight=WEIGHT), result.value, 1e-9)
    cut = [{"a": x[:5], "b": x[5:]} for x in (BASE, *MODELS)]
    whole = reference_model("geometric_median", cut[0], cut[1:], weight=WEIGHT)
    same(np.concatenate([whole["a"].value, whole["b"].value]), result.value, 1e-9)


def test_the_geometric_median_of_a_line_is_its_middle():
    models = [np.full(3, value) for value in (0.0, 1.0, 50.0)]
    same(merge("geometric_median", base=np.zeros(3), models=models), np.ones(3), 1e-3)


@pytest.mark.parametrize("method", ["linear", "multislerp", "karcher", "geometric_median"])
def test_weights_that_cancel_are_refused(method):
    with pytest.raises(ValueError, match="cancel"):
        merge(method, models=MODELS[:2], weight=[1.0, -1.0])


# --- The others


def test_sce_by_hand():
    base, one, two = np.zeros(4), np.array([3.0, 1.0, 0.0, 1.0]), np.array([-1.0, 1.0, 0.0, 2.0])
    # variances 4, 0, 0, 0.25: three quarters of two non-zero scores is one entry, where energies are 9 and 1
    result = reference("sce", base, [one, two], select_topk=0.75)
    assert np.array_equal(result.value, [3.0, 0.0, 0.0, 0.0])
    whole = reference("sce", base, [one, two])
    same(whole.details["weights"], np.array([11, 6]) / 17)
    same(whole.value, [3.0, 1.0, 0.0, (11 * 1 + 6 * 2) / 17])
    unmasked = reference("sce", base, [one, two], select_topk=0.75, select="weights")
    same(unmasked.value, [3.0, 1.0, 0.0, 0.9 * 1 + 0.1 * 2])


def test_nearswap_moves_at_most_t():
    same(merge("nearswap", models=MODELS[:1], t=100.0), MODELS[0])
    assert np.max(np.abs(merge("nearswap", models=MODELS[:1], t=0.01) - BASE)) == pytest.approx(0.01)
    assert np.array_equal(merge("nearswap", models=MODELS[:1], t=-1.0), BASE)


def test_ram_by_hand():
    base, one, two = np.zeros(4), np.array([1.0, 0.0, 2.0, 1e-6]), np.array([0.0, 3.0, 4.0, 0.0])
    assert np.array_equal(merge("ram", base=base, models=[one, two]), [1.0, 3.0, 3.0, 0.0])
    boosted = reference("ramplus_tl", base, [one, two], r=0.5, alpha=0.4)
    same(boosted.value, [1.2, 3.6, 3.0, 0.0])
    same(merge("ramplus_tl", r=0.0), merge("ram"))


def divergence_in_decimals(x, b):
    with localcontext() as context:
        context.prec = 60
        x, b = ([Decimal(float(value)) for value in row] for row in (x, b))
        p, q = ([value.exp() for value in row] for row in (x, b))
        p, q = ([value / sum(row) + Decimal("1e-8") for value in row] for row in (p, q))
        return float(sum(one * (one / other).ln() for one, other in zip(p, q, strict=True)))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-10])
def test_divergence_of_rows_is_the_definition(size):
    x = BASE + size * (MODELS[0] - BASE)
    expected = [divergence_in_decimals(*rows) for rows in zip(x, BASE, strict=True)]
    np.testing.assert_allclose(divergence_of_rows(x, BASE), expected, rtol=1e-13)


def test_divergence_of_rows_far_apart_stays_finite():
    x, b = np.array([[1000.0, 0.0]]), np.array([[0.0, 1000.0]])
    assert float(divergence_of_rows(x, b)[0]) == pytest.approx(math.log(1e8), rel=1e-6)


def test_arcee_fusion_takes_the_outliers_only():
    result = reference("arcee_fusion", BASE, MODELS[:1])
    mask = result.details["masks"]
    assert 0 < np.count_nonzero(mask) < mask.size / 2
    assert np.array_equal(result.value, np.where(mask, MODELS[0], BASE))
    single = np.array([1.0, 2.0, 3.0]).reshape(3, 1)
    assert np.array_equal(merge("arcee_fusion", base=single, models=[single + 1]), single + 1)


def test_passthrough_scales():
    assert np.array_equal(merge("passthrough", models=MODELS[:1]), MODELS[0])
    assert np.array_equal(merge("passthrough", models=MODELS[:1], scale=-0.5), -0.5 * MODELS[0])
