"""First-order gradient of attention, beside that of torch's own: both through torch.autograd, uncompiled."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg
from tests.bench.steps import SETTLE
from tests.bench.table import Options, Table, attempt
from tests.bench.timing import interleave

__all__ = ["ATTENTION", "attention_times"]

Attend = Callable[..., Tensor]

SHAPES = [(8, 6, 128, 32), (2, 8, 512, 64)]
FORMS: dict[str, Attend] = {
    "fg.nn.attention": fg.nn.attention,
    "F.scaled_dot_product_attention": F.scaled_dot_product_attention,
}
ATTENTION: dict[str, dict[str, Any]] = {
    f"{shape}{', causal' if is_causal else ''}": {"shape": shape, "is_causal": is_causal}
    for shape in SHAPES
    for is_causal in (False, True)
}
"""The problems by name."""


def gradient(attend: Attend, shape: tuple[int, ...], is_causal: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward pass of one attention."""
    q, k, v, cotangent = (fg.random.normal(key, shape) for key in fg.random.split(fg.random.key(0), 4))

    def run() -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*inputs, is_causal=is_causal), inputs, cotangent)

    run()
    return run


def attention_times(options: Options, problems: dict[str, dict[str, Any]] = ATTENTION) -> Table:
    """Milliseconds of value and gradient in both forms."""
    makers = {
        f"{form}, {name}": lambda attend=attend, problem=problem: gradient(attend, **problem)
        for name, problem in problems.items()
        for form, attend in FORMS.items()
    }
    runs, failures = attempt(makers)
    return Table("s", interleave(runs, options.rounds, settle=SETTLE), failures).scaled(1e3, "ms")
