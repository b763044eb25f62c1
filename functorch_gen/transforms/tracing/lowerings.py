"""How Inductor generates code for the library's own operations."""

import functools
from typing import Any

import torch

from functorch_gen.random.threefry import rounds, threefry_op

__all__ = ["register_lowerings"]


@functools.cache
def register_lowerings() -> None:
    """Tells Inductor once; it is not imported before something is compiled."""
    from torch._inductor import lowering
    from torch._inductor.ir import Pointwise
    from torch._inductor.virtualized import ops

    def constant(n: int) -> Any:
        return ops.constant(n, torch.int32)

    def rotate(x: Any, r: int) -> Any:
        low = ops.bitwise_and(ops.bitwise_right_shift(x, constant(32 - r)), constant((1 << r) - 1))
        return ops.bitwise_or(ops.bitwise_left_shift(x, constant(r)), low)

    def threefry(*words: Any) -> tuple[Any, Any]:
        words = tuple(lowering.broadcast_tensors(*words))
        loaders = [word.make_loader() for word in words]

        def output(i: int) -> Any:
            def hashed(index: Any) -> Any:
                k0, k1, x0, x1 = (load(index) for load in loaders)
                return rounds(k0, k1, x0, x1, rotate, constant)[i]

            first = words[0]
            return Pointwise.create(
                device=first.get_device(), dtype=torch.int32, inner_fn=hashed, ranges=first.get_size()
            )

        return output(0), output(1)

    lowering.register_lowering(threefry_op, type_promotion_kind=None)(threefry)
