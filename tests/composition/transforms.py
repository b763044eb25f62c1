"""Compositions of transforms, each with a reference that takes another way.

A program and its reference are functions of a problem and a point, or a batch of points. First derivatives and
the slopes of gradients are compared with central differences; batches with loops; Jacobians and Hessians with one
vjp or jvp after another; what changes no value (remat, scan, jit, torch.compile) with the program without it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from composition.problem import INPUTS, OUTPUTS, Data, Point, Problem
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms import (
    grad,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    remat,
    scan,
    value_and_grad,
    vjp,
    vmap,
)
from functorch_gen.typing import Tree

__all__ = ["COMPOSITIONS", "DIFFERENCE", "ROUNDING", "Composition"]

Program = Callable[[Problem, Point], Tree]

# Central differences of fourth order err by h^4 / 30 = 3e-18 times the fifth derivative, and by 1e-16 / h = 1e-12 of
# rounding times condition numbers; the rest is allowance for these. Measured: up to 1e-9.
STEP, DIFFERENCE = 1e-4, 1e-7
# The same sums in another order, in float64.
ROUNDING = 1e-10

LOOP = "a Python loop"


@dataclass(frozen=True)
class Composition:
    """``program(problem, at)`` must equal ``reference(problem, at)``; ``at`` is a batch of points if ``batched``."""

    name: str
    program: Program
    reference: Program
    against: str  # what the reference is, in words
    tolerance: float = ROUNDING
    batched: bool = False

    def __str__(self) -> str:
        return self.name

    def at(self, problem: Problem, seed: int) -> Point:
        """The arguments, drawn anew for each seed."""
        return problem.points(seed) if self.batched else problem.point(seed)


def slope(fun: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> Tensor:
    """The derivative of ``fun`` at ``z`` along ``v``, by central differences."""
    near, far = fun(z + STEP * v) - fun(z - STEP * v), fun(z + 2 * STEP * v) - fun(z - 2 * STEP * v)
    return (8 * near - far) / (12 * STEP)


def axes(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def each(at: Point) -> list[Point]:
    """A batch of points, one by one."""
    return tree.unstack(at)


def loop(program: Program) -> Program:
    """The program of single points, one after another."""
    return lambda problem, at: tree.stack([program(problem, one) for one in each(at)])


def batch(program: Program) -> Program:
    return lambda problem, at: vmap(lambda one: program(problem, one))(at)


# First derivatives.


def values(problem: Problem, at: Point) -> Tensor:
    return problem.vector(at.z, at.data)


def gradient(problem: Problem, at: Point) -> Tensor:
    return grad(problem.scalar)(at.z, at.data)


def slopes(problem: Problem, at: Point) -> Tensor:
    return torch.stack([slope(lambda z: problem.scalar(z, at.data), at.z, e) for e in axes(INPUTS)])


def pushed(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    return jvp(lambda z: problem.vector(z, at.data), (at.z,), (at.v,))


def value_and_slope(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    return values(problem, at), slope(lambda z: problem.vector(z, at.data), at.z, at.v)


def pulled(problem: Problem, at: Point) -> Tensor:
    return vjp(lambda z: problem.vector(z, at.data), at.z)[1](at.w)[0]


def inner_of_pulled(problem: Problem, at: Point) -> Tensor:
    return pulled(problem, at) @ at.v


def inner_of_pushed(problem: Problem, at: Point) -> Tensor:
    return at.w @ pushed(problem, at)[1]


# Second derivatives.


def gradient_of_gradient(problem: Problem, at: Point) -> Tensor:
    return grad(lambda z: grad(problem.scalar)(z, at.data) @ at.v)(at.z)


def curvature(problem: Problem, at: Point) -> Tensor:
    return hvp(lambda z: problem.scalar(z, at.data), (at.z,), (at.v,))


def slope_of_gradient(problem: Problem, at: Point) -> Tensor:
    return slope(lambda z: grad(problem.scalar)(z, at.data), at.z, at.v)


def gradient_of_pushed(problem: Problem, at: Point) -> Tensor:
    return grad(lambda z: at.w @ pushed(problem, at._replace(z=z))[1])(at.z)


def gradient_of_pulled(problem: Problem, at: Point) -> Tensor:
    return grad(lambda z: pulled(problem, at._replace(z=z)) @ at.v)(at.z)


# Matrices.


def jacobians(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    return jacrev(problem.vector)(at.z, at.data), jacfwd(problem.vector)(at.z, at.data)


def by_rows(problem: Problem, at: Point) -> Tensor:
    return torch.stack([pulled(problem, at._replace(w=e)) for e in axes(OUTPUTS)])


def by_columns_and_rows(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    columns = [pushed(problem, at._replace(v=e))[1] for e in axes(INPUTS)]
    return torch.stack(columns, 1), by_rows(problem, at)


def hessians(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    matrix = hessian(problem.scalar)(at.z, at.data)
    return matrix, matrix.T


def twice_by_rows(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    rows = torch.stack([gradient_of_gradient(problem, at._replace(v=e)) for e in axes(INPUTS)])
    return rows, rows


# Batches. One z for the whole batch is the parameters of a network; a batch of them, an ensemble.


def gradient_of_batch(problem: Problem, at: Point) -> Tensor:
    return grad(lambda z: vmap(problem.scalar, in_dims=(None, 0))(z, at.data).mean())(at.z[0])


def mean_of_gradients(problem: Problem, at: Point) -> Tensor:
    return torch.stack([gradient(problem, one._replace(z=at.z[0])) for one in each(at)]).mean(0)


def jacobian_of_batch(problem: Problem, at: Point) -> Tensor:
    return jacrev(lambda z: vmap(problem.vector, in_dims=(None, 0))(z, at.data))(at.z[0])


def rows_of_each(problem: Problem, at: Point) -> Tensor:
    return torch.stack([by_rows(problem, one._replace(z=at.z[0])) for one in each(at)])


def gradients_of_ensemble(problem: Problem, at: Point) -> Tensor:
    return vmap(vmap(grad(problem.scalar), in_dims=(None, 0)), in_dims=(0, None))(at.z, at.data)


def loop_of_loops(problem: Problem, at: Point) -> Tensor:
    return torch.stack([loop(gradient)(problem, at._replace(z=z.expand_as(at.z))) for z in at.z])


# Rematerialisation and loops.


def gradient_of_remat(problem: Problem, at: Point) -> Tensor:
    return grad(remat(problem.scalar))(at.z, at.data)


def curvature_of_remat(problem: Problem, at: Point) -> Tensor:
    return hvp(remat(lambda z: problem.scalar(z, at.data)), (at.z,), (at.v,))


def descend(problem: Problem, z: Tensor, data: Data) -> tuple[Tensor, Tensor]:
    """A step of gradient descent: the new z, and the loss before."""
    loss, slopes = value_and_grad(problem.scalar)(z, data)
    return z - 0.1 * slopes, loss


def scan_of_gradients(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    return scan(lambda z, data: descend(problem, z, data), at.z[0], at.data)


def loop_of_gradients(problem: Problem, at: Point) -> tuple[Tensor, Tensor]:
    z, losses = at.z[0], []
    for one in each(at):
        z, loss = descend(problem, z, one.data)
        losses.append(loss)
    return z, torch.stack(losses)


def gradient_of_scan(problem: Problem, at: Point) -> Tensor:
    def outer(z: Tensor) -> Tensor:
        last, losses = scan(remat(lambda z, data: descend(problem, z, data)), z, at.data)
        return losses.sum() + last.square().sum()

    return grad(outer)(at.z[0])


def gradient_of_loop(problem: Problem, at: Point) -> Tensor:
    def outer(z: Tensor) -> Tensor:
        last, losses = loop_of_gradients(problem, at._replace(z=z.expand_as(at.z)))
        return losses.sum() + last.square().sum()

    return grad(outer)(at.z[0])


COMPOSITIONS = [
    Composition("grad", gradient, slopes, "central differences", DIFFERENCE),
    Composition("jvp", pushed, value_and_slope, "central differences", DIFFERENCE),
    Composition("vjp = jvp", inner_of_pulled, inner_of_pushed, "the inner product of the other mode"),
    Composition("grad(grad)", gradient_of_gradient, slope_of_gradient, "central differences of `grad`", DIFFERENCE),
    Composition("hvp", curvature, slope_of_gradient, "central differences of `grad`", DIFFERENCE),
    Composition("grad(jvp)", gradient_of_pushed, gradient_of_pulled, "`grad` of the inner product with `vjp`"),
    Composition("jacrev = jacfwd", jacobians, by_columns_and_rows, "a loop of `jvp`, and a loop of `vjp`"),
    Composition("hessian", hessians, twice_by_rows, "a loop of `grad(grad)`, for the matrix and its transpose"),
    Composition("vmap", batch(values), loop(values), LOOP, batched=True),
    Composition("vmap(grad)", batch(gradient), loop(gradient), LOOP, batched=True),
    Composition("vmap(jvp)", batch(pushed), loop(pushed), LOOP, batched=True),
    Composition("vmap(hvp)", batch(curvature), loop(curvature), LOOP, batched=True),
    Composition("vmap(hessian)", batch(hessians), loop(twice_by_rows), "a loop of loops of `grad(grad)`", batched=True),
    Composition("vmap(vmap(grad))", gradients_of_ensemble, loop_of_loops, "a loop of loops", batched=True),
    Composition("grad(vmap)", gradient_of_batch, mean_of_gradients, "the mean of a loop of `grad`", batched=True),
    Composition("jacrev(vmap)", jacobian_of_batch, rows_of_each, "a loop of loops of `vjp`", batched=True),
    Composition("grad(remat)", gradient_of_remat, gradient, "without `remat`"),
    Composition("hvp(remat)", curvature_of_remat, gradient_of_gradient, "`grad(grad)` without `remat`"),
    Composition("scan(grad)", scan_of_gradients, loop_of_gradients, LOOP, batched=True),
    Composition("grad(scan(remat(grad)))", gradient_of_scan, gradient_of_loop, "`grad` of a loop", batched=True),
]
