"""Images as PNG files: grids, and the way of samples from noise to data.

Images are drawn pixel by pixel: with ``scale=1`` the file holds, between the gaps, exactly the rounded pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor

from functorch_gen.check import check_choice, check_floating, check_positive, check_shape
from functorch_gen.plot.figure import FilePath, require

__all__ = ["image_grid", "image_path"]

_GAP = 2  # pixels between images
_MARGIN = 12
_CELL = 56  # about how many pixels a small image is enlarged to
_FONT, _TITLE_FONT = 14, 17
_INK, _PAPER = (40, 40, 40), 255


def image_grid(
    images: Tensor,
    path: FilePath,
    *,
    rows: int | None = None,
    columns: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    scale: int | None = None,
) -> Path:
    """Writes images (n, c, h, w) as a grid, row by row, and returns the path; c is 1 (grey) or 3 (red, green, blue).

    Args:
        rows, columns: by default as square as possible; what the images do not fill stays blank.
        value_range: the values drawn black and white; what lies outside is clipped.
        row_labels, column_labels: one for each row or column, or none.
        scale: pixels of the file for a pixel of an image; by default images are about 56 pixels high.
    Raises:
        TypeError: if ``images`` is no floating-point tensor.
        ValueError: if it is not (n, c, h, w) with c 1 or 3, holds NaN, does not fit into rows times columns, or the
            labels do not.
        ImportError: without Pillow.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image_grid(torch.zeros(6, 1, 8, 8), Path(folder) / "grid.png", columns=3).name
    'grid.png'
    """
    pixels = _pixels(images, value_range)
    rows, columns = _layout(pixels.shape[0], rows, columns)
    for name, labels, count in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels and len(labels) != count:
            raise ValueError(f"image_grid: expected {count} {name}, got {len(labels)}")
    scale = max(1, round(_CELL / pixels.shape[1])) if scale is None else scale
    check_positive("image_grid", scale=scale)
    return _save_grid(_mosaic(pixels, rows, columns, scale), path, row_labels, column_labels, title)


def image_path(
    images: Tensor,
    path: FilePath,
    *,
    times: Sequence[float] | Tensor | None = None,
    columns: int = 10,
    value_range: tuple[float, float] = (-1.0, 1.0),
    title: str = "",
    scale: int | None = None,
) -> Path:
    """Writes the way of samples from noise to data, (steps, n, c, h, w): a row for each sample, time to the right.

    Args:
        times: (steps,), written above the columns.
        columns: how many of the steps to draw, evenly spaced, the first and last among them.
    Raises:
        ValueError: as :func:`image_grid`; if ``images`` is not (steps, n, c, h, w) or ``times`` not (steps,).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image_path(torch.zeros(21, 4, 1, 8, 8), Path(folder) / "path.png", times=torch.linspace(1, 0, 21)).name
    'path.png'
    """
    steps = check_shape(images, "steps n c h w", "image_path: images")["steps"]
    check_positive("image_path", columns=columns)
    if times is not None and len(times) != steps:
        raise ValueError(f"image_path: expected times ({steps},), one for each step of images, got ({len(times)},)")
    chosen = torch.linspace(0, steps - 1, min(columns, steps)).round().long()
    return image_grid(
        rearrange(images[chosen.to(images.device)], "steps n c h w -> (n steps) c h w"),
        path,
        columns=len(chosen),
        value_range=value_range,
        column_labels=[] if times is None else [f"t = {float(times[i]):.2f}" for i in chosen.tolist()],
        title=title,
        scale=scale,
    )


def _pixels(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """(n, c, h, w) -> (n, h, w, 3) uint8 on the CPU."""
    channels = check_shape(images, "n c h w", "image_grid: images")["c"]
    check_floating(images, "image_grid: images")
    check_choice("image_grid", "the number of channels", channels, (1, 3))
    check_positive("image_grid", images=images.numel())
    low, high = value_range
    if not low < high:
        raise ValueError(f"image_grid: expected value_range (low, high) with low < high, got {value_range}")
    if images.isnan().any():
        raise ValueError("image_grid: images: expected no NaN, got one")
    unit = ((images.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
    return repeat((255 * unit).round().byte(), "n c h w -> n h w (c three)", three=3 // channels)


def _layout(n: int, rows: int | None, columns: int | None) -> tuple[int, int]:
    given = {"rows": rows, "columns": columns}
    check_positive("image_grid", **{name: count for name, count in given.items() if count is not None})
    if columns is None:
        columns = math.ceil(n / rows) if rows else math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns) if rows is None else rows
    if rows * columns < n:
        raise ValueError(f"image_grid: expected rows * columns >= {n}, the number of images, got {rows} * {columns}")
    return rows, columns


def _mosaic(pixels: Tensor, rows: int, columns: int, scale: int) -> Tensor:
    """Images on white paper, gaps between them: (n, h, w, 3) -> (rows (h scale + gap) - gap, ..., 3)."""
    n, h, w, _ = pixels.shape
    cells = pixels.new_full((rows * columns, h * scale + _GAP, w * scale + _GAP, 3), _PAPER)
    cells[:n, : h * scale, : w * scale] = repeat(pixels, "n h w c -> n (h s) (w t) c", s=scale, t=scale)
    return rearrange(cells, "(r k) h w c -> (r h) (k w) c", k=columns)[:-_GAP, :-_GAP]


def _save_grid(
    mosaic: Tensor, path: FilePath, row_labels: Sequence[str], column_labels: Sequence[str], title: str
) -> Path:
    """Puts the mosaic (h, w, 3) on a sheet with its labels, which are centred on their rows and columns."""
    image, draw_on, fonts = (require(f"PIL.{part}") for part in ("Image", "ImageDraw", "ImageFont"))
    font, title_font = fonts.load_default(_FONT), fonts.load_default(_TITLE_FONT)
    height, width = mosaic.shape[:2]
    left = _MARGIN + (max(int(font.getlength(label)) for label in row_labels) + _MARGIN // 2 if row_labels else 0)
    top = _MARGIN + (_TITLE_FONT + _MARGIN if title else 0) + (_FONT + _MARGIN // 2 if column_labels else 0)
    right = left + max(width, math.ceil(title_font.getlength(title)) if title else 0) + _MARGIN
    sheet = image.new("RGB", (right, top + height + _MARGIN), (_PAPER,) * 3)
    sheet.paste(image.fromarray(mosaic.contiguous().numpy()), (left, top))
    pen = draw_on.Draw(sheet)
    pen.text((left, _MARGIN), title, fill=_INK, font=title_font, anchor="lt")
    for i, label in enumerate(row_labels):
        y = top + (i + 0.5) * (height + _GAP) / len(row_labels)
        pen.text((left - _MARGIN // 2, y), label, fill=_INK, font=font, anchor="rm")
    for i, label in enumerate(column_labels):
        x = left + (i + 0.5) * (width + _GAP) / len(column_labels)
        pen.text((x, top - _MARGIN // 2), label, fill=_INK, font=font, anchor="ms")
    sheet.save(path, format="PNG")
    return Path(path)
