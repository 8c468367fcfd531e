"""Fisher-weighted averaging and RegMean, against plain float64 numpy and least squares."""

from __future__ import annotations

import json

import numpy as np
import pytest

from graftwork.merge.errors import DataError, MismatchError, RecipeError
from graftwork.merge.memory import merge_arrays

SHAPES = {"fc.weight": (6, 5), "fc.bias": (6,), "norm": (4, 3)}


def arrays(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return {name: scale * generator.normal(size=shape) for name, shape in SHAPES.items()}


def informations(seed, scale=1.0):
    return {name: scale * np.exp(3 * values) for name, values in arrays(100 + seed).items()}


MODELS = [arrays(seed) for seed in range(3)]
INFORMATION = [informations(seed) for seed in range(3)]
WEIGHT = (0.5, 0.3, 0.2)


def coded(tensors, dtype="F64"):
    kind = {"F64": np.float64, "F32": np.float32}[dtype]
    return {name: (dtype, np.asarray(values, kind)) for name, values in tensors.items()}


def fisher(models=MODELS, information=INFORMATION, dtype="F64", span=None, **parameters):
    more = {} if span is None else {"span": span}
    return merge_arrays(
        "fisher",
        [coded(model, dtype) for model in models],
        parameters=parameters,
        statistics={"fisher": [None if one is None else coded(one) for one in information]},
        **more,
    )


def reference(models, information, weight, floor=1e-4, scope="model"):
    """Return equations (4) and (5) in plain numpy."""
    result = {}
    for name in models[0]:
        total = divisor = 0.0
        for model, one, factor in zip(models, information, weight, strict=True):
            chosen = one if scope == "model" else {name: one[name]}
            size = np.sqrt(np.mean(np.concatenate([values.reshape(-1) for values in chosen.values()]) ** 2))
            share = factor * np.maximum(one[name] / (1.0 if scope == "none" else size), floor)
            total, divisor = total + share * model[name], divisor + share
        result[name] = total / divisor
    return result


@pytest.mark.parametrize("scope", ["model", "tensor", "none"])
@pytest.mark.parametrize("weight", [(1.0, 1.0, 1.0), WEIGHT])
def test_fisher_is_what_its_equations_say(scope, weight):
    found = fisher(weight=weight, scope=scope, floor=0.01)
    for name, wanted in reference(MODELS, INFORMATION, weight, 0.01, scope).items():
        assert np.allclose(found[name], wanted, rtol=1e-12, atol=1e-14), name


def test_equal_information_gives_the_mean():
    found = fisher(information=[INFORMATION[0]] * 3, dtype="F32", weight=WEIGHT)
    for name in SHAPES:
        stored = [model[name].astype(np.float32).astype(np.float64) for model in MODELS]
        wanted = sum(factor * values for factor, values in zip(WEIGHT, stored, strict=True))
        assert (np.abs(found[name] - wanted) <= np.spacing(np.abs(wanted).astype(np.float32))).all()


def test_the_scale_of_a_models_information_does_not_matter():
    plain = fisher(dtype="F32")
    for place in range(3):
        scaled = [informations(seed, 1e12 if seed == place else 1.0) for seed in range(3)]
        found = fisher(information=scaled, dtype="F32")
        assert all(np.array_equal(found[name], plain[name]) for name in SHAPES)


@pytest.mark.parametrize("scope", ["model", "tensor", "none"])
def test_information_that_is_zero_everywhere_gives_the_mean(scope):
    nothing = [{name: np.zeros(shape) for name, shape in SHAPES.items()}] * 3
    found = fisher(information=nothing, weight=WEIGHT, scope=scope)
    for name in SHAPES:
        wanted = sum(factor * model[name] for factor, model in zip(WEIGHT, MODELS, strict=True))
        assert np.allclose(found[name], wanted, rtol=1e-14)


def test_one_model_gives_itself():
    found = fisher(models=MODELS[:1], information=INFORMATION[:1], dtype="F32")
    assert all(np.array_equal(found[name], MODELS[0][name].astype(np.float32)) for name in SHAPES)


def test_the_order_of_models_and_the_pieces_they_are_read_in_do_not_matter():
    plain = fisher(dtype="F32", weight=WEIGHT)
    order = (2, 0, 1)
    turned = fisher(
        [MODELS[k] for k in order], [INFORMATION[k] for k in order], dtype="F32", weight=[WEIGHT[k] for k in order]
    )
    pieces = fisher(dtype="F32", weight=WEIGHT, span=7)
    for name in SHAPES:
        assert np.array_equal(plain[name], turned[name])
        assert np.array_equal(plain[name], pieces[name])


def test_every_entry_lies_between_the_models():
    found = fisher()
    for name in SHAPES:
        stacked = np.stack([model[name] for model in MODELS])
        assert (found[name] >= stacked.min(0) - 1e-15).all()
        assert (found[name] <= stacked.max(0) + 1e-15).all()


def test_where_information_is_missing_the_mean_is_taken_only_if_asked_for():
    lacking = [INFORMATION[0], {k: v for k, v in INFORMATION[1].items() if k != "norm"}, INFORMATION[2]]
    with pytest.raises(MismatchError, match='"norm": the Fisher file of model 1 has no such tensor'):
        fisher(information=lacking)
    found = fisher(information=lacking, missing="mean")
    assert np.allclose(found["norm"], np.mean([model["norm"] for model in MODELS], axis=0), rtol=1e-14)
    nobody = [{k: v for k, v in one.items() if k != "norm"} for one in INFORMATION]  # such as buffers
    assert np.allclose(fisher(information=nobody)["norm"], found["norm"], rtol=1e-14)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"floor": 0.0}, "the floor is 0; it has to be above zero"),
        ({"weight": (1.0, -0.5, 1.0)}, "the weights are 1, -0.5, 1; they must not be negative"),
        ({"weight": (0.0, 0.0, 0.0)}, "one has to be above zero"),
    ],
)
def test_weights_and_floors_that_cannot_be_are_refused(parameters, message):
    with pytest.raises(RecipeError, match=message):
        fisher(**parameters)


