"""How far two samples are apart: sliced Wasserstein, MMD, Fréchet distance, distance to the nearest neighbour.

A sample is (n, ...): the first axis counts points, all others are flattened into features, so images (n, c, h, w) and
feature vectors (n, d) go in alike. Everything is computed in float64 and returned in the dtype of the inputs. Values
are not looked at, so every function traces and batches; a NaN that goes in comes out as NaN.
"""

import torch
from einops import rearrange, reduce
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.typing import Key, Number

__all__ = ["frechet_distance", "mmd", "moments", "nearest_distance", "sliced_wasserstein"]


def _points(x: Tensor, name: str, least: int = 1) -> Tensor:
    """(n, ...) -> (n, d) float64."""
    check_floating(x, name)
    if x.ndim == 0 or x.shape[0] < least:
        raise ValueError(f"{name}: expected shape (n, ...) with n >= {least}, got {tuple(x.shape)}")
    return rearrange(x, "n ... -> n (...)").double()


def _check_same_space(x: Tensor, y: Tensor, name: str, argument: str = "y") -> None:
    if x.shape[1:] != y.shape[1:]:
        axes = "".join(f", {size}" for size in x.shape[1:])
        raise ValueError(f"{name}: {argument}: expected shape (n{axes or ','}) as x has, got {tuple(y.shape)}")


def _safe_root(x: Tensor, power: float = 0.5, above: Number = 0.0) -> Tensor:
    """x^power where x > above, else 0 with zero derivatives."""
    positive = x > above
    root = torch.where(positive, torch.where(positive, x, 1.0).pow(power), 0.0)
    return torch.where(x.isnan(), x, root)


# Sliced Wasserstein.


def sliced_wasserstein(key: Key, x: Tensor, y: Tensor, *, projections: int = 128, p: float = 2.0) -> Tensor:
    """Sliced Wasserstein distance of two samples: (n, ...), (m, ...) -> ().

    SW_p^p = E_u W_p^p(<u, x>, <u, y>), u uniform on the sphere, estimated with ``projections`` draws;
    in one dimension W_p^p is the integral of |F_x^{-1}(q) - F_y^{-1}(q)|^p over q in [0, 1], exact for any n and m.

    Args:
        p: order of the distance, >= 1.
    Raises:
        ValueError: if the points of x and y differ in shape, a sample is empty, ``projections`` < 1 or p < 1.
    Source: Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters of measures, eq. 5 and 8.

    >>> x = random.normal(random.key(0), (100, 3))
    >>> sliced_wasserstein(random.key(1), x, x)
    tensor(0.)
    """
    check_positive("sliced_wasserstein", projections=projections)
    if p < 1:
        raise ValueError(f"sliced_wasserstein: expected p >= 1, got {p}")
    a, b = _points(x, "sliced_wasserstein: x"), _points(y, "sliced_wasserstein: y")
    _check_same_space(x, y, "sliced_wasserstein")
    directions = random.normal(key, (a.shape[1], projections), torch.float64)
    directions = directions / directions.norm(dim=0)
    cost = _wasserstein_1d(a @ directions, b @ directions, p).mean()
    return _safe_root(cost, 1 / p).to(torch.promote_types(x.dtype, y.dtype))


