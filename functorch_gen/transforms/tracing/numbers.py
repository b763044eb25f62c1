"""Python numbers under a trace: an argument's value is not known yet, but it promotes as the number would."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen.transforms.tracing.errors import TracingError

__all__ = ["TracedNumber", "number_dtype"]

_DTYPES: dict[type, torch.dtype] = {
    bool: torch.bool,
    int: torch.int64,
    float: torch.float64,
    complex: torch.complex128,
}


_UNKNOWN = "the value of a Python number is needed, but numbers are traced"

_KEEPS_NUMBER: dict[str, Callable[..., Tensor]] = {
    "mul": torch.mul,
    "multiply": torch.mul,
    "div": torch.div,
    "divide": torch.div,
    "true_divide": torch.div,
    "floor_divide": torch.floor_divide,
    "floordiv": torch.floor_divide,
    "lerp": torch.lerp,
}
"""Where eager torch (on CPU) keeps a number in float32 beside tensors of 16 bits; elsewhere it rounds it first."""


def number_dtype(x: bool | int | float | complex) -> torch.dtype:
    """The dtype that holds a Python number exactly."""
    return next(dtype for kind, dtype in _DTYPES.items() if isinstance(x, kind))


def _category(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool else 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1


class TracedNumber:
    """Stands for a Python number in a traced function.

    Arithmetic among numbers is Python's, in double precision. Together with tensors it promotes as a Python number
    does: it changes the dtype of the result only if its category (bool, int, float, complex) is higher than the
    tensors'. Asking for its value raises :class:`TracingError`.
    """

    __hash__ = object.__hash__

    def __init__(self, value: Tensor):
        self.value = value  # 0-d bool, int64, float64 or complex128

    @property
    def is_traced_float(self) -> bool:
        """Whether it stands for a float, which may be differentiated."""
        return self.value.is_floating_point()

    def to_tensor(self) -> Tensor:
        """A 0-d tensor of the dtype that ``torch.tensor`` would give the number."""
        return self.value.to(self._default_dtype())

    def _default_dtype(self) -> torch.dtype:
        default = torch.get_default_dtype()
        category = _category(self.value.dtype)
        if category == 3:
            return torch.promote_types(default, torch.complex32)
        return default if category == 2 else self.value.dtype

    def _beside(self, tensors: list[Tensor]) -> Tensor:
        """A 0-d tensor that acts on ``tensors`` as the number would."""
        if not tensors or _category(self.value.dtype) > max(_category(x.dtype) for x in tensors):
            return self.to_tensor()
        top = max(_category(x.dtype) for x in tensors)
        leading = [x for x in tensors if _category(x.dtype) == top]
        leading = [x for x in leading if x.ndim] or leading  # 0-d tensors give way to those with axes
        dtype = functools.reduce(torch.promote_types, [x.dtype for x in leading])
        return self.value.to(dtype)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any torch function on numbers: they become tensors first."""
        kwargs = kwargs or {}
        if func in _SCALAR_ARGUMENTS:
            return _SCALAR_ARGUMENTS[func](*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            _each((args[1],), lambda x: x._unknown() if isinstance(x, TracedNumber) else None)
        tensors: list[Tensor] = []
        _each((args, kwargs), lambda x: tensors.append(x) if isinstance(x, Tensor) else None)
        low = {x.dtype for x in tensors if x.is_floating_point()}
        keeps = _KEEPS_NUMBER.get(func.__name__.strip("_"))
        if keeps is not torch.mul and not (args and isinstance(args[0], Tensor)):
            keeps = None  # a number divided by a tensor is rounded first
        if keeps and len(low) == 1 and low <= {torch.bfloat16, torch.float16}:
            # beside such a number eager torch computes in float32 and rounds once
            lifted = _each((args, kwargs), lambda x: x.float() if isinstance(x, Tensor) and x.dtype in low else None)
            result = cls.__torch_function__(keeps, types, *lifted)
            in_place = func.__name__.endswith("_") and not func.__name__.startswith("_")
            return args[0].copy_(result) if in_place else result.to(low.pop())
        args, kwargs = _each((args, kwargs), lambda x: x._beside(tensors) if isinstance(x, TracedNumber) else None)
        try:
            return func(*args, **kwargs)
        except TypeError as error:  # it takes a number and no tensor
            raise TracingError(_UNKNOWN) from error

    def _unknown(self, *_: Any) -> Any:
        raise TracingError(_UNKNOWN)

    __bool__ = __int__ = __float__ = __complex__ = __index__ = __round__ = __trunc__ = __floor__ = __ceil__ = _unknown

    def __repr__(self) -> str:
        return f"TracedNumber({str(self.value.dtype).removeprefix('torch.')})"

    def __neg__(self) -> "TracedNumber":
        return TracedNumber(-_number(self))

    def __pos__(self) -> "TracedNumber":
        return self

    def __abs__(self) -> "TracedNumber":
        return TracedNumber(_number(self).abs())


def _each(x: Any, f: Callable[[Any], Any]) -> Any:
    """Applies ``f`` inside lists, tuples and dicts; where it returns None the value stays."""
    if isinstance(x, dict):
        return {key: _each(value, f) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_each(value, f) for value in x)
    new = f(x)
    return x if new is None else new


def _number(x: Any) -> Tensor:
    """A number as a 0-d tensor that computes as Python does: bools count as integers."""
    value = x.value if isinstance(x, TracedNumber) else torch.full((), x, dtype=number_dtype(x), device="cpu")
    return value.to(torch.int64) if value.dtype == torch.bool else value


def _true_divide(a: Tensor, b: Tensor) -> Tensor:
    return a.to(torch.promote_types(a.dtype, torch.float64)) / b.to(torch.promote_types(b.dtype, torch.float64))


def _power(a: Tensor, b: Tensor) -> Tensor:
    if not (b.is_floating_point() or b.is_complex() or a.is_floating_point() or a.is_complex()):
        raise TracingError("an int to the power of an int is an int or a float by value; make one of the two a float")
    return torch.pow(a, b)


def _bitwise(function: Callable[[Any, Any], Any]) -> Any:
    """Python's ``&``, ``|`` and ``^``, in which bools stay bools."""

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, Tensor):
            return function(other, self)
        if not isinstance(other, TracedNumber | bool | int):
            return NotImplemented
        a, b = [x.value if isinstance(x, TracedNumber) else torch.full((), x, device="cpu") for x in (self, other)]
        return TracedNumber(function(a, b))

    return method


