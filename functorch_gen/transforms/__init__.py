"""Transforms of pure functions: gradients, Jacobians, batching, compilation, rematerialisation."""

from functorch_gen.transforms.associative_scan import associative_scan
from functorch_gen.transforms.autocast import autocast
from functorch_gen.transforms.barrier import optimization_barrier
from functorch_gen.transforms.batching import vmap
from functorch_gen.transforms.collectives import (
    all_gather,
    axis_index,
    axis_size,
    pmax,
    pmean,
    pmin,
    ppermute,
    psum,
)
from functorch_gen.transforms.cond import cond
from functorch_gen.transforms.custom_jvp import custom_jvp
from functorch_gen.transforms.custom_vjp import CustomVJPPrimal, SymbolicZero, custom_vjp
from functorch_gen.transforms.forward import jvp, linearize
from functorch_gen.transforms.gradient import grad, stop_gradient, value_and_grad, vjp
from functorch_gen.transforms.implicit import custom_linear_solve, custom_root
from functorch_gen.transforms.jacobian import hessian, hvp, jacfwd, jacrev
from functorch_gen.transforms.mapping import map
from functorch_gen.transforms.named_axes import process_axis
from functorch_gen.transforms.rematerialization import remat
from functorch_gen.transforms.saving import Policy, checkpoint_name, dots_saveable, save_only_these_names
from functorch_gen.transforms.scan import scan
from functorch_gen.transforms.shapes import ShapeDtypeStruct, eval_shape
from functorch_gen.transforms.tracing import Jitted, Lowered, TracingError, jit
from functorch_gen.transforms.while_loop import fori_loop, while_loop

__all__ = [
    "CustomVJPPrimal",
    "Jitted",
    "Lowered",
    "Policy",
    "ShapeDtypeStruct",
    "SymbolicZero",
    "TracingError",
    "all_gather",
    "associative_scan",
    "autocast",
    "axis_index",
    "axis_size",
    "checkpoint_name",
    "cond",
    "custom_jvp",
    "custom_linear_solve",
    "custom_root",
    "custom_vjp",
    "dots_saveable",
    "eval_shape",
    "fori_loop",
    "grad",
    "hessian",
    "hvp",
    "jacfwd",
    "jacrev",
    "jit",
    "jvp",
    "linearize",
    "map",
    "optimization_barrier",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "process_axis",
    "psum",
    "remat",
    "save_only_these_names",
    "scan",
    "stop_gradient",
    "value_and_grad",
    "vjp",
    "vmap",
    "while_loop",
]
