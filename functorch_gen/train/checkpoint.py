"""Checkpoints: any tree of tensors as one safetensors file that is whole or absent, and folders of numbered ones.

A file holds the tensors by path, and in its header a manifest: the structure, shapes, dtypes and memory layouts, ties,
Python numbers and strings, metadata of the caller, and a SHA-256 of the file. Reading it executes no code. ::

    newest = checkpoint.latest("runs/first")
    train_state = checkpoint.load(newest, like=train_state) if newest else train_state
    ...
    checkpoint.save_step("runs/first", int(train_state.step), train_state, keep=3)
"""

import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_positive
from functorch_gen.structure import STATIC, Structure, flatten_plain, paths_plain
from functorch_gen.train.sealed_file import (
    CheckpointError,
    check_whole,
    read_manifest,
    safetensors,
    write,
)
from functorch_gen.transforms.context import is_traced
from functorch_gen.typing import Tree

__all__ = ["CheckpointError", "latest", "load", "read_metadata", "save", "save_step", "steps"]

FilePath = str | os.PathLike[str]

_VERSION = 1
_STEP_FILE = re.compile(r"step_(\d+)\.safetensors")
_INCIDENTAL = re.compile(r" at 0x[0-9a-f]+|device\([^)]*\)")  # what may differ between equal static leaves
_RESERVED = "__metadata__"
_LISTED = 20  # differences in one error


# One file.


