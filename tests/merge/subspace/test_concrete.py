"""Tests of masks in closed form: the laws of samples, and gradients against autograd and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from graftwork.merge.subspace.concrete import (
    BLOCK,
    adam_,
    density_of,
    fill_uniform_,
    inner,
    logit_gradient_,
    merge_,
    sample_,
    total,
)


def drawn(logit: float, temperature: float, size: int = 1_000_000) -> Tensor:
    values = torch.empty(size)
    fill_uniform_(values, 0, 1, "tensor")
    sample_(values, torch.full((size,), logit), temperature)
    return values


def test_samples_of_undecided_logits_have_mean_one_half() -> None:
    assert abs(total(drawn(0.0, 0.5)) / 1e6 - 0.5) < 0.002


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 2.0])
def test_more_than_half_is_as_likely_as_the_sigmoid_says_at_any_temperature(logit: float, temperature: float) -> None:
    share = float((drawn(logit, temperature) > 0.5).double().mean())
    assert abs(share - 1 / (1 + np.exp(-logit))) < 0.002


def test_noise_depends_on_seed_step_and_name_alone() -> None:
    def noise(seed: int, step: int, name: str) -> Tensor:
        values = torch.empty(1000)
        fill_uniform_(values, seed, step, name)
        return values

    first = noise(0, 1, "a")
    assert torch.equal(first, noise(0, 1, "a"))
    assert all(not torch.equal(first, noise(*other)) for other in ((1, 1, "a"), (0, 2, "a"), (0, 1, "b")))
    assert 0 <= float(first.min()) < 0.01
    assert 0.99 < float(first.max()) < 1


def test_sums_over_large_vectors_are_those_in_float64() -> None:
    values = torch.rand(3 * BLOCK + 17, generator=torch.Generator().manual_seed(0))
    other = torch.rand(len(values), generator=torch.Generator().manual_seed(1))
    assert total(values) == pytest.approx(float(values.double().sum()), rel=1e-7)
    assert inner(values, other) == pytest.approx(float(values.double() @ other.double()), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


class Tied(nn.Module):
    """Three layers, the second and third of which have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.third.weight = self.second.weight

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.third(gelu(self.second(gelu(self.first(inputs)))))
        return result


