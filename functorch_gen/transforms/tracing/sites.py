"""Where an operation comes from: the user's function and line, found on the Python stack while it is traced."""

import bisect
import functools
import importlib.util
import linecache
import re
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["Recorder", "Site", "is_users", "site_of"]

_autograd: Any = torch.autograd  # its counter is private
_PACKAGE = Path(__file__).parents[2]
_TRACE_FILE = str(Path(__file__).with_name("trace.py"))
_MACHINERY = tuple(
    str(_PACKAGE / name)
    for name in (
        "check.py",
        "debug.py",
        "nn/capture.py",
        "nn/parts.py",
        "random/erfinv.py",
        "random/threefry.py",
        "structure.py",
        "transforms",
        "tree.py",
    )
)
"""What stands between a user's function and what it asks for: no place of its own."""
_GENERATED = ("<eval_with_key", "<frozen", "<string>")


@dataclass(frozen=True)
class Site:
    """A place in the source. ``function`` is the user's, or ``user's > library's`` where that called a layer."""

    function: str
    file: str
    line: int
    backward: bool = False  # the operation belongs to the derivative of what stands there

    def __str__(self) -> str:
        return f"backward of {self.function}" if self.backward else self.function

    @property
    def place(self) -> str:
        """File and line, the folder left out."""
        return f"{Path(self.file).name}:{self.line}"

    @property
    def source(self) -> str:
        """The line itself; empty where the source is not at hand."""
        return linecache.getline(self.file, self.line).strip()


def site_of(node: fx.Node) -> Site | None:
    """Where the operation of a traced graph comes from; None for those that ``jit`` itself has added."""
    return node.meta.get("site")


@functools.cache
def _foreign() -> tuple[str, ...]:
    """Folders of code that is neither the user's nor ours: torch, the tree libraries, Python's own."""
    specs = [importlib.util.find_spec(name) for name in ("torch", "einops", "optree")]
    folders = [str(Path(spec.origin).parent) for spec in specs if spec is not None and spec.origin]
    return (*folders, sysconfig.get_path("stdlib"), *_GENERATED)


@functools.cache
def _kind(file: str) -> str:
    if file.startswith(str(_PACKAGE)):
        return "machinery" if file.startswith(_MACHINERY) else "library"
    return "foreign" if file.startswith(_foreign()) else "user"


def is_users(file: str) -> bool:
    """Whether a file of source is neither this package's nor of what it is built on."""
    return _kind(file) == "user"


def _is_private(frame: FrameType) -> bool:
    return any(part.startswith("_") and part != "__call__" for part in frame.f_code.co_qualname.split("."))


def _name(frame: FrameType) -> str:
    name = frame.f_code.co_qualname.replace(".<locals>", "").replace(".__call__", "")
    if is_users(frame.f_code.co_filename):
        return name
    if name.startswith("_"):  # nobody's name: the module's instead
        return Path(frame.f_code.co_filename).stem
    return re.sub(r"(\.<\w+>)+$", "", name)  # of lambdas and comprehensions inside


class Recorder:
    """Writes the :class:`Site` of every traced operation into ``node.meta["site"]``.

    An operation of the backward pass has no user's frame above it: autograd numbers the nodes of its graph as the
    forward pass makes them, and that number leads to the site of the forward operation.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []  # autograd's counter after each operation, ascending
        self._sites: list[Site | None] = []

    def record(self, frame: FrameType | None) -> None:
        """Marks the nodes that the last operation has added; ``frame`` is what called that operation."""
        mode: Any = get_proxy_mode()
        fresh: list[fx.Node] = []
        for node in reversed(mode.tracer.graph.nodes) if mode else ():
            if node.op == "placeholder" or "site" in node.meta:
                break
            fresh.append(node)
        if fresh:
            site = self._find(frame)
            for node in fresh:
                node.meta["site"] = site

    def _find(self, frame: FrameType | None) -> Site | None:
        number = _autograd._get_sequence_nr()
        site, differentiated = _innermost(frame)
        if differentiated:
            site = self._forward_site() or site
        if not self._numbers or number > self._numbers[-1]:
            self._numbers.append(number)
            self._sites.append(site)
        return site

    def _forward_site(self) -> Site | None:
        """The site of the operation whose derivative autograd computes now."""
        node: Any = torch._C._current_autograd_node()
        at = len(self._sites) if node is None else bisect.bisect_right(self._numbers, node._sequence_nr())
        site = self._sites[at] if at < len(self._sites) else None
        return site and replace(site, backward=True)


def _innermost(frame: FrameType | None) -> tuple[Site | None, bool]:
    """The innermost site within the traced call, and whether autograd's engine was called from there."""
    inner: FrameType | None = None  # the library's own function
    differentiated = False
    while frame is not None and frame.f_code.co_filename != _TRACE_FILE:
        kind = _kind(frame.f_code.co_filename)
        if kind == "user":
            name = f"{_name(frame)} > {_name(inner)}" if inner else _name(frame)
            return Site(name, frame.f_code.co_filename, frame.f_lineno, differentiated), differentiated
        if kind == "library":
            inner = frame if inner is None or (_is_private(inner) and not _is_private(frame)) else inner
        elif frame.f_code.co_name == "_engine_run_backward":
            differentiated, inner = True, None
        frame = frame.f_back
    if inner is None:
        return None, differentiated
    return Site(_name(inner), inner.f_code.co_filename, inner.f_lineno, differentiated), differentiated
