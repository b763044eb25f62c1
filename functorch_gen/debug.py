"""Looking into functions: printing and calling back from jitted code, and the time its functions take.

For NaNs: ``fg.config.update(debug_nans=True)``.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from functorch_gen import config, tree
from functorch_gen.transforms.effects import call
from functorch_gen.transforms.tracing.api import Jitted
from functorch_gen.transforms.tracing.stepwise import Clock, timing
from functorch_gen.transforms.tracing.text import columns

__all__ = ["FunctionTime", "Profile", "callback", "print", "profile"]


def callback(f: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Calls ``f(*args, **kwargs)`` for its side effect each time the program comes here, jitted or not.

    ``f`` sees tensors with values and without history, in the structure it is given. Calls keep their order, under
    ``jit`` too. Under ``vmap`` there is one for each example; in a backward pass there is none, and what :func:`remat`
    computes again calls again, as does the first step of a jitted :func:`scan`. An exception of ``f`` ends the call;
    Inductor may have written over donated arguments then. Plain ``torch.compile`` may leave the call out.

    Raises:
        TypeError: if ``f`` is not a function.

    >>> import torch
    >>> from functorch_gen.transforms import jit
    >>> seen = []
    >>> def f(x):
    ...     callback(seen.append, x.sum())
    ...     return 2 * x
    >>> jit(f, backend="aten")(torch.ones(3)), seen
    (tensor([2., 2., 2.]), [tensor(3.)])
    """
    if not callable(f):
        raise TypeError(f"callback: expected f to be a function, got {type(f).__name__}")
    leaves, treedef = tree.flatten((args, kwargs))

    def function(values: list[Any]) -> None:
        positional, named = tree.unflatten(treedef, values)
        f(*positional, **named)

    call(function, leaves)


def print(text: str, *args: Any, **kwargs: Any) -> None:
    """Writes ``text.format(*args, **kwargs)`` on a line each time the program comes here, as :func:`callback` calls.

    The lines go to standard output, or to ``fg.config``'s ``debug_sink``.

    Raises:
        TypeError: if ``text`` is not a string.

    Source: ``jax.debug.print``.

    >>> import torch
    >>> from functorch_gen.transforms import jit
    >>> def f(x):
    ...     print("x = {}, mean = {mean:.2f}", x, mean=x.mean())
    ...     return 2 * x
    >>> y = jit(f, backend="aten")(torch.ones(3))
    x = tensor([1., 1., 1.]), mean = 1.00
    """
    if not isinstance(text, str):
        raise TypeError(f"debug.print: expected text to be a string with places {{}}, got {type(text).__name__}")
    callback(lambda *values, **named: _write(text.format(*values, **named)), *args, **kwargs)


def _write(line: str) -> None:
    sink = config.current().debug_sink
    if sink is not None:
        sink(line)
    else:
        stream = sys.stdout  # as it is now: notebooks and tests put others in its place
        stream.write(f"{line}\n")


class FunctionTime(NamedTuple):
    """The time one function takes: of the operations that come from its own lines."""

    ops: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    r"""What :func:`profile` measures; ``str(profile)`` is a table, the slowest function first.

    >>> str(Profile({"loss": FunctionTime(ops=2, seconds=0.001)}))
    'function  ops     ms      %\nloss        2  1.000  100.0\ntotal       2  1.000  100.0'
    """

    functions: dict[str, FunctionTime]

    @property
    def seconds(self) -> float:
        """The time of all operations."""
        return sum(row.seconds for row in self.functions.values())

    def __str__(self) -> str:
        rows = sorted(self.functions.items(), key=lambda item: -item[1].seconds)
        total = self.seconds or 1.0
        body = [(name, str(ops), f"{1e3 * t:.3f}", f"{100 * t / total:.1f}") for name, (ops, t) in rows]
        all_ops = sum(row.ops for row in self.functions.values())
        last = ("total", str(all_ops), f"{1e3 * self.seconds:.3f}", "100.0")
        return columns([("function", "ops", "ms", "%"), *body, last])


def profile(fun: Jitted, *args: Any, repeats: int = 3, **kwargs: Any) -> Profile:
    """The time ``fun(*args, **kwargs)`` spends in each function, its backward pass apart.

    The traced graph runs operation by operation, on copies of the tensors (donated ones stay whole): nothing is fused,
    and each operation pays for its own call, so the sum is more than the compiled program takes. An operation's time is
    the median over ``repeats`` runs after one that is not counted.

    Raises:
        TypeError: if ``fun`` is not what ``jit`` returns.
        ValueError: if ``repeats`` is not positive; if ``jit`` would call the function itself (inside a transform, or
            where an input requires grad).

    >>> import torch
    >>> from functorch_gen.transforms import jit
    >>> step = jit(lambda x: (x @ x).sin())
    >>> sum(row.ops for row in profile(step, torch.ones(8, 8)).functions.values())
    2
    """
    if not isinstance(fun, Jitted):
        raise TypeError(f"profile: expected a function from jit, got {type(fun).__name__}")
    if repeats < 1:
        raise ValueError(f"profile: expected repeats > 0, got {repeats}")
    runs = [_time(fun, args, kwargs) for _ in range(repeats + 1)][1:]
    functions: dict[str, FunctionTime] = {}
    for same in zip(*runs, strict=True):
        name = same[0][0]
        ops, seconds = functions.get(name, FunctionTime(0, 0.0))
        functions[name] = FunctionTime(ops + 1, seconds + statistics.median(t for _, t in same))
    if not functions:
        raise ValueError("profile: expected a call that is compiled, got one that jit leaves to the function itself")
    return Profile(functions)


def _time(fun: Jitted, args: Any, kwargs: Any) -> list[tuple[str, float]]:
    args, kwargs = tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    clock = Clock()
    with timing(clock):
        fun(*args, **kwargs)
    return clock.times
