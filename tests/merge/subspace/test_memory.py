"""Tests of the memory that learning takes, in units of the model: P is the merged tensors in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WIDTH, LAYERS, EXPERTS = 1024, 6, 8
P = 4 * LAYERS * WIDTH * WIDTH

PROGRAM = textwrap.dedent("""
    import json, re, sys
    from pathlib import Path
    import torch
    from torch import nn
    from graftwork.merge.subspace import learn_merge
    from graftwork.merge.task import Task

    torch.set_num_threads(1)
    folder, parametrisation, width, layers, experts = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])

    def status(key):
        return 1024 * int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

    class Model(nn.Sequential):
        def __init__(self):
            with torch.device("meta"):
                super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
            self.to_empty(device="cpu")

    rows = torch.randn(16, width)
    tasks = [Task(f"t{n}", Model, lambda: [(rows, None)]) for n in range(experts)]

    def run():
        learn_merge(
            folder / "0.safetensors", [folder / f"{n + 1}.safetensors" for n in range(experts)], tasks,
            parametrisation=parametrisation, steps=1,
        )

    run()  # libraries take what they keep
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    print(json.dumps((status("VmHWM") - before)))
""")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {f"{n}.weight": torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for n in range(LAYERS)}
    for number in range(EXPERTS + 1):
        save_file(
            {name: tensor * (1 + 0.01 * number) for name, tensor in base.items()}, folder / f"{number}.safetensors"
        )
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("parametrisation", "most"), [("mask", 11), ("layer_wise", 5 + EXPERTS / 2), ("mask+layer_wise", 11 + EXPERTS / 2)]
)
def test_memory_is_a_few_times_the_model(models: Path, parametrisation: str, most: float) -> None:
    arguments = [sys.executable, "-c", PROGRAM, models, parametrisation, WIDTH, LAYERS, EXPERTS]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    # Freed tensors of this size go back to the system, as those of large models always do.
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    run = subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    peak = json.loads(run.stdout) / P
    assert peak < most, f"{peak:.1f} P"
    print(f"{parametrisation}: {peak:.1f} P")
