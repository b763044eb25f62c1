"""Codes that are integers: a learned codebook (VQ), and rounding to a fixed grid (FSQ).

Both pass the gradient straight through the choice of a code, as if that were the identity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor

from functorch_gen import numerics, random
from functorch_gen.check import check_floating, check_number, check_positive, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.models.labels import check_integer
from functorch_gen.nn.parts import check_state
from functorch_gen.nn.sizes import check_sizes, freeze
from functorch_gen.transforms import stop_gradient
from functorch_gen.typing import Key, Params, State

__all__ = ["FSQ", "VQ", "Quantized", "perplexity", "straight_through"]


class Quantized(NamedTuple):
    """What became of vectors z (..., d)."""

    values: Tensor  # (..., d): the vectors of the codes; gradients pass through to z
    codes: Tensor  # (...), int64
    commitment: Tensor  # (...): mean of (z - values)^2, with a gradient in z alone


def straight_through(z: Tensor, values: Tensor) -> Tensor:
    """``values``, with the gradient of ``z``: stop_gradient(values) + (z - stop_gradient(z)).

    Source: Bengio et al. 2013, section 4, arXiv:1308.3432.

    >>> from functorch_gen.transforms import grad
    >>> grad(lambda z: straight_through(z, z.round()) ** 2)(torch.tensor(1.2))
    tensor(2.)
    """
    return stop_gradient(values) + (z - stop_gradient(z))


def perplexity(codes: Tensor, num_codes: int) -> Tensor:
    """exp of the entropy of how often each code occurs: (...) integers -> (); ``num_codes`` if all do alike.

    Raises:
        TypeError: if ``codes`` are no integers.
        ValueError: if ``num_codes`` < 1.

    >>> perplexity(torch.tensor([0, 1, 2, 0, 1, 2]), 8)
    tensor(3.)
    """
    check_integer(codes, "perplexity: codes")
    check_sizes("perplexity", num_codes=num_codes)
    frequency = _one_hot(codes.reshape(-1), num_codes, torch.float32).mean(0)
    return torch.exp(-numerics.xlogy(frequency, frequency).sum())


def _one_hot(codes: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    return (codes.unsqueeze(-1) == torch.arange(num_codes, device=codes.device)).to(dtype)


@dataclass(frozen=True)
class VQ:
    """Vector quantisation: each vector becomes the nearest of a codebook: (..., features) -> :class:`Quantized`.

    The codebook is state, no parameter: a call in training moves each code to the running mean of the vectors that
    chose it,

        counts <- decay counts + (1 - decay) n,  sums <- decay sums + (1 - decay) sum z,  code = sums / counts

    A code that is not chosen, counts < ``threshold``, is dead. With a key, a call in training puts each dead code on a
    vector of the batch drawn at random. Add ``beta * commitment`` to the loss, beta = 0.25 in the paper.

    Args:
        eps: of the Laplace smoothing of the counts, which keeps the quotient finite.
        threshold: counts are of vectors a batch; 0: no code is ever dead.
    Raises:
        ValueError: for sizes that are not positive, or a decay that is not in [0, 1).
    Source: van den Oord et al. 2017, eq. 1 to 3 and appendix A.1, arXiv:1711.00937; revival: Dhariwal et al. 2020,
        section 3.1, arXiv:2005.00341.

    >>> vq = VQ(num_codes=2, features=1)
    >>> state = {**vq.init_state(), "codebook": torch.tensor([[0.0], [1.0]])}
    >>> y, state = vq({}, state, torch.tensor([[0.2], [0.9]]), train=False)
    >>> y.codes, y.values.flatten()
    (tensor([0, 1]), tensor([0., 1.]))
    """

    num_codes: int
    features: int
    decay: float = 0.99
    eps: float = 1e-5
    threshold: float = 0.01

    def __post_init__(self) -> None:
        check_sizes("VQ", num_codes=self.num_codes, features=self.features)
        check_number("VQ", "decay", self.decay, low=0, below=1)
        check_positive("VQ", eps=self.eps)
        check_number("VQ", "threshold", self.threshold, low=0)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def init_state(self) -> State:
        """``codebook`` and ``sums`` (k, d), ``counts`` (k,): fixed normal draws, each chosen once."""
        codebook = random.normal(random.key(0), (self.num_codes, self.features))
        return {"codebook": codebook, "sums": codebook.clone(), "counts": torch.ones(self.num_codes)}

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Quantized, State]:
        """The quantised vectors and the new codebook; the vectors are those of the codebook given."""
        check_floating(x, "VQ: x")
        check_shape(x, "... d", "VQ: x", d=self.features)
        sizes = {"k": self.num_codes, "d": self.features}
        check_state(state, {"codebook": "k d", "sums": "k d", "counts": "k"}, "VQ", **sizes)
        codes = self.nearest(state, x)
        values = self.look_up(state, codes).to(x.dtype)
        commitment = reduce((x - values) ** 2, "... d -> ...", "mean")
        if train:
            state = self._update(state, stop_gradient(x), codes, key)
        return Quantized(straight_through(x, values), codes, commitment), state

    def nearest(self, state: State, x: Tensor) -> Tensor:
        """The codes of the vectors nearest to x; of equal distances the first: (..., d) -> (...) integers."""
        codebook = state["codebook"].to(torch.promote_types(state["codebook"].dtype, x.dtype))
        middle = codebook.mean(0)  # taken off, so that little is lost to rounding where all are far from 0
        x, codebook = stop_gradient(x) - middle, codebook - middle
        # |x - c|^2 = |x|^2 - 2 x c + |c|^2, and |x|^2 is the same for all c
        distances = (codebook**2).sum(-1) - 2 * einsum(x, codebook, "... d, k d -> ... k")
        return distances.argmin(-1)

    def look_up(self, state: State, codes: Tensor) -> Tensor:
        """The vectors of codes: (...) integers -> (..., d)."""
        return stop_gradient(state["codebook"])[codes]

    def _update(self, state: State, x: Tensor, codes: Tensor, key: Key | None) -> State:
        """Running means, computed in the dtype of the state."""
        vectors = rearrange(x, "... d -> (...) d").to(state["sums"].dtype)
        chosen = _one_hot(codes.reshape(-1), self.num_codes, vectors.dtype)
        counts = torch.lerp(chosen.sum(0), state["counts"], self.decay)
        sums = torch.lerp(einsum(chosen, vectors, "n k, n d -> k d"), state["sums"], self.decay)
        if key is not None and len(vectors):
            dead = counts < self.threshold
            index = random.randint(key, (self.num_codes,), 0, vectors.shape[0])
            counts, sums = torch.where(dead, 1.0, counts), torch.where(dead.unsqueeze(-1), vectors[index], sums)
        total = counts.sum()
        smooth = (counts + self.eps) / (total + self.num_codes * self.eps) * total
        return {"codebook": sums / smooth.unsqueeze(-1), "sums": sums, "counts": counts}


@dataclass(frozen=True)
class FSQ:
    """Finite scalar quantisation: each number is bounded and rounded to its own levels: (..., d) -> :class:`Quantized`.

    Number i takes ``levels[i]`` values, evenly spaced in [-1, 1]; for an even count -1 is one and 1 is not. There is
    nothing to learn, no state and no collapse; the commitment is 0. The code counts in mixed radix, the first number
    the fastest.

    Raises:
        ValueError: if a count of levels is below 2.
    Source: Mentzer et al. 2023, section 3.1 and appendix A.1, arXiv:2309.15505.

    >>> fsq = FSQ((3, 2))
    >>> fsq({}, torch.tensor([[-9.0, 0.0], [9.0, -9.0]])).codes
    tensor([3, 2])
    >>> fsq.look_up(torch.tensor([3, 2]))
    tensor([[-1.,  0.],
            [ 1., -1.]])
    """

    levels: Sequence[int]

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("FSQ", dims=len(self.levels), levels=self.levels)
        if min(self.levels) < 2:
            raise ValueError(f"FSQ: expected at least 2 levels everywhere, got {self.levels}")

    @property
    def num_codes(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)

    @property
    def features(self) -> int:
        """d."""
        return len(self.levels)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Quantized:
        """Rounds to the grid."""
        check_floating(x, "FSQ: x")
        check_shape(x, "... d", "FSQ: x", d=self.features)
        bounded = self._bound(at_least_float32(x))
        digits = bounded.round()
        half = self._constant([n // 2 for n in self.levels], bounded)
        codes = ((digits + half).long() * self._basis(x)).sum(-1)
        values = (straight_through(bounded, digits) / half).to(x.dtype)
        return Quantized(values, codes, torch.zeros_like(values[..., 0]))

    def look_up(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The vectors of codes: (...) integers -> (..., d)."""
        check_integer(codes, "FSQ: codes")
        levels = torch.tensor(self.levels, device=codes.device)
        half = levels // 2
        digits = (codes.unsqueeze(-1) // self._basis(codes)) % levels - half
        return (digits.to(torch.promote_types(dtype, torch.float32)) / half).to(dtype)

    def _bound(self, x: Tensor) -> Tensor:
        """Into ``levels`` unit intervals around integers; for an even count half a unit lower."""
        half = self._constant([(n - 1) * (1 - 1e-3) / 2 for n in self.levels], x)
        offset = self._constant([0.0 if n % 2 else 0.5 for n in self.levels], x)
        return torch.tanh(x + torch.tan(offset / half)) * half - offset

    def _basis(self, x: Tensor) -> Tensor:
        """How many codes one step of each number is."""
        return torch.tensor([math.prod(self.levels[:i]) for i in range(self.features)], device=x.device)

    def _constant(self, values: Sequence[float], x: Tensor) -> Tensor:
        return torch.tensor(values, dtype=x.dtype, device=x.device)
