"""Losses of embeddings: cosines, triplets and contrasts, among the last axis of (b, ..., d) or (b, d)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_number, check_shape
from functorch_gen.losses.categorical import cross_entropy
from functorch_gen.losses.per_example import check_alike, in_float32, mean_per_example
from functorch_gen.typing import Number

__all__ = [
    "cosine_distance",
    "cosine_embedding_loss",
    "info_nce",
    "ntxent",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
]


@in_float32
def cosine_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """1 - x.y / (|x| |y|) over the last axis, averaged over the others: (b, ..., d), (b, ..., d) -> (b,).

    1 with derivatives 0 where a vector is 0. Elsewhere equals ``optax.cosine_distance``.

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ.

    >>> cosine_distance(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    tensor([0.4000, 1.0000])
    """
    _check_vectors("cosine_distance", predictions=predictions, targets=targets)
    return mean_per_example(1 - numerics.cosine_similarity(predictions, targets))


def _check_vectors(name: str, **tensors: Tensor) -> None:
    check_alike(name, **tensors)
    argument, x = next(iter(tensors.items()))
    if x.ndim < 2:
        raise ValueError(f"{name}: {argument}: expected shape (b, ..., d), got {tuple(x.shape)}")


_LEAST_SQUARE = 9.999999960041972e-13  # 1e-12 in float32, as torch has it


@in_float32
def cosine_embedding_loss(x: Tensor, y: Tensor, targets: Tensor, *, margin: Number = 0.0) -> Tensor:
    """1 - cos(x, y) for the target 1, max(0, cos(x, y) - margin) for -1: (b, d), (b, d), (b,) -> (b,).

    Equals ``torch.nn.functional.cosine_embedding_loss(reduction="none")``, whose squared norms have 1e-12 added.

    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if a shape differs.

    >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    >>> cosine_embedding_loss(x, y, torch.tensor([1])), cosine_embedding_loss(x, y, torch.tensor([-1]), margin=0.5)
    (tensor([0.4000]), tensor([0.1000]))
    """
    check_number("cosine_embedding_loss", "margin", margin)
    check_alike("cosine_embedding_loss", x=x, y=y)
    b = check_shape(x, "b d", "cosine_embedding_loss: x")["b"]
    check_shape(targets, "b", "cosine_embedding_loss: targets", b=b)
    squares = ((x * x).sum(1) + _LEAST_SQUARE) * ((y * y).sum(1) + _LEAST_SQUARE)
    cosine = (x * y).sum(1) / squares.sqrt()
    near = torch.where(targets == 1, 1 - cosine, 0.0)
    return near + torch.where(targets == -1, (cosine - margin).clamp(min=0.0), 0.0)


@in_float32
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: Number = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
) -> Tensor:
    """max(0, d(a, p) - d(a, n) + margin) with d(x, y) = |x - y + eps|_p: (b, ..., d) x 3 -> (b,).

    Averaged over the axes between. Equals ``torch.nn.functional.triplet_margin_loss``; the derivatives of d at 0 are 0.

    Args:
        swap: takes the smaller of d(a, n) and d(p, n).
    Raises:
        TypeError: if the anchors are not floating.
        ValueError: if a shape differs, or ``p`` < 1.
    Source: Balntas et al. 2016, Learning local feature descriptors with triplets and shallow convolutional networks.

    >>> a, n = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    >>> triplet_margin_loss(a, n, a)
    tensor([6.0000])
    """
    check_number("triplet_margin_loss", "p", p, low=1)
    check_number("triplet_margin_loss", "margin", margin)
    _check_vectors("triplet_margin_loss", anchor=anchor, positive=positive, negative=negative)
    return triplet_margin_with_distance_loss(
        anchor,
        positive,
        negative,
        distance_function=partial(_pairwise_distance, p=p, eps=eps),
        margin=margin,
        swap=swap,
    )


@in_float32
def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: Number = 1.0,
    swap: bool = False,
) -> Tensor:
    """max(0, d(a, p) - d(a, n) + margin) with any distance, averaged over the other axes: (b, ...) x 3 -> (b,).

    Equals ``torch.nn.functional.triplet_margin_with_distance_loss``.

    Args:
        distance_function: ``(x, y) -> (b, ...)``; by default that of :func:`triplet_margin_loss`.
        swap: takes the smaller of d(a, n) and d(p, n).
    Raises:
        TypeError: if the anchors are not floating.
        ValueError: if the shapes differ.

    >>> a, n = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    >>> triplet_margin_with_distance_loss(a, n, a, distance_function=lambda x, y: (x - y).abs().sum(-1))
    tensor([8.])
    """
    check_number("triplet_margin_with_distance_loss", "margin", margin)
    check_alike("triplet_margin_with_distance_loss", anchor=anchor, positive=positive, negative=negative)
    distance = _pairwise_distance if distance_function is None else distance_function
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    return mean_per_example((margin + near - far).clamp(min=0.0))


def _pairwise_distance(x: Tensor, y: Tensor, p: float = 2.0, eps: float = 1e-6) -> Tensor:
    """|x - y + eps|_p over the last axis; its derivatives at 0 are 0."""
    x = x - y + eps
    if p in (1, 2, float("inf")):
        return numerics.norm(x, -1, ord=p)
    total = numerics.safe_where(x != 0, lambda x: x.abs().pow(p), x).sum(-1)
    return numerics.safe_where(total != 0, lambda total: total.pow(1 / p), total)


@in_float32
def ntxent(x: Tensor, y: Tensor, *, temperature: Number = 0.5) -> Tensor:
    """Normalised temperature-scaled cross entropy of two views of each example: (b, d), (b, d) -> (b,).

    Among all 2 b views, each has to find its example's other one by the cosine: the mean of both views' losses

        l(i, j) = -log exp(cos(z_i, z_j) / temperature) / sum_{k != i} exp(cos(z_i, z_k) / temperature)

    Raises:
        TypeError: if the views are not floating.
        ValueError: if the shapes differ, or ``temperature`` < 0.
    Source: Chen et al. 2020, eq. 1, arXiv:2002.05709.

    >>> ntxent(torch.eye(2), torch.eye(2), temperature=1.0)  # log(1 + 2 / e)
    tensor([0.5514, 0.5514])
    """
    check_number("ntxent", "temperature", temperature, low=0)
    check_alike("ntxent", x=x, y=y)
    b = check_shape(x, "b d", "ntxent: x")["b"]
    views = numerics.normalize(torch.cat([x, y]))
    index = torch.arange(2 * b, device=x.device)
    itself = index.unsqueeze(1) == index
    logits = torch.where(itself, -torch.inf, views @ views.T / temperature)
    first, second = cross_entropy(logits, index.roll(b)).chunk(2)
    return (first + second) / 2


@in_float32
def info_nce(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Number = 0.1,
    normalize: bool = True,
) -> Tensor:
    """-log exp(s(q_i, k_i)) / sum_j exp(s(q_i, k_j)): (b, d), (b, d) -> (b,).

    s is the cosine, or the dot product, divided by the temperature. Of scores (b, b) of another kind it is
    ``cross_entropy(scores, torch.arange(b))``.

    Args:
        negatives: (n, d), the other keys each query is compared with; by default the keys of the other queries.
        normalize: cosines instead of dot products.
    Raises:
        TypeError: if the queries are not floating.
        ValueError: if a shape differs, or ``temperature`` < 0.
    Source: van den Oord et al. 2018, eq. 4, arXiv:1807.03748.

    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)  # log(1 + 1 / e)
    tensor([0.3133, 0.3133])
    """
    check_number("info_nce", "temperature", temperature, low=0)
    check_alike("info_nce", queries=queries, keys=keys)
    b, d = check_shape(queries, "b d", "info_nce: queries").values()
    if negatives is not None:
        check_shape(negatives, "n d", "info_nce: negatives", d=d)
    unit = numerics.normalize if normalize else lambda x: x
    queries, keys = unit(queries), unit(keys)
    if negatives is None:
        return cross_entropy(queries @ keys.T / temperature, torch.arange(b, device=queries.device))
    scores = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ unit(negatives).T], 1)
    return cross_entropy(scores / temperature, torch.zeros(b, dtype=torch.int64, device=queries.device))
