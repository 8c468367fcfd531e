"""Tests of aggregation against float64 references and against Flower's own robust aggregators."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from graftwork.federated.aggregation import Aggregation, krum_order
from graftwork.federated.errors import FederationError
from graftwork.federated.messages import Encoder, decode_arrays, raw_of, tensor_of

pytestmark = pytest.mark.flower


def models(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"model/a": torch.randn(5, 7, generator=generator), "model/b": torch.randn(11, generator=generator)}
        for _ in range(count)
    ]


def merged(method: str, replies: list[dict[str, torch.Tensor]], weights: list[float]) -> dict[str, torch.Tensor]:
    raws = [{name: raw_of(value) for name, value in reply.items()} for reply in replies]
    base = {name: raw_of(torch.zeros_like(value)) for name, value in replies[0].items()}
    return Aggregation.parse(method).merge(raws, base, weights)


def test_the_mean_is_the_weighted_mean_rounded_once() -> None:
    replies, weights = models(5), [3.0, 0.0, 1.0, 7.0, 2.0]
    found = merged("mean", replies, weights)
    for name in replies[0]:
        exact = sum(w * reply[name].double() for w, reply in zip(weights, replies, strict=True)) / sum(weights)
        torch.testing.assert_close(found[name].double(), exact, rtol=0, atol=4e-7)


@pytest.mark.parametrize("count", [4, 5])
def test_median_trimmed_mean_and_krum_agree_with_flowers(count: int) -> None:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum
    from flwr.serverapp.strategy.fedavg import FedAvg

    from graftwork.federated.grid import _identify

    _identify()
    replies = models(count)

    def flower(strategy: FedAvg) -> dict[str, np.ndarray]:
        sent = []
        for reply in replies:
            arrays = ArrayRecord({name: Array(value.numpy()) for name, value in reply.items()})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            sent.append(Message(content, dst_node_id=1, message_type="train"))
        arrays, _ = strategy.aggregate_train(1, sent)
        assert arrays is not None
        return {name: array.numpy() for name, array in arrays.items()}

    for method, strategy in (
        ("median", FedMedian()),
        ("trimmed_mean:cut=0.25", FedTrimmedAvg(beta=0.25)),
        ("krum:faulty=1", Krum(num_malicious_nodes=1)),
    ):
        expected = flower(strategy)
        found = merged(method, replies, [1.0] * count)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name].numpy(), value, rtol=0, atol=1e-6)


def test_krum_leaves_out_the_one_far_away() -> None:
    replies = models(5)
    replies[3] = {name: value + 100 for name, value in replies[3].items()}
    raws = [{name: raw_of(value) for name, value in reply.items()} for reply in replies]
    assert krum_order(raws, list(raws[0]), faulty=1)[-1] == 3


def test_any_method_of_the_engine_whose_needs_are_met() -> None:
    replies = models(3)
    for method in ("ties:density=0.5", "task_arithmetic", "geometric_median", "model_stock", "dare_ties:density=0.9"):
        found = merged(method, replies, [1.0, 2.0, 1.0])
        assert all(bool(value.isfinite().all()) for value in found.values())


def test_many_replies_are_merged_without_a_kernel_for_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwork.federated.aggregation import engine

    replies = models(4)
    compiled = merged("ties:density=0.5", replies, [1.0, 2.0, 1.0, 3.0])
    monkeypatch.setattr(engine, "MANY", 3)
    found = merged("ties:density=0.5", replies, [1.0, 2.0, 1.0, 3.0])
    for name, value in compiled.items():
        torch.testing.assert_close(found[name], value, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tiess", 'did you mean "ties"'),
        ("slerp", "takes at most"),
        ("trimmed_mean:cut=0.7", "below 0.5"),
        ("krum:faulti=1", 'did you mean "faulty"'),
        ("ties:densty=1", 'did you mean "density"'),
        ("ties:density", "write ties:parameter=value"),
    ],
)
def test_a_wrong_aggregation_is_refused_before_anything_runs(text: str, problem: str) -> None:
    with pytest.raises(FederationError) as caught:
        Aggregation.parse(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.bool,
        torch.uint8,
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 4)])
@pytest.mark.parametrize("is_local", [False, True])
def test_tensors_of_every_dtype_come_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], is_local: bool
) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    encoded = Encoder(is_local=is_local).record({"x": tensor})
    back = tensor_of(decode_arrays(encoded.record, json.loads(encoded.dtypes))["x"])
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    words = [value.numel() and value.reshape(-1).view(torch.uint8).tolist() for value in (back, tensor)]
    assert words[0] == words[1]


def test_arrays_that_stay_in_the_process_are_what_would_cross_the_wire() -> None:
    """Of the same size, in the same bytes, and plain ones as soon as they are pickled."""
    import pickle

    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(7).bfloat16()}
    sent, local = Encoder().record(tensors), Encoder(is_local=True).record(tensors)
    assert (local.size, local.dtypes) == (sent.size, sent.dtypes)
    for name in tensors:
        assert local.record[name].data == sent.record[name].data
        assert np.array_equal(local.record[name].numpy(), sent.record[name].numpy())
        assert type(pickle.loads(pickle.dumps(local.record[name]))) is type(sent.record[name])


def test_the_mean_is_rounded_once_however_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against products and sums in float64: in memory, compiled, and one reply after the other."""
    from graftwork.federated.aggregation import mean as module

    rng = np.random.default_rng(0)
    values = [rng.normal(size=module.CHUNK + 100).astype(np.float32) for _ in range(5)]
    weights = [3.0, 1.0, 4.0, 1.0, 5.0]
    expected = np.zeros(module.CHUNK + 100)
    for value, weight in zip(values, weights, strict=True):
        expected += value.astype(np.float64) * (weight / 14.0)
    raws = [("F32", value) for value in values]
    found = [module.mean(iter(raws), weights), module.means([{"x": raw} for raw in raws], ["x"], weights)["x"]]
    monkeypatch.setattr(module, "COMPILED_ABOVE", 0)
    found.append(module.means([{"x": raw} for raw in raws], ["x"], weights)["x"])
    for each in found:
        assert np.array_equal(each.numpy(), expected.astype(np.float32))


def test_arrays_that_lie_are_refused() -> None:
    from flwr.app import Array, ArrayRecord

    good = Array(np.arange(6, dtype=np.float32))
    short = Array("float32", (6,), "numpy.ndarray", good.data[:-4])
    with pytest.raises(ValueError, match='"x" has 20 bytes for 6 values'):
        decode_arrays(ArrayRecord({"x": short}), {})
    with pytest.raises(ValueError, match="which does not carry BF16"):
        decode_arrays(ArrayRecord({"x": good}), {"x": "BF16"})
    with pytest.raises(ValueError, match="serialised as"):
        decode_arrays(ArrayRecord({"x": Array("float32", (6,), "pickle", good.data)}), {})
