"""The engine on a GPU against the engine on the CPU."""

import numpy as np
import pytest
import torch

from graftwork.merge.device import chosen_device
from graftwork.merge.errors import DependencyError
from graftwork.merge.memory import merge_arrays
from tests.contract.table import ROWS

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def words(values):
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def ordered(raw):
    """Return bf16 words as integers in the order of their values, so that neighbours differ by one."""
    signed = raw.astype(np.int64)
    return np.where(signed & 0x8000, 0x8000 - signed, signed)


def compare(row, device, shape):
    generator = np.random.default_rng(5)
    base = generator.normal(0, 0.02, shape)
    inputs = [base + generator.normal(0, 5e-3, shape) for _ in range(row.models)]
    models = [{"layer.weight": ("BF16", words(values))} for values in inputs]
    foundation = {"layer.weight": ("BF16", words(base))} if row.base else None
    here, there = (
        merge_arrays(row.method, models, foundation, parameters=row.parameters, device=name)["layer.weight"]
        for name in ("cpu", device)
    )
    distance = np.abs(ordered(here) - ordered(there))
    assert distance.max() <= 1
    assert (distance != 0).sum() <= max(3, 1e-4 * distance.size)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_gpu_gives_the_cpu_s_result_to_one_unit_in_rare_entries(row):
    compare(row, "cuda", (700, 1111))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_the_engine_for_devices_gives_the_same_result_on_cpu_tensors(row):
    compare(row, "torch:cpu", (60, 111))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(DependencyError, match=r'cannot use the device "cuda:0": torch .* finds 0 GPUs'):
        chosen_device("cuda:0")
    assert chosen_device("auto") == "cpu"
