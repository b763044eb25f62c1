"""Compiled programs in a file."""

import functools
import hashlib
import os
import pickle
import platform
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["read", "write"]

_MAGIC = b"functorch_gen programs 1\n"


def write(
    path: str | os.PathLike[str], fun: Callable[..., Any], programs: Mapping[Any, Any], files: Iterable[str]
) -> None:
    """Writes programs of ``fun``; a reader sees the old file or the new one, never a part.

    Args:
        files: the source files that the programs come from: a reader has the same.
    """
    sources = {file: _digest_of(file) for file in sorted(files) if Path(file).is_file()}
    body = pickle.dumps((_origin(fun), sources, dict(programs)))
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def read(path: str | os.PathLike[str], fun: Callable[..., Any]) -> dict[Any, Any]:
    """The programs in a file, if they are of this ``fun``, and for this torch and this machine.

    Raises:
        ValueError: if they are not, or the file is damaged.
    """
    data = Path(path).read_bytes()
    digest, body = data[len(_MAGIC) : len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise ValueError(f"jit: expected a file of compiled programs at {os.fspath(path)}, got a damaged or other file")
    found, sources, programs = pickle.loads(body)
    for file, digest in sources.items():
        if not Path(file).is_file() or _digest_of(file) != digest:
            raise ValueError(f"jit: expected {file} as it was when {os.fspath(path)} was made, got a changed file")
    for what, here in _origin(fun).items():
        if found[what] != here:
            raise ValueError(f"jit: expected {os.fspath(path)} to be made with {what} {here}, got {found[what]}")
    return programs


def _digest_of(file: str | Path) -> bytes:
    return hashlib.sha256(Path(file).read_bytes()).digest()


def _package() -> str:
    """A digest of this package's own source."""
    files = sorted(Path(__file__).parents[2].rglob("*.py"))
    return hashlib.sha256(b"".join(map(_digest_of, files))).hexdigest()[:16]


def _origin(fun: Callable[..., Any]) -> dict[str, str]:
    digest = hashlib.sha256()
    for part in _described(fun, set()):
        digest.update(part.encode() + b"\0")
    return {
        "torch": torch.__version__,
        "functorch_gen": _package(),
        "Python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "function": f"{getattr(fun, '__qualname__', type(fun).__name__)} ({digest.hexdigest()[:16]})",
    }


def _described(x: Any, seen: set[int]) -> Iterator[str]:
    """What the result of ``x`` depends on, as far as it can be told: its code, and that of what it closes over."""
    if isinstance(x, str | bytes | int | float | complex | bool | torch.dtype | torch.device) or x is None:
        yield repr(x)
        return
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, types.CodeType):
        yield x.co_code.hex()
        yield from _described(x.co_names, seen)
        yield from _described(x.co_consts, seen)
    elif isinstance(x, types.FunctionType):
        yield x.__qualname__
        yield from _described(x.__code__, seen)
        yield from _described(x.__defaults__, seen)
        yield from _described([_content(cell) for cell in x.__closure__ or ()], seen)
    elif isinstance(x, functools.partial):
        yield from _described((x.func, x.args, sorted(x.keywords.items())), seen)
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _described(part, seen)
    elif isinstance(x, dict):
        yield from _described(sorted(x.items(), key=lambda item: str(item[0])), seen)
    elif is_dataclass(x) and not isinstance(x, type):
        yield type(x).__qualname__
        yield from _described([(field.name, getattr(x, field.name)) for field in fields(x)], seen)
    else:
        yield type(x).__qualname__


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None
