"""Safetensors files that are whole or absent, and tell when a bit of them has changed.

The header holds a SHA-256 of the file, taken with zeros in its own place.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

__all__ = ["CheckpointError", "check_whole", "read_manifest", "safetensors", "write"]

_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')
_BLANK = "0" * 64
_TEMPORARY = ".checkpoint-tmp"


class CheckpointError(ValueError):
    """A file that is no checkpoint, or no longer the one that was written: truncated, or with other bits."""


def safetensors(name: str) -> Any:
    """The library, for the function ``name``.

    Raises:
        ImportError: that says what to install.
    """
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(f"{name}: needs safetensors: pip install functorch_gen[train]") from error


def write(path: Path, tensors: dict[str, Tensor], manifest: Any) -> None:
    """Writes a whole file or none: in a temporary folder beside it, to the disk, renamed."""
    safetensors("checkpoint.save")
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    header = {"checksum": _BLANK, "manifest": json.dumps(manifest)}
    with _locked(path.parent) as descriptor:
        folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
        folder.mkdir()
        try:
            new = folder / "new"
            save_file(tensors, new, header)  # has temporary files of its own, hence the folder
            new.chmod(folder.stat().st_mode & 0o666)
            _seal(new)
            new.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        os.fsync(descriptor)  # the new name, too, is on the disk


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Marks a folder as being written into; removes what killed writers have left if no living one is at work there.

    The system drops the lock with the process.
    """
    import fcntl  # not on Windows, where the rest of the package shall be imported all the same

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(f".*{_TEMPORARY}"):
                shutil.rmtree(left, ignore_errors=True)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)


def _seal(path: Path) -> None:
    """Puts the checksum into its place and the file onto the disk."""
    with open(path, "r+b") as file:
        position, _, digest = _checksum(file)
        file.seek(position)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _checksum(file: BinaryIO) -> tuple[int, bytes, bytes]:
    """Where the checksum stands in a file, what stands there, and what should."""
    length = file.read(8)
    header = file.read(int.from_bytes(length, "little"))
    found = _CHECKSUM.search(header)
    if found is None:
        raise CheckpointError("it has no checksum")
    digest = hashlib.sha256(length + header[: found.start(1)] + _BLANK.encode() + header[found.end(1) :])
    while chunk := file.read(1 << 22):
        digest.update(chunk)
    return 8 + found.start(1), found[1], digest.hexdigest().encode()


def check_whole(name: str, path: Path) -> None:
    """Compares the checksum in a file with that of the file.

    Raises:
        CheckpointError: if it is truncated or corrupt, or has none.
    """
    whole = f"{name}: expected a whole checkpoint, got {str(path)!r}"
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 8 + int.from_bytes(file.read(8), "little"):
            raise CheckpointError(f"{whole}: its header is truncated")
        file.seek(0)
        try:
            _, stands, should = _checksum(file)
        except CheckpointError as error:
            raise CheckpointError(f"{whole}: {error}") from None
    if stands != should:
        raise CheckpointError(f"{whole}: it is truncated or corrupt (its checksum is another)")


def read_manifest(name: str, path: Path) -> Any:
    """What :func:`write` was given as ``manifest``, from the header of the file.

    Raises:
        CheckpointError: if the header is truncated or corrupt, or has none.
    """
    library = safetensors(name)
    try:
        with library.safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["manifest"])
    except (library.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{name}: expected a checkpoint, got {str(path)!r}: {error!r}") from None