def save(path: FilePath, whole: Tree, *, metadata: Any = None) -> Path:
    """Writes a tree into the file ``path``, which holds the old tree or the new one whenever the process is killed.

    The file is written under a temporary name beside it, flushed to the disk and renamed. What earlier processes that
    were killed have left there is removed. Tensors of one memory and shape (ties) are stored once.

    Args:
        whole: a nest of dict, list, tuple, NamedTuple and None. Its leaves are tensors of any device, Python numbers
            and strings; static leaves are not stored, only compared when the file is loaded.
        metadata: anything that JSON can say; :func:`read_metadata` gives it back.
    Raises:
        TypeError: if a leaf is none of these (names its path), the metadata are not, or the tree is being traced.
        ValueError: if two leaves share a path (a key that contains a dot, say).

    >>> import tempfile
    >>> state = {"w": torch.ones(2), "count": torch.tensor(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(f"{folder}/state.safetensors", state, metadata={"seed": 0})
    ...     load(path, like=tree.zeros_like(state)), read_metadata(path)
    ({'w': tensor([1., 1.]), 'count': tensor(3)}, {'seed': 0})
    """
    if is_traced():
        raise TypeError("checkpoint.save: expected values, got a tree that is being traced; save it outside transforms")
    path = Path(path)
    tensors, leaves = _take_apart(whole)
    nodes = dict(_nodes(flatten_plain(whole)[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, tensors, {"version": _VERSION, "nodes": nodes, "leaves": leaves, "metadata": metadata})
    return path


def load(path: FilePath, like: Tree = None) -> Tree:
    """The tree of a file, in the structure of the template ``like``: its values have no influence.

    Each tensor has its stored value bit for bit, and its stored memory layout; tied ones are tied again. It is put on
    the template's device. The template's leaves need no more than a shape and a dtype: ``fg.eval_shape`` makes one,
    and so does the device "meta".

    Args:
        like: None gives nested dicts by path, on the CPU.
    Raises:
        CheckpointError: if the file is truncated or corrupt, or none of :func:`save`.
        ValueError: if structure, shapes or dtypes are not the template's; lists the paths that are missing from the
            file, unexpected in it, or different.
        FileNotFoundError: if there is no file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(save(f"{folder}/state.safetensors", {"layers": [torch.zeros(1)], "rate": 0.5}))
    {'layers': {'0': tensor([0.])}, 'rate': 0.5}
    """
    path = Path(path)
    check_whole("checkpoint.load", path)
    manifest = _manifest("checkpoint.load", path)
    entries: dict[str, Any] = manifest["leaves"]
    if like is None:
        return tree.from_names(_read(path, entries, dict.fromkeys(entries, torch.device("cpu"))))
    _compare(path, manifest, like)
    devices = {name: _device(x) for name, x in _named(like).items()}
    named = _read(path, entries, devices)
    return tree.unflatten(tree.structure(like), [named[name] for name in devices])


def read_metadata(path: FilePath) -> Any:
    """What :func:`save` was given as ``metadata``; reads only the header of the file.

    Raises:
        CheckpointError: if the header is truncated or corrupt, or none of :func:`save`.
        FileNotFoundError: if there is no file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     read_metadata(save(f"{folder}/state.safetensors", {}, metadata=[1, "a"]))
    [1, 'a']
    """
    return _manifest("checkpoint.read_metadata", Path(path))["metadata"]


# A folder.


def save_step(folder: FilePath, step: int, whole: Tree, *, keep: int | None = 3, metadata: Any = None) -> Path:
    """Saves a tree as ``folder/step_00000100.safetensors`` and removes all but the ``keep`` newest of the folder.

    Args:
        keep: how many files stay, this one included; None for all.
    Raises:
        ValueError: if ``step`` < 0 or ``keep`` < 1. As :func:`save` besides.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     names = [save_step(folder, n, {"n": n}, keep=2).name for n in (8, 9, 10)]
    ...     list(steps(folder)), latest(folder).name
    ([9, 10], 'step_00000010.safetensors')
    """
    if step < 0:
        raise ValueError(f"checkpoint.save_step: expected step >= 0, got {step}")
    if keep is not None:
        check_positive("checkpoint.save_step", keep=keep)
    folder = Path(folder)
    path = save(folder / f"step_{step:08d}.safetensors", whole, metadata=metadata)
    if keep is not None:
        for old in list(steps(folder).values())[:-keep]:
            if old != path:
                old.unlink(missing_ok=True)
    return path


def steps(folder: FilePath) -> dict[int, Path]:
    """The files of :func:`save_step` in a folder by step, the newest last; none if there is no folder.

    >>> steps("no such folder")
    {}
    """
    folder = Path(folder)
    found = [(_STEP_FILE.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def latest(folder: FilePath) -> Path | None:
    """The file of the highest step in a folder; None if there is none.

    >>> latest("no such folder") is None
    True
    """
    return next(reversed(steps(folder).values()), None)


# Trees apart and together.


def _take_apart(whole: Tree) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to store by name, each memory once, and what the manifest says of every leaf."""
    tensors: dict[str, Tensor] = {}
    leaves: dict[str, Any] = {}
    stored: dict[Any, str] = {}  # which stretch of memory is stored under which name
    taken: set[int] = set()
    for path, x in _named(whole).items():
        if type(x) in (bool, int, float, str):
            leaves[path] = {"value": x}
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"checkpoint.save: expected a tensor, number or string at {path!r}, got {_kind(x)}")
        name = stored.setdefault(_place(x) if x.numel() else path, path)
        stride = torch.empty_like(x, device="meta").stride()  # x's own where x has neither gaps nor overlaps
        leaves[path] = {"tensor": name, "dtype": _dtype(x), "shape": list(x.shape), "stride": list(stride)}
        if name == path:
            memory = x.untyped_storage().data_ptr()
            tensors[name] = _plain(x, copy=memory in taken)  # safetensors refuses tensors that overlap
            taken.add(memory)
    return tensors, leaves


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how it is read there."""
    return x.device, x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), x.is_conj(), x.is_neg()


def _plain(x: Tensor, copy: bool) -> Tensor:
    """A contiguous tensor on the CPU; of complex numbers, their two parts."""
    plain = x.detach().resolve_conj().resolve_neg()
    plain = torch.view_as_real(plain) if x.is_complex() else plain
    return plain.to("cpu", copy=copy).contiguous()


def _named(whole: Tree) -> dict[str, Any]:
    """The leaves by path, which no two nodes share."""
    leaves, structure = flatten_plain(whole)
    named = dict(zip(paths_plain(structure), leaves, strict=True))
    nodes = [path for path, _ in _nodes(structure)]
    if len({*named, *nodes}) < len(leaves) + len(nodes):
        every = [*paths_plain(structure), *nodes]
        twice = next(path for path in every if every.count(path) > 1)
        raise ValueError(f"checkpoint: expected one node at {twice!r}, got two; is a key empty, or with a dot?")
    if _RESERVED in named:
        raise ValueError(f"checkpoint: expected no leaf at {_RESERVED!r}, a name that safetensors reserves, got one")
    return named


def _nodes(structure: Structure, path: str = "") -> Iterator[tuple[str, str]]:
    """The path of every node that is no leaf, and what it is."""
    if structure.kind is None:
        return
    static = structure.kind in STATIC
    yield path, _describe(structure.entries[0]) if static else structure.kind.__name__
    for entry, child in zip(structure.entries, structure.children):  # a static node has none
        yield from _nodes(child, f"{path}.{entry}" if path else str(entry))


def _describe(x: Any) -> str:
    """A static leaf in words that are the same in every process."""
    if is_dataclass(x):
        said = ", ".join(f"{field.name}={_describe(getattr(x, field.name))}" for field in fields(x))
        return f"{type(x).__name__}({said})"
    return _INCIDENTAL.sub("", repr(x))


def _dtype(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _kind(x: Any) -> str:
    """What a leaf is, as far as a template must agree."""
    return f"{_dtype(x)} {tuple(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else type(x).__name__


def _kind_of(entry: dict[str, Any]) -> str:
    """The same of a leaf of a manifest."""
    return f"{entry['dtype']} {tuple(entry['shape'])}" if "tensor" in entry else type(entry["value"]).__name__


def _device(x: Any) -> torch.device:
    device = torch.device(getattr(x, "device", "cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _compare(path: Path, manifest: dict[str, Any], like: Tree) -> None:
    want = {**dict(_nodes(flatten_plain(like)[1])), **{name: _kind(x) for name, x in _named(like).items()}}
    got = {**manifest["nodes"], **{name: _kind_of(entry) for name, entry in manifest["leaves"].items()}}
    lines = [f"missing from the file: {name!r} ({kind})" for name, kind in want.items() if name not in got]
    lines += [f"unexpected in the file: {name!r} ({kind})" for name, kind in got.items() if name not in want]
    for name, kind in want.items():
        if kind != got.get(name, kind):
            expected, found = _around_difference(kind, got[name])
            lines.append(f"different: {name!r}: expected {expected}, got {found}")
    if lines:
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        listed = "\n  ".join([*lines[:_LISTED], *more])
        raise ValueError(
            f"checkpoint.load: expected the tree of the template, got another in {str(path)!r}:\n  {listed}"
        )


def _around_difference(a: str, b: str) -> tuple[str, str]:
    """Two descriptions; of long ones, what lies around the first difference."""
    same = next((i for i, (left, right) in enumerate(zip(a, b)) if left != right), 0)
    begin = max(same - 20, 0) if max(len(a), len(b)) > 80 else 0
    dots = "..." if begin else ""
    return f"{dots}{a[begin : begin + 80]}", f"{dots}{b[begin : begin + 80]}"


def _read(path: Path, entries: dict[str, Any], devices: dict[str, torch.device]) -> dict[str, Any]:
    """The leaves by path, in memory of their own."""
    named: dict[str, Any] = {}
    made: dict[Any, Tensor] = {}
    with safetensors("checkpoint.load").safe_open(path, framework="pt") as file:
        for name, device in devices.items():
            entry = entries[name]
            if "value" in entry:
                named[name] = entry["value"]
                continue
            place = (entry["tensor"], device)
            if place not in made:
                made[place] = _own(file.get_tensor(entry["tensor"]), entry, device)
            named[name] = made[place]
    return named


def _own(mapped: Tensor, entry: dict[str, Any], device: torch.device) -> Tensor:
    """A tensor that lies in the file as one in memory, with the strides of the tensor that was saved."""
    dtype = getattr(torch, entry["dtype"])
    x = torch.empty_strided(entry["shape"], entry["stride"], dtype=dtype, device=device)
    (torch.view_as_real(x) if dtype.is_complex else x).copy_(mapped)
    return x


def _manifest(name: str, path: Path) -> dict[str, Any]:
    manifest = read_manifest(name, path)
    if manifest["version"] != _VERSION:
        version = manifest["version"]
        raise CheckpointError(f"{name}: expected a checkpoint of version {_VERSION}, got {version} in {str(path)!r}")
    return manifest
