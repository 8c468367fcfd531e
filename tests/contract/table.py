"""One row per method (and per setting of it that changes what it is), and what holds for that row.

Laws are letters; `test_methods.py` has one test for each of them:

    A  every input is b: the result is b                    I  a model split in two of half the weight: same
    B  all models are x: the result is x                    J  one more model that is b: same
    C  models permuted with their parameters: same          K  one model of weight 1: that model
    D  a common tensor added to everything: added           L  orthogonal maps of the flat tensor commute
    E  everything times 8: times 8                          M  orthogonal maps of rows and columns commute
    F  everything negated: negated                          N  a permutation of the elements commutes
    G  weights times 3: same                                O  every entry between min and max of the inputs
    V  weights times 3: three times as far from the base    P  lambda times: as many times as far from the base
    H  weight 0: as if the model were absent

A new method needs a row here; without one, `test_every_method_has_a_row` fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from graftwork.merge import dtypes
from graftwork.merge.memory import merge_arrays
from graftwork.merge.methods import registry

Array = np.ndarray[Any, np.dtype[Any]]

W = (0.5, 0.3, 0.2)
HALF = {"weight": W, "density": (0.5, 0.4, 0.7)}
CRUMBS = {**HALF, "gamma": (0.05, 0.1, 0.02)}
RANKED = {**HALF, "epsilon": (0.15, 0.1, 0.05)}


@dataclass(frozen=True)
class Row:
    """A method with example parameters, and its laws.

    Args:
        label: What the row is called in test names; begins with the method's name.
        parameters: Example parameters, those per model as tuples for `models` models.
        laws: The laws that hold with them.
        broken: Laws that do not hold with them, as a proof that the law's test can fail.
        neutral: Further parameters, with which `neutral_laws` hold as well.
        neutral_laws: See `neutral`.
        models: Number of models.
        base: Whether a base is given.
        tolerance: Relative to the largest entry, in float64.
    """

    label: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    laws: str = ""
    broken: str = ""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    neutral_laws: str = ""
    models: int = 3
    base: bool = True
    tolerance: float = 1e-12

    @property
    def method(self) -> str:
        """The method's registered name."""
        return self.label.partition("-")[0]


DENSE = {"density": 1.0}

