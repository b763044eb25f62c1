"""One call of a function as one ATen graph."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.context import outside_inference
from functorch_gen.transforms.effects import thread_effects
from functorch_gen.transforms.graph_passes import prune, repair
from functorch_gen.transforms.indexing import TensorIndices
from functorch_gen.transforms.known_zeros import Fakes
from functorch_gen.transforms.tracing.errors import TracingError, explain
from functorch_gen.transforms.tracing.numbers import TracedNumber, number_dtype
from functorch_gen.transforms.tracing.sites import Recorder
from functorch_gen.typing import Tree

__all__ = ["Trace", "strides_of", "trace"]


@dataclass
class Trace:
    """A traced call: ``graph(*inputs, *constants)`` returns the tensors of the result.

    After them it returns one more if the function has side effects (``debug.print``). Each node's ``meta["site"]``
    says where it comes from.
    """

    graph: fx.GraphModule
    inputs: list[Tensor]  # fake, one for each leaf
    constants: list[Tensor]  # the tensors that the function closes over, read anew at every call
    outputs: Outputs


def trace(fun: Callable[..., Tree], leaves: Sequence[Any]) -> Trace:
    """Traces ``fun(*leaves)``, whose leaves are tensors and Python numbers, into one graph without in-place arguments.

    Raises:
        TracingError: if ``fun`` needs the value of a tensor, draws from a global generator, or writes to an argument
            or to a tensor it closes over; names the user's line.
    """
    outputs = Outputs()
    is_number = [not isinstance(x, Tensor) for x in leaves]

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = [TracedNumber(x) if number else x for x, number in zip(tensors, is_number, strict=True)]
        with _Watch(tensors), TensorIndices():
            result = fun(*arguments)
        return outputs.put(tree.map(lambda x: x.value if isinstance(x, TracedNumber) else x, result))

    mode = Fakes(allow_non_fake_inputs=True)
    with mode:
        inputs = [_fake(x) for x in leaves]
    try:
        with mode, outside_inference(), torch.no_grad():
            graph = make_fx(flat, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        raise told from error
    constants = _lift_constants(graph, mode)
    thread_effects(graph.graph)
    repair(graph)
    prune(graph)
    return Trace(graph, inputs, constants, outputs)


def _fake(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.empty((), dtype=number_dtype(x), device="cpu")
    return torch.empty_strided(x.shape, strides_of(x), dtype=x.dtype, device=x.device)


def strides_of(x: Tensor) -> tuple[int, ...]:
    """The layout in which ``x`` enters a program: its own if it is dense, else the nearest that is."""
    return x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


class _Watch(TorchDispatchMode):
    """Refuses what a pure function does not do, and notes where each operation comes from."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self._recorder = Recorder()
        self._inputs = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes here."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _given(func, args, kwargs).get("dropout_p") != 0.0:
            name = func.overloadpacket.__name__
            raise TracingError(f"{name} draws from torch's global generator; pass a key and use fg.random")
        if func._schema.is_mutable:
            given = _given(func, args, kwargs)
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check_write(func, given.get(argument.name))
        result = func(*args, **kwargs)
        self._recorder.record(sys._getframe(1))
        return result

    def _check_write(self, func: Any, value: Any) -> None:
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, Tensor) and (not isinstance(x, FakeTensor) or x.untyped_storage()._cdata in self._inputs):
                name = func.overloadpacket.__name__
                kind = "an argument" if isinstance(x, FakeTensor) else "a tensor outside the function"
                raise TracingError(
                    f"{name} writes to {kind} in place; return the new value, and donate_argnums the old"
                )


def _given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by name; attention's ``dropout_p`` is 0 if it is not among them."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {"dropout_p": 0.0} if "dropout_p" in names else {}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _lift_constants(graph: fx.GraphModule, mode: FakeTensorMode) -> list[Tensor]:
    """Makes inputs of the tensors closed over, so that later changes of them are seen; returns them."""
    nodes = graph.graph.nodes
    last = max((n for n in nodes if n.op == "placeholder"), key=list(nodes).index, default=None)
    found: dict[int, tuple[Tensor, fx.Node]] = {}
    for node in [n for n in nodes if n.op == "get_attr"]:
        constant = getattr(graph, str(node.target))
        if not isinstance(constant, Tensor) or all(
            user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users
        ):
            continue
        if id(constant) not in found:
            with graph.graph.inserting_after(last) if last else graph.graph.inserting_before(next(iter(nodes))):
                last = graph.graph.placeholder(f"closed_over_{len(found)}")
            last.meta["val"] = mode.from_tensor(constant.detach(), static_shapes=True)
            found[id(constant)] = (constant, last)
        node.replace_all_uses_with(found[id(constant)][1])
        graph.graph.erase_node(node)
    return [constant for constant, _ in found.values()]
