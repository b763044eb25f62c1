"""jit: pure functions as compiled programs."""

from functorch_gen.transforms.tracing.api import Jitted, Lowered, jit
from functorch_gen.transforms.tracing.errors import TracingError

__all__ = ["Jitted", "Lowered", "TracingError", "jit"]
