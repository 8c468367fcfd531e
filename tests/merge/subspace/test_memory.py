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

WIDTH, LAYERS, EXPERTS = 640, 6, 8
P = 4 * LAYERS * WIDTH * WIDTH

MOST = {"mask": 11, "layer_wise": 5 + EXPERTS / 2, "mask+layer_wise": 11 + EXPERTS / 2}

PROGRAM = textwrap.dedent("""
    import json, os, re, sys
    from pathlib import Path
    import torch
    from torch import nn
    from graftwork.merge.subspace import learn_merge
    from graftwork.merge.task import Task

    torch.set_num_threads(1)
    folder, names, widths, layers, experts = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])

    def status(key):
        return 1024 * int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

    def run(parametrisation, width):
        class Model(nn.Sequential):
            def __init__(self):
                with torch.device("meta"):
                    super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
                self.to_empty(device="cpu")

        rows = torch.randn(16, width)
        tasks = [Task(f"t{n}", Model, lambda: [(rows, None)]) for n in range(experts)]
        paths = [folder / f"{width}-{n}.safetensors" for n in range(experts + 1)]
        learn_merge(paths[0], paths[1:], tasks, parametrisation=parametrisation, steps=1)

    for name in names:
        process = os.fork()  # a process of its own, without the time that it would take to import torch again
        if process == 0:
            run(name, widths[0])  # libraries take what they keep
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            run(name, widths[1])
            print(json.dumps({name: status("VmHWM") - before}), flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
""")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_is_a_few_times_the_model(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (32, WIDTH):
        base = {f"{n}.weight": torch.randn(width, width, generator=generator) / width**0.5 for n in range(LAYERS)}
        for number in range(EXPERTS + 1):
            tensors = {name: tensor * (1 + 0.01 * number) for name, tensor in base.items()}
            save_file(tensors, tmp_path / f"{width}-{number}.safetensors")
    arguments = [json.dumps(list(MOST)), json.dumps([32, WIDTH]), str(LAYERS), str(EXPERTS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    # Freed tensors of this size go back to the system, as those of large models always do.
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *arguments], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    peaks = {name: peak / P for line in run.stdout.splitlines() for name, peak in json.loads(line).items()}
    assert list(peaks) == list(MOST)
    print(peaks)
    assert all(peaks[name] < most for name, most in MOST.items()), peaks
