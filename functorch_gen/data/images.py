"""Folders of pictures, a class each, as a data set that decodes what it is asked for."""

import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from functorch_gen.check import check_choice, check_positive

__all__ = ["ImageFolder", "image_folder"]

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by number of channels


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError("image_folder: needs Pillow: pip install functorch_gen[plot]") from error


@dataclass(frozen=True)
class ImageFolder(Dataset[dict[str, Tensor]]):
    """What :func:`image_folder` finds; ``dataset[i]`` is ``{"image": (c, h, w), "label": ()}``.

    >>> dataset = ImageFolder(("cat", "dog"), (Path("dog/0.png"),), (1,), (8, 8), 3, torch.uint8)
    >>> len(dataset), dataset.classes[dataset.labels[0]]
    (1, 'dog')
    """

    classes: tuple[str, ...]
    files: tuple[Path, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    size: tuple[int, int]
    channels: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Decodes and resizes one picture (bilinear, antialiased)."""
        image = _pillow()
        height, width = self.size
        with image.open(self.files[index]) as file:
            picture = file.convert(_MODES[self.channels]).resize((width, height), image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        x = rearrange(pixels, "(h w c) -> c h w", h=height, w=width).contiguous()
        x = x if self.dtype == torch.uint8 else x.to(self.dtype) / 255
        return {"image": x, "label": torch.tensor(self.labels[index])}


def image_folder(
    folder: str | os.PathLike[str],
    size: tuple[int, int],
    *,
    channels: int = 3,
    dtype: torch.dtype = torch.uint8,
) -> ImageFolder:
    """The pictures of a folder that has a folder for each class, as a map-style data set for :func:`loader`.

    Classes are numbered in the order of their names; files come class by class, in the order of theirs, from folders
    within as well. What does not end like a picture is left out.

    Args:
        size: (height, width) to which all are resized.
        channels: 1 (grey), 3 (red, green, blue) or 4 (and alpha).
        dtype: uint8 in [0, 255], or a floating dtype in [0, 1].
    Raises:
        ImportError: if Pillow is not installed.
        FileNotFoundError: if there is no such folder, or no picture in it.

    >>> import tempfile
    >>> from functorch_gen.plot import image_grid
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         Path(folder, name).mkdir()
    ...         _ = image_grid(torch.ones(1, 1, 8, 8), Path(folder, name, "0.png"))
    ...     dataset = image_folder(folder, (8, 8), channels=1)
    ...     dataset.classes, dataset[1]["image"].shape, dataset[1]["label"]
    (('cat', 'dog'), torch.Size([1, 8, 8]), tensor(1))
    """
    _pillow()
    check_positive("image_folder", height=size[0], width=size[1])
    check_choice("image_folder", "channels", channels, _MODES)
    if not (dtype.is_floating_point or dtype == torch.uint8):
        raise ValueError(f"image_folder: expected dtype uint8 or a floating one, got {dtype}")
    classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    found = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted(Path(folder, name).rglob("*"))
        if file.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise FileNotFoundError(f"image_folder: expected pictures in folders of {str(folder)!r}, got none")
    files, labels = zip(*found)
    return ImageFolder(tuple(classes), files, labels, (size[0], size[1]), channels, dtype)
