"""Arrays on the disk as tensors: of data larger than memory, only what a batch holds is read.

A folder of ``.npy`` files is a tree by their names: ``train.image.npy`` is the leaf ``train.image``.
"""

import importlib
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.typing import Tree

__all__ = ["create_arrays", "open_arrays", "save_arrays"]

FilePath = str | os.PathLike[str]

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it since 3.13


def _numpy(name: str) -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise ImportError(f"{name}: needs numpy: pip install numpy") from error


def open_arrays(path: FilePath) -> Tree:
    """The arrays of a folder as a nest of dicts, or that of one ``.npy`` file: memory-mapped tensors.

    They are ordinary tensors on the CPU, and rows are read when they are indexed. What is written into one stays in
    the process: the file is not changed, and may be read-only.

    Raises:
        FileNotFoundError: if there is no such file, or none in the folder.
        ValueError: if a file is no array, or shorter than its header says.
        TypeError: if torch does not have the dtype of an array; names the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_arrays(f"{folder}/data", {"x": torch.eye(3), "label": torch.arange(3)})
    ...     data = open_arrays(f"{folder}/data")
    ...     data["x"][1:], data["label"]
    (tensor([[0., 1., 0.],
            [0., 0., 1.]]), tensor([0, 1, 2]))
    """
    path = Path(path)
    if not path.is_dir():
        return _open(path)
    files = sorted(path.glob("*.npy"))
    if not files:
        raise FileNotFoundError(f"open_arrays: expected .npy files in {str(path)!r}, got none")
    return tree.from_names({file.name.removesuffix(".npy"): _open(file) for file in files})


def _open(path: Path) -> Tensor:
    numpy = _numpy("open_arrays")
    header = numpy.load(path, mmap_mode="r", allow_pickle=False)
    # torch has no read-only tensors: where one is written into, the process gets pages of its own. No memory is set
    # aside for them, which would be refused for files larger than memory.
    flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    order = "F" if header.flags.f_contiguous else "C"
    array = numpy.ndarray(header.shape, header.dtype, pages, header.offset, order=order)
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"open_arrays: expected a dtype of torch in {str(path)!r}, got {array.dtype}") from error


@contextmanager
def create_arrays(folder: FilePath, like: Tree) -> Iterator[Tree]:
    """A folder of new arrays in the shapes and dtypes of ``like``, to be filled: writable memory-mapped zeros.

    The folder appears, whole and on the disk, when the ``with`` block ends; if it ends by an error, or the process is
    killed, there is none. Do not write into the tensors after it.

    Args:
        like: a tree of tensors, of the device "meta" say, or of other leaves with ``shape`` and ``dtype``.
    Raises:
        FileExistsError: if the folder exists.
        TypeError: if numpy does not have a dtype (bfloat16, say); names the path.
        ValueError: if a path cannot be the name of a file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with create_arrays(f"{folder}/data", {"x": torch.empty(4, 2, device="meta")}) as data:
    ...         for i in range(4):
    ...             data["x"][i] = i
    ...     open_arrays(f"{folder}/data")["x"].sum(0)
    tensor([6., 6.])
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"create_arrays: expected no {str(folder)!r}, got one")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        named = {path: _create(temporary, path, x) for path, x in tree.names(like).items()}
        yield tree.from_names(named, like)
        for path in named:
            _synchronize(temporary / f"{path}.npy")
        _synchronize(temporary)
        temporary.rename(folder)
        _synchronize(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _create(folder: Path, path: str, x: Any) -> Tensor:
    numpy = _numpy("create_arrays")
    if not path or "/" in path or os.sep in path:
        raise ValueError(f"create_arrays: expected paths that can be names of files, got {path!r}")
    try:
        dtype = torch.empty(0, dtype=x.dtype).numpy().dtype
    except TypeError:
        raise TypeError(f"create_arrays: expected a dtype of numpy at {path!r}, got {x.dtype}") from None
    return torch.from_numpy(numpy.lib.format.open_memmap(folder / f"{path}.npy", "w+", dtype, tuple(x.shape)))


def _synchronize(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; pages of mappings included."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_arrays(folder: FilePath, data: Tree) -> Path:
    """Writes a tree of tensors as a folder of ``.npy`` files, which appears when it is whole; returns its path.

    Raises:
        As :func:`create_arrays`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in save_arrays(f"{folder}/data", {"a": {"b": torch.ones(2)}}).iterdir())
    ['a.b.npy']
    """
    with create_arrays(folder, data) as arrays:
        tree.map(lambda array, x: array.copy_(x.detach()), arrays, data)
    return Path(folder)
