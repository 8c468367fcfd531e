"""How fast GGEUR's statistics and samples are: against the published procedure, and against a full decomposition.

    python benchmarks/geometry.py
    python benchmarks/geometry.py --features 768 --classes 100

Prints processor seconds of one thread, and ratios; exits with 1 if a bar is missed.

- **Sampling.** The published code draws around each anchor anew: it decomposes the class's covariance, puts it together
  again from its eigenvalues, factorises that, and gives it to numpy's `multivariate_normal`, which decomposes it once
  more. That is rendered here (`published`) and timed per anchor, for a few anchors; ours draws the whole augmented set
  of a data set of CIFAR-10's size: 50,000 anchors at ten sites, 5,000 embeddings per class and site. The ratio compares
  processor seconds per anchor. Both have the same distribution: the covariance of samples is compared as well.
- **Gram route.** With fewer embeddings than features, the decomposition is of the n × n Gram matrix. Compared with
  `torch.linalg.eigh` of the P × P covariance, which has to be formed first as well, in float64 and in float32.
- **Merge.** Ten sites' statistics of one class.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_library}_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from graftwork.federated.geometry import compose, geometry_of  # noqa: E402
from graftwork.federated.moments import (  # noqa: E402
    Moments,
    class_moments,
    merge_moments,
    spectrum,
    to_tensors,
)

SAMPLING_BAR, GRAM_BAR = 1000.0, 5.0


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median processor time of a call, after one for warming up."""
    work()
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return statistics.median(taken)


def published(anchor: np.ndarray[Any, Any], covariance: np.ndarray[Any, Any], count: int, seed: int) -> Any:
    """Draw `count` samples around one anchor as the published procedure does, decomposition by decomposition."""
    values, vectors = np.linalg.eigh(covariance)
    rebuilt = vectors @ np.diag(np.clip(values, 0, None)) @ vectors.T
    factor = np.linalg.cholesky(rebuilt + 1e-6 * np.eye(len(rebuilt)))
    return np.random.default_rng(seed).multivariate_normal(anchor, factor @ factor.T, size=count, method="svd")


def make_sites(sites: int, per_site: int, features: int, classes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    made = []
    for _ in range(sites):
        labels = torch.arange(per_site) % classes
        made.append((torch.randn(per_site, features, generator=generator) @ mixing + labels[:, None], labels))
    return made


def sampling(features: int, classes: int, anchors: int, rank: int) -> dict[str, float]:
    sites, target = 10, anchors // classes
    per_site = anchors // sites
    data = make_sites(sites, per_site, features, classes)
    moments = [class_moments(x, y, classes, form="tri") for x, y in data]
    merged = merge_moments(moments)
    covariance, anchor = merged.covariance(0).numpy(), data[0][0][0].double().numpy()
    draws = max(1, target // (per_site // classes))
    theirs = seconds(lambda: published(anchor, covariance, draws, 0), 3)

    begin = time.process_time()
    geometry = geometry_of(merged, rank=rank)
    geometry = type(geometry)(
        **{
            name: getattr(geometry, name).float()
            for name in ("counts", "means", "directions", "deviations", "prototypes", "prototype_counts")
        }
    )
    drawn = 0
    for site, (x, y) in enumerate(data):
        every = compose(x, y, geometry, torch.Generator().manual_seed(site), target_per_class=target)
        drawn += len(every.draw_all(geometry, site)[0])
    ours = (time.process_time() - begin) / anchors

    many = published(anchor, covariance, 20_000, 1) - anchor
    single = compose(
        data[0][0][:1], torch.zeros(1, dtype=torch.int64), geometry, torch.Generator(),
        target_per_class=20_001, fill="none",
    )  # fmt: skip
    own = single.draw(torch.arange(1, 20_001), geometry, 1)[0].double().numpy() - data[0][0][0].double().numpy()

    def error(samples: Any) -> float:
        found = samples.T @ samples / len(samples)
        return float(np.linalg.norm(found - covariance) / np.linalg.norm(covariance))

    return {
        "published_seconds_per_anchor": theirs,
        "our_seconds_per_anchor": ours,
        "our_seconds_in_all": ours * anchors,
        "embeddings_in_the_sets": float(drawn),
        "ratio": theirs / ours,
        "covariance_error_of_20000_published": error(many),
        "covariance_error_of_20000_ours": error(own),
    }


def gram(rows: int, features: int) -> dict[str, float]:
    found = {}
    for dtype in (torch.float64, torch.float32):
        points = torch.randn(rows, features, generator=torch.Generator().manual_seed(0), dtype=dtype)

        def whole(points: torch.Tensor = points) -> Any:
            return torch.linalg.eigh(points.T @ points)

        name = str(dtype).removeprefix("torch.")
        found[f"eigh_{name}"] = seconds(whole)
        found[f"gram_{name}"] = seconds(lambda points=points: spectrum(points))  # type: ignore[misc]
        found[f"ratio_{name}"] = found[f"eigh_{name}"] / found[f"gram_{name}"]
    return found


def merging(features: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for form in ("tri", "factor", "lowrank"):
        data = make_sites(10, 40, features, 1)
        parts: list[Moments] = [class_moments(x, y, 1, form=form) for x, y in data]  # type: ignore[arg-type]
        found[f"{form}_merge_seconds"] = seconds(lambda parts=parts: merge_moments(parts), 3)  # type: ignore[misc]
        sent = to_tensors(parts[0], form)  # type: ignore[arg-type]
        found[f"{form}_bytes"] = float(sum(value.numel() * value.element_size() for value in sent.values()))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--anchors", type=int, default=50_000)
    parser.add_argument("--rows", type=int, default=140)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        "command": " ".join(["python", "benchmarks/geometry.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "gram": gram(arguments.rows, arguments.features),
        "merge": merging(arguments.features),
        "sampling": sampling(arguments.features, arguments.classes, arguments.anchors, arguments.rank),
        "sampling_full_rank": sampling(arguments.features, arguments.classes, arguments.anchors, 0),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    for section in ("gram", "merge", "sampling", "sampling_full_rank"):
        print(section)
        for name, value in figures[section].items():  # type: ignore[attr-defined]
            print(f"  {name:38s} {value:14.6g}")
    ratio = figures["sampling"]["ratio"]  # type: ignore[index]
    route = figures["gram"]["ratio_float64"]  # type: ignore[index]
    print(f"sampling: {ratio:,.0f} times the published procedure (bar {SAMPLING_BAR:,.0f})")
    print(f"Gram route at n = {arguments.rows}, P = {arguments.features}: {route:.1f} times eigh (bar {GRAM_BAR:g})")
    return 0 if ratio >= SAMPLING_BAR and route >= GRAM_BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
