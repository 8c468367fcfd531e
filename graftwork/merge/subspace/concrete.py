"""Concrete masks in closed form: samples, the merged tensor, and gradients without a graph.

Tang et al. 2023, arXiv 2312.06173. For one tensor with base b, combined task vector S = Σ λₖ τₖ and logits x:

    (2)  m = sigmoid((x + log u - log(1 - u)) / T),  u uniform in (0, 1)
    (3)  m̂ = m / mean(m)  if mean(m) > 1e-6, else 0
    (4)  θ = b + m̂ ∘ S
    (7)  with G = dL/dθ and q = G ∘ S:   dL/dm = (q - mean(q ∘ m̂)) / mean(m),   dL/dx = dL/dm ∘ m ∘ (1 - m) / T,
         dL/dλₖ = ⟨G ∘ m̂, τₖ⟩

Published code keeps an autograd graph through the mask and all task vectors for this; with (7) one ordinary backward
pass through the merged network is enough. The guard of (3) is ours: an all but empty mask leaves the base as it is.

All tensors are flat and contiguous, of one floating dtype. Functions whose name ends in `_` work in place and allocate
nothing of the tensor's size, because a mask is as large as the model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graftwork.merge.random import stream_key

EMPTY = 1e-6
"""A mask with a smaller mean leaves the base as it is."""

BLOCK = 65_536
"""Elements whose sum is formed in the tensor's dtype; sums of blocks are added in float64."""


def total(values: Tensor) -> float:
    """Return the sum of all values."""
    whole = values.numel() // BLOCK * BLOCK
    result = float(values[whole:].sum())
    if whole:
        result += float(values[:whole].view(-1, BLOCK).sum(1).double().sum())
    return result


def inner(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two vectors."""
    step = 16 * BLOCK
    return sum(total(left[at : at + step] * right[at : at + step]) for at in range(0, left.numel(), step))


def fill_uniform_(values: Tensor, seed: int, step: int, name: str) -> None:
    """Fill with numbers in [0, 1) that depend on seed, step and tensor name alone, so that none is ever stored."""
    key = np.array([stream_key(seed, name, 0), step], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    array = values.numpy()
    generator.random(array.shape, array.dtype, out=array)


def sample_(uniform: Tensor, logits: Tensor, temperature: float) -> None:
    """Turn uniform numbers into a sample of the mask (2)."""
    uniform.logit_().add_(logits).div_(temperature).sigmoid_()


def density_of(mask: Tensor) -> float:
    """Return mean(m), or 0 for a mask that is empty in the sense of (3)."""
    mean = total(mask) / max(mask.numel(), 1)
    return mean if mean > EMPTY else 0.0


def merge_(target: Tensor, base: Tensor, combined: Tensor, mask: Tensor | None = None, density: float = 1.0) -> None:
    """Set `target` to the merged values (4); without a mask to b + S.

    Args:
        target: What is overwritten.
        base: b.
        combined: S.
        mask: m.
        density: `density_of(mask)`.
    """
    target.copy_(base)
    if mask is None:
        target.add_(combined)
    elif density:
        target.addcmul_(mask, combined, value=1 / density)


def logit_gradient_(
    gradient: Tensor, combined: Tensor, mask: Tensor, density: float, temperature: float, scratch: Tensor | None = None
) -> Tensor:
    """Return dL/dx (7).

    Args:
        gradient: G. It becomes the result, unless `scratch` is given.
        combined: S.
        mask: m.
        density: `density_of(mask)`.
        temperature: T.
        scratch: Becomes the result in place of `gradient`; may be `combined` itself.
    """
    if scratch is None:
        result = gradient.mul_(combined)
    else:
        result = torch.mul(gradient, combined, out=scratch)
    if not density:
        return result.zero_()
    shift = inner(result, mask) / (result.numel() * density)
    result.sub_(shift).mul_(mask)
    return result.addcmul_(result, mask, value=-1).mul_(1 / (density * temperature))


def adam_(
    values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, scratch: Tensor, *, step: int, rate: float
) -> None:
    """Make step number `step` (from 1) of Adam with its usual constants (0.9, 0.999, 1e-8).

    torch.optim.Adam does the same and needs a second tensor of this size while it does.
    """
    first.lerp_(gradient, 0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    torch.sqrt(second, out=scratch)
    scratch.div_((1 - 0.999**step) ** 0.5).add_(1e-8)
    values.addcdiv_(first, scratch, value=-rate / (1 - 0.9**step))
