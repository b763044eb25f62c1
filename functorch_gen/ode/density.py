"""Densities along a flow: divergences, exact and estimated, and the instantaneous change of variables."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_choice, check_floating, check_positive, check_shape
from functorch_gen.ode.runge_kutta import solve
from functorch_gen.transforms import jvp, vmap
from functorch_gen.typing import Key

__all__ = ["divergence", "hutchinson_divergence", "log_prob"]

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> dx/dt, of each example alone: (b, ...), (b,) -> (b, ...)."""


def divergence(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """sum_i df_i/dx_i of each example, exactly: (b, ...) -> (b,). As many directional derivatives as x has elements.

    Args:
        f: (b, ...) -> (b, ...), of each example alone.
    Raises:
        TypeError: if x is not floating.
        ValueError: if x has no axis, or f(x) is not shaped like x.

    >>> divergence(lambda x: x**2, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([ 6., 14.])
    """
    return _directional("divergence", f, x, _unit_vectors("divergence", x))[1].sum(0)


def hutchinson_divergence(
    key: Key, f: Callable[[Tensor], Tensor], x: Tensor, *, num_probes: int = 1, probe: str = "rademacher"
) -> Tensor:
    """The mean of v.Jv over random probes v, an unbiased estimate of the divergence: (b, ...) -> (b,).

    With S = (J + J^T) / 2, one probe has the variance 2 (sum_ij S_ij^2 - sum_i S_ii^2) if its elements are +-1, and
    2 sum_ij S_ij^2 if they are normal.

    Args:
        f: (b, ...) -> (b, ...), of each example alone.
        probe: ``"rademacher"`` or ``"normal"``.
    Raises:
        TypeError: if x is not floating.
        ValueError: if x has no axis, f(x) is not shaped like x, the probe is unknown or ``num_probes`` < 1.
    Source: Hutchinson 1990, A stochastic estimator of the trace of the influence matrix; Avron and Toledo 2011.

    >>> hutchinson_divergence(random.key(0), lambda x: x**2, torch.tensor([[1.0, 2.0]]))  # J is diagonal: exact
    tensor([6.])
    """
    probes = _random_probes("hutchinson_divergence", key, x, num_probes, probe)
    return _directional("hutchinson_divergence", f, x, probes)[1].mean(0)


def _check_batch(name: str, x: Tensor) -> None:
    check_floating(x, f"{name}: x")
    if not x.ndim:
        raise ValueError(f"{name}: x: expected shape (b, ...), got ()")


def _unit_vectors(name: str, x: Tensor) -> Tensor:
    """One for each element of an example: (d, 1, ...)."""
    _check_batch(name, x)
    d = math.prod(x.shape[1:])
    return torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])


def _random_probes(name: str, key: Key, x: Tensor, num_probes: int, probe: str) -> Tensor:
    """(num_probes, b, ...)."""
    _check_batch(name, x)
    check_positive(name, num_probes=num_probes)
    draws = {"rademacher": random.rademacher, "normal": random.normal}
    check_choice(name, "probe", probe, draws)
    return draws[probe](key, (num_probes, *x.shape), x.dtype)


def _directional(name: str, f: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), and v.Jv for each probe v: (b, ...), (n, b or 1, ...) -> (b, ...), (n, b)."""

    def along(v: Tensor) -> tuple[Tensor, Tensor]:
        value, pushed = jvp(f, (x,), (v.expand_as(x),))
        if value.shape != x.shape:
            raise ValueError(f"{name}: f: expected f(x) of shape {tuple(x.shape)}, got {tuple(value.shape)}")
        return value, (v * pushed).reshape(len(x), math.prod(x.shape[1:])).sum(1)

    return vmap(along, out_dims=(None, 0))(probes)


def log_prob(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    log_prob_end: Callable[[Tensor], Tensor],
    *,
    key: Key | None = None,
    num_probes: int = 1,
    probe: str = "rademacher",
    method: str = "rk4",
    return_latent: bool = False,
) -> Any:
    """Log-density at x of what the flow dx/dt = velocity(x, t) makes of a known density at its end: (b, ...) -> (b,).

    The instantaneous change of variables: d log p(x(t)) / dt = -div velocity, hence along the path through x

        log p(x(t_0)) = log p(x(t_n)) + integral over [t_0, t_n] of div velocity dt

    Args:
        velocity: ``(x, t) -> dx/dt`` of each example alone: (b, ...), (b,) -> (b, ...).
        times: (n,) from that of x (0 for data) to that of ``log_prob_end`` (1 for noise).
        log_prob_end: (b, ...) -> (b,), the log-density at the last time.
        key: None: the exact divergence; else Hutchinson's estimate, with the same probes all along the path, so that
            the result is the exact change of volume along them, and unbiased.
        num_probes, probe: see :func:`hutchinson_divergence`.
        method: see :func:`solve`.
        return_latent: return (log_prob, x at the last time).
    Raises:
        TypeError, ValueError: as :func:`solve` and :func:`hutchinson_divergence`; if ``log_prob_end`` does not return
            (b,).
    Source: Chen et al. 2018, theorem 1, arXiv:1806.07366; Grathwohl et al. 2019, eq. 4 to 8, arXiv:1810.01367.

    >>> normal = lambda x: -0.5 * (x**2 + math.log(2 * math.pi)).sum(1)
    >>> stretch = lambda x, t: x  # by e: the data are N(0, e^-2)
    >>> log_prob(stretch, torch.zeros(1, 1), torch.linspace(0, 1, 11), normal)  # 1 - log(2 pi) / 2
    tensor([0.0811])
    """
    if key is None:
        probes, total = _unit_vectors("log_prob", x), Tensor.sum
    else:
        probes, total = _random_probes("log_prob", key, x, num_probes, probe), Tensor.mean

    def field(state: tuple[Tensor, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        slope, forms = _directional("log_prob", lambda x: velocity(x, t.expand(len(x))), state[0], probes)
        return slope, total(forms, 0)

    latent, change = solve(field, (x, x.new_zeros(len(x))), times, method=method)
    at_end = log_prob_end(latent)
    check_shape(at_end, "b", "log_prob: log_prob_end", b=len(x))
    return (at_end + change, latent) if return_latent else at_end + change
