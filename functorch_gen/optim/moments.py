"""Transformations with a memory of past gradients: momentum, and the averages of Adam and its kin."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen.check import check_number
from functorch_gen.gradient_transformation import GradientTransformation
from functorch_gen.numerics import safe_where, sqrt
from functorch_gen.optim.memory import Leaf, Rule, average, check_hyperparameters, remember, unbiased, weights
from functorch_gen.typing import Number, Tree

__all__ = [
    "ScaleByAdaDeltaState", "ScaleByAdamState", "ScaleByAdanState", "ScaleByAmsgradState", "ScaleByLionState",
    "ScaleByRStdDevState", "ScaleByRadamState", "ScaleByRmsState", "ScaleByRssState", "TraceState",
    "scale_by_adadelta", "scale_by_adam", "scale_by_adamax", "scale_by_adan", "scale_by_amsgrad", "scale_by_belief",
    "scale_by_lion", "scale_by_radam", "scale_by_rms", "scale_by_rss", "scale_by_stddev", "trace",
]  # fmt: skip


class TraceState(NamedTuple):
    """State of :func:`trace`."""

    trace: Tree  # like the parameters, at least float32


def trace(decay: Number, nesterov: bool = False) -> GradientTransformation:
    """Momentum: trace = g + decay * trace; the update is the trace, or g + decay * trace for Nesterov's.

    Equals ``optax.trace`` and the momentum buffer of ``torch.optim.SGD`` (dampening 0).
    Source: Sutskever et al. 2013, with the learning rate outside the buffer as in torch.

    >>> tx = trace(0.9)
    >>> updates, state = tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))
    >>> tx.update([torch.ones(1)], state)[0]
    [tensor([1.9000])]
    """
    check_number("trace", "decay", decay, low=0, high=1)

    def accumulate(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = g + decay * v
        return g + decay * v if nesterov else v, v

    return remember("trace", TraceState, lambda state: accumulate)


# Adam and its kin.


class ScaleByAdamState(NamedTuple):
    """State of :func:`scale_by_adam`, :func:`scale_by_belief` and :func:`scale_by_adamax`."""

    count: Tensor  # optax's name; () int64: updates so far
    mu: Tree  # like the parameters, at least float32: mean of the gradients
    nu: Tree  # like the parameters, at least float32: mean of their squares
    mu_weight: Tensor  # () 1 - b1^count
    nu_weight: Tensor  # () 1 - b2^count


def scale_by_adam(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0, *, nesterov: bool = False
) -> GradientTransformation:
    """mu_hat / (sqrt(nu_hat + eps_root) + eps), of the bias-corrected means of gradients and of their squares.

    mu <- b1 mu + (1 - b1) g,  nu <- b2 nu + (1 - b2) g^2,  mu_hat = mu / (1 - b1^t),  nu_hat = nu / (1 - b2^t)
    Nesterov's: mu_hat = b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)

    Equals ``optax.scale_by_adam``. Derivatives at g = 0 are finite (the root's is taken to be 0 where nu is 0).

    Args:
        b1: decay of the mean of gradients.
        b2: decay of the mean of squared gradients.
        eps: added to the root of the second moment.
        eps_root: added under the root; bounds the derivatives of the update where gradients vanish.
    Source: Kingma and Ba 2015, algorithm 1, arXiv:1412.6980; Dozat 2016.

    >>> tx = scale_by_adam()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 1., -1.])]
    """
    check_hyperparameters("scale_by_adam", b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    rule = _adam_rule(b1, b2, lambda state: lambda m, v: m / (sqrt(v + eps_root) + eps), nesterov)
    return remember("scale_by_adam", ScaleByAdamState, rule, weights(mu=b1, nu=b2))


def _adam_rule(
    b1: Number,
    b2: Number,
    direction: Callable[[Any], Callable[[Tensor, Tensor], Tensor]],
    nesterov: bool = False,
    belief: Number | None = None,
) -> Rule:
    """The update is ``direction(state)(mu_hat, nu_hat)``; a third memory is the largest nu_hat so far."""

    def rule(state: Any) -> Leaf:
        mu_hat, unbias_nu, update = unbiased(b1, state.mu_weight, nesterov), 1 / state.nu_weight, direction(state)

        def leaf(g: Tensor, mu: Tensor, nu: Tensor, *largest: Tensor) -> tuple[Tensor, ...]:
            mu = average(g, mu, b1)
            nu = average(g * g, nu, b2) if belief is None else average((g - mu) * (g - mu), nu, b2) + belief
            largest = tuple(torch.maximum(x, unbias_nu * nu) for x in largest)
            return update(mu_hat(g, mu), *(largest or (unbias_nu * nu,))), mu, nu, *largest

        return leaf

    return rule


class ScaleByAmsgradState(NamedTuple):
    """State of :func:`scale_by_amsgrad`."""

    count: Tensor  # () int64: updates so far
    mu: Tree  # like the parameters, at least float32: mean of the gradients
    nu: Tree  # mean of their squares
    nu_max: Tree  # largest bias-corrected nu so far
    mu_weight: Tensor  # () 1 - b1^count
    nu_weight: Tensor  # () 1 - b2^count


def scale_by_amsgrad(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0
) -> GradientTransformation:
    """mu_hat / (sqrt(nu_max + eps_root) + eps): :func:`scale_by_adam` with the largest nu_hat so far.

    Equals ``optax.scale_by_amsgrad``; ``torch.optim.Adam(amsgrad=True)`` takes the largest nu, and corrects its bias.
    Source: Reddi et al. 2018, algorithm 2, arXiv:1904.09237.

    >>> tx = scale_by_amsgrad()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 1., -1.])]
    """
    check_hyperparameters("scale_by_amsgrad", b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    rule = _adam_rule(b1, b2, lambda state: lambda m, v: m / (sqrt(v + eps_root) + eps))
    return remember("scale_by_amsgrad", ScaleByAmsgradState, rule, weights(mu=b1, nu=b2))


def scale_by_belief(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-16, eps_root: Number = 1e-16, *, nesterov: bool = False
) -> GradientTransformation:
    """mu_hat / (sqrt(nu_hat) + eps), nu <- b2 nu + (1 - b2) (g - mu)^2 + eps_root; see :func:`scale_by_adam`.

    Equals ``optax.scale_by_belief``.
    Source: Zhuang et al. 2020, algorithm 2, arXiv:2010.07468.

    >>> tx = scale_by_belief(eps_root=0.0)
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 1.1111, -1.1111])]
    """
    check_hyperparameters("scale_by_belief", b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    rule = _adam_rule(b1, b2, lambda state: lambda m, v: m / (sqrt(v) + eps), nesterov, belief=eps_root)
    return remember("scale_by_belief", ScaleByAdamState, rule, weights(mu=b1, nu=b2))


class ScaleByRadamState(NamedTuple):
    """State of :func:`scale_by_radam`."""

    count: Tensor  # () int64: updates so far
    mu: Tree  # like the parameters, at least float32: mean of the gradients
    nu: Tree  # mean of their squares
    mu_weight: Tensor  # () 1 - b1^count
    nu_weight: Tensor  # () 1 - b2^count
    nu_age: Tensor  # () sum of the ages of nu's gradients, each with its weight in nu


def scale_by_radam(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0, threshold: Number = 5.0
) -> GradientTransformation:
    """r mu_hat / (sqrt(nu_hat + eps_root) + eps) where rho >= threshold, else mu_hat; see :func:`scale_by_adam`.

    rho_inf = 2 / (1 - b2) - 1,  rho = rho_inf - 2 t b2^t / (1 - b2^t),
    r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))

    Equals ``optax.scale_by_radam``; ``torch.optim.RAdam`` adds eps before it corrects the bias of nu. rho is computed
    as 1 + 2 times the mean age of the gradients in nu, in which nothing cancels.
    Source: Liu et al. 2020, algorithm 2, arXiv:1908.03265.

    >>> tx = scale_by_radam()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 4.0000, -0.5000])]
    """
    check_hyperparameters("scale_by_radam", b1=b1, b2=b2, eps=eps, eps_root=eps_root, threshold=threshold)

    def direction(state: ScaleByRadamState) -> Callable[[Tensor, Tensor], Tensor]:
        rho, limit = 1 + 2 * state.nu_age / state.nu_weight, 1 + 2 * b2 / (1 - b2)
        is_known = rho >= threshold
        below = torch.where(is_known, (limit - 4) * (limit - 2) * rho, 1.0)
        rectifier = safe_where(is_known, torch.sqrt, (rho - 4) * (rho - 2) * limit / below)
        return lambda m, v: torch.where(is_known, rectifier * m / (sqrt(v + eps_root) + eps), m)

    scalars = {**weights(mu=b1, nu=b2), "nu_age": lambda state: b2 * (state.nu_age + state.nu_weight)}
    return remember("scale_by_radam", ScaleByRadamState, _adam_rule(b1, b2, direction), scalars)


def scale_by_adamax(b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8) -> GradientTransformation:
    """mu_hat / nu, nu <- max(|g| + eps, b2 nu); mu_hat as in :func:`scale_by_adam`.

    Equals ``optax.scale_by_adamax`` and the direction of ``torch.optim.Adamax``.
    Source: Kingma and Ba 2015, algorithm 2, arXiv:1412.6980.

    >>> tx = scale_by_adamax()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 1., -1.])]
    """
    check_hyperparameters("scale_by_adamax", b1=b1, b2=b2, eps=eps)

    def rule(state: ScaleByAdamState) -> Leaf:
        mu_hat = unbiased(b1, state.mu_weight)

        def leaf(g: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, ...]:
            mu, nu = average(g, mu, b1), torch.maximum(g.abs() + eps, b2 * nu)
            return mu_hat(g, mu) / nu, mu, nu

        return leaf

    return remember("scale_by_adamax", ScaleByAdamState, rule, weights(mu=b1, nu=b2))


class ScaleByAdanState(NamedTuple):
    """State of :func:`scale_by_adan`, with optax's names."""

    m: Tree  # like the parameters, at least float32: mean of the gradients
    v: Tree  # mean of their differences
    n: Tree  # mean of the squares of gradients with Nesterov's differences
    g: Tree  # the last gradients
    t: Tensor  # () int64: updates so far
    m_weight: Tensor  # () 1 - b1^t
    v_weight: Tensor  # () 1 - b2^t
    n_weight: Tensor  # () 1 - b3^t