ROWS = (
    Row("linear", {"weight": W}, "ABCDEFGHIKLMNO", "J", base=False),
    Row("linear-sum", {"weight": (0.5, -0.3, 2.0), "normalize": False}, "CEFHILMN", "ABG", base=False),
    Row("passthrough", {}, "ABEFKLMN", models=1, base=False),
    Row("passthrough-scale", {"scale": 0.8}, "EFLMN", "AK", models=1, base=False),
    Row("task_arithmetic", {"weight": W, "lambda": 0.7}, "ACDEFVHIJLMNP", "BG", {"lambda": 1.0}, "K"),
    Row("task_arithmetic-normalized", {"weight": (0.5, 0.9, 0.2), "normalize": True}, "ABCDEFGHIKLMNP", "JV"),
    Row("ties", HALF, "ACDEFGHIJNOP", "BL", DENSE, "BK"),
    Row("ties-sum", {**HALF, "normalize": False}, "ACDEFVHIJNP", "BG", DENSE, "K"),
    Row("ties-rescaled", {**HALF, "rescale": True}, "ACDEFGHIJNP", "BO", DENSE, "BK"),
    Row("ties-model", {**HALF, "scope": "model"}, "ACDEFGHIJNOP", "BL", DENSE, "BK"),
    Row("breadcrumbs", CRUMBS, "ACDEFVHIJNP", "BGL", DENSE, "K"),
    Row("breadcrumbs-rescaled", {**CRUMBS, "rescale": True}, "ACDEFVHIJNP", "BG", DENSE, "K"),
    Row("breadcrumbs_ties", CRUMBS, "ACDEFVHIJNP", "BG", DENSE, "K"),
    Row("dare_linear", HALF, "ACDEFVHIJP", "BGN", DENSE, "K"),
    Row("dare_linear-published", {**HALF, "rescale": "density", "seed": 7}, "ACDEFVHIJP", "BGN", DENSE, "K"),
    Row("dare_ties", HALF, "ACDEFVHIJP", "BGN", DENSE, "K"),
    Row("della", RANKED, "ACDEFGHIJP", "BN", DENSE, "BK"),
    Row("della-published", {**RANKED, "rescale": "inverse"}, "ACDEFGHIJP", "BN", DENSE, "BK"),
    Row("della_linear", RANKED, "ACDEFVHIJP", "BGN", DENSE, "K"),
    Row("slerp", {"t": 0.4}, "AEFLMN", "BD", models=1),
    Row("nuslerp", {"weight": (0.6, 0.3)}, "ABCEFGHLMN", "D", models=2, base=False),
    Row("nuslerp-base", {"weight": (0.6, 0.3)}, "ABCDEFGHLMN", "J", models=2),
    Row("nuslerp-last-axis", {"weight": (0.6, 0.3), "nuslerp_flatten": False}, "ABCDEFGH", "LN", models=2),
    Row(
        "nuslerp-first-axis", {"weight": (0.6, 0.3), "nuslerp_flatten": False, "nuslerp_row_wise": True}, "ABCEFGH",
        "DLN", models=2, base=False,
    ),
    Row("multislerp", {"weight": W}, "ABCEFGHIKLMN", "D", base=False),
    Row("multislerp-base", {"weight": W}, "ABCDEFGHIKLMN", "J"),
    Row("multislerp-sum", {"weight": (0.5, 0.9, 0.2), "normalize_weights": False}, "ACDEFVHILMN", "BG"),
    Row("karcher", {"weight": W}, "ABCEFGHIKLMN", "D", base=False),
    Row("model_stock", {}, "ABCDEFLMNO", "J"),
    Row("model_stock-rows", {"filter_wise": True}, "ABCDEFO", "LN"),
    # It stops when a step changes no coefficient by more than 1e-10.
    # Of two models of unequal weight the median is the heavier one, which it nears only to `nu`: so equal ones.
    Row(
        "geometric_median", {"weight": (0.4, 0.4, 0.2)}, "ABCDEFGHIKLMNO", "J", base=False, tolerance=1e-8,
    ),
    Row("geometric_median-base", {"weight": (0.4, 0.4, 0.2), "scope": "tensor"}, "ABCDEFGHIKLMNO", "J", tolerance=1e-8),
    Row("sce", {"select_topk": 0.5}, "ACDEFNOP", "BL", {"select_topk": 1.0}, "BJK"),
    Row(
        "sce-weights", {"select_topk": 0.5, "select": "weights", "lambda": 0.8}, "ACDEFNP", "BL", {"select_topk": 1.0},
        "J",
    ),
    Row("nearswap", {"t": 0.1}, "ADFNO", "BEL", {"t": 100.0}, "BK", models=1),
    Row("ram", {"epsilon": 0.15}, "ACDFJNOP", "BEL", {"epsilon": 0.0}, "BEK"),
    Row(
        "ramplus_tl", {"epsilon": 0.15, "r": 0.4, "alpha": 2.0, "lambda": 0.8}, "ACDFJNP", "BEL", {"epsilon": 0.0}, "E",
    ),
    Row("arcee_fusion", {}, "AO", "DEFN", models=1),
    # Singular vectors carry more rounding.
    Row("iso_c", {"scale": 0.9}, "ACDEFJMP", "BLN", tolerance=1e-11),
    Row("iso_c-images", {"matrix_reshape": True}, "ACDEFJMP", "BLN", tolerance=1e-11),
    Row("iso_c-mean", {"decompose": False}, "ABCDEFKLMNOP", "J"),
    Row("iso_cts", {"common_fraction": 0.6, "scale": 0.9}, "ACDEFMP", "BJLN", tolerance=1e-11),
    Row(
        "iso_cts-images", {"common_fraction": 1.0, "matrix_reshape": True, "decompose": True}, "ACDEFJMP", "BLN",
        tolerance=1e-11,
    ),
    Row("tsv_m", {"weight": (0.5, 0.9, 0.7), "scale": 0.9}, "ACDEFMPV", "BGLN", {"scale": 1.0}, "K", tolerance=1e-11),
    Row("consensus_ta", {"threshold": 2, "mask_lambda": (0.4, 0.6, 0.5), "scale": 0.7}, "ACDEFJNP", "BKL"),
    Row("consensus_ta-sum", {"threshold": 0, "scale": 1.0}, "ACDEFJKLMNP", "BO"),
    Row(
        "consensus_ties", {"threshold": 1, "mask_lambda": 0.6, "scale": 0.7, "density": (0.3, 0.6, 0.4)}, "ACDEFJNP",
        "BKL",
    ),
    Row("tall_masks", {"from": "sum", "mask_lambda": 0.5, "scale": 0.7}, "ACDEFJLMNP", "B", {"scale": 1.0}, "K"),
    Row("tall_masks-ties", {"from": "ties", "density": 0.6, "scale": 0.7}, "ACDEFNP", "BKL", {"density": 1.0}, "J"),
    Row("emr", {"rescale_by": "entry"}, "ABCDEFJKNO", "L"),
    Row("pcb", {"ratio": 0.4, "scale": 0.9}, "ACDFNP", "BEJKL"),
    Row("pcb-tensor", {"ratio": 0.9, "scale": 1.0, "scope": "tensor"}, "ACDFNP", "BEJKL"),
    Row("tsv_m-images", {"matrix_reshape": True, "decompose": True}, "ACDEFKMP", "BJLN", tolerance=1e-11),
)  # fmt: skip


