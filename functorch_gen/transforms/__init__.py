"""Transforms of pure functions: gradients, Jacobians, batching, compilation, rematerialisation."""

from functorch_gen.transforms.barrier import optimization_barrier
from functorch_gen.transforms.batching import vmap
from functorch_gen.transforms.forward import jvp, linearize
from functorch_gen.transforms.gradient import grad, stop_gradient, value_and_grad, vjp
from functorch_gen.transforms.jacobian import hessian, hvp, jacfwd, jacrev
from functorch_gen.transforms.rematerialization import remat
from functorch_gen.transforms.saving import Policy, checkpoint_name, dots_saveable, save_only_these_names
from functorch_gen.transforms.scan import scan
from functorch_gen.transforms.shapes import ShapeDtypeStruct, eval_shape
from functorch_gen.transforms.tracing import Jitted, Lowered, TracingError, jit

__all__ = [
    "Jitted",
    "Lowered",
    "Policy",
    "ShapeDtypeStruct",
    "TracingError",
    "checkpoint_name",
    "dots_saveable",
    "eval_shape",
    "grad",
    "hessian",
    "hvp",
    "jacfwd",
    "jacrev",
    "jit",
    "jvp",
    "linearize",
    "optimization_barrier",
    "remat",
    "save_only_these_names",
    "scan",
    "stop_gradient",
    "value_and_grad",
    "vjp",
    "vmap",
]
