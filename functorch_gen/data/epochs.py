"""Epochs of batches without replacement: batch n is a pure function of (key, n), so a run resumes at any step."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_positive
from functorch_gen.typing import Key, Tree

__all__ = ["batch_indices", "batches"]


def batch_indices(key: Key, size: int, batch_size: int, step: int) -> Tensor:
    """Which examples batch ``step`` holds: -> (batch_size,) int64.

    Every epoch goes through a new permutation of all ``size`` examples, drawn from ``fold_in(key, epoch)``, and leaves
    out the ``size % batch_size`` at its end.

    Raises:
        ValueError: if ``size`` or ``batch_size`` < 1, ``batch_size`` > ``size`` or ``step`` < 0.

    >>> both = [batch_indices(random.key(0), 6, 3, step) for step in (0, 1)]
    >>> torch.cat(both).sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    epoch, position = divmod(step, _batches_per_epoch("batch_indices", size, batch_size, step))
    return _cut(random.permutation(random.fold_in(key, epoch), size), batch_size, position)


def _batches_per_epoch(name: str, size: int, batch_size: int, step: int) -> int:
    check_positive(name, size=size, batch_size=batch_size)
    if batch_size > size:
        raise ValueError(f"{name}: expected batch_size <= {size}, the number of examples, got {batch_size}")
    if step < 0:
        raise ValueError(f"{name}: expected a step >= 0, got {step}")
    return size // batch_size


def _cut(order: Tensor, batch_size: int, position: int) -> Tensor:
    return order[position * batch_size : (position + 1) * batch_size]


def batches(key: Key, data: Tree, batch_size: int, *, steps: int | None = None, start: int = 0) -> Iterator[Tree]:
    """Iterates over batches of ``data``, a tree of tensors (n, ...) -> trees of (batch_size, ...).

    Batch n holds the examples ``batch_indices(key, n, ...)``, wherever the iteration starts.

    Args:
        steps: how many batches; None for no end.
        start: step of the first batch: ``int(train_state.step)`` to resume a run.
    Raises:
        TypeError: if a leaf is no tensor; names its path.
        ValueError: at the call, if the leaves differ in their number of examples (names the path), ``batch_size`` is
            not in [1, n], ``steps`` < 1 or ``start`` < 0.

    >>> data = {"x": torch.arange(6) * 10, "label": torch.arange(6)}
    >>> batch = next(batches(random.key(0), data, 4))
    >>> batch["x"].shape, torch.equal(batch["x"], batch["label"] * 10)
    (torch.Size([4]), True)
    """
    size = _number_of_examples(data)
    if steps is not None:
        check_positive("batches", steps=steps)
    _batches_per_epoch("batches", size, batch_size, start)
    counter = itertools.count(start) if steps is None else range(start, start + steps)
    return _iterate(key, data, size, batch_size, iter(counter))


def _iterate(key: Key, data: Tree, size: int, batch_size: int, counter: Iterator[int]) -> Iterator[Tree]:
    drawn, order = -1, torch.zeros(0)
    for step in counter:
        epoch, position = divmod(step, size // batch_size)
        if epoch != drawn:
            drawn, order = epoch, random.permutation(random.fold_in(key, epoch), size)
        indices = _cut(order, batch_size, position)
        yield tree.map(lambda x, indices=indices: x[indices.to(x.device)], data)


def _number_of_examples(data: Tree) -> int:
    """The size of the leading axis, which all leaves share."""
    size: int | None = None
    for path, x in tree.names(data).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"batches: data: expected a tensor at {path!r}, got {type(x).__name__}")
        if x.ndim == 0 or size not in (None, x.shape[0]):
            examples = "n" if size is None else size
            raise ValueError(f"batches: data: expected shape ({examples}, ...) at {path!r}, got {tuple(x.shape)}")
        size = x.shape[0]
    if size is None:
        raise ValueError("batches: data: expected at least one leaf, got an empty tree")
    return size
