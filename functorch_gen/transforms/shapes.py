"""eval_shape: what a function would return, without computing it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.known_zeros import Fakes
from functorch_gen.typing import Tree

__all__ = ["ShapeDtypeStruct", "eval_shape"]


@dataclass(frozen=True)
class ShapeDtypeStruct:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


def eval_shape(fun: Callable[..., Any], *args: Tree, **kwargs: Tree) -> Tree:
    """The shapes, dtypes and devices of ``fun(*args, **kwargs)``; nothing is computed or allocated.

    Args:
        args: trees of tensors or of :class:`ShapeDtypeStruct`.
    Returns:
        The result with a :class:`ShapeDtypeStruct` in place of each tensor.

    >>> eval_shape(lambda x: {"y": x @ x.mT}, torch.ones(3, 2))["y"].shape
    (3, 3)
    """
    # what torch.compile traces is computed only if its values are used: no mode is needed, and none would trace
    compiling = torch.compiler.is_dynamo_compiling()
    mode = contextlib.nullcontext() if compiling else Fakes(allow_non_fake_inputs=True)

    def fake(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, ShapeDtypeStruct) else x

    with mode, torch.no_grad():
        inputs = tree.map(fake, (args, kwargs))
        out = fun(*inputs[0], **inputs[1])
    return tree.map(lambda x: ShapeDtypeStruct(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x, out)
