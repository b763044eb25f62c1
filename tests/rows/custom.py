"""Rows: functions whose derivatives are written by hand, and solutions of equations."""

from collections.abc import Callable

import torch
from torch import Tensor
from zoo_case import Draw, Refusal, from_draw

from functorch_gen.transforms import custom_jvp, custom_linear_solve, custom_root, custom_vjp, jacfwd
from functorch_gen.typing import Tree


def value(beta: Tensor, x: Tensor) -> Tensor:
    return x * torch.sigmoid(beta * x)


def slopes(beta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(beta * x)
    return x**2 * s * (1 - s), s * (1 + beta * x * (1 - s))


@custom_vjp
def swish(beta: Tensor, x: Tensor) -> Tensor:
    return value(beta, x)


def swish_bwd(residuals: tuple[Tensor, Tensor], cotangent: Tensor) -> tuple[Tensor, Tensor]:
    of_beta, of_x = slopes(*residuals)
    return (cotangent * of_beta).sum(), cotangent * of_x


swish.defvjp(lambda beta, x: (value(beta, x), (beta, x)), swish_bwd)


@custom_jvp
def pushed_swish(beta: Tensor, x: Tensor) -> Tensor:
    return value(beta, x)


pushed_swish.defjvps(
    lambda t, out, beta, x: t * slopes(beta, x)[0],
    lambda t, out, beta, x: t * slopes(beta, x)[1],
)


def dense_solve(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    return torch.linalg.inv(jacfwd(matvec)(torch.zeros_like(b))) @ b


def linear_solve(root: Tensor, b: Tensor) -> Tensor:
    return custom_linear_solve(lambda x: root @ x + 4 * x, b, dense_solve, dense_solve)


def fixed_point(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of f(x) = tanh(...) - x, by its iteration; it contracts to rounding in 60 steps."""
    for _ in range(60):
        x = x + f(x)
    return x


def equilibrium(w: Tensor, x: Tensor) -> Tensor:
    """z = tanh(w z + x), with w scaled to a norm below one."""
    w = w / (2 + w.square().sum().sqrt())
    return custom_root(lambda z: torch.tanh(w @ z + x) - z, torch.zeros_like(x), fixed_point, dense_solve)


FORWARD = Refusal(
    "custom_vjp: can't apply forward-mode differentiation",
    "`custom_vjp` says how to pull cotangents back, not how to push tangents forward; `custom_jvp` says both "
    "(as in [JAX](https://docs.jax.dev/en/latest/_autosummary/jax.custom_vjp.html))",
)
FORWARD_COLUMNS = ["jvp", "grad(jvp)", "jacrev = jacfwd", "vmap(jvp)", "hvp(remat)"]


def inputs(d: Draw) -> tuple[Tree, ...]:
    return d(2, 2), d(2)


CASES = [
    from_draw(
        "custom_vjp",
        swish,
        lambda d: (d(), d(2, 3)),
        errors=dict.fromkeys(["vjp = jvp", *FORWARD_COLUMNS, *[f"jit({c})" for c in FORWARD_COLUMNS]], FORWARD),
    ),
    from_draw("custom_jvp", pushed_swish, lambda d: (d(), d(2, 3))),
    from_draw("custom_linear_solve", linear_solve, inputs),
    from_draw("custom_root", equilibrium, inputs),
]
