"""Merging learned on unlabelled inputs: Concrete masks over task vectors, and coefficients per task and layer.

    from graftwork.merge.subspace import learn_merge

    learned = learn_merge("base.safetensors", ["a.safetensors", "b.safetensors"], [task_a, task_b])
    learned.save("masks.safetensors")

The methods `adamerging`, `concrete_task_arithmetic` and `concrete_adamerging` merge with such a file.
"""

from graftwork.merge.subspace.learning import (
    KIND,
    METHODS,
    LearnedMerge,
    Learning,
    Progress,
    Report,
    learn_merge,
)
from graftwork.merge.subspace.losses import LOSSES

__all__ = ["KIND", "LOSSES", "METHODS", "LearnedMerge", "Learning", "Progress", "Report", "learn_merge"]
