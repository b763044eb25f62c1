"""Law: the gradient is the slope of the function, by central differences along a random direction."""

import torch
from zoo import CASES, as_vectors, differentiable, direction, over

from functorch_gen.transforms import vjp


@over("gradient", [case for case in CASES if differentiable(case)])
def test_gradient_is_the_slope(case):
    fun, x = as_vectors(case)
    y, pull = vjp(fun, x)
    weights, v, h = direction(y, 1), direction(x, 2), 1e-5
    slope = weights @ (fun(x + h * v) - fun(x - h * v)) / (2 * h)
    # Truncation h^2 f''' / 6 and rounding 1e-16 |f| / h: both about 1e-10 for values near one.
    torch.testing.assert_close(pull(weights)[0] @ v, slope, rtol=1e-6, atol=1e-7)
