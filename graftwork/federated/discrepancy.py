"""How far apart two sets of features are: multi-kernel maximum mean discrepancy.

Used by FedKA (arXiv 2203.11635) between a site's features and the target's, and by FRAug (arXiv 2205.14900) between
synthetic and real embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = 5
"""How many Gaussian kernels are added; each bandwidth is twice the one before."""

SMALLEST_BANDWIDTH = 1e-12


def squared_distances(points: Tensor) -> Tensor:
    """Return the squared Euclidean distances (n, n) between the rows of `points` (n, d), none below zero."""
    # Distances do not change with the origin; around the mean, the subtraction below cancels least.
    points = points - points.detach().mean(0)
    squares = (points * points).sum(1)
    return (squares[:, None] + squares[None, :] - 2 * points @ points.T).clamp_min(0)


def mk_mmd(first: Tensor, second: Tensor, kernels: int = KERNELS) -> Tensor:
    """Return the squared MK-MMD of two sets of features, a scalar in [0, 2 × kernels].

    It is the biased estimate, mean k(a, a') + mean k(b, b') − 2 mean k(a, b), with the diagonal, as in FedKA's
    published code, where k(a, b) = Σ_u exp(−‖a − b‖² / σ_u) and the bandwidths σ_u are σ̄ · 2^(u − ⌊kernels / 2⌋) of the
    mean squared distance σ̄ between two different rows of both sets. σ̄ counts as a constant in the gradient. Unlike
    there, the sets may have different sizes, and features that are all equal give 0, not NaN.

    Args:
        first: Shape (m, d), m ≥ 1.
        second: Shape (n, d), n ≥ 1.
        kernels: How many kernels.
    """
    count = len(first)
    distances = squared_distances(torch.cat([first, second]))
    rows = len(distances)
    bandwidth = (distances.detach().sum() / (rows * rows - rows)).clamp_min(SMALLEST_BANDWIDTH)
    # Halving a bandwidth squares its kernel, so one exponential is enough.
    kernel = torch.exp(-distances / (bandwidth * 2.0 ** (kernels - 1 - kernels // 2)))
    total = kernel
    for _ in range(kernels - 1):
        kernel = kernel * kernel
        total = total + kernel
    within = total[:count, :count].mean() + total[count:, count:].mean()
    return (within - total[:count, count:].mean() - total[count:, :count].mean()).clamp_min(0)
