"""Functions of two numbers that are hard to descend. For the optimizer race."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


def rosenbrock(p: Tensor) -> Tensor:
    """(2,) -> (): a bent valley, least at (1, 1). Rosenbrock 1960."""
    return (1 - p[0]).square() + 100 * (p[1] - p[0].square()).square()


def beale(p: Tensor) -> Tensor:
    """(2,) -> (): flat, with sharp corners, least at (3, 0.5). Beale 1958."""
    terms = [(c - p[0] + p[0] * p[1] ** k).square() for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
    return terms[0] + terms[1] + terms[2]


class Surface(NamedTuple):
    """A function of two numbers and what of it to draw."""

    fun: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]


SURFACES = {
    "Rosenbrock": Surface(rosenbrock, (-1.2, 1.0), (1.0, 1.0), (-2.0, 2.0), (-1.0, 3.0)),
    "Beale": Surface(beale, (1.0, 1.6), (3.0, 0.5), (-1.0, 4.5), (-2.0, 2.5)),
}
