"""Mixed precision of a function: the heavy operations in a narrow type, the delicate ones in float32."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_choice
from functorch_gen.transforms.context import AutocastState, autocast_state

__all__ = ["autocast", "carry_autocast", "narrow_operands"]


def autocast(
    fun: Callable[..., Any], dtype: torch.dtype = torch.bfloat16, *, output_dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """``fun`` with its products and convolutions in ``dtype``, and sums, exponentials and losses in float32.

    Which operation runs in which type is torch's list (``torch.autocast``). Arguments keep their dtypes, so float32
    parameters get float32 gradients; nothing but the operations inside ``fun`` is changed, and no cast is remembered
    from one call to the next. The device is that of the first tensor among the arguments.

    Small gradients vanish in float16, not in bfloat16: see :func:`functorch_gen.optim.dynamic_loss_scale`.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        output_dtype: the floating leaves of the result are cast to it; by default they come as they are.
    Raises:
        ValueError: for another dtype; by the call, if no argument holds a tensor.

    Source: Micikevicius et al. 2018, arXiv:1710.03740.

    >>> product = autocast(torch.matmul)
    >>> product(torch.ones(2, 2), torch.ones(2, 2)).dtype
    torch.bfloat16
    >>> autocast(torch.matmul, output_dtype=torch.float32)(torch.ones(2, 2), torch.ones(2, 2)).dtype
    torch.float32
    """
    check_choice("autocast", "dtype", dtype, (torch.bfloat16, torch.float16))

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(_device_type(args, kwargs), dtype=dtype, cache_enabled=False):
            result = fun(*args, **kwargs)
        return result if output_dtype is None else tree.cast(result, output_dtype)

    return wrapped


def _device_type(*arguments: Any) -> str:
    for x in tree.leaves(arguments):
        if isinstance(x, Tensor):
            return x.device.type
    raise ValueError("autocast: expected a tensor among the arguments, got none")


def narrow_operands(*operands: Tensor | None) -> list[Any]:
    """The operands of a convolution in the narrow type, where autocast is on; those in float64 stay, as torch's do.

    torch's own cast does not reach a convolution under ``vmap``: it would run in float32, or be refused for operands
    of two types.

    >>> run = autocast(lambda x: narrow_operands(x, x.double(), None))
    >>> [x if x is None else x.dtype for x in run(torch.ones(2))]
    [torch.bfloat16, torch.float64, None]
    """
    dtype = dict(autocast_state()).get(next(x.device.type for x in operands if x is not None))
    if dtype is None:
        return list(operands)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in operands]


def carry_autocast(
    rebuild: Callable[[Sequence[Tensor]], Callable[..., Any]],
) -> Callable[[Sequence[Tensor]], Callable[..., Any]]:
    """``rebuild`` of a closure, whose functions run as if called here.

    What a backward pass computes again has then the dtypes of the first time: the pass itself runs after the region.
    """
    wanted = autocast_state()

    def restored(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as modes:
            for mode in _changes(wanted, autocast_state()):
                modes.enter_context(mode)
            return fun(*args, **kwargs)

    return lambda tensors: functools.partial(restored, rebuild(tensors))


def _changes(wanted: AutocastState, now: AutocastState) -> list[torch.autocast]:
    kinds = [kind for kind, _ in wanted]
    off = [torch.autocast(kind, enabled=False) for kind, _ in now if kind not in kinds]
    return [*off, *[torch.autocast(*state, cache_enabled=False) for state in wanted if state not in now]]
