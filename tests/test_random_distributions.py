"""random: the distribution of every sampler, properties for any seed, derivatives."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

from functorch_gen import random
from functorch_gen.random.erfinv import erfinv

KEY = random.key(0)
FOUR = [0.1, 0.2, 0.3, 0.4]
P = torch.tensor(FOUR)

# Properties.


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 300))
def test_split_keys_are_distinct(seed, n):
    keys = random.split(random.key(seed), n)
    assert len({tuple(key) for key in keys.tolist()}) == n


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_fold_in_of_a_tensor_equals_that_of_its_number(seed, data):
    key = random.key(seed)
    expected = random.fold_in(key, data)
    assert torch.equal(random.fold_in(key, torch.tensor(data)), expected)
    assert torch.equal(random.fold_in(key, torch.tensor(data).to(torch.int32)), expected)


@given(st.integers(-(2**63), 2**63 - 1))
def test_key_of_a_tensor_equals_that_of_its_number(seed):
    assert torch.equal(random.key(torch.tensor(seed)), random.key(seed))


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 4), max_size=4))
def test_samplers_have_the_shape_asked_for(seed, shape):
    key = random.key(seed)
    for draw in (random.bits, random.uniform, random.normal, random.gumbel, random.rademacher):
        assert list(draw(key, shape).shape) == shape
    assert list(random.randint(key, shape, 0, 3).shape) == shape


@given(st.integers(0, 2**32 - 1), st.integers(-(2**63), 2**63 - 2), st.integers(1, 2**64))
def test_randint_stays_in_its_bounds(seed, low, width):
    high = min(low + width, 2**63 - 1)
    drawn = random.randint(random.key(seed), (20,), low, high)
    assert bool(((low <= drawn) & (drawn < high)).all())


@given(st.integers(0, 2**32 - 1), st.integers(0, 200))
def test_permutation_holds_every_number_once(seed, n):
    assert random.permutation(random.key(seed), n).sort().values.tolist() == list(range(n))


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(0.01, 4))
def test_truncated_normal_stays_inside(seed, low, width):
    drawn = random.truncated_normal(random.key(seed), low, low + width, (50,))
    low, high = torch.tensor([low, low + width]).tolist()
    assert bool(((low < drawn) & (drawn < high)).all())


# Distributions: a fixed key draws n numbers; the p-value of the right distribution falls below 1e-3 in one of 1000
# choices of the key.

N = 20_000
PHI = scipy.stats.norm.cdf


def ks_pvalue(x: Tensor, cdf: Callable) -> float:
    return scipy.stats.kstest(x.double().numpy(), cdf).pvalue


def chi2_pvalue(x: Tensor, probabilities: list[float]) -> float:
    counts = torch.bincount(x.flatten(), minlength=len(probabilities)).numpy()
    return scipy.stats.chisquare(counts, np.array(probabilities) * counts.sum()).pvalue


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("draw", "cdf"),
    [
        (lambda key, dtype: random.uniform(key, (N,), dtype, -1.0, 3.0), scipy.stats.uniform(-1, 4).cdf),
        (lambda key, dtype: random.normal(key, (N,), dtype), PHI),
        (lambda key, dtype: random.exponential(key, (N,), dtype), scipy.stats.expon.cdf),
        (lambda key, dtype: random.laplace(key, (N,), dtype), scipy.stats.laplace.cdf),
        (lambda key, dtype: random.gumbel(key, (N,), dtype), scipy.stats.gumbel_r.cdf),
        (lambda key, dtype: random.gumbel(key, (N,), dtype, "high"), scipy.stats.gumbel_r.cdf),
        (
            lambda key, dtype: random.truncated_normal(key, -0.5, 2.0, (N,), dtype),
            scipy.stats.truncnorm(-0.5, 2.0).cdf,
        ),
    ],
    ids=["uniform", "normal", "exponential", "laplace", "gumbel", "gumbel_high", "truncated_normal"],
)
def test_floating_sampler_has_its_distribution(draw, cdf, dtype):
    assert ks_pvalue(draw(random.key(1), dtype), cdf) > 1e-3


@pytest.mark.parametrize(
    ("draw", "probabilities"),
    [
        (lambda key: random.bernoulli(key, 0.3, (N,)).long(), [0.7, 0.3]),
        (lambda key: (random.rademacher(key, (N,)) + 1) // 2, [0.5, 0.5]),
        (lambda key: random.randint(key, (N,), -3, 4) + 3, [1 / 7] * 7),
        (lambda key: random.randint(key, (N,), -3, 4, torch.int32) + 3, [1 / 7] * 7),
        (lambda key: random.categorical(key, P.log(), shape=(N,)), FOUR),
        (lambda key: random.choice(key, 5, (N,)), [0.2] * 5),
        (lambda key: random.choice(key, 4, (N,), p=P), FOUR),
        (lambda key: random.bits(key, (N,), torch.uint8).long(), [1 / 256] * 256),
        (lambda key: (random.bits(key, (N,)) >> 24).long() + 128, [1 / 256] * 256),
    ],
    ids=["bernoulli", "rademacher", "randint", "randint_int32", "categorical", "choice", "choice_p", "low", "high"],
)
def test_integer_sampler_has_its_distribution(draw, probabilities):
    assert chi2_pvalue(draw(random.key(1)), probabilities) > 1e-3


def test_permutation_takes_every_order_equally_often():
    orders = vmap(lambda key: random.permutation(key, 4))(random.split(random.key(1), N))
    _, index = torch.unique(orders, dim=0, return_inverse=True)
    assert chi2_pvalue(index, [1 / 24] * 24) > 1e-3


@pytest.mark.parametrize("draw", ["categorical", "choice"])
def test_draws_without_replacement_follow_the_urn(draw):
    def pair(key: Tensor) -> Tensor:
        if draw == "categorical":
            return random.categorical(key, P.log(), shape=(2,), replace=False)
        return random.choice(key, 4, (2,), replace=False, p=P)

    first, second = vmap(pair)(random.split(random.key(1), N)).unbind(-1)
    urn = [
        FOUR[i] * FOUR[j] / (1 - FOUR[i]) for i in range(4) for j in range(4) if i != j
    ]  # the second among what is left
    pairs = (first * 3 + second - (second > first).long())[first != second]
    assert len(pairs) == N
    assert chi2_pvalue(pairs, urn) > 1e-3


def test_orthogonal_is_orthogonal_and_haar():
    q = random.orthogonal(random.key(1), 3, (4000,), torch.float64)
    eye = torch.eye(3, dtype=torch.float64).expand(4000, 3, 3)
    torch.testing.assert_close(q @ q.mT, eye, rtol=0, atol=1e-14)
    # a coordinate of a uniform point of the 2-sphere is uniform on [-1, 1] (Archimedes)
    for i in range(3):
        assert ks_pvalue(q[:, i, 2 - i], scipy.stats.uniform(-1, 2).cdf) > 1e-3


@pytest.mark.parametrize(("n", "m"), [(2, 5), (5, 2)])
def test_orthogonal_of_unequal_sides_is_semi_orthogonal(n, m):
    q = random.orthogonal(KEY, n, m=m)
    assert q.shape == (n, m)
    gram = q @ q.mT if n < m else q.mT @ q
    torch.testing.assert_close(gram, torch.eye(2), rtol=0, atol=1e-6)


def test_streams_of_split_and_folded_keys_are_uncorrelated():
    left, right = random.split(KEY)
    keys = torch.cat([random.split(left, 8), torch.stack([random.fold_in(right, i) for i in range(8)])])
    x = vmap(lambda key: random.normal(key, (N,)))(keys)
    correlation = torch.corrcoef(x) - torch.eye(16)
    assert correlation.abs().max() < 4.5 / math.sqrt(N)  # 120 standard normals over sqrt(N) exceed it once in 1000


@pytest.mark.slow
def test_normal_of_a_million_has_its_distribution():
    x = random.normal(random.key(2), (1_000_000,))
    assert ks_pvalue(x, PHI) > 1e-3
    assert abs(scipy.stats.kurtosis(x.double().numpy())) < 4 * math.sqrt(24 / 1e6)


def test_gumbel_high_reaches_beyond_low():
    low, high = (random.gumbel(random.key(3), (2,), mode=mode) for mode in ("low", "high"))
    assert not torch.equal(low, high)
    assert bool(torch.isfinite(random.gumbel(random.key(3), (N,), torch.float16)).all())


# Derivatives and accuracy.


def test_erfinv_equals_scipy():
    tail = 1 - 2.0 ** -torch.arange(1, 53, dtype=torch.float64)
    x = torch.cat([torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1], tail])
    torch.testing.assert_close(erfinv(x), torch.from_numpy(scipy.special.erfinv(x.numpy())), rtol=1e-15, atol=0)


def test_erfinv_of_float32_is_as_exact_as_that_of_xla():
    x = torch.cat([torch.linspace(-1, 1, 20_001)[1:-1], 1 - 2.0 ** -torch.arange(1, 25)])
    expected = torch.from_numpy(scipy.special.erfinv(x.double().numpy()))
    # 97 half-ulps where 1 - x * x is rounded, measured over all draws of uniform, for XLA and here alike
    torch.testing.assert_close(erfinv(x).double(), expected, rtol=97 * 2**-24, atol=0)


def test_erfinv_has_its_derivatives():
    x = torch.tensor([-0.99999, -0.5, 0.0, 0.9, 0.9999999], dtype=torch.float64)
    slope = vmap(grad(erfinv))(x)
    torch.testing.assert_close(slope, math.sqrt(math.pi) / 2 * torch.exp(erfinv(x) ** 2), rtol=1e-9, atol=0)
    curvature = vmap(grad(grad(erfinv)))(x)
    torch.testing.assert_close(curvature, 2 * erfinv(x) * slope**2, rtol=1e-6, atol=0)


def test_uniform_has_the_gradient_of_its_bounds():
    def mean(low: Tensor, high: Tensor) -> Tensor:
        return random.uniform(KEY, (100,), torch.float64, low, high).mean()

    u = random.uniform(KEY, (100,), torch.float64).mean()
    low, high = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(grad(mean, (0, 1))(low, high), (1 - u, u))
    _, tangent = jvp(mean, (low, high), (torch.ones_like(low), torch.ones_like(high)))
    assert tangent.item() == pytest.approx(1, abs=1e-15)


def test_truncated_normal_has_the_gradient_of_its_bounds():
    low, high = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    x = random.truncated_normal(KEY, low, high, (50,), torch.float64)
    share = (PHI(x) - PHI(-1)) / (PHI(2) - PHI(-1))  # implicit: d/d high of [PHI(x) - share PHI(high)] = 0
    expected = torch.from_numpy(share * scipy.stats.norm.pdf(2) / scipy.stats.norm.pdf(x.numpy()))
    _, tangent = jvp(
        lambda b: random.truncated_normal(KEY, low, b, (50,), torch.float64), (high,), (torch.ones_like(high),)
    )
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=0)


def test_truncated_normal_to_one_tail_is_finite():
    drawn = random.truncated_normal(KEY, 4.0, math.inf, (1000,))
    assert bool((torch.isfinite(drawn) & (drawn > 4)).all())