def scale_by_adan(
    b1: Number = 0.98, b2: Number = 0.92, b3: Number = 0.99, eps: Number = 1e-8, eps_root: Number = 0.0
) -> GradientTransformation:
    """(m_hat + (1 - b2) v_hat) / (sqrt(n_hat + eps_root) + eps), with d = g - g_before (at first 0).

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) d,  n <- b3 n + (1 - b3) (g + (1 - b2) d)^2,  bias-corrected

    Equals ``optax.scale_by_adan``.
    Source: Xie et al. 2022, algorithm 1, arXiv:2208.06677.

    >>> tx = scale_by_adan()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 1., -1.])]
    """
    check_hyperparameters("scale_by_adan", b1=b1, b2=b2, b3=b3, eps=eps, eps_root=eps_root)

    def rule(state: ScaleByAdanState) -> Leaf:
        is_first, unbias_n = state.t == 1, 1 / state.n_weight
        m_hat, v_hat = unbiased(b1, state.m_weight), unbiased(b2, state.v_weight)

        def leaf(g: Tensor, m: Tensor, v: Tensor, n: Tensor, last: Tensor) -> tuple[Tensor, ...]:
            difference = torch.where(is_first, 0.0, g - last)
            ahead = g + (1 - b2) * difference
            m, v, n = average(g, m, b1), average(difference, v, b2), average(ahead * ahead, n, b3)
            update = (m_hat(g, m) + (1 - b2) * v_hat(g, v)) / (sqrt(unbias_n * n + eps_root) + eps)
            return update, m, v, n, g

        return leaf

    return remember("scale_by_adan", ScaleByAdanState, rule, weights(m=b1, v=b2, n=b3))


