"""Trees through torch's DataLoader: batches that depend on a key, not on the workers or a global generator."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from functorch_gen import random, tree
from functorch_gen.check import check_positive
from functorch_gen.data.epochs import batch_indices, in_epochs, number_of_examples
from functorch_gen.typing import Key, Tree

__all__ = ["TreeDataset", "collate", "loader"]


class TreeDataset(Dataset[Tree]):
    """A tree of tensors (n, ...), in memory or memory-mapped, as a map-style data set of n trees.

    Raises:
        TypeError: if a leaf is no tensor; names its path.
        ValueError: if the leaves differ in their number of examples; names the path.

    >>> dataset = TreeDataset({"x": torch.eye(2), "label": torch.tensor([5, 7])})
    >>> len(dataset), dataset[1]
    (2, {'x': tensor([0., 1.]), 'label': tensor(7)})
    """

    def __init__(self, data: Tree):
        self.size = number_of_examples("TreeDataset", data)
        self.data = data

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tree:
        return tree.map(lambda x: x[index], self.data)


def collate(examples: Sequence[Tree]) -> Tree:
    """One batch of examples, trees of one structure: tensors are stacked, numbers become tensors (b,), strings a list.

    For torch's ``DataLoader(dataset, collate_fn=collate)``. Floats become the default dtype, ints int64; numpy arrays
    are tensors.

    Raises:
        TypeError: if a leaf is none of these; names its path.
        ValueError: if there is no example, or structures or shapes differ; names the path.

    >>> collate([{"x": torch.zeros(2), "y": (1, "a")}, {"x": torch.ones(2), "y": (2, "b")}])
    {'x': tensor([[0., 0.],
            [1., 1.]]), 'y': (tensor([1, 2]), ['a', 'b'])}
    """
    if not examples:
        raise ValueError("collate: expected at least one example, got none")
    return tree.map_with_path(lambda path, *leaves: _join(path, leaves), *examples)


def _join(path: str, leaves: tuple[Any, ...]) -> Any:
    first = leaves[0]
    if isinstance(first, str | bytes):
        return list(leaves)
    if isinstance(first, bool | int | float):
        return torch.tensor(leaves)
    if not isinstance(first, Tensor) and not hasattr(first, "__array__"):
        raise TypeError(f"collate: expected tensors, numbers or strings at {path!r}, got {type(first).__name__}")
    tensors = [torch.as_tensor(x) for x in leaves]
    shape = tensors[0].shape
    other = next((x for x in tensors if x.shape != shape), None)
    if other is not None:
        raise ValueError(f"collate: expected shape {tuple(shape)} at {path!r}, got {tuple(other.shape)}")
    return torch.stack(tensors)


class _Keyed(Dataset[Tree]):
    """Examples by (epoch, index), each transformed with a key of its own."""

    def __init__(self, dataset: Dataset[Any], key: Key, transform: Callable[[Key, Tree], Tree] | None):
        self.dataset, self.key, self.transform = dataset, key, transform

    def __getitem__(self, place: tuple[int, int]) -> Tree:
        epoch, index = place
        example = self.dataset[index]
        if self.transform is None:
            return example
        return self.transform(random.fold_in(random.fold_in(self.key, epoch), index), example)


class _Steps(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of every example of a batch, for one step after another."""

    def __init__(self, key: Key, size: int, batch_size: int, counter: Callable[[], Iterable[int]]):
        self.key, self.size, self.batch_size, self.counter = key, size, batch_size, counter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, indices in in_epochs(self.key, self.size, self.batch_size, self.counter()):
            yield [(epoch, index) for index in indices.tolist()]


def loader(
    key: Key,
    dataset: Any,
    batch_size: int,
    *,
    transform: Callable[[Key, Tree], Tree] | None = None,
    steps: int | None = None,
    start: int = 0,
    **options: Any,
) -> DataLoader[Tree]:
    """A DataLoader whose batch n is a pure function of (key, n), whatever ``num_workers``, as that of :func:`batches`.

    It holds the examples ``batch_indices(key, n, ...)``, collated by :func:`collate`.

    Args:
        dataset: map-style: ``len(dataset)`` and ``dataset[i]``, a tree, without a draw of its own.
        transform: ``transform(key, example) -> example``, run by the workers. The key of example i in epoch e is
            ``fold_in(fold_in(fold_in(key, -1), e), i)``; no epoch has the number -1.
        steps: how many batches; None for no end.
        start: step of the first batch: ``int(train_state.step)`` to resume a run.
        options: more of torch's DataLoader: ``num_workers``, ``pin_memory``, ``prefetch_factor``, ...
    Raises:
        ValueError: if ``batch_size`` is not in [1, n], ``steps`` < 1 or ``start`` < 0.

    >>> dataset = TreeDataset({"x": torch.arange(6)})
    >>> batch = next(iter(loader(random.key(0), dataset, 3, transform=lambda key, example: example, start=1)))
    >>> torch.equal(batch["x"], batch_indices(random.key(0), 6, 3, step=1))
    True
    """
    size = len(dataset)
    batch_indices(key, size, batch_size, start)  # raises
    if steps is not None:
        check_positive("loader", steps=steps)

    def counter() -> Iterable[int]:
        return itertools.count(start) if steps is None else range(start, start + steps)

    return DataLoader(
        _Keyed(dataset, random.fold_in(key, -1), transform),
        batch_sampler=_Steps(key, size, batch_size, counter),
        collate_fn=collate,
        generator=Generator(),  # torch draws a seed for its workers, which nothing here uses: not from the global one
        **options,
    )
