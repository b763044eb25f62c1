"""Sums and stacks over a named axis as operators, with their derivatives.

Like the barrier they carry their rules on the dispatcher's keys: each is one node under functorch, make_fx, Dynamo and
Inductor alike, to any order. The axis' index is an input. The level of ``vmap`` at which it is batched is the axis:
there the rule reduces over the examples; every other level batches the operator. No rule asks functorch for its levels.
"""

from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from functorch_gen.transforms.context import is_differentiable

__all__ = ["gather_op", "sum_op"]

_LIBRARY = torch.library.Library("functorch_gen", "FRAGMENT")
for _name in ("axis_sum", "axis_gather"):
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor index, SymInt size, str group) -> Tensor", tags=torch.Tag.pt2_compliant_tag
    )
sum_op: Any = torch.ops.functorch_gen.axis_sum.default
"""axis_sum(x, index, size, group): the sum of x over an axis; the processes ``group``, or the examples of ``index``."""
gather_op: Any = torch.ops.functorch_gen.axis_gather.default
"""axis_gather(x, index, size, group): (size, *x.shape), the values of x along an axis."""


def _check_processes(group: str) -> None:
    if not group:
        raise RuntimeError("psum: expected the vmap that names the axis to be active, got a value from outside it")


def _sum_processes(x: Tensor, index: Tensor, size: int, group: str) -> Tensor:
    _check_processes(group)
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def _gather_processes(x: Tensor, index: Tensor, size: int, group: str) -> Tensor:
    _check_processes(group)
    functional = torch.ops._c10d_functional
    flat = functional.all_gather_into_tensor(x.reshape(-1), size, group)
    return functional.wait_tensor(flat).reshape(size, *x.shape)


def _fake_sum(x: Tensor, index: Tensor, size: int, group: str) -> Tensor:
    _check_processes(group)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_gather(x: Tensor, index: Tensor, size: int, group: str) -> Tensor:
    _check_processes(group)
    return x.new_empty((size, *x.shape))


def _sum_examples(info: Any, dims: Any, x: Tensor, index: Tensor, size: int, group: str) -> Any:
    if group or dims[1] is None:  # a level that is not the axis
        return sum_op(x, index, size, group), dims[0]
    return (x * size if dims[0] is None else x.sum(dims[0], dtype=x.dtype)), None


def _gather_examples(info: Any, dims: Any, x: Tensor, index: Tensor, size: int, group: str) -> Any:
    if group or dims[1] is None:
        return gather_op(x, index, size, group), None if dims[0] is None else dims[0] + 1
    return (x.expand(size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)), None


class _Collective(_SingleLevelFunction):  # not a Function: functorch would handle all levels at once
    """The derivative rule within one functorch level; the levels below see the operator again."""

    @staticmethod
    def forward(ctx: Any, keys: Any, modes: tuple[bool, bool], op: Any, x: Tensor, index: Tensor, *axis: Any) -> Tensor:
        ctx.op, ctx.axis = op, axis
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)
        # apply() has switched differentiation off, but the levels below need the caller's modes
        with torch.set_grad_enabled(modes[0]), _set_fwd_grad_enabled(modes[1]), _C._AutoDispatchBelowAutograd():
            out = op.redispatch(keys & _C._after_autograd_keyset, x, index, *axis)
        if not is_differentiable(out):
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        """Each example's x is in the sum of all examples: its cotangent is the sum of theirs."""
        (index,) = ctx.saved_tensors
        total = sum_op(cotangent, index, *ctx.axis)
        if ctx.op is gather_op:
            total = total.index_select(0, index.reshape(1).to(total.device)).squeeze(0)
        return (None, None, None, total, None, None, None)

    @staticmethod
    def jvp(ctx: Any, _keys: None, _modes: None, _op: None, tangent: Tensor, *_axis: Any) -> Tensor:
        (index,) = ctx.saved_tensors
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward mode over forward mode
            return ctx.op(tangent, index, *ctx.axis)


def _register(op: Any, kernel: Any, fake: Any, batched: Any) -> None:
    name = op.name().removesuffix(".default")
    rule: Any = _Collective  # torch's stubs do not know that it has ``apply``

    def autograd(keys: Any, x: Tensor, index: Tensor, size: int, group: str) -> Tensor:
        modes = (torch.is_grad_enabled(), _C._is_fwd_grad_enabled())
        with enable_single_level_autograd_function():
            return rule.apply(keys, modes, op, x, index, size, group)

    _LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_vmap(name, batched, lib=_LIBRARY)


_register(sum_op, _sum_processes, _fake_sum, _sum_examples)
_register(gather_op, _gather_processes, _fake_gather, _gather_examples)
