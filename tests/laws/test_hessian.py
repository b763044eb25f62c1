"""Law: second derivatives are symmetric, equal in each composition of modes, and the slope of the gradient."""

import torch
from zoo import CASES, as_vectors, differentiable, direction, over

from functorch_gen.transforms import grad, hvp


@over("hessian", [case for case in CASES if differentiable(case)])
def test_hessian_is_symmetric_and_the_slope_of_the_gradient(case):
    fun, x = as_vectors(case)
    weights = direction(fun(x), 1)
    u, v, h = direction(x, 2), direction(x, 3), 1e-5

    def scalar(x):
        return weights @ torch.sin(fun(x))

    curved = hvp(scalar, (x,), (v,))
    reverse_twice = grad(lambda x: grad(scalar)(x) @ v)(x)
    size = float(curved.abs().max())
    # The same products in another order.
    torch.testing.assert_close(curved, reverse_twice, rtol=1e-9, atol=1e-10 * size + 1e-12)
    torch.testing.assert_close(u @ curved, v @ hvp(scalar, (x,), (u,)), rtol=1e-8, atol=1e-9 * (1 + size))
    # Truncation and rounding as for the gradient, here of values up to ``size``.
    slope = (grad(scalar)(x + h * v) - grad(scalar)(x - h * v)) / (2 * h)
    torch.testing.assert_close(curved, slope, rtol=1e-5, atol=1e-6 * (1 + size))