class ScaleByLionState(NamedTuple):
    """State of :func:`scale_by_lion`."""

    count: Tensor  # () int64: updates so far
    mu: Tree  # like the parameters, at least float32: mean of the gradients


def scale_by_lion(b1: Number = 0.9, b2: Number = 0.99) -> GradientTransformation:
    """sign(b1 mu + (1 - b1) g), mu <- b2 mu + (1 - b2) g. Equals ``optax.scale_by_lion``.

    Source: Chen et al. 2023, algorithm 2, arXiv:2302.06675.

    >>> tx = scale_by_lion()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 1., -1.])]
    """
    check_hyperparameters("scale_by_lion", b1=b1, b2=b2)
    name = "scale_by_lion"
    return remember(name, ScaleByLionState, lambda _: lambda g, mu: (average(g, mu, b1).sign(), average(g, mu, b2)))


# Roots of squared gradients.


class ScaleByRssState(NamedTuple):
    """State of :func:`scale_by_rss`."""

    sum_of_squares: Tree  # like the parameters, at least float32


def scale_by_rss(initial_accumulator_value: Number = 0.1, eps: Number = 1e-7) -> GradientTransformation:
    """g / sqrt(s + eps), s <- s + g^2, at first ``initial_accumulator_value``; 0 where s = 0.

    Equals ``optax.scale_by_rss``; ``torch.optim.Adagrad`` divides by sqrt(s) + eps, which is the same at eps = 0.
    Source: Duchi et al. 2011, Adaptive subgradient methods, JMLR 12.

    >>> tx = scale_by_rss(0.0)
    >>> tx.update([torch.tensor([4.0, 0.0])], tx.init([torch.zeros(2)]))[0]
    [tensor([1., 0.])]
    """
    start = initial_accumulator_value
    check_hyperparameters("scale_by_rss", initial_accumulator_value=start, eps=eps)

    def leaf(g: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        total = total + g * g
        return g * safe_where(total > 0, lambda x: (x + eps).rsqrt(), total), total

    starts = {"sum_of_squares": lambda zero: zero + start}
    return remember("scale_by_rss", ScaleByRssState, lambda state: leaf, starts=starts)


class ScaleByRmsState(NamedTuple):
    """State of :func:`scale_by_rms`."""

    nu: Tree  # like the parameters, at least float32: mean of the squared gradients


class ScaleByRStdDevState(NamedTuple):
    """State of :func:`scale_by_stddev`."""

    nu: Tree  # like the parameters, at least float32: mean of the squared gradients
    mu: Tree  # mean of the gradients


def scale_by_rms(
    decay: Number = 0.9, eps: Number = 1e-8, initial_scale: Number = 0.0, eps_in_sqrt: bool = True
) -> GradientTransformation:
    """g / sqrt(nu + eps), or g / (sqrt(nu) + eps); nu <- decay nu + (1 - decay) g^2, at first ``initial_scale``.

    Equals ``optax.scale_by_rms``; without ``eps_in_sqrt`` the direction of ``torch.optim.RMSprop`` (alpha is decay).
    Source: Tieleman and Hinton 2012, lecture 6.5.

    >>> tx = scale_by_rms()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 3.1623, -3.1623])]
    """
    return _scale_by_root("scale_by_rms", ScaleByRmsState, decay, eps, initial_scale, eps_in_sqrt)


def scale_by_stddev(
    decay: Number = 0.9, eps: Number = 1e-8, initial_scale: Number = 0.0, eps_in_sqrt: bool = True
) -> GradientTransformation:
    """:func:`scale_by_rms` with the variance nu - mu^2 instead of nu. Equals ``optax.scale_by_stddev``.

    Source: Graves 2013, eq. 38-45, arXiv:1308.0850.

    >>> tx = scale_by_stddev()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 3.3333, -3.3333])]
    """
    return _scale_by_root("scale_by_stddev", ScaleByRStdDevState, decay, eps, initial_scale, eps_in_sqrt)


def _scale_by_root(
    name: str, state_type: Any, decay: Number, eps: Number, initial_scale: Number, eps_in_sqrt: bool
) -> GradientTransformation:
    check_hyperparameters(name, decay=decay, eps=eps, initial_scale=initial_scale)

    def leaf(g: Tensor, nu: Tensor, *mu: Tensor) -> tuple[Tensor, ...]:
        nu, mu = average(g * g, nu, decay), tuple(average(g, m, decay) for m in mu)
        square = (nu - mu[0] * mu[0]).clamp(min=0) if mu else nu  # rounding may take it below
        return g / (sqrt(square + eps) if eps_in_sqrt else sqrt(square) + eps), nu, *mu

    return remember(name, state_type, lambda state: leaf, starts={"nu": lambda zero: zero + initial_scale})


class ScaleByAdaDeltaState(NamedTuple):
    """State of :func:`scale_by_adadelta`, with optax's names."""

    e_g: Tree  # like the parameters, at least float32: mean of the squared gradients
    e_x: Tree  # mean of the squared updates


def scale_by_adadelta(rho: Number = 0.9, eps: Number = 1e-6) -> GradientTransformation:
    """u = sqrt(e_x + eps) / sqrt(e_g + eps) g, e_g <- rho e_g + (1 - rho) g^2, e_x <- rho e_x + (1 - rho) u^2.

    Equals ``optax.scale_by_adadelta`` and the direction of ``torch.optim.Adadelta``.
    Source: Zeiler 2012, algorithm 1, arXiv:1212.5701.

    >>> tx = scale_by_adadelta()
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([ 0.0032, -0.0032])]
    """
    check_hyperparameters("scale_by_adadelta", rho=rho, eps=eps)

    def leaf(g: Tensor, e_g: Tensor, e_x: Tensor) -> tuple[Tensor, ...]:
        e_g = average(g * g, e_g, rho)
        update = sqrt(e_x + eps) / sqrt(e_g + eps) * g
        return update, e_g, average(update * update, e_x, rho)

    return remember("scale_by_adadelta", ScaleByAdaDeltaState, lambda state: leaf)
