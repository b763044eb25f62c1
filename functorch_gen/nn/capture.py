"""capture: the outputs of named sublayers, returned beside the result, without hooks.

:class:`~functorch_gen.nn.Bound` calls the sublayers, so it knows their names: it tells those who watch. Nothing else
does, and nobody watches but while a captured function runs, in its own thread.
"""

import fnmatch
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

__all__ = ["Watcher", "call_part", "capture", "watch"]

_TORCHS = ("_functorch", "_higher_order_ops", "autograd", "utils/checkpoint.py")
_TRANSFORMS = (
    str(Path(__file__).parents[1] / "transforms"),
    *[str(Path(torch.__file__).parent / name) for name in _TORCHS],
)
"""Where the code of transforms lies."""
_NO_TRANSFORM = "transforms/autocast.py"
"""The tensors of a function in mixed precision are those of its caller."""


class Watcher(Protocol):
    """Is told of each sublayer before and after its call; ``path`` is "block0.norm", seen from the watched function."""

    def enter(self, path: str, layer: Any) -> None:
        """The sublayer is about to be called."""
        ...

    def leave(self, path: str, y: Any) -> None:
        """It has returned ``y``."""
        ...


class _Watching(threading.local):  # not a ContextVar, which Dynamo cannot read
    def __init__(self) -> None:
        self.watchers: tuple[tuple[Watcher, int], ...] = ()  # each with the length of the path where it began
        self.path: tuple[str, ...] = ()


_watching = _Watching()


def watch(watcher: Watcher, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``fun(*args, **kwargs)``, whose sublayers ``watcher`` is told of."""
    before = _watching.watchers
    _watching.watchers = (*before, (watcher, len(_watching.path)))
    try:
        return fun(*args, **kwargs)
    finally:
        _watching.watchers = before


def call_part(name: str, layer: Any, call: Callable[[], Any]) -> Any:
    """``call()``, the output of the part ``name``."""
    watchers = _watching.watchers
    if not watchers:
        return call()
    before = _watching.path
    path = (*before, name)
    _watching.path = path
    try:
        for watcher, depth in watchers:
            watcher.enter(".".join(path[depth:]), layer)
        y = call()
        for watcher, depth in watchers:
            watcher.leave(".".join(path[depth:]), y)
        return y
    finally:
        _watching.path = before


def capture(fun: Callable[..., Any], names: str | Sequence[str]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """``fun``, which returns ``(fun(...), activations)``: the outputs of the sublayers ``names``, by their paths.

    A sublayer is named as its parameters are: what a composite layer calls by :class:`Bound` (as :class:`Sequential`
    and all layers of this package do). The first call is ``"block0.norm"``, the next are ``"block0.norm#1"``,
    ``"block0.norm#2"``; of a stateful layer the output counts, not the state. Activations are results like any
    other: they may be differentiated, batched, traced and compiled.

    Args:
        fun: calls layers; no transform may stand between it and a layer that is named. Capture inside the transform
            instead, ``vmap(capture(f, names))``, and return the activation.
        names: a path, a glob (``"*.norm1"``; ``*`` matches dots too), or several. The calls of one path go together.
    Raises:
        KeyError: when called, if a name matches no sublayer that ``fun`` calls; lists those it does. (A program that
            ``jit`` has compiled calls none.)
        RuntimeError: when called, if ``fun`` calls a layer that is named inside a transform: outside, its output has no
            meaning.
        TypeError: if a name is no string.

    >>> from functorch_gen import nn, random
    >>> net = nn.MLP(3, (4,), 2)
    >>> y, activations = capture(net, "0")(net.init(random.key(0)), torch.ones(5, 3))
    >>> {name: tuple(h.shape) for name, h in activations.items()}
    {'0': (5, 4)}
    """
    globs = (names,) if isinstance(names, str) else tuple(names)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"capture: expected names to be strings, got {type(glob).__name__}")

    @functools.wraps(fun)
    def captured(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        found = _Activations(globs)
        y = watch(found, fun, *args, **kwargs)
        for glob in globs:
            if not any(_matches(path, (glob,)) for path in found.calls):
                listed = ", ".join(found.calls) or "no sublayer"
                raise KeyError(f"capture: expected a sublayer that matches {glob!r}, got only {listed}")
        return y, found.activations

    return captured


class _Activations:
    """The outputs whose paths match, and how often each path was called."""

    def __init__(self, globs: tuple[str, ...]):
        self.globs = globs
        self.activations: dict[str, Any] = {}
        self.calls: dict[str, int] = {}
        self._surroundings = _surroundings()
        self._depth = len(_files())

    def enter(self, path: str, layer: Any) -> None:
        """Nothing is known yet."""

    def leave(self, path: str, y: Any) -> None:
        """Keeps ``y``, if it is asked for."""
        n = self.calls.get(path, 0)
        self.calls[path] = n + 1
        if not _matches(path, self.globs):
            return
        transforms = [f"that of {Path(file).name}" for file in _files()[self._depth :] if _is_transform(file)]
        if self._surroundings != _surroundings():
            transforms.append("one under torch.compile")
        if transforms:
            raise RuntimeError(
                f"capture: expected no transform between capture and {path!r}, got {transforms[0]};"
                " capture inside it, and return the activation from there"
            )
        self.activations[f"{path}#{n}" if n else path] = y


@torch.compiler.assume_constant_result  # torch.compile cannot look into fnmatch
def _matches(path: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def _is_transform(file: str) -> bool:
    return file.startswith(_TRANSFORMS) and not file.endswith(_NO_TRANSFORM)


def _surroundings() -> tuple[bool, bool]:
    """Whether Dynamo traces, and whether it does so inside a transform: there are no frames to look at."""
    compiling = torch.compiler.is_dynamo_compiling()
    return compiling, compiling and torch._C._are_functorch_transforms_active()


def _files() -> list[str]:
    """The files of the code that runs, from the outermost call to that of the caller."""
    files: list[str] = []
    frame: FrameType | None = None if torch.compiler.is_dynamo_compiling() else sys._getframe(2)
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return files[::-1]
