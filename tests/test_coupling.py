"""Couplings of a batch by optimal transport: against all permutations, and the plan's own conditions."""

import itertools
import math

import pytest
import torch

import functorch_gen as fg
from functorch_gen import random
from functorch_gen.flow_matching import entropic_coupling, exact_coupling, sinkhorn, squared_distances

F64 = torch.float64
KEY = random.key(0)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, F64)


def least_cost(cost: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """By trying all permutations."""
    rows = range(len(cost))
    return min((sum(cost[i, j].item() for i, j in zip(rows, order)), order) for order in itertools.permutations(rows))


def test_squared_distances_are_those_of_flattened_examples():
    x, noise = normal(1, 3, 2, 2), normal(2, 4, 2, 2)
    wanted = [[((a - b) ** 2).sum() for b in noise] for a in x]
    torch.testing.assert_close(squared_distances(x, noise), torch.tensor(wanted, dtype=F64), rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match=r"expected x and noise of shapes \(n, ...\) and \(m, ...\), got \(3, 2, 2\)"):
        squared_distances(x, noise[:, 0])
    with pytest.raises(TypeError, match=r"noise: expected torch\.float64, as x has, got torch\.float32"):
        squared_distances(x, noise.float())
    narrow = squared_distances(x.bfloat16(), noise.bfloat16())
    assert torch.equal(narrow, squared_distances(x.bfloat16().float(), noise.bfloat16().float()).bfloat16())


def test_couplings_take_numbers_as_examples_and_every_dtype():
    x = torch.tensor([0.0, 10.0, 20.0])
    noise = torch.tensor([19.0, 1.0, 9.0])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for paired in (
            exact_coupling(x.to(dtype), noise.to(dtype)),
            entropic_coupling(KEY, x.to(dtype), noise.to(dtype)),
        ):
            assert torch.equal(paired, torch.tensor([1.0, 9.0, 19.0], dtype=dtype))


def test_sinkhorn_names_what_it_expects():
    with pytest.raises(TypeError, match=r"sinkhorn: cost: expected a floating-point tensor, got torch.int64"):
        sinkhorn(torch.ones(2, 2, dtype=torch.int64), reg=0.1)
    with pytest.raises(ValueError, match=r"sinkhorn: expected n > 0, got 0"):
        sinkhorn(torch.ones(0, 2), reg=0.1)


def test_exact_coupling_is_the_best_permutation():
    x, noise = normal(1, 6, 3), normal(2, 6, 3)
    _, order = least_cost(squared_distances(x, noise))
    assert torch.equal(exact_coupling(x, noise), noise[list(order)])


def test_exact_coupling_is_refused_where_it_has_no_values():
    x = torch.ones(2, 1)
    for traced in (fg.jit(exact_coupling, backend="aten"), fg.vmap(exact_coupling)):
        with pytest.raises(TypeError, match="exact_coupling: expected values, got a trace: pair batches before it"):
            traced(x, x)
    with pytest.raises(ValueError, match=r"exact_coupling: noise: expected shape \(2, 1\), got \(3, 1\)"):
        exact_coupling(x, torch.ones(3, 1))


def test_the_sums_of_a_plan_are_uniform():
    plan = sinkhorn(squared_distances(normal(1, 4, 2), normal(2, 6, 2)), reg=0.5, steps=200).exp()
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 1 / 4, dtype=F64), rtol=1e-13, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6, dtype=F64), rtol=1e-9, atol=0)  # 200 steps


def test_a_plan_is_optimal_for_its_regularisation():
    """Optimality: log P + C / reg = f_i + g_j, so that its mixed differences vanish."""
    cost = squared_distances(normal(1, 4, 2), normal(2, 6, 2))
    potentials = sinkhorn(cost, reg=0.5, steps=20) + cost / 0.5
    mixed = potentials.diff(dim=0).diff(dim=1)
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), rtol=0, atol=1e-12)


def test_the_cost_of_a_plan_falls_to_that_of_the_best_permutation():
    cost = squared_distances(normal(1, 5, 2), normal(2, 5, 2))
    least = least_cost(cost)[0] / 5
    for reg in (1.0, 0.1, 0.02):
        plan = sinkhorn(cost, reg=reg, steps=3000).exp()
        # P minimises <P, C> - reg H(P), H of a permutation is log n and at most 2 log n
        assert -1e-6 <= (plan * cost).sum() - least <= reg * math.log(5) + 1e-6


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_entropic_coupling_draws_from_the_plan(dtype):
    x, noise, n = normal(1, 3, 1).to(dtype), normal(2, 4, 1).to(dtype), 20_000
    keys = random.split(KEY, n)
    drawn = fg.vmap(entropic_coupling, in_dims=(0, None, None))(keys, x, noise)[..., 0]  # (n, 3)
    share = (drawn[..., None] == noise[:, 0]).double().mean(0)
    cost = squared_distances(x, noise).double()
    plan = 3 * sinkhorn(cost, reg=0.05 * cost.mean()).exp()
    assert ((share - plan).abs() <= 4 * (plan * (1 - plan) / n).sqrt() + 1e-12).all()  # four standard errors


def test_entropic_coupling_is_nearly_exact_for_little_regularisation():
    x, noise = normal(1, 6, 3), normal(2, 6, 3)
    assert torch.equal(entropic_coupling(KEY, x, noise, reg=0.002, steps=2000), exact_coupling(x, noise))
