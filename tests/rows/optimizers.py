"""Rows: two updates of every optimizer, as a function of the parameters and both gradients."""

from functools import partial

from optim_cases import ALL, Row
from zoo_case import ALIKE, Case, from_draw

from functorch_gen import optim
from functorch_gen.typing import Tree

FULL = ("radam", "adan", "rmsprop centered", "lamb", "adafactor", "muon")
"""What the table of compositions holds; the others are like one of these, or like those in zoo.py."""


def twice(row: Row, params: Tree, first: Tree, second: Tree) -> Tree:
    tx = row(0.1)
    state = tx.init(params)
    for grads in (first, second):
        updates, state = tx.update(grads, state, params, value=2.0)
        params = optim.apply_updates(params, updates)
    return params


def case(name: str, row: Row) -> Case:
    skip = {} if name in FULL else {"table": ALIKE}
    shapes = lambda d: {"w": d(2, 2), "inner": {"b": d(2)}}
    return from_draw(f"optim.{name}", partial(twice, row), lambda d: (shapes(d), shapes(d), shapes(d)), **skip)


CASES = [case(name, row) for name, row in ALL.items() if name not in ("sgd", "adam", "adamw")]
