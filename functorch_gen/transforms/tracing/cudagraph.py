"""backend="cudagraph": the launches of a whole program recorded once, and sent to the device by one call.

A recording replays the kernels on the addresses that they had. So tensors that stay where they are from call to call
(the donated state, tensors closed over) are read and written in place, the others are copied to buffers of the
recording on their way in, and results are copied out before the next replay writes over them.

Source: "CUDA Graphs" in https://docs.pytorch.org/docs/stable/notes/cuda.html.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from functorch_gen.transforms.effects import has_effects
from functorch_gen.transforms.tracing.graph import value
from functorch_gen.transforms.tracing.sites import site_of

__all__ = ["CudaRecorder", "Recorder", "Replayed", "cuda_device", "on_device"]

_Run = Callable[..., Sequence[Tensor]]

_RECORDINGS = 4
"""For so many states in turn (of the networks of a GAN, of restored runs) a recording is kept."""


class Recorder(Protocol):
    """What runs and records work on a device."""

    device: torch.device

    def warm(self, run: _Run, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Runs, so that kernels are loaded and tuned before they are recorded."""
        ...

    def record(self, run: _Run, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Records without running: what runs it, and the results that each replay fills."""
        ...


class CudaRecorder:
    """Records with ``torch.cuda.CUDAGraph``; each recording has a memory pool of its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self._side = torch.cuda.Stream(device)

    def warm(self, run: _Run, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Runs on a side stream, as torch asks of work that is to be recorded."""
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            results = run(*inputs)
        current.wait_stream(self._side)
        for x in results:
            if x.is_cuda:
                x.record_stream(current)
        return results

    def record(self, run: _Run, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Records on a stream of its own; other threads may go on allocating memory meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = run(*inputs)
        return graph.replay, results


@dataclass
class _Recording:
    replay: Callable[[], None]
    buffers: list[Tensor]  # of the inputs that move
    results: Sequence[Tensor]


class Replayed:
    """``run(*inputs)``, recorded at the second call with the fixed inputs at the same addresses, then replayed.

    The first call at new addresses runs as it is. No memory of an input is kept, and a recording is replayed only when
    the fixed inputs are found at its addresses: what else may lie at the addresses of another recording is safe.
    Calls are queued on the current stream; on several streams the caller orders them.

    Args:
        fixed: for each input whether it stays where it is from call to call, and so is not copied.
    """

    def __init__(self, run: _Run, fixed: Sequence[bool], recorder: Recorder):
        self._run, self._fixed, self._recorder = run, fixed, recorder
        self._moving = [not stays for stays in fixed]
        self._recordings: OrderedDict[tuple[int, ...], _Recording | None] = OrderedDict()  # None: seen once
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Runs or replays; the results are the caller's."""
        with self._lock:
            addresses = tuple([x.data_ptr() for x in compress(inputs, self._fixed)])
            if addresses not in self._recordings:
                results = self._recorder.warm(self._run, [self._on_device(x) for x in inputs])
                self._keep(addresses, None)
                return results
            recording = self._recordings[addresses] or self._record(inputs)
            self._keep(addresses, recording)
            for buffer, x in zip(recording.buffers, compress(inputs, self._moving), strict=True):
                _fill(buffer, x)
            recording.replay()
            return [x.clone() for x in recording.results]

    def _keep(self, addresses: tuple[int, ...], recording: _Recording | None) -> None:
        self._recordings[addresses] = recording
        self._recordings.move_to_end(addresses)
        if len(self._recordings) > _RECORDINGS:
            self._recordings.popitem(last=False)

    def _record(self, inputs: Sequence[Tensor]) -> _Recording:
        static = [x if stays else self._buffer(x) for x, stays in zip(inputs, self._fixed, strict=True)]
        try:
            replay, results = self._recorder.record(self._run, static)
        except RuntimeError as error:
            error.add_note("jit: the program could not be recorded as a CUDA graph; run it with backend='inductor'")
            raise
        return _Recording(replay, [*compress(static, self._moving)], results)

    def _on_device(self, x: Tensor) -> Tensor:
        if x.device == self._recorder.device:
            return x
        buffer = self._buffer(x)
        _fill(buffer, x)
        return buffer

    def _buffer(self, x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self._recorder.device)


def _fill(buffer: Tensor, x: Tensor) -> None:
    """``buffer.copy_(x)`` that waits for nothing: a number on the CPU goes along with the launch."""
    if x.device == buffer.device:
        buffer.copy_(x)
    else:
        buffer.fill_(x.item())


def cuda_device(module: fx.GraphModule) -> torch.device:
    """The CUDA device of all tensors of a traced program.

    Numbers (0-d tensors on the CPU, and what is computed from them alone) are not asked where they are.

    Raises:
        ValueError: if there is no CUDA tensor, or a tensor elsewhere (names the user's line), or the program calls
            Python back (``debug.print``), which no device can do.
    """
    if has_effects(module.graph):
        raise ValueError("jit: expected a program that calls nothing back for backend='cudagraph', got debug.print")
    device = None
    for node in module.graph.nodes:
        for x in _tensors(node):
            if _is_number(x) and not _is_fetched(node):
                continue
            device = device or x.device
            if not x.is_cuda or x.device != device:
                site = site_of(node)
                where = f', in {site}: "{site.source}"' if site else ""
                raise ValueError(
                    "jit: expected all tensors on one CUDA device for backend='cudagraph', got "
                    f"{x.device if device == x.device else f'{device} and {x.device}'}{where}"
                )
    if device is None:
        raise ValueError("jit: expected tensors on one CUDA device for backend='cudagraph', got numbers only")
    return device


def on_device(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of a program that takes, makes and holds its numbers on ``device``, where a recording can read them."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    moved = fx.GraphModule(module, graph)
    for node in graph.nodes:
        x = value(node)
        if not isinstance(x, Tensor) or not _is_number(x):
            continue
        if node.op == "placeholder" and isinstance(x, FakeTensor):
            with x.fake_mode:
                node.meta["val"] = torch.empty((), dtype=x.dtype, device=device)
        elif node.op == "get_attr":
            name = str(node.target)
            setattr(moved, name, getattr(moved, name).to(device))
        elif "device" in node.kwargs:
            node.update_kwarg("device", device)
    moved.recompile()
    return moved


def _is_number(x: Tensor) -> bool:
    return x.ndim == 0 and x.device.type == "cpu"


def _is_fetched(node: fx.Node) -> bool:
    """Whether a number comes from the device, or is written over an input: that would have to wait for the device."""
    is_written = node.target is torch.ops.aten.copy_.default
    return is_written or any(y.is_cuda for source in node.all_input_nodes for y in _tensors(source))


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    """The values of a node; of a write its target."""
    source: Any = node.args[0] if node.target is torch.ops.aten.copy_.default else node
    x = value(source)
    yield from (y for y in (x if isinstance(x, list | tuple) else [x]) if isinstance(y, Tensor))
