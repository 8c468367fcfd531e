"""Tensors that are read beside the models: by methods that exist only here."""

from collections.abc import Iterator

import numpy as np
import pytest

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.artifact import parent_of, save_artifact
from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import CheckpointError, DataError, MismatchError, RecipeError
from graftwork.merge.memory import merge_arrays
from graftwork.merge.methods import registry
from graftwork.merge.passes import Apply, ApplyMatrix, Companion, Group, Sums


def _weighted(models, base, index, *, fisher, weight):
    total = weight[0] * fisher[0]
    value = total * models[0]
    for number in range(1, len(models)):
        share = weight[number] * fisher[number]
        total = total + share
        value = value + share * models[number]
    return value / total


def _squares(model, models, base, index, *, fisher):
    return (fisher * fisher,)


def _under_mask(models, base, index, *, mask, scale):
    return scale * (mask[0] * models[0] + mask[1] * models[1])


def _everywhere(name, available, parameters):
    if not all(name in names for names in available["fisher"]):
        raise MismatchError(f'cannot merge "{name}": a model has no fisher of it')
    return {"fisher": ("fisher", name)}


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    registry.load()
    before = dict(registry._METHODS)

    @registry.register(
        "weighted_by_file", title="x", kind="elementwise", base="ignored", formula="x", reference="x",
        statistics=("fisher",), companions=_everywhere,
    )  # fmt: skip
    def weighted(group: Group):
        """Weigh entries."""
        squares = yield Sums(_squares, group.models, {"fisher": Companion("fisher")}, each=True)
        weight = tuple(1 / np.sqrt(squares / group.size))
        return Apply(_weighted, {"fisher": Companion("fisher"), "weight": weight}, precision="float64")

    @registry.register(
        "by_matrix", title="x", kind="matrix", base="ignored", formula="x", reference="x", statistics=("gram",),
        companions=lambda name, available, parameters: {"gram": ("gram", name), "other": ("model", "bias")},
    )  # fmt: skip
    def by_matrix(group: Group):
        """Multiply by a matrix and add another tensor of the models."""

        def product(models, base, first, gram, other):
            return sum(model @ matrix + own for model, matrix, own in zip(models, gram, other, strict=True))

        return ApplyMatrix(product, {"gram": Companion("gram"), "other": Companion("other")})

    @registry.register(
        "masked", title="x", kind="elementwise", base="ignored", formula="x", reference="x", shared=("mask",),
        companions=lambda name, available, parameters: {"mask": ("mask", f"{name}.logit")},
    )  # fmt: skip
    def masked(group: Group):
        """Sum under a mask that all models share."""
        [file] = group.measured["mask"]
        scale = float(file.metadata["scale"]) * float(file.values("lambda")[1])
        return Apply(
            _under_mask,
            {"mask": Companion("mask"), "scale": scale},
        )

    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)


SIZE = 200_001


def _arrays(seed: int, count: int = 3, positive: bool = False):
    random = np.random.default_rng(seed)
    values = [random.standard_normal(SIZE).astype(np.float32) for _ in range(count)]
    return [np.abs(value) + np.float32(0.01) for value in values] if positive else values


def _expected(models, fishers):
    wide = [fisher.astype(np.float64) for fisher in fishers]
    share = [fisher / np.sqrt(np.mean(fisher**2)) for fisher in wide]
    return sum(a * m.astype(np.float64) for a, m in zip(share, models, strict=True)) / sum(share)


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("threads", [1, 2])
def test_statistics_reach_sums_and_formula(device, threads):
    models, fishers = _arrays(0), _arrays(1, positive=True)
    merged = merge_arrays(
        "weighted_by_file",
        [{"w": ("F32", model)} for model in models],
        statistics={"fisher": [{"w": ("F32", fisher)} for fisher in fishers]},
        device=device,
        threads=threads,
    )["w"]
    assert np.abs(merged - _expected(models, fishers)).max() < 1e-6


def test_whole_matrices_and_other_tensors_reach_matrix_methods():
    random = np.random.default_rng(0)
    models = [random.standard_normal((3, 4)) for _ in range(2)]
    bias = [random.standard_normal((3, 1)) for _ in range(2)]
    gram = [random.standard_normal((4, 4)) for _ in range(2)]
    merged = merge_arrays(
        "by_matrix",
        [{"weight": ("F64", m), "bias": ("F64", b)} for m, b in zip(models, bias, strict=True)],
        statistics={"gram": [{"weight": ("F64", g), "bias": ("F64", np.eye(1))} for g in gram]},
    )["weight"]
    expected = models[0] @ gram[0] + bias[0] + models[1] @ gram[1] + bias[1]
    assert np.allclose(merged, expected, atol=1e-14)


