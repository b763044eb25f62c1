"""A scan's gradient beside one written by hand, and the time to build programs of few and of many steps."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import tree
from tests.bench.memory import peak_bytes

__all__ = ["build_seconds", "gradient_peaks", "hand_written_gradient", "problem", "scan_gradient"]

LENGTH, BATCH_SIZE, WIDTH = 256, 64, 128

Step = Callable[[Any, Tensor, Tensor], Tensor]


def cell(params: Any, h: Tensor, x: Tensor) -> Tensor:
    """Two layers and a residual: (b, d), (b, d) -> (b, d)."""
    return h + torch.tanh(torch.tanh(h @ params["up"] + x) @ params["down"])


def problem(length: int = LENGTH, batch_size: int = BATCH_SIZE, width: int = WIDTH) -> tuple[Any, Tensor, Tensor]:
    """Parameters, the first carry, and the inputs (length, b, d)."""
    keys = fg.random.split(fg.random.key(0), 3)
    params = {
        name: fg.random.normal(key, (width, width)) / (8 * width) ** 0.5
        for name, key in zip(("up", "down"), keys, strict=False)
    }
    return params, torch.zeros(batch_size, width), 0.1 * fg.random.normal(keys[2], (length, batch_size, width))


def scan_gradient(params: Any, h: Tensor, xs: Tensor) -> tuple[Any, Tensor]:
    """Of the last carry's mean square, by parameters and inputs."""

    def loss(params: Any, xs: Tensor) -> Tensor:
        return fg.scan(lambda h, x: (cell(params, h, x), None), h, xs)[0].square().mean()

    return fg.grad(loss, (0, 1))(params, xs)


def hand_written_gradient(params: Any, h: Tensor, xs: Tensor) -> tuple[Any, Tensor]:
    """The same: a loop that keeps the carries, and one back that runs each step again."""
    carries = []
    for x in xs:
        carries.append(h)
        h = cell(params, h, x)
    of_h, of_params, of_xs = 2 * h / h.numel(), tree.zeros_like(params), torch.empty_like(xs)
    for i in reversed(range(len(xs))):
        leaves = [x.detach().requires_grad_() for x in (carries.pop(), xs[i], *tree.leaves(params))]
        new = cell(tree.unflatten(tree.structure(params), leaves[2:]), *leaves[:2])
        of_h, of_xs[i], *rest = torch.autograd.grad(new, leaves, of_h)
        of_params = tree.add(of_params, tree.unflatten(tree.structure(params), rest))
    return of_params, of_xs


def gradient_peaks(backend: str = "inductor", **sizes: int) -> dict[str, int]:
    """Peak bytes beside the arguments."""
    arguments, jitted = problem(**sizes), fg.jit(scan_gradient, backend=backend)
    peaks = {}
    for name, gradient in {"fg.scan": jitted, "by hand": hand_written_gradient}.items():
        gradient(*arguments)
        peaks[name] = peak_bytes(lambda gradient=gradient: gradient(*arguments))
    return peaks


def build_seconds(length: int, backend: str = "inductor", **sizes: int) -> float:
    """Time to trace and compile the gradient for so many steps."""
    arguments, jitted = problem(length, **sizes), fg.jit(scan_gradient, backend=backend)
    start = time.perf_counter()
    jitted.lower(*arguments).compile()
    return time.perf_counter() - start
