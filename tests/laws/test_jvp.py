"""Law: forward and reverse mode are adjoint, <w, J v> = <J^T w, v>."""

import torch
from zoo import CASES, as_vectors, differentiable, direction, over

from functorch_gen.transforms import jvp, vjp


@over("jvp", [case for case in CASES if differentiable(case)])
def test_jvp_is_adjoint_to_vjp(case):
    fun, x = as_vectors(case)
    v = direction(x, 2)
    y, pushed = jvp(fun, (x,), (v,))
    weights = direction(y, 1)
    pulled = vjp(fun, x)[1](weights)[0]
    scale = float((weights * pushed).abs().sum() + (pulled * v).abs().sum())
    # Two sums of the same products: some ulp of the sum of their magnitudes.
    torch.testing.assert_close(weights @ pushed, pulled @ v, rtol=0, atol=1e-11 * scale + 1e-14)
