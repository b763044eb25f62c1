"""What is going on around a call: the only place that asks torch's private state."""

import contextlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_gen import tree
from functorch_gen.transforms.named_axes import process_groups
from functorch_gen.typing import Tree

_C: Any = torch._C  # torch's stubs leave out some of its modules
functorch: Any = _C._functorch
"""What torch tells of its transforms: levels, and what a tensor is wrapped in."""

AutocastState: TypeAlias = tuple[tuple[str, torch.dtype], ...]
"""Kinds of device under autocast, and the dtype of each."""

__all__ = [
    "AutocastState",
    "ambient",
    "autocast_state",
    "differentiating",
    "functorch",
    "is_differentiable",
    "is_inference",
    "is_mapped",
    "is_nested",
    "is_traced",
    "is_transformed",
    "outside_inference",
    "requires_gradient",
]


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
    return requires_gradient(tree.leaves(inputs))


def requires_gradient(leaves: Iterable[Any]) -> bool:
    """Whether torch's own automatic differentiation, forward or reverse, follows what is computed from ``leaves``."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)


def is_mapped(x: Tensor) -> bool:
    """Whether ``x`` differs between the examples of the innermost ``vmap``."""
    if torch.compiler.is_dynamo_compiling() or not functorch.is_batchedtensor(x):
        return False
    return functorch.maybe_get_level(x) == functorch.maybe_current_level()


def is_differentiable(x: object) -> bool:
    """Whether ``x`` is a tensor of real or complex floating numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def is_inference(leaves: Iterable[Any]) -> bool:
    """Whether a tensor among ``leaves`` was made in inference mode: torch.autograd refuses it, functorch does not."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return any(isinstance(x, Tensor) and x.is_inference() for x in leaves)


def outside_inference() -> contextlib.AbstractContextManager[Any]:
    """Leaves inference mode, in which torch.autograd and custom rules give zero derivatives without an error."""
    if torch.compiler.is_dynamo_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def differentiating() -> contextlib.AbstractContextManager[Any]:
    """Leaves the modes in which a derivative cannot be differentiated again.

    They are inference mode and, inside a transform, ``no_grad``, where torch takes formulas for the backward pass that
    have no derivative themselves.
    """
    if torch.compiler.is_dynamo_compiling() or not torch._C._are_functorch_transforms_active():
        return outside_inference()
    modes = contextlib.ExitStack()
    modes.enter_context(outside_inference())
    modes.enter_context(torch.enable_grad())
    return modes


def autocast_state() -> AutocastState:
    """The kinds of device on which operations choose their dtypes themselves here, each with the narrow one."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    kinds = ("cpu", "cuda")
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


def ambient() -> tuple[Any, ...]:
    """What else decides which operations one function gives: default dtype and device, autocast, named processes."""
    device = torch.get_default_device() if torch._C._len_torch_function_stack() else None  # it is a function mode
    return torch.get_default_dtype(), device, process_groups(), autocast_state()
