"""Which products a program leaves to one thread, and what it leaves behind."""

import pytest
import torch

import functorch_gen as fg
from functorch_gen.transforms.tracing import matmul
from functorch_gen.transforms.tracing.trace import trace


def power(x, w):
    return fg.scan(lambda h, _: (h @ w, None), x, length=3)[0]


PROGRAMS = {
    "small": (lambda x, w: torch.tanh(x @ w), (8, 32), (32, 4), True),
    "square of one": (lambda x, w: x @ x, (32, 32), (1,), True),
    "batched": (lambda x, w: torch.bmm(x, w), (4, 8, 8), (4, 8, 8), True),
    "large": (lambda x, w: x @ w, (128, 128), (128, 128), False),
    "one large": (lambda x, w: (x @ w) @ (w.mT @ x.mT), (8, 64), (64, 512), False),
    "in a loop": (lambda x, w: fg.scan(lambda h, _: (h @ w, None), x, length=3)[0], (8, 32), (32, 32), True),
    "large in a loop": (
        lambda x, w: fg.scan(lambda h, _: (h @ w, None), x, length=3)[0],
        (128, 128),
        (128, 128),
        False,
    ),
    "none": (lambda x, w: x + w, (3,), (3,), False),
    "decomposition": (lambda x, w: torch.linalg.solve(x @ w, w), (3, 3), (3, 3), False),
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_programs_of_small_products_are_told_apart(name):
    fun, x, w, expected = PROGRAMS[name]
    assert matmul.has_small_products(trace(fun, [torch.ones(x), torch.ones(w)]).graph) is expected


@pytest.mark.skipif(matmul._mkl_threads() is None, reason="this torch has no MKL to tell how many threads to take")
def test_the_caller_keeps_its_threads():
    """After a program of small products, and after one that fails."""
    small, set_threads = fg.jit(lambda x, w: torch.tanh(x @ w)), matmul._mkl_threads()
    x, w = torch.randn(8, 4), torch.randn(4, 4)
    torch.testing.assert_close(small(x, w), torch.tanh(x @ w))
    program = next(iter(small._programs.values()))
    assert program.executable.one_thread
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small(x, w)
        assert set_threads(2) == 2
        with pytest.raises(TypeError):
            program.executable.load()(x)
        assert set_threads(2) == 2
    finally:
        torch.set_num_threads(before)
