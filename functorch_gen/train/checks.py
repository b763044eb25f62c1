"""What to look at before a long run: the data, and the folder that its results go to."""

import os
from pathlib import Path

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.typing import Tree

__all__ = ["check_data", "check_writable"]


def check_data(data: Tree, name: str = "check_data: data") -> None:
    """Checks that every leaf is a tensor without NaN or infinity.

    Raises:
        TypeError: if a leaf is no tensor; names its path.
        ValueError: if a value is not finite; names the path and the first such example.

    >>> check_data({"image": torch.tensor([0.0, float("nan")])})
    Traceback (most recent call last):
        ...
    ValueError: check_data: data: expected finite values at 'image', got nan at index (1,)
    """
    for path, x in tree.names(data).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor at {path!r}, got {type(x).__name__}")
        finite = torch.isfinite(x)
        if not finite.all():
            index = tuple((~finite).nonzero()[0].tolist())
            raise ValueError(f"{name}: expected finite values at {path!r}, got {x[index].item()} at index {index}")


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Makes sure that files can be written into ``folder``, which is made if it does not exist; returns its path.

    Raises:
        NotADirectoryError: if the folder, or one above it, is a file.
        PermissionError: if the folder may not be made or written into.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check_writable(Path(folder) / "runs" / "first").is_dir()
    True
    """
    path = Path(folder)
    existing = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not existing.is_dir():
        of = "" if existing == path else f" on the way to {str(path)!r}"
        raise NotADirectoryError(f"check_writable: expected a folder, got the file {str(existing)!r}{of}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"check_writable: expected a writable folder, got {str(path)!r} (no right to {existing})")
    path.mkdir(parents=True, exist_ok=True)
    return path