@pytest.mark.parametrize(("value", "message"), [(-1.0, "is -1 at flat index 7"), (np.nan, "nan at flat index 7")])
def test_information_that_cannot_be_is_refused_with_its_place(value, message):
    wrong = [{name: values.copy() for name, values in one.items()} for one in INFORMATION]
    wrong[1]["norm"].reshape(-1)[7] = value
    with pytest.raises(DataError, match=f'"norm".*{message}'):
        fisher(information=wrong)


# --- RegMean ----------------------------------------------------------------------------------------------------------


def regression(models, inputs, *, transposed=False, groups=1, joint=True, **parameters):
    """Merge layers, given each model's inputs (rows, columns), or (groups, rows, columns)."""
    grams = []
    for rows in inputs:
        rows = rows if rows.ndim == 3 else rows[None]
        rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], -1) if joint else rows
        gram = rows.transpose(0, 2, 1) @ rows / rows.shape[1]
        grams.append({"fc.weight": gram if groups > 1 else gram[0]})
    layer = {"rows": 9, "bias": joint, "groups": groups, "transposed": transposed}
    return merge_arrays(
        "regmean",
        [coded(model) for model in models],
        parameters=parameters,
        statistics={"gram": [coded(gram) for gram in grams]},
        metadata={"gram": {"layers": json.dumps({"fc.weight": layer})}},
    )


def rows_for(seed, rows=40, columns=5, rank=None):
    generator = np.random.default_rng(50 + seed)
    found = generator.normal(size=(rows, columns)) + generator.normal(size=columns)
    return found if rank is None else found[:, :rank] @ generator.normal(size=(rank, columns))


def least_squares(models, inputs, *, joint=True):
    """Return weight and bias with the least mean squared distance to every model's outputs on its own inputs."""
    rows, outputs = [], []
    for model, own in zip(models, inputs, strict=True):
        out = own @ model["fc.weight"].T + (model["fc.bias"] if joint else 0)
        rows.append((np.concatenate([own, np.ones((len(own), 1))], 1) if joint else own) / np.sqrt(len(own)))
        outputs.append(out / np.sqrt(len(own)))
    found = np.linalg.lstsq(np.concatenate(rows), np.concatenate(outputs), rcond=None)[0].T
    return (found[:, :-1], found[:, -1]) if joint else (found, None)