def _wasserstein_1d(x: Tensor, y: Tensor, p: float) -> Tensor:
    """W_p^p of each column: (n, k), (m, k) -> (k,).

    The quantile functions are constant between the levels i/n and j/m; in units of 1/(n m) all levels are integers.
    """
    n, m = x.shape[0], y.shape[0]
    levels = torch.cat([torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n])
    upper = levels.sort().values
    lower = torch.cat([torch.zeros_like(upper[:1]), upper[:-1]])
    x_quantile = x.sort(dim=0).values[(lower // m).clamp(max=n - 1)]
    y_quantile = y.sort(dim=0).values[(lower // n).clamp(max=m - 1)]
    width = rearrange(upper - lower, "q -> q 1").to(x.dtype) / (n * m)
    return (width * (x_quantile - y_quantile).abs().pow(p)).sum(0)


# Maximum mean discrepancy.


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2: (n, d), (m, d) -> (n, m); the inputs should be near the origin, for the terms cancel."""
    x_norms, y_norms = reduce(x * x, "n d -> n 1", "sum"), reduce(y * y, "m d -> 1 m", "sum")
    return (x_norms + y_norms - 2 * x @ y.T).clamp(min=0.0)


def mmd(x: Tensor, y: Tensor, *, bandwidth: Number | None = None, unbiased: bool = True) -> Tensor:
    """Squared maximum mean discrepancy with a Gaussian kernel: (n, ...), (m, ...) -> ().

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))

    Args:
        bandwidth: by default the median distance between two different points of the pooled sample (1 if that is 0),
            taken as a constant by derivatives.
        unbiased: leave out the pairs of a point with itself; the estimate may then be negative.
    Raises:
        ValueError: if the points of x and y differ in shape, a sample has fewer than 2, or ``bandwidth`` <= 0.
    Source: Gretton et al. 2012, A kernel two-sample test, eq. 3 (unbiased) and the square of eq. 5 (biased).

    >>> x = random.normal(random.key(0), (100, 3))
    >>> mmd(x, x, unbiased=False)
    tensor(0.)
    """
    a, b = _points(x, "mmd: x", 2), _points(y, "mmd: y", 2)
    _check_same_space(x, y, "mmd")
    if bandwidth is not None and not isinstance(bandwidth, Tensor):
        check_positive("mmd", bandwidth=bandwidth)
    centre = torch.cat([a, b]).mean(0)
    a, b = a - centre, b - centre
    scale = _median_distance(torch.cat([a, b]).detach()) if bandwidth is None else bandwidth

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return torch.exp(-_squared_distances(u, v) / (2 * scale**2))

    result = _pair_mean(kernel(a, a), unbiased) + _pair_mean(kernel(b, b), unbiased) - 2 * kernel(a, b).mean()
    return result.to(torch.promote_types(x.dtype, y.dtype))


def _pair_mean(gram: Tensor, unbiased: bool) -> Tensor:
    """Mean of the kernel over pairs within a sample, or over pairs of different points: (n, n) -> ()."""
    n = gram.shape[0]
    return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1)) if unbiased else gram.mean()


def _median_distance(points: Tensor) -> Tensor:
    """Lower median of the distances between different points: (n, d) -> (); 1 where it is 0."""
    i, j = torch.triu_indices(points.shape[0], points.shape[0], offset=1, device=points.device)
    median = _squared_distances(points, points)[i, j].median().sqrt()
    return torch.where(median == 0, 1.0, median)


# Fréchet distance.


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance of a sample: (n, ...) -> (d,), (d, d), in float64.

    >>> mean, covariance = moments(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> mean.tolist(), covariance.tolist()
    ([1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """
    points = _points(x, "moments: x", 2)
    mean = points.mean(0)
    centred = points - mean
    return mean, centred.T @ centred / (points.shape[0] - 1)


def frechet_distance(x: Tensor | tuple[Tensor, Tensor], y: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Squared Fréchet distance between the Gaussians fitted to two samples: (n, ...), (m, ...) -> ().

    d^2 = |m_x - m_y|^2 + Tr(C_x + C_y - 2 (C_y^{1/2} C_x C_y^{1/2})^{1/2})

    On Inception features this is the FID. Either argument may be the pair (mean, covariance), as :func:`moments`
    returns it. Gradients in ``x`` exist for every pair of covariances, singular ones too; those in ``y`` are NaN where
    an eigenvalue of its covariance is repeated, and those of a forward derivative in ``y`` always are (torch's rule of
    ``eigh``). The distance is symmetric: put first what you differentiate.

    Raises:
        ValueError: if x and y differ in their number of features, or a sample has fewer than 2 points.
    Source: Dowson and Landau 1982, eq. 4; Heusel et al. 2017, eq. 6, arXiv:1706.08500.

    >>> x = random.normal(random.key(0), (100, 3))
    >>> frechet_distance(x, x + 2).round(decimals=4)
    tensor(12.)
    """
    mean_x, covariance_x, dtype_x = _gaussian(x, "frechet_distance: x")
    mean_y, covariance_y, dtype_y = _gaussian(y, "frechet_distance: y")
    check_shape(mean_y, "d", "frechet_distance: mean of y", d=mean_x.shape[0])
    root_y = _matrix_root(covariance_y)
    cross = _root_eigenvalues(_eigenvalues(root_y @ covariance_x @ root_y)).sum()
    difference = mean_x - mean_y
    squared = difference @ difference + covariance_x.trace() + covariance_y.trace() - 2 * cross
    return squared.clamp(min=0.0).to(torch.promote_types(dtype_x, dtype_y))


def _gaussian(x: Tensor | tuple[Tensor, Tensor], name: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Mean (d,) and covariance (d, d) in float64, and the dtype they came in."""
    if isinstance(x, Tensor):
        _points(x, name, 2)
        return *moments(x), x.dtype
    mean, covariance = x
    d = check_shape(mean, "d", f"{name}: mean")["d"]
    check_shape(covariance, "d d", f"{name}: covariance", d=d)
    check_floating(mean, f"{name}: mean")
    check_floating(covariance, f"{name}: covariance")
    return mean.double(), covariance.double(), torch.promote_types(mean.dtype, covariance.dtype)


def _root_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """Square roots of the eigenvalues (d,) of a semidefinite matrix; what rounding may have made is 0."""
    noise = eigenvalues.shape[0] * torch.finfo(eigenvalues.dtype).eps * eigenvalues.detach().abs().amax()
    return _safe_root(eigenvalues, above=noise)


def _matrix_root(a: Tensor) -> Tensor:
    """Symmetric root of a semidefinite matrix: (d, d) -> (d, d)."""
    finite = a.isfinite().all()
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, a, 0.0))  # raises on NaN: hide it, then put it back
    return torch.where(finite, (vectors * _root_eigenvalues(eigenvalues)) @ vectors.T, torch.nan)


def _eigenvalues(a: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix: (d, d) -> (d,); NaN where it is not finite."""
    finite = a.isfinite().all()
    return torch.where(finite, torch.linalg.eigvalsh(torch.where(finite, (a + a.T) / 2, 0.0)), torch.nan)


# Memorisation.


def nearest_distance(x: Tensor, reference: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Euclidean distance of every point to the nearest reference point: (n, ...), (m, ...) -> (n,).

    The nearest point is chosen to about 1e-8 of the data's spread; the distance to it is exact, 0 for a copy. Memory
    grows as ``chunk_size`` * m.

    Raises:
        ValueError: if the points differ in shape, a sample is empty, or ``chunk_size`` < 1.

    >>> nearest_distance(torch.tensor([[0.0, 1.0], [3.0, 4.0]]), torch.zeros(5, 2))
    tensor([1., 5.])
    """
    check_positive("nearest_distance", chunk_size=chunk_size)
    points, others = _points(x, "nearest_distance: x"), _points(reference, "nearest_distance: reference")
    _check_same_space(x, reference, "nearest_distance", "reference")
    centre = others.mean(0)
    chunks = [
        _squared_distances(chunk - centre, others - centre).argmin(1)  # the index only: its distance is rounded
        for chunk in points.detach().split(chunk_size)
    ]
    difference = points - others[torch.cat(chunks)]
    squared = reduce(difference * difference, "n d -> n", "sum")
    return _safe_root(squared).to(torch.promote_types(x.dtype, reference.dtype))
