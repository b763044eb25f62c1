"""What runs a traced graph: Inductor's code, or the graph's own ATen calls."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from functorch_gen.transforms.tracing.cudagraph import CudaRecorder, Replayed, cuda_device, on_device
from functorch_gen.transforms.tracing.decompose import decompose
from functorch_gen.transforms.tracing.executor import Executable, assemble
from functorch_gen.transforms.tracing.graph import value
from functorch_gen.transforms.tracing.lowerings import register_lowerings

__all__ = ["BACKENDS", "compile_graph", "decomposed", "on_cpu", "run_as_is"]

BACKENDS = ("inductor", "aten", "tiered", "cudagraph")

_Run = Callable[..., Sequence[Tensor]]


def run_as_is(graph: fx.GraphModule) -> _Run:
    """The graph as a function of its inputs, without generated code."""
    return graph.forward


def compile_graph(graph: fx.GraphModule, backend: str, fixed: Collection[int] = ()) -> tuple[_Run, Executable | None]:
    """The graph as a function of its inputs, and in a form that can be saved if there is one.

    Args:
        fixed: inputs whose memory stays where it is from call to call (donated, closed over).
    """
    if backend == "cudagraph":
        device = cuda_device(graph)
        stays = [i in fixed and x.is_cuda for i, x in enumerate(_inputs(graph))]
        return Replayed(_standalone(on_device(graph, device)), stays, CudaRecorder(device)), None
    if backend != "aten" and on_cpu(graph) and not _has_compiler():
        warnings.warn(
            "jit: no C++ compiler was found (g++, clang++ or $CXX), so programs run with backend='aten'", stacklevel=2
        )
        backend = "aten"
    if backend == "aten":
        return run_as_is(graph), None
    if on_cpu(graph):
        executable = assemble(decomposed(graph))
        return executable.load(), executable
    return _standalone(graph), None


def _standalone(graph: fx.GraphModule) -> _Run:
    """The graph as Inductor compiles it whole."""
    register_lowerings()
    from torch._inductor import config, standalone_compile

    options = {"emulate_precision_casts": True}  # as in kernels.py
    if hasattr(config.triton, "mix_order_reduction"):
        options["triton.mix_order_reduction"] = False  # wrong gradients in chains of modulated norms (pytorch#193061)
    with config.patch(options), _quiet():
        return standalone_compile(graph, [*_inputs(graph)], dynamic_shapes="from_example_inputs")


def _inputs(graph: fx.GraphModule) -> list[Tensor]:
    return [value(n) for n in graph.graph.nodes if n.op == "placeholder"]


def on_cpu(graph: fx.GraphModule) -> bool:
    """Whether all tensors of the graph are on the CPU."""
    return all(x.device.type == "cpu" for x in _tensors(graph))


def decomposed(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is compiled on a CPU."""
    return decompose(graph, _mode(graph))


def _mode(graph: fx.GraphModule) -> FakeTensorMode:
    """The mode in which the graph was traced."""
    modes = (x.fake_mode for x in _tensors(graph) if isinstance(x, FakeTensor))
    return next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)


def _tensors(graph: fx.GraphModule) -> Iterator[Tensor]:
    for node in graph.graph.nodes:
        for x in value(node) if isinstance(value(node), list | tuple) else [value(node)]:
            if isinstance(x, Tensor):
                yield x


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back a warning that the artifact of a graph compiled before cannot be saved again; it is not saved here."""

    def other(record: logging.LogRecord) -> bool:
        return "artifact generation failed" not in record.getMessage()

    log = logging.getLogger("torch._inductor.standalone_compile")
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def _has_compiler() -> bool:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "gcc", "clang"]
    return any(name and shutil.which(name.split()[0]) for name in names)
