"""What runs a traced graph: Inductor's code, or the graph's own ATen calls."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.tracing.lowerings import register_lowerings

__all__ = ["BACKENDS", "compile_graph", "compute_scalars_once"]

BACKENDS = ("inductor", "aten")

_OPTIONS: dict[str, Any] = {
    "mix_order_reduction": False,  # wrong gradients in chains of modulated norms (pytorch#193061)
}


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor], backend: str) -> Callable[..., Sequence[Tensor]]:
    """The graph as a function of its inputs (fake here): ``"inductor"`` generates code, ``"aten"`` does not."""
    on_cpu = all(x.device.type == "cpu" for x in inputs)
    if backend == "inductor" and on_cpu and not _has_compiler():
        warnings.warn(
            "jit: no C++ compiler was found (g++, clang++ or $CXX), so programs run with backend='aten'", stacklevel=2
        )
        backend = "aten"
    if backend == "aten":
        return graph.forward
    compute_scalars_once(graph)
    register_lowerings()
    from torch._inductor import config, standalone_compile

    options = {key: value for key, value in _OPTIONS.items() if hasattr(config, key)}
    if on_cpu and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX"):
        options["cpp.vec_isa_ok"] = True  # torch has found the ISA already: its 9 s of compiler probes are skipped
    with config.patch(options), _quiet():
        return standalone_compile(graph, list(inputs), dynamic_shapes="from_example_inputs")


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


def compute_scalars_once(module: fx.GraphModule) -> None:
    """Makes Inductor store each computed 0-d tensor that larger ones read.

    It would fuse the scalar's arithmetic (a schedule's cosine, a clip factor) into every vector loop that reads it; the
    input of ``as_strided`` is computed to memory first.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or _ndim(node) != 0 or not node.all_input_nodes:
            continue
        readers = [user for user in node.users if _ndim(user) > 0]
        if readers:
            with graph.inserting_after(node):
                stored = graph.call_function(torch.ops.aten.as_strided.default, (node, [], [], 0))
            stored.meta["val"] = node.meta["val"]
            for user in readers:
                user.replace_input_with(node, stored)
    module.recompile()


def _ndim(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else -1


def _has_compiler() -> bool:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "gcc", "clang"]
    return any(name and shutil.which(name.split()[0]) for name in names)
