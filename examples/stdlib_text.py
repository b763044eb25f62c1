"""The text of Python's standard library, and what models of bytes without a network make of it.

The corpus: the ``.py`` files below ``sysconfig.get_path("stdlib")``, sorted by path, but those in folders named
``test``, ``tests``, ``idle_test`` (tests) and ``site-packages``, ``dist-packages`` (other people's). Shuffled with key
0, the last tenth of the files, whole ones, is held out; the files of each part are put one after the other.
"""

import bz2
import lzma
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

import functorch_gen as fg

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def stdlib_files() -> list[Path]:
    """The files of the corpus, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    return [file for file in sorted(root.rglob("*.py")) if not LEFT_OUT & set(file.relative_to(root).parts)]


def load() -> tuple[Tensor, Tensor]:
    """The bytes of the training files and of those held out: (n,), (m,), uint8."""
    files = stdlib_files()
    order = fg.random.permutation(fg.random.key(0), len(files)).tolist()
    kept = len(files) - len(files) // 10
    return _joined([files[i] for i in order[:kept]]), _joined([files[i] for i in order[kept:]])


def _joined(files: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def compressed(text: Tensor) -> dict[str, float]:
    """Bits per byte of the compressors of Python, at their best setting, on the text alone."""
    data = bytes(text.tolist())
    sizes = {"bz2 -9": len(bz2.compress(data, 9)), "lzma -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def ngram_bits(train: Tensor, text: Tensor, orders: int) -> list[float]:
    """Bits per byte of the text by contexts of 0, 1, ..., ``orders`` bytes counted in ``train``: Witten and Bell.

    P_n(c | s) = (count(s c) + kinds(s) P_(n-1)(c | s without its first byte)) / (count(s) + kinds(s)), where kinds(s)
    is the number of different bytes that followed s, and P_(-1) = 1 / 256.

    Source: Witten and Bell 1991, method C, "The zero-frequency problem"; in this form: Chen and Goodman 1996, section
    2.4, arXiv:cmp-lg/9606011.
    """
    p = torch.full((len(text),), 1 / 256, dtype=torch.float64)
    bits = []
    for n in range(orders + 1):
        strings, counts = torch.unique(_strings(train, n + 1), return_counts=True)
        contexts, which = torch.unique_consecutive(strings >> 8, return_inverse=True)
        kinds = torch.bincount(which)
        totals = torch.zeros_like(kinds).index_add(0, which, counts)
        asked = _strings(text, n + 1)
        count = _look_up(strings, counts, asked)
        total, kind = (_look_up(contexts, values, asked >> 8) for values in (totals, kinds))
        p = torch.where(total > 0, (count + kind * p) / (total + kind).clamp(min=1), p)
        bits.append(float(-p.log2().mean()))
    return bits


def _strings(text: Tensor, n: int) -> Tensor:
    """The n bytes that end at each place, as one number; before the text stand line feeds."""
    padded = torch.cat([text.new_full((n - 1,), ord("\n")), text])
    codes = torch.zeros(len(text), dtype=torch.int64)
    for i in range(n):
        codes = 256 * codes + padded[i : i + len(text)]
    return codes


def _look_up(keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """The value of each key asked for, 0 for others; keys are sorted."""
    place = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == asked, values[place], 0)
