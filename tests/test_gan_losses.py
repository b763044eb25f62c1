"""Losses of the two players: formulas, equilibria, the best discriminators, which are known for discrete data."""

import math

import pytest
import torch
from torch.nn import functional as F

from functorch_gen import gan, losses, random
from functorch_gen.transforms import grad

F64 = torch.float64
PAIRS = [gan.d_logistic, gan.d_least_squares, gan.d_hinge, gan.d_wasserstein, gan.d_relativistic, gan.g_relativistic]
SINGLES = [gan.g_minimax, gan.g_non_saturating, gan.g_least_squares, gan.g_hinge, gan.g_wasserstein]
by_name = {"ids": lambda loss: loss.__name__}

P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)  # data and generator, on four points
Q = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=F64)


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, F64)


def expected_d_loss(loss, logits):
    """E over x ~ P, y ~ Q of the loss, for logits at the four points."""
    real, fake = logits[:, None].expand(4, 4).flatten(), logits.expand(4, 4).flatten()
    return (torch.outer(P, Q).flatten() * loss(real, fake)).sum()


def test_logistic_losses_are_binary_cross_entropies():
    real, fake = 3 * normal(0, 50), 3 * normal(1, 50)
    bce = lambda logits, target: F.binary_cross_entropy_with_logits(
        logits, torch.full_like(logits, target), reduction="none"
    )
    for found, expected in (
        (gan.d_logistic(real, fake), bce(real, 1.0) + bce(fake, 0.0)),
        (gan.g_minimax(fake), -bce(fake, 0.0)),
        (gan.g_non_saturating(fake), bce(fake, 1.0)),
        (gan.d_relativistic(real, fake), bce(real - fake, 1.0)),
        (gan.g_relativistic(real, fake), bce(fake - real, 1.0)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_losses_at_the_equilibrium():
    """Where the discriminator cannot tell: logits 0, or 1/2 with targets 0 and 1."""
    zero, half = torch.zeros(3, dtype=F64), torch.full((3,), 0.5, dtype=F64)
    for found, expected in (
        (gan.d_logistic(zero, zero), 2 * math.log(2)),
        (gan.g_non_saturating(zero), math.log(2)),
        (gan.g_minimax(zero), -math.log(2)),
        (gan.d_relativistic(zero, zero), math.log(2)),
        (gan.g_relativistic(zero, zero), math.log(2)),
        (gan.d_least_squares(half, half), 1 / 4),
        (gan.d_hinge(zero, zero), 2.0),
        (gan.d_wasserstein(zero, zero), 0.0),
    ):
        torch.testing.assert_close(found, torch.full_like(zero, expected), rtol=1e-15, atol=0)


def test_the_best_logit_is_the_log_ratio_and_leaves_the_jensen_shannon_divergence():
    """Goodfellow et al. 2014, theorem 1: the least d_logistic is 2 ln 2 - 2 JSD(P, Q)."""
    best = (P / Q).log()
    loss = lambda logits: expected_d_loss(gan.d_logistic, logits)
    torch.testing.assert_close(grad(loss)(best), torch.zeros(4, dtype=F64), rtol=0, atol=1e-15)
    divergence = losses.jensen_shannon(P.log()[None], Q.log()[None])[0]
    torch.testing.assert_close(loss(best), 2 * math.log(2) - 2 * divergence, rtol=1e-14, atol=0)


def test_the_best_least_squares_discriminator_is_the_share_of_the_data():
    """D = p / (p + q): Mao et al. 2017."""
    slope = grad(lambda logits: expected_d_loss(gan.d_least_squares, logits))(P / (P + Q))
    torch.testing.assert_close(slope, torch.zeros(4, dtype=F64), rtol=0, atol=1e-15)


def test_the_best_hinge_discriminator_is_the_sign_and_leaves_the_total_variation():
    """2 - 2 TV, TV = sum |p - q| / 2; no step away from it is better."""
    best = torch.sign(P - Q)
    least = expected_d_loss(gan.d_hinge, best)
    torch.testing.assert_close(least, 2 - (P - Q).abs().sum(), rtol=1e-14, atol=0)
    for seed in range(20):
        assert expected_d_loss(gan.d_hinge, best + normal(seed, 4)) >= least - 1e-14


def test_the_wasserstein_loss_of_the_identity_is_the_distance_of_shifted_data():
    x = normal(0, 100)
    torch.testing.assert_close(gan.d_wasserstein(x + 3, x).mean(), torch.tensor(-3.0, dtype=F64), rtol=1e-14, atol=0)
    assert torch.equal(gan.g_wasserstein(x), -x)
    assert torch.equal(gan.g_hinge(x), -x)


def test_the_least_squares_generator_wants_one():
    torch.testing.assert_close(gan.g_least_squares(normal(0, 9)), F.mse_loss(normal(0, 9), torch.ones(9, dtype=F64),
                               reduction="none") / 2, rtol=1e-15, atol=0)  # fmt: skip


def test_only_the_saturating_loss_has_no_slope_where_the_discriminator_wins():
    fake = torch.tensor([-40.0], dtype=F64)
    slope = {loss: float(grad(lambda x, loss=loss: loss(x).sum())(fake)) for loss in SINGLES}
    assert abs(slope.pop(gan.g_minimax)) < 1e-16
    assert all(value <= -1 + 1e-15 for value in slope.values())


@pytest.mark.parametrize("loss", [*PAIRS, *SINGLES], **by_name)
def test_losses_are_finite_at_large_logits_and_round_once(loss):
    count = 2 if loss in PAIRS else 1
    for size in (-1e4, 1e4):
        logits = [torch.tensor([size * (-1) ** i]) for i in range(count)]
        slopes = grad(lambda logits: loss(*logits).sum())(logits)
        assert all(bool(torch.isfinite(x).all()) for x in [loss(*logits), *slopes])
    short = [normal(i, 100).to(torch.bfloat16) for i in range(count)]
    assert torch.equal(loss(*short), loss(*[x.float() for x in short]).to(torch.bfloat16))


@pytest.mark.parametrize("loss", [*PAIRS, *SINGLES], **by_name)
def test_wrong_logits_are_refused(loss):
    first, *rest = ("real", "fake") if loss in PAIRS else ("fake",)
    good = [torch.zeros(3) for _ in rest]
    with pytest.raises(ValueError, match=rf"{loss.__name__}: {first}: expected shape \(b,\), got \(3, 1\)"):
        loss(torch.zeros(3, 1), *good)
    with pytest.raises(TypeError, match=f"{loss.__name__}: {first}: expected a floating-point tensor, got torch.int64"):
        loss(torch.zeros(3, dtype=torch.int64), *good)
    if rest:
        with pytest.raises(ValueError, match=rf"{loss.__name__}: fake: expected shape \(b=2,\), got \(3,\)"):
            loss(torch.zeros(2), *good)
