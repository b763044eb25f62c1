"""Rows of control flow: branches, loops, and one inside the other."""

import torch
from torch import Tensor
from zoo_case import Draw, from_draw

from functorch_gen import random
from functorch_gen.transforms import associative_scan, cond, fori_loop, map, remat, scan, while_loop
from functorch_gen.typing import Tree


def weights(draw: Draw) -> Tree:
    return {"w": draw(3, 3), "b": draw(3)}


def chosen(params: Tree, x: Tensor) -> Tree:
    """A choice by value, inside one branch of another; closes over parameters."""

    def linear(x: Tensor) -> Tensor:
        return cond(x[0] > 0, lambda: x @ params["w"], lambda: x * params["b"])

    return cond(x.sum() > 0, linear, lambda x: torch.sin(linear(x)) + params["b"], x)


def switching(h: Tensor, xs: Tensor) -> Tree:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = cond(x[0] > 0, remat(lambda h: torch.tanh(h * x)), lambda h: h.sin() + x, h)
        return new, new * h

    return scan(step, h, xs)


def looping_or_not(h: Tensor, xs: Tensor) -> Tensor:
    def looped(h: Tensor) -> Tensor:
        return scan(lambda h, x: (torch.sin(h + x), None), h, xs)[0]

    return cond(h.sum() > 0, looped, lambda h: h * xs.sum(0), h)


def power(x: Tensor) -> Tensor:
    return fori_loop(1, 4, lambda i, total: total * torch.sin(x) + i * x, x)


def mapped(w: Tensor, xs: Tensor) -> Tree:
    return map(lambda x: {"y": torch.tanh(x @ w)}, xs, batch_size=2)


def affine(first: Tree, second: Tree) -> Tree:
    return {"a": second["a"] * first["a"], "b": second["a"] * first["b"] + second["b"]}


def rejection(scale: Tensor, key: Tensor) -> Tensor:
    """Draws until a number is greater than 1/2; the loop does not depend on what is differentiated."""

    def draw(carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        key, now = random.split(carry[0])
        return key, random.normal(now, (), scale.dtype)

    _, sample = while_loop(lambda c: c[1] < 0.5, draw, (key, torch.zeros((), dtype=scale.dtype)))
    return (scale * sample).sin()


CASES = [
    from_draw("cond", chosen, lambda d: (weights(d), d(3))),
    from_draw("cond in scan", switching, lambda d: (d(2), d(3, 2))),
    from_draw("scan in cond", looping_or_not, lambda d: (d(2), d(3, 2))),
    from_draw("fori_loop", power, lambda d: (d(3),)),
    from_draw("map in chunks", mapped, lambda d: (d(2, 2), d(3, 2))),
    from_draw("associative_scan", lambda e: associative_scan(affine, e), lambda d: ({"a": d(5), "b": d(5)},)),
    from_draw("while_loop, a sampler", rejection, lambda d: (d(3), d.key())),
]
