"""optimization_barrier: an identity that no compiler sees through.

The operator carries its own derivative rules, on the dispatcher's autograd key rather than as an
``autograd.Function``: so it is one node under functorch, make_fx, Dynamo and Inductor alike, to any order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from functorch_gen import tree
from functorch_gen.transforms.context import is_differentiable
from functorch_gen.typing import Tree

__all__ = ["barrier_op", "optimization_barrier"]

_LIBRARY = torch.library.Library("functorch_gen", "FRAGMENT")
_LIBRARY.define(
    "barrier(Tensor[] xs, Tensor[] after) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
barrier_op: Any = torch.ops.functorch_gen.barrier.default
"""barrier(xs, after): copies of ``xs``, made when ``after`` has been computed."""

_LIBRARY.impl("barrier", lambda xs, after: [x.clone() for x in xs], "CompositeExplicitAutograd")
torch.library.register_fake("functorch_gen::barrier", lambda xs, after: [torch.empty_like(x) for x in xs], lib=_LIBRARY)
torch.library.register_vmap(
    "functorch_gen::barrier", lambda info, dims, xs, after: (barrier_op(xs, after), list(dims[0])), lib=_LIBRARY
)


def _through(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """A barrier on the tangents or cotangents that exist."""
    passed = iter(barrier_op([t for t in tensors if t is not None], []))
    return tuple(None if t is None else next(passed) for t in tensors)


class _Barrier(_SingleLevelFunction):  # not a Function: functorch would handle all levels at once
    """The derivative rule within one functorch level; the levels below see the operator again."""

    @staticmethod
    def forward(ctx: Any, keys: Any, modes: tuple[bool, bool], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.count, ctx.rest = count, len(tensors) - count
        ctx.set_materialize_grads(False)
        # apply() has switched differentiation off, but the levels below need the caller's modes
        with torch.set_grad_enabled(modes[0]), _set_fwd_grad_enabled(modes[1]), _C._AutoDispatchBelowAutograd():
            below = keys & _C._after_autograd_keyset
            out = tuple(barrier_op.redispatch(below, list(tensors[:count]), list(tensors[count:])))
        ctx.mark_non_differentiable(*[x for x in out if not is_differentiable(x)])
        ctx.likes = [(x.shape, x.dtype, x.device) if is_differentiable(x) else None for x in out]
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return (None, None, None, *_through(cotangents), *[None] * ctx.rest)

    @staticmethod
    def jvp(ctx: Any, _keys: None, _modes: None, _count: None, *tangents: Tensor | None) -> Any:
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward mode over forward mode
            moved = _through(tangents[: ctx.count])
        return tuple(
            torch.zeros(like[0], dtype=like[1], device=like[2]) if t is None and like else t
            for t, like in zip(moved, ctx.likes, strict=True)
        )


_rule: Any = _Barrier  # torch's stubs do not know that it has ``apply``


def _autograd(keys: Any, xs: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    modes = (torch.is_grad_enabled(), _C._is_fwd_grad_enabled())
    with enable_single_level_autograd_function():
        return list(_rule.apply(keys, modes, len(xs), *xs, *after))


_LIBRARY.impl("barrier", _autograd, "Autograd", with_keyset=True)


def optimization_barrier(x: Tree) -> Tree:
    """``x``, with nothing fused, shared or moved across: what follows starts from finished values.

    It is the identity under every transform, and a barrier in each of them: gradients pass one of their own.

    >>> optimization_barrier({"a": torch.ones(2)})
    {'a': tensor([1., 1.])}
    """
    leaves, treedef = tree.flatten(x)
    passed = iter(barrier_op([leaf for leaf in leaves if isinstance(leaf, Tensor)], []))
    return tree.unflatten(treedef, [next(passed) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
