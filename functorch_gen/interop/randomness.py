"""Calls inside a module that draw from the global generator, or have no derivatives of every order."""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from functorch_gen import random
from functorch_gen.interop.norms import NORMS, weight_norm
from functorch_gen.interop.record import Record
from functorch_gen.interop.recurrent import RECURRENT, call_recurrent
from functorch_gen.nn import attention

__all__ = ["Pure"]

# By name: functions of torch and of torch.nn.functional, methods of tensors.
_DRAWS = {
    "_sample_dirichlet", "_standard_gamma", "alpha_dropout", "bernoulli", "bernoulli_", "binomial", "cauchy_",
    "dropout_", "exponential_", "feature_alpha_dropout", "fractional_max_pool2d", "fractional_max_pool3d", "geometric_",
    "gumbel_softmax", "log_normal_", "multinomial", "native_dropout", "normal", "poisson", "randint", "randint_like",
    "random_", "randperm", "rrelu",
}  # fmt: skip


class Pure(TorchFunctionMode):
    """Runs a module's forward with draws from a key instead of torch's generator, and keeps buffers as they are.

    Without a key, dropout is the identity and other draws are errors.
    """

    def __init__(self, record: Record):
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, or what stands for it here."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.multi_head_attention_forward:
            with self:
                return _MULTI_HEAD(*args, **kwargs)
        rule = NORMS.get(func) or _RULES.get(name)
        if rule is not None:
            return rule(self._record, *args, **kwargs)
        if name in RECURRENT:
            key = None if self._record.key is None else self._record.next_key(name)
            return call_recurrent(func, name, args, key)
        if name in _DRAWS and _is_random(name, args, kwargs):
            raise TypeError(
                f"from_module: expected a forward that draws by dropout, rand, randn, uniform_ or normal_, got {name}; "
                "draw with functorch_gen.random and pass the values in"
            )
        return func(*args, **kwargs)


def _is_random(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Some functions draw in training only: alpha_dropout(input, p, training), rrelu(input, lower, upper, training)."""
    if "alpha_dropout" not in name and name != "rrelu":
        return True
    place = 3 if name == "rrelu" else 2
    return bool(kwargs.get("training", args[place] if len(args) > place else False))


# What stands for torch's functions. Each takes the record first.


def _dropped(record: Record, x: Tensor, p: float, training: bool, inplace: bool, shape: torch.Size) -> Tensor:
    """x / (1 - p) with probability 1 - p, else 0; one draw for each element of ``shape``."""
    if not training or p == 0 or record.key is None:
        return x
    y = torch.zeros_like(x)
    if p < 1:
        y = torch.where(random.bernoulli(record.next_key("dropout"), 1 - p, shape), x / (1 - p), 0.0)
    return x.copy_(y) if inplace else y


def _dropout(record: Record, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _dropped(record, input, p, training, inplace, input.shape)


def _channels(unbatched: int | None) -> Callable[..., Tensor]:
    """Dropout of whole channels of (b, c, ...), or of (c, ...) if that is what ``unbatched`` axes mean."""

    def rule(record: Record, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        lead = 1 if input.ndim == unbatched else 2
        shape = torch.Size([*input.shape[:lead], *[1] * (input.ndim - lead)])
        return _dropped(record, input, p, training, inplace, shape)

    return rule


def _attention(
    record: Record, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``F.scaled_dot_product_attention``, with derivatives of every order."""
    drawn = record.next_key("dropout") if dropout_p and record.key is not None else None
    return attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale, dropout=dropout_p, key=drawn)


def _sized(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.rand(2, 3)`` and its like."""

    def rule(record: Record, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **named: Any) -> Tensor:
        shape = named.get("size", size[0] if size and isinstance(size[0], Sequence) else size)
        return draw(record.next_key(name), tuple(shape), dtype or torch.get_default_dtype()).to(device)

    return rule


def _like(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A draw in the shape of a tensor."""

    def rule(record: Record, input: Tensor, *, dtype: torch.dtype | None = None, **layout: Any) -> Tensor:
        return draw(record.next_key(name), input.shape, dtype or input.dtype)

    return rule


def _uniform(record: Record, x: Tensor, low: float = 0.0, high: float = 1.0, **named: Any) -> Tensor:
    low, high = named.get("from", low), named.get("to", high)
    return x.copy_(low + (high - low) * random.uniform(record.next_key("uniform_"), x.shape, x.dtype))


def _normal(record: Record, x: Tensor, mean: float = 0.0, std: float = 1.0, **named: Any) -> Tensor:
    return x.copy_(mean + std * random.normal(record.next_key("normal_"), x.shape, x.dtype))


_RULES: dict[str, Callable[..., Tensor]] = {
    "_weight_norm": weight_norm,
    "dropout": _dropout,
    "dropout1d": _channels(2),
    "dropout2d": _channels(None),
    "dropout3d": _channels(4),
    "feature_dropout": _channels(None),
    "normal_": _normal,
    "rand": _sized("rand", random.uniform),
    "rand_like": _like("rand_like", random.uniform),
    "randn": _sized("randn", random.normal),
    "randn_like": _like("randn_like", random.normal),
    "scaled_dot_product_attention": _attention,
    "unflatten": lambda record, x, dim, sizes: torch.unflatten(x, dim, sizes),  # Dynamo cannot trace the method
    "uniform_": _uniform,
}

# Its body, which calls dropout; the function itself would ask the mode first, without end.
_body: Any = F.multi_head_attention_forward
_MULTI_HEAD = types.FunctionType(
    _body.__code__, {**_body.__globals__, "has_torch_function": lambda _: False}, _body.__name__, _body.__defaults__
)
