"""Low-rank adaptation: a trained layer and a small update of its weight."""

from dataclasses import dataclass
from typing import Any

import torch

from functorch_gen.check import check_number
from functorch_gen.nn.capture import call_part
from functorch_gen.nn.init import fan_in_uniform
from functorch_gen.nn.parts import check_stateless, draws, entry, name_key
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Layer, Params

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA:
    """The layer with ``weight + alpha / rank * B A`` in place of its weight, B A of rank ``rank``.

    Parameters are ``base``, the layer's own, ``lora_a`` (rank, columns) and ``lora_b`` (rows, rank), where the rows are
    the weight's first axis and the columns all others, flat: any weight of two or more axes will do (Linear, Conv,
    Embedding). ``lora_b`` starts at zero, so the layer starts as its base.

    Nothing is frozen by itself: split the parameters with :func:`functorch_gen.tree.partition` and take the gradient of
    one part, as below; then no gradient of the base is computed, and none is kept by the optimizer.

    Args:
        layer: one without state.
        alpha: scale of the update; trained with Adam, it acts as a learning rate.
        name: of the parameter.
    Raises:
        TypeError: if the layer has state.
        KeyError: if the layer has no such parameter.
        ValueError: if the weight has fewer than two axes.

    Source: Hu et al. 2021, eq. 3, arXiv:2106.09685; A is drawn as in its authors' code.

    >>> from functorch_gen import nn, random, tree
    >>> from functorch_gen.transforms import grad
    >>> layer = LoRA(nn.Linear(8, 4), rank=2)
    >>> params = layer.init(random.key(0))
    >>> adapter, frozen = tree.partition(params, "*lora_?")
    >>> gradient = grad(lambda adapter, x: layer(tree.merge(adapter, frozen), x).sum())(adapter, torch.ones(3, 8))
    >>> {name: tuple(x.shape) for name, x in tree.names(gradient).items()}
    {'lora_a': (2, 8), 'lora_b': (4, 2)}
    >>> sorted(layer.merge(params))  # for nn.Linear(8, 4), without LoRA
    ['bias', 'weight']
    """

    layer: Layer
    rank: int
    alpha: float = 1.0
    name: str = "weight"

    def __post_init__(self) -> None:
        check_stateless("LoRA", self.layer)
        check_sizes("LoRA", rank=self.rank)
        check_number("LoRA", "alpha", self.alpha)

    @property
    def draws(self) -> bool:
        """Whether the layer draws from its key."""
        return draws(self.layer)

    def init(self, key: Key, base: Params | None = None) -> Params:
        """``{"base", "lora_a", "lora_b"}``; A as torch's Linear draws its weight, B = 0.

        Args:
            base: trained parameters of the layer, instead of drawn ones.
        """
        base = self.layer.init(name_key(key, "base")) if base is None else base
        weight = entry("LoRA", base, self.name)
        if weight.ndim < 2:
            raise ValueError(f"LoRA: expected {self.name!r} with at least two axes, got {tuple(weight.shape)}")
        rows, columns = weight.shape[0], weight[0].numel()
        return {
            "base": base,
            "lora_a": fan_in_uniform(name_key(key, "lora_a"), (self.rank, columns), columns).to(weight.dtype),
            "lora_b": torch.zeros(rows, self.rank, dtype=weight.dtype, device=key.device),
        }

    def __call__(self, params: Params, x: Any, *inputs: Any, key: Key | None = None, **options: Any) -> Any:
        """The layer's output.

        Args:
            inputs: what the layer takes beside x.
            options: the layer's own.
        """
        merged = self.merge(params)
        return call_part("base", self.layer, lambda: self.layer(merged, x, *inputs, key=key, **options))

    def merge(self, params: Params) -> Params:
        """The parameters of the plain layer, the update added to its weight."""
        base, a, b = (entry("LoRA", params, name) for name in ("base", "lora_a", "lora_b"))
        weight = entry("LoRA", base, self.name)
        return {**base, self.name: weight + (self.alpha / self.rank) * (b @ a).reshape(weight.shape)}
