"""Positions: formulas of the papers written out, complex products, and what only their differences change."""

import math

import pytest
import torch
from torch import Tensor

from functorch_gen import nn, random
from functorch_gen.transforms import hessian, jit, jvp, vmap


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


# Vectors that are added.


def test_learned_positions_add_the_rows_of_the_table() -> None:
    layer, table, x = nn.LearnedPositions(5, 3), draw(5, 3, seed=1), draw(2, 4, 3)
    params = {"weight": table}
    assert torch.equal(layer(params, x), x + table[:4])
    positions = torch.tensor([[4, 0, 1, 1], [2, 3, 9, 4]])
    found = layer(params, x, positions=positions)
    for i in range(2):
        for j in range(4):
            assert torch.equal(found[i, j], x[i, j] + table[min(int(positions[i, j]), 4)])


def test_learned_positions_start_with_their_deviation() -> None:
    """Within five standard errors."""
    weight = nn.LearnedPositions(100, 40, std=0.3).init(random.key(0))["weight"]
    assert abs(float(weight.std()) / 0.3 - 1) < 5 / math.sqrt(2 * weight.numel())


def test_learned_positions_refuse_more_than_they_have() -> None:
    layer = nn.LearnedPositions(5, 3)
    with pytest.raises(ValueError, match="LearnedPositions: x: expected at most max_length=5 positions, got 6"):
        layer(layer.init(random.key(0)), torch.zeros(6, 3))


def test_sinusoidal_positions_are_the_formula() -> None:
    """Vaswani et al. 2017, section 3.5, entry by entry."""
    y = nn.SinusoidalPositions(6, max_period=100.0)({}, torch.zeros(7, 6, dtype=torch.float64))
    for p in range(7):
        for i in range(3):
            angle = p / 100.0 ** (2 * i / 6)
            assert y[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-14)
            assert y[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-14)


def test_sinusoidal_positions_take_positions_and_keep_the_dtype() -> None:
    layer, x = nn.SinusoidalPositions(4), draw(9, 4)
    positions = torch.tensor([[3, 4], [0, 8]])
    whole = layer({}, torch.zeros(9, 4, dtype=torch.float64))
    assert torch.equal(layer({}, x[:2], positions=positions), x[:2] + whole[positions])
    assert layer({}, torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# Rotations.


@pytest.mark.parametrize("base", [10000.0, 10.0])
def test_apply_rotary_is_a_complex_multiplication(base: float) -> None:
    x, positions = draw(2, 3, 5, 6), torch.tensor([0, 1, 2, 7, 1000])
    factors = [[complex(math.cos(a), math.sin(a)) for a in angles] for angles in _angles(positions, 6, base)]
    turned = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) * torch.tensor(factors, dtype=torch.complex128)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(nn.apply_rotary(x, positions, base), expected, rtol=1e-12, atol=1e-12)


def _angles(positions: Tensor, d: int, base: float) -> list[list[float]]:
    return [[p * base ** (-2 * i / d) for i in range(d // 2)] for p in positions.tolist()]


def test_apply_rotary_makes_products_depend_on_differences_of_positions() -> None:
    """1e-12: angles up to 1e3 carry 1e-13."""
    q, k, at = draw(4, 8), draw(5, 8, seed=1), torch.arange(9)
    scores = nn.apply_rotary(q, at[:4]) @ nn.apply_rotary(k, at[:5]).mT
    later = nn.apply_rotary(q, at[:4] + 900) @ nn.apply_rotary(k, at[:5] + 900).mT
    torch.testing.assert_close(later, scores, rtol=1e-12, atol=1e-12)
    other = nn.apply_rotary(q, at[:4] + 1) @ nn.apply_rotary(k, at[:5]).mT
    assert (other - scores).abs().max() > 0.1


def test_apply_rotary_keeps_norms_and_dtypes_and_takes_positions_of_each_sequence() -> None:
    x, positions = draw(2, 3, 4), torch.tensor([[0, 1, 2], [5, 9, 1]])
    y = nn.apply_rotary(x, positions)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(vmap(nn.apply_rotary)(x, positions), y, rtol=0, atol=0)
    assert nn.apply_rotary(x.bfloat16(), positions).dtype == torch.bfloat16
    assert nn.apply_rotary(x[:, :0], positions[:, :0]).shape == (2, 0, 4)


def test_apply_rotary_is_linear_so_its_second_derivative_is_zero() -> None:
    x, t, positions = draw(2, 4), draw(2, 4, seed=1), torch.arange(2)
    rotated = jit(lambda x: nn.apply_rotary(x, positions), backend="aten")
    torch.testing.assert_close(jvp(rotated, (x,), (t,))[1], nn.apply_rotary(t, positions), rtol=1e-14, atol=1e-14)
    assert hessian(lambda x: nn.apply_rotary(x, positions).sum())(x).abs().max() == 0


def test_apply_rotary_refuses_an_odd_width_and_a_base_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="apply_rotary: expected d to be even, got 3"):
        nn.apply_rotary(torch.zeros(2, 3), torch.arange(2))
    with pytest.raises(ValueError, match=r"apply_rotary: expected base > 0, got -1\.0"):
        nn.apply_rotary(torch.zeros(2, 4), torch.arange(2), -1.0)


# Biases.

# "attn_mask_utils" of the paper's repository, printed with six digits
SLOPES = {
    1: [0.00390625],
    2: [0.0625, 0.00390625],
    3: [0.0625, 0.00390625, 0.25],
    6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125],
    8: [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625],
}


@pytest.mark.parametrize("num_heads", SLOPES)
def test_alibi_bias_is_minus_slope_times_distance(num_heads: int) -> None:
    bias = nn.alibi_bias(num_heads, torch.arange(2, 5), torch.arange(6), torch.float64)
    assert bias.shape == (num_heads, 3, 6)
    for h, slope in enumerate(SLOPES[num_heads]):
        for i in range(3):
            for j in range(6):
                assert bias[h, i, j].item() == -slope * abs(i + 2 - j)


def test_alibi_bias_of_each_sequence_is_that_of_one() -> None:
    positions = torch.tensor([[0, 1, 2], [4, 5, 6]])
    assert torch.equal(nn.alibi_bias(4, positions), vmap(lambda p: nn.alibi_bias(4, p))(positions))
