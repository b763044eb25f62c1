"""Matrix products by the faster of the two libraries that torch links."""

import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from functorch_gen.transforms.tracing.graph import value

__all__ = ["LINEAR", "as_linear", "has_small_products", "on_one_thread"]

_aten: Any = torch.ops.aten

LINEAR = ("mkldnn", "_linear_pointwise", "default")
"""oneDNN's ``x w^T + b``."""

_WORTH = 16e6
"""Floating-point operations from which the call's own cost, ten microseconds more than MKL's, is made up for."""

_SMALL = 2.5e5
"""Floating-point operations up to which MKL loses more time with a second thread than it wins."""

_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}

_LIBRARY = "libtorch_cpu.so"


def as_linear(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """``(x, m, bias)`` if the node is a product x m (+ bias) that oneDNN should do; None if it should stay.

    On processors that are not Intel's, MKL keeps to 256-bit vectors, which halves its speed where there are 512.
    """
    args: Any = node.args
    if node.target is _aten.mm.default:
        x, m, bias = *args, None
    elif node.target is _aten.addmm.default and not node.kwargs:
        bias, x, m = args
        if value(bias).shape != value(m).shape[1:]:
            return None
    else:
        return None
    if value(x).dtype != torch.float32 or not _has_faster_library():
        return None
    flops = 2 * math.prod(value(x).shape) * value(m).shape[1]
    return (x, m, bias) if flops >= _WORTH else None


@functools.cache
def _has_faster_library() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "GenuineIntel" in cpuinfo.read_text():
        return False
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_op and torch.backends.mkl.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def has_small_products(module: fx.GraphModule) -> bool:
    """Whether the graph, with those inside it, has products, none that deserves a second thread, nor other algebra."""
    products = 0
    for node in _calls(module):
        name = getattr(node.target, "name", str)()
        if node.target in _PRODUCTS:
            args: Any = node.args
            x, m = (value(n) for n in args[-2:])
            if 2 * x.numel() * m.shape[-1] > _SMALL:
                return False
            products += 1
        elif name.startswith(_ALGEBRA):
            return False
    return products > 0


_ALGEBRA = tuple(f"aten::{name}" for name in ("_linalg", "linalg", "_fft", "cholesky", "lu_", "triangular", "ormqr"))


def _calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    for graph in (part.graph for part in module.modules() if isinstance(part, fx.GraphModule)):
        yield from (node for node in graph.nodes if node.op == "call_function")


def on_one_thread(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with MKL on the calling thread alone; as it is where MKL cannot be told."""
    set_threads = _mkl_threads()
    if set_threads is None:
        return run

    def alone(*inputs: Any) -> Any:
        before = set_threads(1)
        try:
            return run(*inputs)
        finally:
            set_threads(before)

    return alone


@functools.cache
def _mkl_threads() -> Callable[[int], int] | None:
    """Sets how many threads MKL takes when this thread asks, as ``torch.set_num_threads`` does; returns what it was."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY)).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # another system, or a torch without MKL
        return None
