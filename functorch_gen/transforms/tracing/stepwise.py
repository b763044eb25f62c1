"""A traced graph run operation by operation: to find the first NaN, or what takes the time."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen import config, tree
from functorch_gen.transforms.tracing.sites import site_of
from functorch_gen.transforms.tracing.text import operation

__all__ = ["Clock", "runner", "timing"]

_Call = Callable[[], Any]
_Operate = Callable[[fx.Node, Any, _Call], Any]
"""Runs one operation: (node, its arguments, the call) -> the result of the call."""

_COPY = torch.ops.aten.copy_.default


class Clock:
    """Collects ``(where from, seconds)`` of each operation that runs under :func:`timing`."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    def operate(self, node: fx.Node, given: Any, call: _Call) -> Any:
        """Runs the operation of ``node``, and waits until the device has finished it."""
        start = time.perf_counter()
        result = call()
        if any(x.is_cuda for x in _tensors(result)):
            torch.cuda.synchronize()
        self.times.append((str(site_of(node) or "jit"), time.perf_counter() - start))
        return result


_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextlib.contextmanager
def timing(clock: Clock) -> Iterator[None]:
    """Jitted functions run operation by operation, timed by ``clock``."""
    token = _CLOCK.set(clock)
    try:
        yield
    finally:
        _CLOCK.reset(token)


def runner(graph: fx.GraphModule, names: Sequence[str]) -> Callable[..., Sequence[Tensor]] | None:
    """What runs ``graph`` instead of its compiled form while a debug mode is on; None if none is.

    Inputs are written to (donation) when all operations have run, so that an error leaves them as they were.

    Args:
        names: of the inputs, for messages.
    """
    clock = _CLOCK.get()
    if clock is None and not config.current().debug_nans:
        return None

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        operate = clock.operate if clock else _Check(names, inputs).operate
        return _Stepwise(graph, operate).run(*inputs)

    return run


class _Stepwise(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, operate: _Operate):
        super().__init__(graph)
        self.extra_traceback = False  # the message names the user's line itself
        self._operate = operate
        self._writes: list[Any] = []

    def run(self, *inputs: Tensor) -> Any:
        """Runs the graph, then its writes to inputs."""
        results = super().run(*inputs)
        for target, value in self._writes:
            target.copy_(value)
        return results

    def run_node(self, n: fx.Node) -> Any:
        """Each node passes here."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is _COPY:
            self._writes.append(args)
            return args[1]
        return self._operate(n, (args, kwargs), lambda: self.call_function(n.target, args, kwargs))


_FINITE, _INFINITE, _NAN = range(3)


class _Check:
    """Raises ``FloatingPointError`` at the first operation that yields NaN, or infinity from finite numbers."""

    def __init__(self, names: Sequence[str], inputs: Sequence[Tensor]):
        self._names, self._inputs = names, inputs

    def operate(self, node: fx.Node, given: Any, call: _Call) -> Any:
        """Runs the operation of ``node`` and looks at its result."""
        result = call()
        state = max((_state(x) for x in _tensors(result)), default=_FINITE)
        if state == _FINITE or _is_unset_or_view(node, given, result):
            return result
        before = max((_state(x) for x in tree.leaves(given)), default=_FINITE)
        if state == _NAN:
            raise FloatingPointError(self._message(node, "NaN", before == _NAN))
        if before == _FINITE:
            raise FloatingPointError(self._message(node, "infinity", False))
        return result

    def _message(self, node: fx.Node, what: str, was_given: bool) -> str:
        site = site_of(node)
        where = f', at {site.file}:{site.line} in {site}: "{site.source}"' if site else ""
        pairs = zip(self._names, self._inputs, strict=False)
        givers = [name for name, x in pairs if _state(x) == _NAN] if was_given else []
        told = f" (held by {' and '.join(givers)} before the call)" if givers else ""
        return f"jit: {operation(node)} yields {what}{told}{where}"


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree.leaves(value) if isinstance(x, Tensor)]


def _state(x: Any) -> int:
    if isinstance(x, float):
        return _NAN if math.isnan(x) else _INFINITE if math.isinf(x) else _FINITE
    if not isinstance(x, Tensor) or torch.isfinite(x).all():
        return _FINITE
    return _NAN if torch.isnan(x).any() else _INFINITE


def _is_unset_or_view(node: fx.Node, given: Any, result: Any) -> bool:
    """Whether the numbers are nobody's (``empty``), or were there before the operation."""
    if "empty" in operation(node):
        return True
    held = {x.untyped_storage().data_ptr() for x in _tensors(given)}
    return all(x.untyped_storage().data_ptr() in held for x in _tensors(result))