class Problem:
    """A network in float64, task vectors, coefficients and logits for its parameters."""

    temperature = 0.5
    experts = 3

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Tied().double()
        self.inputs = torch.randn(11, 5, dtype=torch.float64)
        self.names = [name for name, _ in self.network.named_parameters()]
        self.base = {name: value.detach().clone() for name, value in self.network.named_parameters()}
        self.vectors = {
            name: 0.3 * torch.randn(self.experts, *value.shape, dtype=torch.float64)
            for name, value in self.base.items()
        }
        self.logits = {name: torch.randn_like(value) for name, value in self.base.items()}
        self.uniform = {name: torch.rand_like(value) for name, value in self.base.items()}
        self.coefficients = {name: torch.rand(self.experts, dtype=torch.float64) for name in self.names}

    def loss(self, logits: dict[str, Tensor], coefficients: dict[str, Tensor]) -> Tensor:
        """Return the loss with a graph through everything, written as the paper has it."""
        values = {}
        for name in self.names:
            noise = self.uniform[name].log() - (1 - self.uniform[name]).log()
            mask = torch.sigmoid((logits[name] + noise) / self.temperature)
            combined = torch.tensordot(coefficients[name], self.vectors[name], dims=1)
            values[name] = self.base[name] + mask / mask.mean() * combined
        outputs = torch.func.functional_call(self.network, values, (self.inputs,), tie_weights=True)
        return outputs.log_softmax(1).square().mean()

    def closed_form(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return dL/dx and dL/dλ from one backward pass through the network."""
        parameters = dict(self.network.named_parameters())
        masks, densities, combined = {}, {}, {}
        for name in self.names:
            masks[name] = self.uniform[name].flatten().clone()
            sample_(masks[name], self.logits[name].flatten(), self.temperature)
            densities[name] = density_of(masks[name])
            combined[name] = torch.tensordot(self.coefficients[name], self.vectors[name], dims=1).flatten()
            target = parameters[name].data.view(-1)
            merge_(target, self.base[name].flatten(), combined[name], masks[name], densities[name])
        self.network(self.inputs).log_softmax(1).square().mean().backward()
        of_logits, of_coefficients = {}, {}
        for name in self.names:
            gradient = parameters[name].grad
            assert gradient is not None
            weighted = gradient.flatten() * masks[name] / densities[name]
            of_coefficients[name] = self.vectors[name].flatten(1) @ weighted
            of_logits[name] = logit_gradient_(
                gradient.flatten().clone(), combined[name], masks[name], densities[name], self.temperature
            ).view_as(gradient)
            in_scratch = logit_gradient_(
                gradient.flatten(), combined[name], masks[name], densities[name], self.temperature, combined[name]
            )
            assert torch.equal(in_scratch.view_as(gradient), of_logits[name])
        return of_logits, of_coefficients


def test_closed_form_gradients_are_those_of_autograd() -> None:
    problem = Problem()
    logits = {name: value.clone().requires_grad_() for name, value in problem.logits.items()}
    coefficients = {name: value.clone().requires_grad_() for name, value in problem.coefficients.items()}
    problem.loss(logits, coefficients).backward()
    of_logits, of_coefficients = problem.closed_form()
    for name in problem.names:
        assert (of_logits[name] - logits[name].grad).abs().max() < 1e-12
        assert (of_coefficients[name] - coefficients[name].grad).abs().max() < 1e-12
        assert logits[name].grad.abs().max() > 1e-6


def test_closed_form_gradients_are_finite_differences() -> None:
    problem = Problem()
    of_logits, of_coefficients = problem.closed_form()
    step = 1e-6
    for name in problem.names:
        for changed, gradient in ((problem.logits, of_logits), (problem.coefficients, of_coefficients)):
            flat = changed[name].view(-1)
            for place in (0, len(flat) - 1):
                found = []
                for sign in (1, -1):
                    flat[place] += sign * step
                    found.append(float(problem.loss(problem.logits, problem.coefficients)))
                    flat[place] -= sign * step
                difference = (found[0] - found[1]) / (2 * step)
                assert difference == pytest.approx(float(gradient[name].flatten()[place]), abs=1e-6)


def test_an_empty_mask_leaves_the_base_and_has_no_gradient() -> None:
    base, combined, mask = torch.randn(9), torch.randn(9), torch.full((9,), 1e-9)
    target = torch.full((9,), float("nan"))
    merge_(target, base, combined, mask, density_of(mask))
    assert torch.equal(target, base)
    assert torch.equal(logit_gradient_(torch.ones(9), combined, mask, density_of(mask), 0.5), torch.zeros(9))


@pytest.mark.parametrize("logit", [30.0, 10.0, 0.0, -10.0])
def test_equal_logits_are_task_arithmetic(logit: float) -> None:
    base, combined = torch.randn(1000), torch.randn(1000)
    mask = torch.full((1000,), logit).sigmoid()
    target = torch.empty(1000)
    merge_(target, base, combined, mask, density_of(mask))
    assert (target - base - combined).abs().max() < 1e-5


def test_a_single_element_is_always_kept_whole() -> None:
    mask = torch.tensor([0.2])
    target = torch.empty(1)
    merge_(target, torch.tensor([1.0]), torch.tensor([0.5]), mask, density_of(mask))
    assert target.item() == pytest.approx(1.5)
    assert logit_gradient_(torch.ones(1), torch.tensor([0.5]), mask, density_of(mask), 0.5).abs().item() < 1e-7


def test_adam_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    mine = parameter.detach().clone()
    first, second, scratch = (torch.zeros_like(mine) for _ in range(3))
    optimizer = torch.optim.Adam([parameter], lr=0.03)
    for step in range(1, 30):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        adam_(mine, gradient, first, second, scratch, step=step, rate=0.03)
    assert (mine - parameter.detach()).abs().max() < 1e-12