def _binary(on_numbers: Callable[[Tensor, Tensor], Tensor], on_tensors: Callable[[Any, Any], Any], swap: bool) -> Any:
    def method(self: Any, other: Any) -> Any:
        if isinstance(other, Tensor):
            if on_tensors is torch.true_divide and not swap:
                return other.reciprocal() * self  # as Tensor.__rtruediv__ does
            return on_tensors(other, self) if swap else on_tensors(self, other)
        if not isinstance(other, TracedNumber | bool | int | float | complex):
            return NotImplemented
        a, b = _number(self), _number(other)
        return TracedNumber(on_numbers(b, a) if swap else on_numbers(a, b))

    return method


for _name, _on_numbers, _on_tensors in (
    ("add", operator.add, torch.add),
    ("sub", operator.sub, torch.sub),
    ("mul", operator.mul, torch.mul),
    ("truediv", _true_divide, torch.true_divide),
    ("floordiv", torch.floor_divide, torch.floor_divide),
    ("mod", torch.remainder, torch.remainder),
    ("pow", _power, torch.pow),
):
    setattr(TracedNumber, f"__{_name}__", _binary(_on_numbers, _on_tensors, swap=False))
    setattr(TracedNumber, f"__r{_name}__", _binary(_on_numbers, _on_tensors, swap=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TracedNumber, f"__{_name}__", _binary(getattr(torch, _name), getattr(torch, _name), swap=False))
for _name in ("and", "or", "xor"):
    for _side in ("", "r"):  # they commute
        setattr(TracedNumber, f"__{_side}{_name}__", _bitwise(getattr(torch, f"bitwise_{_name}")))


def _full(size: Any, fill_value: TracedNumber, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    filled = torch.zeros(size, dtype=dtype or fill_value._default_dtype(), **options)
    return filled + fill_value.value.to(filled.dtype)


def _full_like(x: Tensor, fill_value: TracedNumber, **options: Any) -> Tensor:
    filled = torch.zeros_like(x, **options)
    return filled + fill_value.value.to(filled.dtype)


_SCALAR_ARGUMENTS: dict[Any, Callable[..., Any]] = {torch.full: _full, torch.full_like: _full_like}
"""Torch functions whose number argument cannot be a tensor."""
