"""What a traced function must not do, told with the user's own line."""

import linecache
import traceback

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from functorch_gen.transforms.tracing.sites import is_users

__all__ = ["TracingError", "explain"]


class TracingError(RuntimeError):
    """A function given to ``jit`` depends on values, on hidden random numbers, or writes to its arguments."""


_BRANCH = "a Python value is asked of a tensor, which has none while tracing (if, while, float(), .item(), .tolist())"
_OFFER = "Choose by fg.cond or torch.where, or mark the argument static with static_argnums."


def explain(error: Exception) -> TracingError | None:
    """The error as the user should read it, or None if it is the user's own."""
    text = str(error)
    if isinstance(error, TracingError):
        what = text
    elif isinstance(error, RuntimeError) and "dtype of TracedNumber" in text:
        what = "torch.tensor() of a Python number is asked, but numbers are traced; write torch.ones(()) * number"
    elif isinstance(error, DataDependentOutputException) or "data-dependent control flow" in text:
        what = _BRANCH
    elif isinstance(error, DynamicOutputShapeException):
        what = "a shape depends on the values of a tensor (nonzero, unique, a boolean mask as index)"
    elif isinstance(error, RuntimeError) and ("FakeTensor" in text or "tensor subclasses" in text):
        what = "the data of a tensor is read (.numpy(), .data_ptr()), but there is none while tracing"
    else:
        return None
    offer = "" if "key" in what or "donate" in what else f" {_OFFER}"
    return TracingError(f"jit: {what}{_users_line(error)}.{offer}")


def _users_line(error: BaseException) -> str:
    """Where the innermost frame outside torch and this package stands."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
            return f', at {frame.filename}:{frame.lineno} in {frame.name}: "{line}"'
    return ""
