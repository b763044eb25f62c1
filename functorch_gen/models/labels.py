"""Class labels of conditional networks, where one more label says "no class"."""

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.typing import Key

__all__ = ["check_integer", "check_labels", "drop_labels"]


def check_integer(label: Tensor, name: str) -> None:
    """Raises ``TypeError`` when ``label`` is no tensor of integers that can index.

    >>> check_integer(torch.zeros(2), "UNet: label")
    Traceback (most recent call last):
        ...
    TypeError: UNet: label: expected an int64 or int32 tensor, got torch.float32
    """
    if not isinstance(label, Tensor) or label.dtype not in (torch.int64, torch.int32):
        got = label.dtype if isinstance(label, Tensor) else type(label).__name__
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {got}")


def check_labels(label: Tensor, num_classes: int) -> None:
    """Checks that every label is a class 0 .. num_classes - 1 or ``num_classes``, "no class".

    Reads the values: call it on the data before training, not inside a traced function.

    Raises:
        TypeError: if ``label`` is no integer tensor.
        ValueError: if a label is out of range; names the first and its index.

    >>> check_labels(torch.tensor([0, 9, 10]), num_classes=10)
    >>> check_labels(torch.tensor([0, 11]), num_classes=10)
    Traceback (most recent call last):
        ...
    ValueError: check_labels: expected labels in 0..10, got 11 at index 1
    """
    check_integer(label, "check_labels: label")
    wrong = ((label < 0) | (label > num_classes)).flatten().nonzero().flatten().tolist()
    if wrong:
        value = int(label.flatten()[wrong[0]])
        raise ValueError(f"check_labels: expected labels in 0..{num_classes}, got {value} at index {wrong[0]}")


def drop_labels(key: Key, label: Tensor, rate: float, num_classes: int) -> Tensor:
    """Replaces each label by ``num_classes``, "no class", with probability ``rate``: (...) -> (...).

    Trains the conditional and the unconditional model at once, for classifier-free guidance.

    Source: Ho and Salimans 2022, algorithm 1, arXiv:2207.12598.

    >>> drop_labels(random.key(0), torch.arange(3), rate=1.0, num_classes=10)
    tensor([10, 10, 10])
    """
    dropped = random.bernoulli(key, rate, tuple(label.shape))
    return torch.where(dropped, num_classes, label)
