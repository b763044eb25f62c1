"""What is going on around a call: the only place that asks torch's private state."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_gen import tree
from functorch_gen.typing import Tree

__all__ = ["is_differentiable", "is_nested", "is_traced", "is_transformed"]


def is_transformed() -> bool:
    """Whether a functorch transform is active, so that a tensor here may stand for many or carry a tangent."""
    return torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether someone watches the operations: functorch, a dispatch mode (make_fx), Dynamo."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def is_nested(inputs: Tree) -> bool:
    """Whether an outer derivative may be taken of what is computed from ``inputs`` now."""
    if torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves(inputs))


def is_differentiable(x: object) -> bool:
    """Whether ``x`` is a tensor of real or complex floating numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
