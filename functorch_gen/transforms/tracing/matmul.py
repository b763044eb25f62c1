"""Matrix products by the faster of the two libraries that torch links."""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import fx

from functorch_gen.transforms.tracing.graph import value

__all__ = ["LINEAR", "as_linear"]

_aten: Any = torch.ops.aten

LINEAR = ("mkldnn", "_linear_pointwise", "default")
"""oneDNN's ``x w^T + b``."""

_WORTH = 16e6
"""Floating-point operations from which the call's own cost, ten microseconds more than MKL's, is made up for."""


def as_linear(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """``(x, m, bias)`` if the node is a product x m (+ bias) that oneDNN should do; None if it should stay.

    On processors that are not Intel's, MKL keeps to 256-bit vectors, which halves its speed where there are 512.
    """
    if node.target is _aten.mm.default:
        x, m, bias = *node.args, None
    elif node.target is _aten.addmm.default and not node.kwargs:
        bias, x, m = node.args
        if value(bias).shape != value(m).shape[1:]:  # type: ignore[arg-type]
            return None
    else:
        return None
    if value(x).dtype != torch.float32 or not _has_faster_library():  # type: ignore[arg-type]
        return None
    flops = 2 * math.prod(value(x).shape) * value(m).shape[1]  # type: ignore[arg-type]
    return (x, m, bias) if flops >= _WORTH else None  # type: ignore[return-value]


@functools.cache
def _has_faster_library() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "GenuineIntel" in cpuinfo.read_text():
        return False
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_op and torch.backends.mkl.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
