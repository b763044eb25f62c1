"""The names of axes that collectives run over: examples of a vmap, or processes.

An axis is known by its index, a 0-d tensor that differs from example to example. Where a body is run anew under other
transforms (remat, the loop of a compiled scan), the index goes with it as an input like any other; so a name means the
same examples there, though functorch has given their axis another level.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Axis",
    "AxisName",
    "bound_axes",
    "call_with_axes",
    "carry_axes",
    "check_axis_name",
    "find_axes",
    "process_axis",
    "process_groups",
]

AxisName = str | tuple[str, ...]
"""One name, or several whose axes are taken together."""


class Axis(NamedTuple):
    """What a name stands for."""

    index: Tensor  # (), int64: this example's, this process's
    size: int
    group: str = ""  # of processes; empty: the examples of a vmap


class _Bound(threading.local):  # not a ContextVar, which Dynamo cannot read
    def __init__(self) -> None:
        self.axes: Mapping[str, Axis] = {}  # replaced as a whole, never changed


_bound = _Bound()


def bound_axes() -> dict[str, Axis]:
    """The axes that have a name here, outermost first."""
    return dict(_bound.axes)


def process_groups() -> tuple[tuple[str, str], ...]:
    """The names bound to processes and their groups: a traced program holds for these alone."""
    return tuple((name, axis.group) for name, axis in _bound.axes.items() if axis.group)


def call_with_axes(axes: Mapping[str, Axis], fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``fun(*args, **kwargs)``, in which ``axes`` have a name besides those that are bound here."""
    before = _bound.axes
    _bound.axes = {**before, **axes}
    try:
        return fun(*args, **kwargs)
    finally:
        _bound.axes = before


def carry_axes(
    tensors: Sequence[Tensor], rebuild: Callable[[Sequence[Tensor]], Callable[..., Any]]
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Callable[..., Any]]]:
    """A closure, as its tensors and how to rebuild it from others, that carries the axes bound here.

    Their indices become tensors of the closure, and what is rebuilt binds the names to those it is given.
    """
    axes = bound_axes()
    count = len(tensors)

    def with_axes(given: Sequence[Tensor]) -> Callable[..., Any]:
        indices = zip(axes.items(), given[count:], strict=True)
        moved = {name: axis._replace(index=index) for (name, axis), index in indices}
        return functools.partial(call_with_axes, moved, rebuild(given[:count]))

    return [*tensors, *[axis.index for axis in axes.values()]], with_axes if axes else rebuild


def check_axis_name(name: str, axis_name: object) -> None:
    """Raises ``TypeError`` unless ``axis_name`` is a string."""
    if not isinstance(axis_name, str):
        raise TypeError(f"{name}: expected axis_name to be a string, got {type(axis_name).__name__}")


def find_axes(name: str, axis_name: AxisName) -> list[Axis]:
    """The axes of one name or a tuple of names, for the collective ``name``.

    Raises:
        NameError: if one is not bound; lists those that are.
        TypeError: if a name is no string.
        ValueError: if the tuple is empty.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names:
        raise ValueError(f"{name}: expected at least one axis name, got ()")
    found: list[Axis] = []
    for word in names:
        check_axis_name(name, word)
        if word not in _bound.axes:
            bound = ", ".join(repr(other) for other in _bound.axes) or "none"
            raise NameError(f"{name}: expected a name that vmap or process_axis binds here ({bound}), got {word!r}")
        found.append(_bound.axes[word])
    return found


@contextlib.contextmanager
def process_axis(name: str, group: "dist.ProcessGroup | None" = None) -> Iterator[None]:
    """Within it, collectives over ``name`` run over the processes of ``group``, one example on each.

    A function that names the axis of a ``vmap`` so becomes one that runs on many processes: with
    ``pmean(gradient, "data")`` a training step is data parallel. Derivatives, ``vmap`` and :func:`jit` pass through.
    Each process must run the same collectives in the same order; ``jit(backend="tiered")``, which changes programs when
    the compiler is ready, does not promise that.

    Args:
        name: the name of the axis, for the thread that enters.
        group: None: all processes.
    Raises:
        RuntimeError: if ``torch.distributed.init_process_group`` has not been called.
        ValueError: if this process is not of the group.

    >>> import tempfile
    >>> from functorch_gen.transforms import psum
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
    >>> with process_axis("data"):
    ...     psum(torch.tensor(2.0), "data")
    tensor(2.)
    >>> dist.destroy_process_group()
    """
    check_axis_name("process_axis", name)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("process_axis: expected torch.distributed.init_process_group to have been called")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"process_axis: expected a group that holds this process, got {group!r}")
    before = _bound.axes
    axis = Axis(torch.tensor(group.rank()), group.size(), group.group_name)
    _bound.axes = {**before, name: axis}
    try:
        yield
    finally:
        _bound.axes = before