def test_a_shared_file_reaches_the_formula_and_the_program():
    models, [mask] = _arrays(0, 2), _arrays(1, 1, positive=True)
    merged = merge_arrays(
        "masked",
        [{"w": ("F32", model)} for model in models],
        shared={"mask": {"w.logit": ("F32", mask), "lambda": ("F64", np.array([0.0, 0.5]))}},
        metadata={"mask": {"scale": "2"}},
    )["w"]
    assert np.abs(merged - mask * (models[0] + models[1])).max() < 1e-5


def test_a_statistic_that_is_not_finite_is_named():
    fishers = _arrays(1, positive=True)
    fishers[2][77] = np.inf
    with pytest.raises(DataError, match=r"fisher file of model 2 has inf at flat index 77"):
        merge_arrays(
            "weighted_by_file",
            [{"w": ("F32", model)} for model in _arrays(0)],
            statistics={"fisher": [{"w": ("F32", fisher)} for fisher in fishers]},
        )


def test_another_shape_is_refused():
    with pytest.raises(MismatchError, match=r'"w": it has the shape \[200001\].* shape \[2\]'):
        merge_arrays(
            "weighted_by_file",
            [{"w": ("F32", model)} for model in _arrays(0)],
            statistics={"fisher": [{"w": ("F32", np.ones(2, np.float32))}] * 3},
        )


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two models, their statistics, and a recipe."""
    monkeypatch.chdir(tmp_path)
    models, fishers = _arrays(0, 2), _arrays(1, 2, positive=True)
    for number, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
        save_artifact(f"m{number}.safetensors", {"w": model}, kind="model", method="x", settings={})
        with Checkpoint.open(f"m{number}.safetensors") as checkpoint:
            save_artifact(
                f"f{number}.safetensors", {"w": fisher}, kind="fisher", method="x", settings={},
                parents=[parent_of(checkpoint)],
            )  # fmt: skip
    (tmp_path / "recipe.yml").write_text(
        "merge_method: weighted_by_file\nmodels:\n"
        "- {model: m0.safetensors, statistics: {fisher: f0.safetensors}}\n"
        "- {model: m1.safetensors, statistics: {fisher: f1.safetensors}}\n"
    )
    return models, fishers


def test_a_recipe_names_its_statistics(files, tmp_path):
    models, fishers = files
    result = merge("recipe.yml", "out.safetensors")
    with Checkpoint.open("out.safetensors") as out:
        assert np.abs(load_numpy(out)["w"] - _expected(models, fishers)).max() < 1e-6
        assert [name in out.metadata["graftwork.parents"] for name in ("m0.", "f0.", "m1.", "f1.")] == [True] * 4
    assert result.plan.bytes_read == 4 * 4 * SIZE


def test_statistics_of_another_model_are_refused(files, tmp_path):
    text = (tmp_path / "recipe.yml").read_text()
    (tmp_path / "recipe.yml").write_text(text.replace("f0.", "x.").replace("f1.", "f0.").replace("x.", "f1."))
    with pytest.raises(CheckpointError) as caught:
        make_plan(load_recipe("recipe.yml").recipes[0])
    assert len(caught.value.problems) == 2
    assert "it was made from m1.safetensors" in caught.value.problems[0]
    assert "but m0.safetensors holds" in caught.value.problems[0]


def test_a_model_is_no_statistic(files, tmp_path):
    text = (tmp_path / "recipe.yml").read_text()
    (tmp_path / "recipe.yml").write_text(text.replace("f0.", "m0."))
    with pytest.raises(CheckpointError, match='is of the kind "model", not "fisher"'):
        make_plan(load_recipe("recipe.yml").recipes[0])


def test_statistics_that_are_missing_are_named_with_their_key(files, tmp_path):
    (tmp_path / "recipe.yml").write_text(
        "merge_method: weighted_by_file\nmodels: [{model: m0.safetensors}, "
        "{model: m1.safetensors, statistics: {fish: f}}]"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yml")
    problems = caught.value.problems
    assert any(line.startswith("models[0].statistics.fisher: is missing") for line in problems)
    assert any('models[1].statistics.fish: "weighted_by_file" does not know it' in line for line in problems)


def test_a_mask_where_none_is_used_is_a_problem(files, tmp_path):
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmask: f0.safetensors\nmodels: [{model: m0.safetensors, parameters: {weight: 1}}]"
    )
    with pytest.raises(RecipeError, match='mask: "linear" uses no mask'):
        load_recipe("recipe.yml")
