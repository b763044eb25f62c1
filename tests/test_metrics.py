"""Two-sample metrics against scipy, closed forms between Gaussians and loops over pairs of points."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import metrics, random

KEY = random.key(0)


def normal(seed, *shape, dtype=torch.float64):
    return random.normal(random.key(seed), shape, dtype)


def covariance(seed, d):
    root = normal(seed, d, d)
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


# Sliced Wasserstein.


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 5), (1, 6), (30, 12)])
def test_sliced_wasserstein_in_one_dimension_equals_scipy(n, m):
    x, y = normal(1, n, 1), normal(2, m, 1) + 0.3
    expected = scipy.stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert metrics.sliced_wasserstein(KEY, x, y, p=1).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_sliced_wasserstein_equals_loop_over_matched_copies(p):
    """m copies of every x and n copies of every y have the same quantile functions, and equal sizes."""
    n, m, d, projections = 6, 4, 3, 5
    x, y = normal(1, n, d), normal(2, m, d) * 2
    directions = random.normal(KEY, (d, projections), torch.float64)
    costs = []
    for u in directions.T:
        u = u / math.sqrt(sum(float(value) ** 2 for value in u))
        a = sorted(float(u @ point) for point in x for _ in range(m))
        b = sorted(float(u @ point) for point in y for _ in range(n))
        costs.append(sum(abs(s - t) ** p for s, t in zip(a, b, strict=True)) / (n * m))
    expected = (sum(costs) / projections) ** (1 / p)
    got = metrics.sliced_wasserstein(KEY, x, y, projections=projections, p=p)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_of_translation_has_closed_form():
    """W_2 along u is |<u, c>|, and E <u, c>^2 = |c|^2 / d with relative variance 3 d / (d + 2) - 1."""
    d, projections = 4, 20_000
    x, c = normal(1, 3, d), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    got = metrics.sliced_wasserstein(KEY, x, x + c, projections=projections).item() ** 2
    error = math.sqrt((3 * d / (d + 2) - 1) / projections)
    assert got == pytest.approx((c @ c).item() / d, rel=4 * error)


def test_sliced_wasserstein_has_the_gradient_of_finite_differences():
    x, y = normal(1, 5, 3).requires_grad_(), normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: metrics.sliced_wasserstein(KEY, x, y, projections=4), (x, y))


def test_sliced_wasserstein_of_equal_samples_has_zero_derivatives():
    x = normal(1, 5, 3)

    def distance(y):
        return metrics.sliced_wasserstein(KEY, x, y)

    assert torch.equal(torch.func.grad(distance)(x), torch.zeros_like(x))
    assert torch.func.hessian(distance)(x).isfinite().all()


# Maximum mean discrepancy.


def mmd_by_loops(x, y, bandwidth, unbiased):
    def mean(a, b, skip):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return sum(math.exp(-float((a[i] - b[j]).square().sum()) / (2 * bandwidth**2)) for i, j in pairs) / len(pairs)

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_equals_loop_over_pairs(unbiased):
    x, y = normal(1, 6, 3), normal(2, 4, 3) + 0.5
    got = metrics.mmd(x, y, bandwidth=0.7, unbiased=unbiased)
    assert got.item() == pytest.approx(mmd_by_loops(x, y, 0.7, unbiased), rel=1e-12)


def test_mmd_default_bandwidth_is_the_median_distance():
    x, y = normal(1, 6, 3), normal(2, 4, 3) + 0.5
    distances = np.sort(scipy.spatial.distance.pdist(torch.cat([x, y]).numpy()))
    median = distances[(len(distances) - 1) // 2]
    assert metrics.mmd(x, y).item() == pytest.approx(mmd_by_loops(x, y, median, True), rel=1e-12)


def test_mmd_of_equal_points_uses_bandwidth_one():
    assert metrics.mmd(torch.ones(4, 2), torch.ones(3, 2)) == 0


def test_mmd_unbiased_mean_is_the_closed_form_between_gaussians():
    """E k = (s^2 / (s^2 + 2))^(d/2) exp(-|m|^2 / (2 (s^2 + 2))) for two points of N(0, I) whose means differ by m."""
    d, s, repeats = 2, 1.5, 400
    m = torch.tensor([0.6, -0.3], dtype=torch.float64)
    base = (s**2 / (s**2 + 2)) ** (d / 2)
    expected = 2 * base * (1 - math.exp(-(m @ m).item() / (2 * (s**2 + 2))))
    x, y = normal(1, repeats, 10, d), normal(2, repeats, 8, d) + m
    estimates = torch.vmap(lambda x, y: metrics.mmd(x, y, bandwidth=s))(x, y)
    error = estimates.std().item() / math.sqrt(repeats)
    assert error < 0.2 * expected
    assert estimates.mean().item() == pytest.approx(expected, abs=4 * error)


def test_mmd_keeps_its_precision_far_from_the_origin():
    """Shifting by 1e6 rounds the points by 1e-10."""
    x, y = normal(1, 6, 3), normal(2, 4, 3)
    assert torch.allclose(metrics.mmd(x + 1e6, y + 1e6), metrics.mmd(x, y), atol=1e-9)


def test_mmd_has_the_gradient_of_finite_differences():
    x, y = normal(1, 5, 3).requires_grad_(), normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: metrics.mmd(x, y, bandwidth=1.3), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: metrics.mmd(x, y, bandwidth=1.3), (x, y))


# Fréchet distance.


def test_moments_equal_numpy():
    x = normal(1, 9, 2, 2)
    mean, cov = metrics.moments(x)
    flat = x.reshape(9, 4).numpy()
    assert np.allclose(mean.numpy(), flat.mean(0), rtol=1e-14)
    assert np.allclose(cov.numpy(), np.cov(flat, rowvar=False), rtol=1e-13)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_frechet_distance_equals_scipy_sqrtm(d):
    a, b, m = covariance(1, d), covariance(2, d), normal(3, d)
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real
    expected = float(m @ m) + float(a.trace() + b.trace()) - 2 * np.trace(root)
    got = metrics.frechet_distance((m, a), (torch.zeros_like(m), b))
    assert got.item() == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_singular_covariances_has_closed_form():
    """Covariances that commute: the sum of (sqrt a - sqrt b)^2, zeros and repetitions included."""
    a = torch.tensor([4.0, 4.0, 0.0, 0.0, 9.0], dtype=torch.float64)
    b = torch.tensor([1.0, 0.0, 0.0, 0.0, 16.0], dtype=torch.float64)
    basis, _ = torch.linalg.qr(normal(1, 5, 5))
    zero = torch.zeros(5, dtype=torch.float64)
    got = metrics.frechet_distance((zero, basis * a @ basis.T), (zero, basis * b @ basis.T))
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert got.item() == pytest.approx(expected, abs=1e-7)  # sqrt of rounding, 1e-16 * 144


def test_frechet_distance_of_fewer_points_than_features_equals_nuclear_norm():
    """Tr (C_y^1/2 C_x C_y^1/2)^1/2 is the nuclear norm of the product of the centred samples."""
    x, y = normal(1, 4, 10), normal(2, 6, 10)
    a, b = (x - x.mean(0)) / math.sqrt(3), (y - y.mean(0)) / math.sqrt(5)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    expected = shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert metrics.frechet_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-7)


def test_frechet_distance_of_a_sample_to_itself_is_zero():
    x = normal(1, 50, 8)
    assert metrics.frechet_distance(x, x).item() == pytest.approx(0.0, abs=1e-12)
    assert metrics.frechet_distance(x, metrics.moments(x)).item() == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_has_the_gradient_of_finite_differences():
    x, y = normal(1, 6, 3).requires_grad_(), (1.5 * normal(2, 7, 3)).requires_grad_()
    assert torch.autograd.gradcheck(metrics.frechet_distance, (x, y))
    assert torch.autograd.gradgradcheck(metrics.frechet_distance, (x, y))


def test_frechet_distance_gradient_is_finite_at_repeated_eigenvalues():
    """d/dA = I - T with T the optimal map; for A = I and diagonal B, T = B^{1/2}."""
    b = torch.tensor([4.0, 4.0, 0.25], dtype=torch.float64)
    zero, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    gradient = torch.func.grad(lambda a: metrics.frechet_distance((zero, a), (zero, b.diag())))(eye)
    assert torch.allclose(gradient, torch.diag(1 - b.sqrt()), atol=1e-12)


def test_frechet_distance_gradient_is_finite_for_constant_features():
    x, y = normal(1, 8, 5), normal(2, 8, 5)
    x[:, 3:], y[:, 3:] = 1.0, 1.0
    gradient = torch.func.grad(metrics.frechet_distance)(x, y)
    expected = torch.func.grad(metrics.frechet_distance)(x[:, :3], y[:, :3])
    assert torch.allclose(gradient[:, :3], expected, atol=1e-12)
    assert torch.equal(gradient[:, 3:], torch.zeros_like(gradient[:, 3:]))


# Nearest neighbours.


def test_nearest_distance_equals_loop():
    x, reference = normal(1, 7, 2, 3), normal(2, 5, 2, 3)
    expected = [min(math.sqrt(float((a - b).square().sum())) for b in reference) for a in x]
    assert metrics.nearest_distance(x, reference).tolist() == pytest.approx(expected, rel=1e-14)


def test_nearest_distance_does_not_depend_on_chunks():
    x, reference = normal(1, 7, 3), normal(2, 5, 3)
    whole = metrics.nearest_distance(x, reference)
    assert all(torch.equal(metrics.nearest_distance(x, reference, chunk_size=size), whole) for size in (1, 3, 7))


def test_nearest_distance_of_a_copy_is_zero_and_so_are_its_derivatives():
    reference = normal(1, 5, 3) + 1e4
    assert torch.equal(metrics.nearest_distance(reference[:2], reference), torch.zeros(2, dtype=torch.float64))
    total = torch.func.grad(lambda x: metrics.nearest_distance(x, reference).sum())(reference[:2])
    assert torch.equal(total, torch.zeros_like(total))


def test_nearest_distance_has_the_gradient_of_finite_differences():
    x, reference = normal(1, 4, 3).requires_grad_(), normal(2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(metrics.nearest_distance, (x, reference))


# All of them.

ALL = {
    "sliced_wasserstein": lambda x, y: metrics.sliced_wasserstein(KEY, x, y, projections=8),
    "mmd": metrics.mmd,
    "frechet_distance": metrics.frechet_distance,
    "nearest_distance": lambda x, y: metrics.nearest_distance(x, y, chunk_size=3),
}


@pytest.mark.parametrize("name", ALL)
def test_metric_of_images_is_that_of_flattened_images(name):
    x, y = normal(1, 6, 1, 2, 2), normal(2, 5, 1, 2, 2)
    assert torch.equal(ALL[name](x, y), ALL[name](x.reshape(6, 4), y.reshape(5, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_metric_returns_its_float64_value_in_the_dtype_of_the_input(name, dtype):
    x, y = normal(1, 6, 3).to(dtype), normal(2, 5, 3).to(dtype)
    got = ALL[name](x, y)
    assert got.dtype == dtype
    assert torch.equal(got, ALL[name](x.double(), y.double()).to(dtype))


@pytest.mark.parametrize("name", ALL)
def test_metric_of_nan_is_nan(name):
    x, y = normal(1, 6, 3), normal(2, 5, 3)
    assert ALL[name](x.index_fill(0, torch.tensor([2]), torch.nan), y).isnan().any()


@pytest.mark.parametrize("name", ALL)
def test_metric_batches_under_vmap(name):
    x, y = normal(1, 3, 6, 2), normal(2, 3, 5, 2)
    loop = torch.stack([ALL[name](a, b) for a, b in zip(x, y, strict=True)])
    assert torch.allclose(torch.vmap(ALL[name])(x, y), loop, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_metric_traces_with_its_gradient(name):
    x, y = normal(1, 6, 2), normal(2, 5, 2)

    def gradient(x, y):
        return torch.func.grad(lambda x: ALL[name](x, y).sum())(x)

    traced = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(x, y)
    assert torch.allclose(traced(x + 1, y), gradient(x + 1, y), atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_metric_compiles_whole(name):
    x, y = normal(1, 6, 2), normal(2, 5, 2)
    compiled = torch.compile(ALL[name], fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, y), ALL[name](x, y), atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_metric_of_different_spaces_is_an_error(name):
    with pytest.raises(ValueError, match=rf"{name}: .*(y|reference): expected shape \(.*3,?\).*got \(.*4,?\)"):
        ALL[name](normal(1, 6, 3), normal(2, 5, 4))


@pytest.mark.parametrize("name", ALL)
def test_metric_of_integers_is_an_error(name):
    with pytest.raises(TypeError, match=rf"{name}: x: expected a floating-point tensor, got torch.int64"):
        ALL[name](torch.arange(6), normal(2, 6))


@pytest.mark.parametrize(
    ("name", "n", "least"), [("sliced_wasserstein", 0, 1), ("mmd", 1, 2), ("frechet_distance", 1, 2)]
)
def test_metric_of_too_few_points_is_an_error(name, n, least):
    message = rf"{name}: y: expected shape \(n, ...\) with n >= {least}, got \({n}, 3\)"
    with pytest.raises(ValueError, match=message):
        ALL[name](normal(1, 6, 3), normal(2, n, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.sliced_wasserstein(KEY, x, x, projections=0), "expected projections > 0, got 0"),
        (lambda x: metrics.sliced_wasserstein(KEY, x, x, p=0.5), "expected p >= 1, got 0.5"),
        (lambda x: metrics.mmd(x, x, bandwidth=-1.0), "expected bandwidth > 0, got -1.0"),
        (lambda x: metrics.nearest_distance(x, x, chunk_size=0), "expected chunk_size > 0, got 0"),
        (
            lambda x: metrics.frechet_distance(x, (torch.zeros(3), torch.eye(2))),
            r"y: covariance: expected shape \(d=3, d=3\), got \(2, 2\)",
        ),
    ],
)
def test_metric_argument_out_of_range_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(1, 6, 3))