def test_regmean_of_linear_models_is_least_squares_on_the_pooled_inputs():
    inputs = [rows_for(seed, rows=30 + 10 * seed) for seed in range(3)]
    found = regression(MODELS, inputs, ridge=0.0)
    weight, bias = least_squares(MODELS, inputs)
    assert np.allclose(found["fc.weight"], weight, rtol=1e-9, atol=1e-9)
    assert np.allclose(found["fc.bias"], bias, rtol=1e-9, atol=1e-9)
    assert np.allclose(found["norm"], np.mean([model["norm"] for model in MODELS], axis=0), rtol=1e-14)


def test_without_a_constant_column_the_bias_is_the_mean():
    inputs = [rows_for(seed) for seed in range(3)]
    found = regression(MODELS, inputs, joint=False, ridge=0.0)
    weight, _ = least_squares(MODELS, inputs, joint=False)
    assert np.allclose(found["fc.weight"], weight, rtol=1e-9, atol=1e-9)
    assert np.allclose(found["fc.bias"], np.mean([model["fc.bias"] for model in MODELS], axis=0), rtol=1e-14)


def test_what_no_input_excites_keeps_the_mean():
    inputs = [np.pad(rows_for(seed, columns=3), ((0, 0), (0, 2))) for seed in range(3)]
    found = regression(MODELS, inputs)
    mean = np.mean([model["fc.weight"] for model in MODELS], axis=0)
    assert np.isfinite(found["fc.weight"]).all()
    assert np.allclose(found["fc.weight"][:, 3:], mean[:, 3:], rtol=0, atol=1e-9)
    assert not np.allclose(found["fc.weight"][:, :3], mean[:, :3], atol=1e-2)
    nothing = regression(MODELS, [np.zeros((4, 5))] * 3, joint=False)
    assert np.allclose(nothing["fc.weight"], mean, rtol=1e-14)


def test_equal_models_and_zero_weights_are_left_alone():
    inputs = [rows_for(seed) for seed in range(3)]
    same = regression([MODELS[0]] * 3, inputs)
    first = regression(MODELS, inputs, weight=(1.0, 0.0, 0.0))
    for name in SHAPES:
        assert np.allclose(same[name], MODELS[0][name], rtol=0, atol=1e-12)
        assert np.allclose(first[name], MODELS[0][name], rtol=0, atol=1e-12)


def test_without_correlations_columns_are_averaged_by_their_energy():
    inputs = [rows_for(seed) for seed in range(3)]
    found = regression(MODELS, inputs, joint=False, alpha=0.0, ridge=0.0)
    energy = [np.mean(own**2, axis=0) for own in inputs]
    wanted = sum(e * model["fc.weight"] for e, model in zip(energy, MODELS, strict=True)) / sum(energy)
    assert np.allclose(found["fc.weight"], wanted, rtol=1e-12)


def test_transposed_weights_and_groups_are_the_same_layers():
    inputs = [rows_for(seed) for seed in range(3)]
    plain = regression(MODELS, inputs)
    turned = regression([{**model, "fc.weight": model["fc.weight"].T} for model in MODELS], inputs, transposed=True)
    assert np.allclose(turned["fc.weight"].T, plain["fc.weight"], rtol=1e-12)
    assert np.allclose(turned["fc.bias"], plain["fc.bias"], rtol=1e-12)
    halves = [np.stack([own, own[::-1] ** 2]) for own in inputs]
    grouped = regression(MODELS, halves, groups=2)
    for place in range(2):
        part = slice(3 * place, 3 * place + 3)
        own = [{"fc.weight": m["fc.weight"][part], "fc.bias": m["fc.bias"][part]} for m in MODELS]
        alone = regression(own, [half[place] for half in halves])
        for name in ("fc.weight", "fc.bias"):
            assert np.allclose(grouped[name][part], alone[name], rtol=1e-10)


def test_a_matrix_that_cannot_be_factorised_names_the_layer_and_what_to_do():
    broken = -np.eye(5)
    with pytest.raises(DataError, match=r'"fc.weight".*5 columns.*more examples.*`alpha`'):
        merge_arrays(
            "regmean",
            [coded({"fc.weight": model["fc.weight"]}) for model in MODELS],
            statistics={"gram": [coded({"fc.weight": broken})] * 3},
            metadata={"gram": {"layers": "{}"}},
        )


def test_a_matrix_of_another_width_is_refused():
    with pytest.raises(MismatchError, match="has 8 columns, the weight 5"):
        regression(MODELS, [rows_for(seed, columns=7) for seed in range(3)])
