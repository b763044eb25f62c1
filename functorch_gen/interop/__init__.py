"""Bridges: ``torch.nn`` modules as pure functions and back, arrays of JAX."""

from functorch_gen.interop.arrays import from_jax, to_jax
from functorch_gen.interop.modules import to_module
from functorch_gen.interop.pure import from_module

__all__ = ["from_jax", "from_module", "to_jax", "to_module"]
