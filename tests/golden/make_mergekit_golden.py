"""Write `mergekit.safetensors`: small inputs, and what mergekit makes of them in float64.

    python tests/golden/make_mergekit_golden.py tests/golden/mergekit.safetensors

Run it with a Python that has mergekit 0.1.5. The file holds the inputs (`input.SHAPE.base`, `input.SHAPE.N`) and one
output per case and shape (`output.CASE.SHAPE`). Its metadata holds the cases as JSON (label, method, whether a base is
given, number of models, parameters) and the versions that made them. `deviations` are inputs with which this project
differs on purpose: inputs `deviation.CASE.N`, and `deviation.CASE.output` or, in the metadata, the name of the error.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys

import numpy as np
import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.numpy import save_file

SHAPES = {"matrix": (12, 16), "vector": (7,)}
WEIGHTS = [0.5, 0.3, 0.2]
KEYS = ("label", "method", "base", "models", "parameters")
HALF = {"weight": WEIGHTS, "density": 0.5}


def cases() -> list[tuple[str, str, bool, int, dict[str, object]]]:
    """Return (label, method, whether a base is given, number of models, parameters)."""
    return [
        ("linear", "linear", False, 3, {"weight": WEIGHTS}),
        ("linear-sum", "linear", False, 3, {"weight": [0.5, -0.3, 2.0], "normalize": False}),
        ("linear-normalized", "linear", False, 3, {"weight": [5.0, 3.0, 1.0]}),
        ("slerp", "slerp", True, 1, {"t": 0.4}),
        ("slerp-end", "slerp", True, 1, {"t": 1.0}),
        ("nuslerp", "nuslerp", False, 2, {"weight": [0.6, 0.4]}),
        ("nuslerp-base", "nuslerp", True, 2, {"weight": [0.6, 0.4]}),
        ("nuslerp-last-axis", "nuslerp", False, 2, {"weight": [0.6, 0.4], "nuslerp_flatten": False}),
        (
            "nuslerp-first-axis",
            "nuslerp",
            True,
            2,
            {"weight": [0.6, 0.4], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        ),
        ("multislerp", "multislerp", False, 3, {"weight": WEIGHTS, "eps": 1e-12}),
        ("multislerp-base", "multislerp", True, 3, {"weight": WEIGHTS, "eps": 1e-12}),
        (
            "multislerp-sum",
            "multislerp",
            False,
            3,
            {"weight": [0.5, 0.7, 0.4], "normalize_weights": False, "eps": 1e-12},
        ),
        ("karcher", "karcher", False, 3, {}),
        ("karcher-long", "karcher", False, 3, {"max_iter": 50, "tol": 1e-9}),
        ("task_arithmetic", "task_arithmetic", True, 3, {"weight": WEIGHTS}),
        ("task_arithmetic-lambda", "task_arithmetic", True, 3, {"weight": WEIGHTS, "lambda": 0.6, "normalize": True}),
        ("ties", "ties", True, 3, HALF),
        ("ties-sum", "ties", True, 3, {**HALF, "normalize": False, "lambda": 0.7}),
        ("ties-rescale", "ties", True, 3, {"weight": [1.0, 0.7, 0.2], "density": [0.2, 0.55, 0.8], "rescale": True}),
        ("ties-one", "ties", True, 1, {"weight": 0.4, "density": 0.01}),
        ("ties-dense", "ties", True, 3, {"weight": WEIGHTS, "density": 1.0}),
        ("breadcrumbs", "breadcrumbs", True, 3, {**HALF, "gamma": 0.05}),
        ("breadcrumbs-rescale", "breadcrumbs", True, 3, {**HALF, "gamma": 0.2, "density": 0.9, "rescale": True}),
        ("breadcrumbs_ties", "breadcrumbs_ties", True, 3, {**HALF, "gamma": 0.05}),
        ("breadcrumbs_ties-dense", "breadcrumbs_ties", True, 3, {"weight": WEIGHTS, "density": 1.0, "gamma": 0.3}),
        ("sce", "sce", True, 3, {"select_topk": 0.5}),
        ("sce-all", "sce", True, 3, {}),
        ("model_stock", "model_stock", True, 3, {}),
        ("model_stock-rows", "model_stock", True, 3, {"filter_wise": True}),
        ("nearswap", "nearswap", True, 1, {"t": 0.05}),
        ("arcee_fusion", "arcee_fusion", True, 1, {}),
        ("ram", "ram", True, 3, {"epsilon": 0.1}),
        ("ramplus_tl", "ramplus_tl", True, 3, {"epsilon": 0.1}),
        ("ramplus_tl-alpha", "ramplus_tl", True, 3, {"epsilon": 0.2, "r": 0.4, "alpha": 5.0}),
        ("passthrough", "passthrough", False, 1, {}),
        ("passthrough-scale", "passthrough", False, 1, {"scale": 0.8}),
        ("dare_linear-dense", "dare_linear", True, 3, {"weight": WEIGHTS}),
        ("dare_ties-dense", "dare_ties", True, 3, {"weight": WEIGHTS}),
        ("della-dense", "della", True, 3, {"weight": WEIGHTS}),
        ("della_linear-dense", "della_linear", True, 3, {"weight": WEIGHTS}),
    ]


def deviations() -> list[tuple[str, str, bool, list[np.ndarray], dict[str, object]]]:
    """Return (label, method, whether the first input is the base, inputs, parameters)."""
    zero, x, unit = np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]), np.eye(4)
    angles = [np.array([np.cos(angle), np.sin(angle)]) for angle in (0, 2, 4)]
    half = {"weight": 1.0, "density": 0.5}
    return [
        ("slerp-zero", "slerp", True, [zero, x], {"t": 0.3}),
        ("nuslerp-zero", "nuslerp", False, [zero, x], {"weight": [0.7, 0.3]}),
        ("multislerp-unchanged", "multislerp", True, [x, x, x, x], {"weight": WEIGHTS}),
        ("multislerp-cancelling", "multislerp", False, [x, x + 1], {"weight": [1.0, -1.0]}),
        ("linear-cancelling", "linear", False, [x, x + 1], {"weight": [1.0, -1.0]}),
        ("karcher-small", "karcher", False, [1e-6 * unit[0], 1e-6 * unit[1]], {}),
        ("model_stock-small", "model_stock", True, [zero, 3e-4 * (unit[0] + unit[1]), 3e-4 * unit[0]], {}),
        ("model_stock-beyond", "model_stock", True, [np.zeros(2), *angles], {}),
        ("della-one-entry", "della", True, [np.zeros(1), np.ones(1)], half),
        ("della-column", "della", True, [np.zeros((3, 1)), np.ones((3, 1))], half),
        ("della-scalar", "della", True, [np.zeros(()), np.ones(())], half),
        ("sce-small", "sce", True, [zero, 1e-4 * unit[0], 2e-4 * unit[0], 4e-4 * unit[0]], {}),
        ("nearswap-small", "nearswap", True, [x, x + 5e-7], {"t": 1e-7}),
        ("ties-rescale-small", "ties", True, [zero, 1e-9 * x], {**half, "rescale": True}),
    ]


def inputs() -> dict[str, np.ndarray]:
    """Return a base and three models of each shape; the models share most of their changes."""
    generator = np.random.Generator(np.random.PCG64(2024))
    found = {}
    for shape, size in SHAPES.items():
        base = generator.normal(size=size)
        common = generator.normal(size=size) * 0.3
        found[f"input.{shape}.base"] = base
        for model in range(3):
            found[f"input.{shape}.{model}"] = base + common + generator.normal(size=size) * (0.1 + 0.1 * model)
    return found


def merged(
    method: str, with_base: bool, tensors: list[np.ndarray], parameters: dict[str, object]
) -> np.ndarray:  # fmt: skip
    """Return what mergekit makes of the tensors in float64."""
    output = merge_tensors(
        [torch.from_numpy(np.array(tensor)) for tensor in tensors],
        method,
        parameters=parameters,
        base_index=0 if with_base else None,
        dtype=torch.float64,
        out_dtype=torch.float64,
    )
    return np.array(output.numpy())


def main() -> None:
    """Write the file that the command line names."""
    tensors = inputs()
    for label, method, with_base, count, parameters in cases():
        for shape in SHAPES:
            names = [f"input.{shape}.base"] * with_base + [f"input.{shape}.{model}" for model in range(count)]
            output = merged(method, with_base, [tensors[name] for name in names], parameters)
            tensors[f"output.{label}.{shape}"] = output
    different = []
    for label, method, with_base, given, parameters in deviations():
        error = None
        try:
            tensors[f"deviation.{label}.output"] = merged(method, with_base, given, parameters)
        except (ValueError, RuntimeError, IndexError) as caught:
            error = type(caught).__name__
        tensors.update({f"deviation.{label}.{i}": np.array(tensor) for i, tensor in enumerate(given)})
        values = (label, method, with_base, len(given) - with_base, parameters, error)
        different.append(dict(zip((*KEYS, "error"), values, strict=True)))
    versions = {name: importlib.metadata.version(name) for name in ("mergekit", "torch", "numpy")}
    metadata = {
        "cases": json.dumps([dict(zip(KEYS, case, strict=True)) for case in cases()]),
        "deviations": json.dumps(different),
        "versions": json.dumps({"python": platform.python_version(), **versions}),
        "command": "python tests/golden/make_mergekit_golden.py tests/golden/mergekit.safetensors",
    }
    save_file(tensors, sys.argv[1], metadata=metadata)


if __name__ == "__main__":
    main()
