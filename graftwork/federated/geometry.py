"""The shape of each class's embeddings, and samples of that shape around real embeddings (GGEUR, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graftwork.federated.moments import Moments, spectrum, symmetric_spectrum
from graftwork.federated.seeds import seed_of

Fill = Literal["global", "none"]
Mode = Literal["single", "multi"]

COUNTS, MEANS, DIRECTIONS, DEVIATIONS, PROTOTYPES = "counts", "means", "directions", "deviations", "prototypes"
PROTOTYPE_COUNTS = "prototype_counts"
"""Names of the tensors that the server sends."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How embeddings of C classes spread around a point, and the means of classes and sites; float32 or wider.

    A sample of class c is x + ε directions[g] + deviations[g] · η, with ε (r,) and η (P,) standard normal, and g the
    class, or 0 if one shape stands for all classes.

    Args:
        counts: How many embeddings of each class were measured, (C,); classes with 0 are not sampled.
        means: Mean of each class, (C, P).
        directions: Scaled directions, (G, r, P).
        deviations: Standard deviation in all directions, (G,).
        prototypes: Mean of each class at each site, (D, C, P); D may be 0.
        prototype_counts: How many embeddings each prototype has, (D, C); 0 for none.
    """

    counts: Tensor
    means: Tensor
    directions: Tensor
    deviations: Tensor
    prototypes: Tensor
    prototype_counts: Tensor

    def group(self, label: int) -> int:
        """Return which shape a class has."""
        return label if len(self.directions) == len(self.counts) else 0

    def covariance(self, label: int) -> Tensor:
        """Return the covariance of samples of a class, (P, P)."""
        group = self.group(label)
        total = self.directions[group].T @ self.directions[group]
        total.diagonal().add_(self.deviations[group] ** 2)
        return total

    def to_tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the tensors that the server sends."""
        return {
            COUNTS: self.counts.double(),
            MEANS: self.means.to(dtype),
            DIRECTIONS: self.directions.to(dtype),
            DEVIATIONS: self.deviations.to(dtype),
            PROTOTYPES: self.prototypes.to(dtype),
            PROTOTYPE_COUNTS: self.prototype_counts.double(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Geometry:
        """Return what the server sent."""
        return cls(
            tensors[COUNTS],
            tensors[MEANS],
            tensors[DIRECTIONS],
            tensors[DEVIATIONS],
            tensors[PROTOTYPES],
            tensors[PROTOTYPE_COUNTS],
        )


def geometry_of(
    moments: Moments,
    *,
    rank: int = 64,
    eigen_power: float = 0.5,
    noise_scale: float = 1.0,
    prototypes: Tensor | None = None,
    prototype_counts: Tensor | None = None,
) -> Geometry:
    """Return the geometry of merged moments: one decomposition per group.

    A covariance that is a factor of fewer rows than features is decomposed through the Gram matrix of the rows, which
    takes n × n instead of P × P numbers.

    Args:
        moments: Of all sites.
        rank: Directions kept per class, 0 for all; what is left out becomes a variance in all other directions, so
            that the trace is kept (with `eigen_power` 0.5).
        eigen_power: 0.5 samples the covariance itself, as the published code does. 1 multiplies directions by the
            eigenvalue instead of its root, as the paper writes in eq. 5; then the spread of samples depends on the
            units of the embeddings.
        noise_scale: Multiplies all spreads.
        prototypes: Means of the sites' classes (D, C, P), for samples around them.
        prototype_counts: How many embeddings each of them has, (D, C).
    """
    found = [_shape(moments, group, rank, eigen_power) for group in range(len(moments.rows))]
    most = max(max(len(directions) for directions, _ in found), 1)
    directions = torch.zeros(len(found), most, moments.features, dtype=torch.float64)
    for group, (rows, _) in enumerate(found):
        directions[group, : len(rows)] = rows
    return Geometry(
        counts=moments.counts,
        means=moments.means,
        directions=directions * noise_scale,
        deviations=torch.tensor([deviation for _, deviation in found], dtype=torch.float64) * noise_scale,
        prototypes=torch.zeros(0, *moments.means.shape, dtype=torch.float64) if prototypes is None else prototypes,
        prototype_counts=(
            torch.zeros(0, moments.classes, dtype=torch.float64) if prototype_counts is None else prototype_counts
        ),
    )


def _shape(moments: Moments, group: int, rank: int, power: float) -> tuple[Tensor, float]:
    """Return scaled directions (r, P) and the deviation in all directions of one group."""
    rows, everywhere = moments.rows[group], float(moments.residuals[group])
    if moments.dense is None:
        values, directions = spectrum(rows) if len(rows) else (rows.new_zeros(0), rows)
    else:
        dense = moments.dense[group]
        values, directions = symmetric_spectrum(dense + rows.T @ rows if len(rows) else dense)
        present = values > 0
        values, directions = values[present], directions[present]
    kept = len(values) if rank == 0 else min(rank, len(values))
    others = moments.features - kept
    rest = everywhere + (float(values[kept:].sum()) / others if others else 0.0)
    # Along a kept direction the two parts of a sample add up to the eigenvalue there: λ + everywhere.
    scale = ((values[:kept] + everywhere) ** (2 * power) - rest ** (2 * power)).clamp_min(0).sqrt()
    return scale[:, None] * directions[:kept], rest**power


# ---------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True, slots=True)
class Augmented:
    """A training set of real and synthetic embeddings, drawn only when asked for.

    Args:
        points: Real embeddings, prototypes and means around which samples are drawn, (A, P).
        anchors: For each member of the set its row in `points`, (M,).
        labels: For each member its class, (M,).
        synthetic: For each member whether noise is added, (M,).
    """

    points: Tensor
    anchors: Tensor
    labels: Tensor
    synthetic: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, members: Tensor, geometry: Geometry, seed: int, *, unit: bool = False) -> tuple[Tensor, Tensor]:
        """Return embeddings (m, P) and labels (m,) of members, synthetic ones with noise.

        Args:
            members: Their numbers.
            geometry: What noise looks like.
            seed: The noise of class c comes from `seed_of(seed, c)`, in the order of `members`.
            unit: Bring synthetic embeddings to length 1, as real ones are.
        """
        labels = self.labels[members]
        samples = self.points[self.anchors[members]]
        noisy = self.synthetic[members]
        for label in torch.unique(labels[noisy]).tolist():
            chosen = torch.nonzero(noisy & (labels == label)).squeeze(1)
            generator = torch.Generator().manual_seed(seed_of(seed, label))
            made = samples[chosen] + noise(geometry, label, len(chosen), generator).to(samples.dtype)
            samples[chosen] = torch.nn.functional.normalize(made) if unit else made
        return samples, labels

    def draw_all(self, geometry: Geometry, seed: int, *, unit: bool = False) -> tuple[Tensor, Tensor]:
        """Return all members, drawn once."""
        return self.draw(torch.arange(len(self)), geometry, seed, unit=unit)


def noise(geometry: Geometry, label: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` differences from an anchor of a class, (count, P)."""
    group = geometry.group(label)
    directions, deviation = geometry.directions[group], float(geometry.deviations[group])
    drawn = torch.randn(count, len(directions), generator=generator, dtype=directions.dtype) @ directions
    if deviation:
        drawn.add_(
            torch.randn(count, directions.shape[1], generator=generator, dtype=directions.dtype), alpha=deviation
        )
    return drawn


def compose(
    embeddings: Tensor,
    labels: Tensor,
    geometry: Geometry,
    generator: torch.Generator,
    *,
    mode: Mode = "single",
    target_per_class: int = 200,
    per_prototype: int = 500,
    fill: Fill = "global",
) -> Augmented:
    """Return a site's augmented training set (GGEUR, algorithms 1 and 2).

    All real embeddings are in it. Where a class has fewer than `target_per_class`, samples around them make up the
    difference, as evenly as possible over the anchors. In mode `multi`, `per_prototype` samples are added around every
    other site's mean of every class. A class that the site lacks is left out with `fill` "none", as in the published
    code; with "global" it is sampled around the other sites' means (`multi`) or around the class's mean. Classes that
    nobody measured have their real embeddings only.

    Args:
        embeddings: The site's own, (n, P).
        labels: Their classes, (n,).
        geometry: From the server, with a count of 0 for the site's own prototypes.
        generator: Chooses anchors.
        mode: One domain, or a domain per site.
        target_per_class: Members of each class around own embeddings.
        per_prototype: Members around each other site's mean.
        fill: What is done for classes that the site lacks.
    """
    base = len(embeddings)
    classes, sites = len(geometry.counts), len(geometry.prototypes)
    points = torch.cat(
        [
            embeddings,
            geometry.means.to(embeddings.dtype),
            geometry.prototypes.reshape(-1, embeddings.shape[1]).to(embeddings.dtype),
        ]
    )
    anchors: list[Tensor] = [torch.arange(base)]
    members: list[Tensor] = [labels]
    for label in range(classes):
        if geometry.counts[label] <= 0:
            continue
        own = torch.nonzero(labels == label).squeeze(1)
        others = [
            base + classes + site * classes + label
            for site in range(sites)
            if geometry.prototype_counts[site, label] > 0
        ]
        chosen: list[Tensor] = []
        if len(own):
            chosen.append(_evenly(own, max(target_per_class - len(own), 0), generator))
        elif fill == "global":
            around = torch.tensor(others if mode == "multi" and others else [base + label])
            chosen.append(_evenly(around, target_per_class, generator))
        if mode == "multi" and (len(own) or fill == "global") and others:
            chosen.append(torch.tensor(others).repeat(per_prototype))
        anchors += chosen
        members += [torch.full((len(part),), label) for part in chosen]
    every = torch.cat(anchors)
    return Augmented(points, every, torch.cat(members), torch.arange(len(every)) >= base)


def _evenly(anchors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of the anchors: each equally often, up to one."""
    rounds = -(-count // len(anchors))
    shuffled = [anchors[torch.randperm(len(anchors), generator=generator)] for _ in range(min(rounds, 1))]
    if rounds > 1:
        shuffled = [anchors.repeat(rounds - 1), *shuffled]
    return torch.cat(shuffled)[:count] if shuffled else anchors[:0]