def laws(*letters: str) -> list[tuple[Row, dict[str, Any]]]:
    """Return every row for which one of the laws holds, with the parameters for which it does."""
    found = []
    for row in ROWS:
        if any(letter in row.laws for letter in letters):
            found.append((row, dict(row.parameters)))
        if any(letter in row.neutral_laws for letter in letters):
            found.append((row, {**row.parameters, **row.neutral}))
    return found


def broken(letter: str) -> list[tuple[Row, dict[str, Any]]]:
    """Return every row for which the law does not hold."""
    return [(row, dict(row.parameters)) for row in ROWS if letter in row.broken]


def is_per_model(method: str, name: str) -> bool:
    """Say whether each model has its own value of the parameter."""
    return registry.get(method).parameters[name].per_model


def chosen(method: str, parameters: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Return the parameters for the models that `order` names."""
    return {
        name: tuple(value[number] for number in order)
        if is_per_model(method, name) and isinstance(value, tuple)
        else value
        for name, value in parameters.items()
    }


# ---------------------------------------------------------------- raw words


def words_of(values: Any, dtype: str) -> Array:
    """Return values as raw words, rounded by torch (from float32; from float64 only where that is exact)."""
    values = np.asarray(values)
    if dtype in ("F64", "F32"):
        return values.astype(dtypes.RAW[dtype])
    if dtype == "F16":
        return values.astype(np.float16).view(np.int16)
    tensor = torch.from_numpy(np.array(values, np.float32)).to(getattr(torch, dtypes.TORCH_NAMES[dtype]))
    same_size = torch.int16 if dtype == "BF16" else torch.uint8
    return tensor.view(same_size).numpy().view(dtypes.RAW[dtype])


def values_of(words: Array, dtype: str) -> Array:
    """Return raw words as float64 values."""
    if dtype in ("F64", "F32"):
        return words.astype(np.float64)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float64)
    same_size = np.int16 if dtype == "BF16" else np.uint8
    tensor = torch.from_numpy(np.array(words).view(same_size)).view(getattr(torch, dtypes.TORCH_NAMES[dtype]))
    return tensor.to(torch.float32).numpy().astype(np.float64)


def merged(
    method: str,
    base: Array | None,
    models: Sequence[Array],
    parameters: Mapping[str, Any],
    *,
    dtype: str = "F64",
    name: str = "tensor",
    **options: Any,
) -> Array:
    """Return what the engine makes of float64 arrays that are stored in `dtype`, as float64."""
    stored = [{name: (dtype, words_of(model, dtype))} for model in models]
    below = None if base is None else {name: (dtype, words_of(base, dtype))}
    output = merge_arrays(method, stored, below, parameters=parameters, **options)
    return values_of(output[name], options.get("dtype") or dtype)
