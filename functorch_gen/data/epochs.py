"""Epochs of batches without replacement: batch n is a pure function of (key, n), so a run resumes at any step."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_positive
from functorch_gen.data.sampling import check_weights, weighted_indices
from functorch_gen.typing import Key, Tree

__all__ = ["batch_indices", "batches", "epoch_batches", "in_epochs", "number_of_examples"]


def batch_indices(key: Key, size: int, batch_size: int, step: int | Tensor) -> Tensor:
    """Which examples batch ``step`` holds: -> (batch_size,) int64.

    Every epoch goes through a new permutation of all ``size`` examples, drawn from ``fold_in(key, epoch)``, and leaves
    out the ``size % batch_size`` at its end. Epoch and place in it are ``divmod(step, size // batch_size)``.

    Args:
        step: a number, or a 0-d tensor in a function that is jitted or vmapped.
    Raises:
        ValueError: if ``size`` or ``batch_size`` < 1, ``batch_size`` > ``size`` or ``step`` < 0.

    >>> both = [batch_indices(random.key(0), 6, 3, step) for step in (0, 1)]
    >>> torch.cat(both).sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    per_epoch = _batches_per_epoch("batch_indices", size, batch_size, step)
    order = random.permutation(random.fold_in(key, step // per_epoch), size)
    return order[step % per_epoch * batch_size + torch.arange(batch_size, device=order.device)]


def _batches_per_epoch(name: str, size: int, batch_size: int, step: int | Tensor) -> int:
    check_positive(name, size=size, batch_size=batch_size)
    if batch_size > size:
        raise ValueError(f"{name}: expected batch_size <= {size}, the number of examples, got {batch_size}")
    if not isinstance(step, Tensor) and step < 0:
        raise ValueError(f"{name}: expected a step >= 0, got {step}")
    return size // batch_size


def batches(
    key: Key,
    data: Tree,
    batch_size: int,
    *,
    weights: Tensor | None = None,
    steps: int | None = None,
    start: int = 0,
) -> Iterator[Tree]:
    """Iterates over batches of ``data``, a tree of tensors (n, ...) -> trees of (batch_size, ...).

    Batch n holds the examples ``batch_indices(key, n, ...)``, or those of ``weighted_indices``, wherever the iteration
    starts.

    Args:
        weights: (n,), draws with replacement and these probabilities: see :func:`balanced_weights`.
        steps: how many batches; None for no end.
        start: step of the first batch: ``int(train_state.step)`` to resume a run.
    Raises:
        TypeError: if a leaf is no tensor; names its path.
        ValueError: at the call, if the leaves differ in their number of examples (names the path), ``batch_size`` is
            not in [1, n] (with weights, < 1), ``weights`` are not (n,), ``steps`` < 1 or ``start`` < 0.

    >>> data = {"x": torch.arange(6) * 10, "label": torch.arange(6)}
    >>> batch = next(batches(random.key(0), data, 4))
    >>> batch["x"].shape, torch.equal(batch["x"], batch["label"] * 10)
    (torch.Size([4]), True)
    """
    size = number_of_examples("batches", data)
    if steps is not None:
        check_positive("batches", steps=steps)
    check_positive("batches", batch_size=batch_size)
    _batches_per_epoch("batches", size, batch_size if weights is None else 1, start)  # with replacement, of any size
    if weights is not None:
        check_weights("batches", weights, n=size)
    counter = itertools.count(start) if steps is None else range(start, start + steps)
    if weights is None:
        return (_take(data, indices) for _, indices in in_epochs(key, size, batch_size, counter))
    return (_take(data, weighted_indices(key, weights, batch_size, step)) for step in counter)


def in_epochs(key: Key, size: int, batch_size: int, counter: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """The epoch and the ``batch_indices`` of every step; an epoch's permutation is drawn once."""
    drawn, order = -1, torch.zeros(0)
    for step in counter:
        epoch, position = divmod(step, size // batch_size)
        if epoch != drawn:
            drawn, order = epoch, random.permutation(random.fold_in(key, epoch), size)
        yield epoch, order[position * batch_size : (position + 1) * batch_size]


def _take(data: Tree, indices: Tensor) -> Tree:
    return tree.map(lambda x: x[indices.to(x.device)], data)


def epoch_batches(data: Tree, batch_size: int, *, drop_last: bool = False) -> Iterator[Tree]:
    """Goes once through ``data``, a tree of tensors (n, ...), in its order: for evaluation. The batches are views.

    Args:
        drop_last: leaves out the ``n % batch_size`` examples at the end, which otherwise make a smaller last batch (and
            a jitted function is compiled anew for it).
    Raises:
        TypeError: if a leaf is no tensor; names its path.
        ValueError: at the call, if the leaves differ in their number of examples (names the path), or ``batch_size``
            < 1.

    >>> [len(batch) for batch in epoch_batches(torch.arange(7), 3)]
    [3, 3, 1]
    """
    size = number_of_examples("epoch_batches", data)
    check_positive("epoch_batches", batch_size=batch_size)
    stop = size - size % batch_size if drop_last else size
    starts = range(0, stop, batch_size)
    return (tree.map(lambda x, start=start: x[start : start + batch_size], data) for start in starts)


def number_of_examples(name: str, data: Tree) -> int:
    """The size of the leading axis, which all leaves share."""
    size: int | None = None
    for path, x in tree.names(data).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: data: expected a tensor at {path!r}, got {type(x).__name__}")
        if x.ndim == 0 or size not in (None, x.shape[0]):
            examples = "n" if size is None else size
            raise ValueError(f"{name}: data: expected shape ({examples}, ...) at {path!r}, got {tuple(x.shape)}")
        size = x.shape[0]
    if size is None:
        raise ValueError(f"{name}: data: expected at least one leaf, got an empty tree")
    return size
