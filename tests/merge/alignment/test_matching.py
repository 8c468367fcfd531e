"""Matching weights: re-ordered copies are found bit for bit, steps only rise, nothing depends on chance or threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork.merge.alignment.apply import apply_permutation, check_permutation, identity, random_permutation
from graftwork.merge.alignment.families import family_spec
from graftwork.merge.alignment.matching import MatchingProgress, match_in_stages, match_weights
from graftwork.merge.alignment.spec import (
    Axis,
    Group,
    PermutationSpec,
    TensorAxes,
    concatenation,
    plain,
    product,
    shapes_of,
)
from graftwork.merge.artifact import save_artifact
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import DataError, MismatchError, RecipeError

CHECKPOINTS = Path(__file__).parents[4] / "shared" / "data" / "checkpoints" / "digits_lenet"

Model = dict[str, Tensor]


def normal(generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, generator=generator)


def spec_of(tensors: dict[str, tuple[Axis, ...]], model: Model, **within: str) -> PermutationSpec:
    """A spec of plain axes; sizes come from the model."""
    groups = {}
    for name, axes in tensors.items():
        for number, axis in enumerate(axes):
            if axis is not None and len(axis) == 1 and len(axis[0]) == 1:
                groups[str(axis[0][0])] = Group(model[name].shape[number], within.get(str(axis[0][0])))
    counted = {name: TensorAxes(axes, counted="running" not in name) for name, axes in tensors.items()}
    return PermutationSpec(groups, counted)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def mlp(seed: int, sizes: tuple[int, ...] = (12, 30, 24, 20, 5)) -> tuple[Model, PermutationSpec]:
    draw = normal(torch.Generator().manual_seed(seed))
    model = {}
    for layer, (entering, leaving) in enumerate(itertools.pairwise(sizes)):
        model[f"fc{layer}.weight"] = draw(leaving, entering) / entering**0.5
        model[f"fc{layer}.bias"] = 0.1 * draw(leaving)
    return model, family_spec(shapes_of(model))


def convolutional(seed: int) -> tuple[Model, PermutationSpec]:
    """A VGG with batch norm as after training, whose last channels are flattened with their 2 x 2 pixels."""
    draw = normal(torch.Generator().manual_seed(seed))
    model: Model = {}
    widths = (3, 8, 16, 16)
    for number, (entering, leaving) in enumerate(itertools.pairwise(widths)):
        model[f"features.{3 * number}.weight"] = draw(leaving, entering, 3, 3) / (9 * entering) ** 0.5
        model[f"features.{3 * number}.bias"] = 0.1 * draw(leaving)
        norm_of(model, f"features.{3 * number + 1}", leaving, draw)
    for name, entering, leaving in (("classifier.0", 64, 24), ("classifier.2", 24, 10)):
        model[f"{name}.weight"] = draw(leaving, entering) / entering**0.5
        model[f"{name}.bias"] = 0.1 * draw(leaving)
    return model, family_spec(shapes_of(model))


def norm_of(model: Model, name: str, width: int, draw: Callable[..., Tensor]) -> None:
    model[f"{name}.weight"] = 1 + 0.25 * draw(width)
    model[f"{name}.bias"] = 0.2 * draw(width)
    model[f"{name}.running_mean"] = 0.5 * draw(width)
    model[f"{name}.running_var"] = 0.5 + draw(width).abs()
    model[f"{name}.num_batches_tracked"] = torch.tensor(7)


def residual(seed: int) -> tuple[Model, PermutationSpec]:
    """A ResNet of bottlenecks, two stages."""
    draw = normal(torch.Generator().manual_seed(seed))
    model: Model = {}

    def convolution(name: str, norm: str, entering: int, leaving: int, kernel: int) -> None:
        model[f"{name}.weight"] = draw(leaving, entering, kernel, kernel) / (entering * kernel**2) ** 0.5
        norm_of(model, norm, leaving, draw)

    convolution("conv1", "bn1", 3, 8, 3)
    entering = 8
    for stage, width in ((1, 4), (2, 8)):
        for block in range(2):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", entering, width, 1)
            convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            convolution(f"{name}.conv3", f"{name}.bn3", width, 4 * width, 1)
            if block == 0:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", entering, 4 * width, 1)
            entering = 4 * width
    model["fc.weight"], model["fc.bias"] = draw(10, entering) / entering**0.5, draw(10)
    return model, family_spec(shapes_of(model))


def gpt2(seed: int) -> tuple[Model, PermutationSpec]:
    width, heads, hidden = 32, 4, 48
    draw = normal(torch.Generator().manual_seed(seed))
    model = {"wte.weight": draw(40, width), "wpe.weight": draw(16, width)}
    for layer in range(2):
        for name in ("ln_1", "ln_2"):
            model[f"h.{layer}.{name}.weight"], model[f"h.{layer}.{name}.bias"] = (
                1 + 0.2 * draw(width),
                0.2 * draw(width),
            )
        for name, entering, leaving in (
            ("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width),
            ("mlp.c_fc", width, hidden), ("mlp.c_proj", hidden, width),
        ):  # fmt: skip
            model[f"h.{layer}.{name}.weight"] = draw(entering, leaving) / entering**0.5
            model[f"h.{layer}.{name}.bias"] = 0.1 * draw(leaving)
    model["ln_f.weight"], model["ln_f.bias"] = 1 + 0.2 * draw(width), 0.2 * draw(width)
    return model, family_spec(shapes_of(model), config={"n_head": heads})


def llama(seed: int) -> tuple[Model, PermutationSpec]:
    """Rotary positions, and two groups of three query heads each."""
    width, heads, groups, hidden, size = 48, 6, 2, 40, 8
    draw = normal(torch.Generator().manual_seed(seed))
    model = {"model.embed_tokens.weight": draw(50, width), "lm_head.weight": draw(50, width)}
    model["model.norm.weight"] = 1 + 0.2 * draw(width)
    for layer in range(2):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            model[f"{name}.{norm}.weight"] = 1 + 0.2 * draw(width)
        for part, leaving, entering in (
            ("self_attn.q_proj", heads * size, width), ("self_attn.k_proj", groups * size, width),
            ("self_attn.v_proj", groups * size, width), ("self_attn.o_proj", width, heads * size),
            ("mlp.gate_proj", hidden, width), ("mlp.up_proj", hidden, width), ("mlp.down_proj", width, hidden),
        ):  # fmt: skip
            model[f"{name}.{part}.weight"] = draw(leaving, entering) / entering**0.5
    config = {"num_attention_heads": heads, "num_key_value_heads": groups}
    return model, family_spec(shapes_of(model), config=config)


def plain_queries(seed: int) -> tuple[Model, PermutationSpec]:
    """Query heads that share keys, without rotary positions: the order of dimensions of queries is free, too."""
    draw = normal(torch.Generator().manual_seed(seed))
    model = {name: draw(rows, 20) for name, rows in (("q", 2 * 3 * 4), ("k", 2 * 4), ("v", 2 * 4), ("o", 2 * 3 * 4))}
    model["embedding"] = draw(30, 20)
    groups = {
        "stream": Group(20), "heads": Group(2), "queries": Group(3, "heads"),
        "keys": Group(4, "heads"), "values": Group(4, "heads"),
    }  # fmt: skip
    axes = {
        "q": product("heads", "queries", "keys"), "k": product("heads", "keys"),
        "v": product("heads", "values"), "o": product("heads", "queries", "values"),
    }  # fmt: skip
    tensors = {name: TensorAxes((axis, plain("stream"))) for name, axis in axes.items()}
    return model, PermutationSpec(groups, {**tensors, "embedding": TensorAxes((None, plain("stream")))})


def concatenated(seed: int) -> tuple[Model, PermutationSpec]:
    """Two branches, laid end to end with fixed inputs, and a layer that is interleaved in threes."""
    draw = normal(torch.Generator().manual_seed(seed))
    model = {"left": draw(6, 5), "right": draw(9, 5), "joint": draw(8, 6 + 9 + 5), "threes": draw(4, 3 * 8)}
    groups = {"left": Group(6), "right": Group(9), "joint": Group(8)}
    tensors = {
        "left": TensorAxes((plain("left"), None)),
        "right": TensorAxes((plain("right"), None)),
        "joint": TensorAxes((plain("joint"), concatenation(plain("left"), plain("right"), 5))),
        "threes": TensorAxes((None, product(3, "joint"))),
    }
    return model, PermutationSpec(groups, tensors)


def symmetric(seed: int) -> tuple[Model, PermutationSpec]:
    """The stream on both axes of a tensor: no assignment problem, but bound by the embedding."""
    draw = normal(torch.Generator().manual_seed(seed))
    model = {"embedding": draw(40, 24), "transform": draw(24, 24), "bias": draw(24)}
    stream = plain("stream")
    axes = {"embedding": (None, stream), "transform": (stream, stream), "bias": (stream,)}
    return model, spec_of(axes, model)


NETWORKS = {
    function.__name__: function
    for function in (mlp, convolutional, residual, gpt2, llama, plain_queries, concatenated, symmetric)
}


def assert_found(model: Model, spec: PermutationSpec, seed: int, **settings: object) -> None:
    copy = apply_permutation(spec, random_permutation(spec, seed), model)
    found = match_weights(spec, model, copy, **settings)  # type: ignore[arg-type]
    restored = apply_permutation(spec, found.permutation, copy)
    different = [name for name in model if not torch.equal(restored[name], model[name])]
    assert different == []
    assert found.distance_after == 0.0


@pytest.mark.parametrize("network", NETWORKS)
def test_a_reordered_copy_is_found_bit_for_bit(network: str) -> None:
    for seed in range(50):
        model, spec = NETWORKS[network](seed)
        assert_found(model, spec, 1000 + seed)


@pytest.mark.parametrize("network", ["gpt2", "llama"])
def test_heads_are_found_with_the_stream_pinned(network: str) -> None:
    for seed in range(10):
        model, spec = NETWORKS[network](seed)
        spec = spec.pin({"residual": "kept"})
        assert_found(model, spec, seed)
        found = match_weights(spec, model, apply_permutation(spec, random_permutation(spec, seed), model))
        assert found.sweeps == 0, "nothing depends on anything but the stream: one pass is exact"
        assert found.pinned == {"residual": "kept"}


# ---------------------------------------------------------------------------------------------------------------------
# Residual networks with little that is fixed: coordinate descent from the identity finds next to none of these


def anchored_by(anchor: str, width: int, hidden: int, seed: int) -> tuple[Model, PermutationSpec]:
    """A residual MLP of two blocks. What is fixed: nothing but biases, a map of three inputs, or both."""
    draw = normal(torch.Generator().manual_seed(seed))
    stream = plain("stream")
    model: Model = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    if anchor != "biases":
        model["input"], axes["input"] = draw(width, 3), (stream, None)
    for block in range(2):
        inner = plain(f"hidden{block}")
        model[f"{block}.up"], axes[f"{block}.up"] = draw(hidden, width), (inner, stream)
        model[f"{block}.down"], axes[f"{block}.down"] = draw(width, hidden), (stream, inner)
        if anchor != "input":
            model[f"{block}.up_bias"], axes[f"{block}.up_bias"] = draw(hidden), (inner,)
            model[f"{block}.down_bias"], axes[f"{block}.down_bias"] = draw(width), (stream,)
    return model, spec_of(axes, model)


@pytest.mark.parametrize(("width", "hidden"), [(3, 5), (30, 50), (64, 256)])
@pytest.mark.parametrize("anchor", ["biases", "input", "both"])
def test_residual_networks_with_little_that_is_fixed(anchor: str, width: int, hidden: int) -> None:
    for seed in range(50):
        model, spec = anchored_by(anchor, width, hidden, seed)
        assert_found(model, spec, seed)


def test_descent_from_the_identity_fails_where_the_anchored_start_does_not() -> None:
    model, spec = anchored_by("input", 64, 128, 0)
    copy = apply_permutation(spec, random_permutation(spec, 3), model)
    assert match_weights(spec, model, copy, start="identity").distance_ratio > 0.1
    assert match_weights(spec, model, copy).distance_ratio == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Independent models


def objective(spec: PermutationSpec, a: Model, b: Model) -> float:
    return sum(
        float((a[name].double() * b[name].double()).sum()) for name, tensor in spec.tensors.items() if tensor.counted
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("start", ["anchored", "identity"])
def test_the_objective_rises_step_by_step_to_what_the_models_have(network: str, start: str) -> None:
    a, spec = NETWORKS[network](1)
    b, _ = NETWORKS[network](2)
    found = match_weights(spec, a, b, start=start)  # type: ignore[arg-type]
    check_permutation(spec, found.permutation)
    aligned = apply_permutation(spec, found.permutation, b)
    assert all(later > earlier for earlier, later in zip(found.log, found.log[1:], strict=False))
    assert found.objective_before == pytest.approx(objective(spec, a, b), rel=1e-12)
    assert found.objective_after == pytest.approx(objective(spec, a, aligned), rel=1e-12)
    assert found.log[-1] == pytest.approx(found.objective_after, rel=1e-12)
    assert found.objective_after > found.objective_before
    norms = sum(float(model[name].double().square().sum()) for model in (a, b)
                for name, tensor in spec.tensors.items() if tensor.counted)  # fmt: skip
    assert found.distance_after**2 == pytest.approx(norms - 2 * found.objective_after, rel=1e-9)


@pytest.mark.parametrize("network", ["mlp", "residual", "gpt2", "llama", "plain_queries"])
def test_no_single_group_can_do_better(network: str) -> None:
    """Where the descent ends, random exchanges of two units, also inside heads, never gain."""
    a, spec = NETWORKS[network](1)
    b, _ = NETWORKS[network](2)
    found = match_weights(spec, a, b)
    random = np.random.default_rng(0)
    for name in spec.free_groups:
        size = spec.groups[name].size
        for _ in range(8):
            changed = dict(found.permutation)
            vector = changed[name].copy()
            one, other = random.choice(size, 2, replace=False) + size * random.integers(spec.blocks(name))
            vector[[one, other]] = vector[[other, one]]
            changed[name] = vector
            value = objective(spec, a, apply_permutation(spec, changed, b))
            assert value <= found.objective_after + 1e-6 * abs(found.objective_after)


def test_a_step_on_a_tensor_with_a_group_twice_is_taken_only_if_the_objective_rises() -> None:
    """Without the embedding the linearised score of one tensor is misleading: plain descent would not end."""
    for seed in range(20):
        draw = normal(torch.Generator().manual_seed(seed))
        a, b = {"transform": draw(12, 12)}, {"transform": draw(12, 12)}
        spec = spec_of({"transform": (plain("stream"), plain("stream"))}, a)
        found = match_weights(spec, a, b, start="identity")
        assert found.objective_after >= found.objective_before
        assert all(later > earlier for earlier, later in zip(found.log, found.log[1:], strict=False))


def test_gains_of_groups_are_what_their_orders_have_more_than_the_present_ones() -> None:
    a, spec = gpt2(1)
    b, _ = gpt2(2)
    found = match_weights(spec, a, b)
    natural = identity(spec)
    for node, gain in found.gains.items():
        without = {
            name: natural[name] if node in (name, spec.groups[name].within) else vector
            for name, vector in found.permutation.items()
        }
        lost = found.objective_after - objective(spec, a, apply_permutation(spec, without, b))
        assert gain == pytest.approx(lost, rel=1e-4)


def test_equal_models_and_dead_units_keep_their_order() -> None:
    model, spec = convolutional(0)
    for name in ("features.3.weight", "features.3.bias", "features.4.weight", "features.4.bias"):
        model[name][5:9] = 0.0
    model["features.6.weight"][:, 5:9] = 0.0
    found = match_weights(spec, model, dict(model))
    for name, vector in found.permutation.items():
        np.testing.assert_array_equal(vector, np.arange(len(vector)), err_msg=name)
    assert found.distance_ratio == 1.0
    assert found.log == (found.objective_after,)


def test_running_statistics_go_along_but_do_not_count() -> None:
    a, spec = residual(1)
    b, _ = residual(2)
    found = match_weights(spec, a, b)
    disturbed = {name: value * 100 if "running" in name else value for name, value in b.items()}
    other = match_weights(spec, a, disturbed)
    assert_equal_orders(found.permutation, other.permutation)
    without = replace(spec, tensors={n: replace(t, counted=not n.endswith("bias")) for n, t in spec.tensors.items()
                                     if t.counted or "num" in n or "running" in n})  # fmt: skip
    with pytest.raises(DataError, match=r'"bn1\.num_batches_tracked" is torch\.int64, not floats'):
        match_weights(without, a, b)


def test_vectors_count() -> None:
    """With nothing but biases to go by, the order is that of the biases."""
    bias = torch.arange(8.0)
    spec = spec_of({"bias": (plain("units"),)}, {"bias": bias})
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    found = match_weights(spec, {"bias": bias}, {"bias": bias[order]})
    assert torch.equal(bias[order][torch.from_numpy(found.permutation["units"])], bias)


def assert_equal_orders(one: object, other: object) -> None:
    assert one.keys() == other.keys()  # type: ignore[attr-defined]
    for name in one:  # type: ignore[attr-defined]
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)  # type: ignore[index]


def test_threads_and_repetition_change_nothing() -> None:
    a, spec = mlp(1, (40, 300, 1100, 10))
    b, _ = mlp(2, (40, 300, 1100, 10))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            found.append(match_weights(spec, a, b))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_equal_orders(found[0].permutation, other.permutation)
        assert other.objective_after == found[0].objective_after
        assert other.log == found[0].log


def test_restarts_never_end_lower_and_seeds_decide() -> None:
    a, spec = mlp(1)
    b, _ = mlp(2)
    for start in ("anchored", "identity"):
        once = match_weights(spec, a, b, start=start, seed=3)  # type: ignore[arg-type]
        again = match_weights(spec, a, b, start=start, seed=3)  # type: ignore[arg-type]
        more = match_weights(spec, a, b, start=start, seed=3, restarts=6)  # type: ignore[arg-type]
        assert_equal_orders(once.permutation, again.permutation)
        assert more.objective_after >= once.objective_after
    assert more.objective_after > once.objective_after, "six random starts of this small network find a better order"


def test_a_given_order_is_a_start() -> None:
    a, spec = mlp(1)
    b, _ = mlp(2)
    found = match_weights(spec, a, b)
    again = match_weights(spec, a, b, start=found.permutation)
    assert_equal_orders(found.permutation, again.permutation)
    assert again.log == (again.objective_after,)
    short = match_weights(spec, a, b, start="identity", max_sweeps=1)
    assert short.sweeps == 1


def test_stages_leave_the_stream_of_relatives_alone() -> None:
    a, spec = gpt2(1)
    draw = normal(torch.Generator().manual_seed(5))
    still = spec.pin({"residual": "the models are relatives"})
    relative = {name: value + 0.05 * draw(*value.shape) for name, value in a.items()}
    b = apply_permutation(still, random_permutation(still, 3), relative)
    found = match_in_stages(spec, a, b)
    np.testing.assert_array_equal(found.permutation["residual"], np.arange(32))
    restored = apply_permutation(spec, found.permutation, b)
    assert found.distance_after == pytest.approx(
        sum(float((restored[name] - a[name]).double().square().sum()) for name in a) ** 0.5, rel=1e-9
    )
    assert found.distance_after <= sum(float((relative[n] - a[n]).double().square().sum()) for n in a) ** 0.5 * (
        1 + 1e-9
    )
    assert found.pinned == {}


def test_every_solver_gives_the_same() -> None:
    a, spec = mlp(1)
    b, _ = mlp(2)
    pytest.importorskip("lap")
    found = [match_weights(spec, a, b, solver=solver) for solver in ("own", "scipy", "lapx")]  # type: ignore[arg-type]
    for other in found[1:]:
        assert other.objective_after == pytest.approx(found[0].objective_after, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# What goes in


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_is_read(dtype: torch.dtype) -> None:
    model, spec = mlp(0)
    model = {name: value.to(dtype) for name, value in model.items()}
    assert_found(model, spec, 1)
    wide = {name: value.double() if "fc1" in name else value for name, value in model.items()}
    assert match_weights(spec, model, apply_permutation(spec, random_permutation(spec, 2), wide)).distance_after == 0.0


def test_files_and_arrays_give_the_same(tmp_path: Path) -> None:
    a, spec = residual(1)
    b, _ = residual(2)
    found = match_weights(spec, a, b)
    arrays = [{name: value.numpy() for name, value in model.items()} for model in (a, b)]
    for model in arrays:
        for value in model.values():
            value.setflags(write=False)
    assert_equal_orders(found.permutation, match_weights(spec, arrays[0], arrays[1]).permutation)
    for name, model in zip("ab", arrays, strict=True):
        save_artifact(tmp_path / f"{name}.safetensors", model, kind="test", method="test", settings={}, parents=[])
    with Checkpoint.open(tmp_path / "a.safetensors") as one, Checkpoint.open(tmp_path / "b.safetensors") as other:
        assert_equal_orders(found.permutation, match_weights(spec, one, other).permutation)


def test_a_model_that_diverged_is_refused_by_the_name_of_its_tensor() -> None:
    a, spec = mlp(1)
    b, _ = mlp(2)
    for value, word in ((np.nan, "NaN"), (np.inf, "infinity")):
        broken = {name: tensor.clone() for name, tensor in b.items()}
        broken["fc1.weight"][3, 2] = value
        with pytest.raises(DataError, match=rf'units of the second model: "fc1\.weight" holds {word}'):
            match_weights(spec, a, broken)


def test_what_does_not_fit_is_refused() -> None:
    a, spec = mlp(1)
    b, _ = mlp(2, (12, 30, 25, 20, 5))
    with pytest.raises(MismatchError, match=r'the second model .* "fc1\.weight" axis 0 has 25 entries'):
        match_weights(spec, a, b)
    with pytest.raises(MismatchError, match="the order to start with"):
        match_weights(spec, a, a, start={"fc0": np.zeros(30, np.int64)})
    with pytest.raises(RecipeError, match="restarts is 0, not 1 or more"):
        match_weights(spec, a, a, restarts=0)
    with pytest.raises(RecipeError, match='start is "random"'):
        match_weights(spec, a, a, start="random")  # type: ignore[arg-type]


def test_progress_is_told() -> None:
    a, spec = mlp(1)
    b, _ = mlp(2)
    told: list[MatchingProgress] = []
    found = match_weights(spec, a, b, progress=told.append)
    assert [step.solves for step in told] == list(range(1, found.solves + 1))
    assert told[0].sweep == 0
    assert told[-1].sweep == found.sweeps


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason=f"needs the real checkpoints in {CHECKPOINTS}")
@pytest.mark.parametrize(("pair", "ratio"), [("mnist", 0.869), ("svhn", 0.870)])
def test_real_networks_come_nearer(pair: str, ratio: float) -> None:
    with (
        Checkpoint.open(CHECKPOINTS / f"{pair}_a.safetensors") as a,
        Checkpoint.open(CHECKPOINTS / f"{pair}_b.safetensors") as b,
    ):
        spec = family_spec(shapes_of(a.tensors))
        assert match_weights(spec, a, b).distance_ratio <= ratio + 5e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_formed_on_a_gpu_find_the_same_copy() -> None:
    for network in ("mlp", "gpt2", "llama"):
        model, spec = NETWORKS[network](1)
        assert_found(model, spec, 2, device="cuda")
