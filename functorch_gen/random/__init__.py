"""Random numbers as pure functions of a key, with the bits of ``jax.random`` (0.10, threefry2x32, partitionable).

A key is a (2,) int32 tensor. It is split or folded, never advanced: the same key gives the same draw, and no global
generator is read or written. Samplers have jax.random's signatures and algorithms; a draw lives on its key's device;
a batch of keys is drawn from with ``vmap``.

``split``, ``fold_in``, ``bits`` and ``uniform`` equal jax bit for bit on every device, eager or compiled, and so do
``bernoulli``, ``rademacher``, ``randint`` and ``permutation``. Samplers that pass through a logarithm, an inverse
error function or a QR decomposition equal jax up to its rounding, by which ``categorical`` and ``choice`` with
probabilities may decide otherwise once in millions.

A dtype means what it means to jax: ``float64`` and ``int64`` draws are those of jax with ``jax_enable_x64``;
``float16`` and ``bfloat16`` hold as many random bits as their mantissa (10 and 7), so that a ``bfloat16`` normal takes
128 values. Draw in ``float32`` and cast where that is too coarse.

>>> from functorch_gen import random
>>> key, subkey = random.split(random.key(0))
>>> random.normal(subkey, (2, 3)).shape
torch.Size([2, 3])
"""

from functorch_gen.random.continuous import (
    exponential,
    gumbel,
    laplace,
    normal,
    orthogonal,
    truncated_normal,
    uniform,
)
from functorch_gen.random.discrete import bernoulli, categorical, choice, permutation, rademacher, randint
from functorch_gen.random.keys import bits, fold_in, key, split

__all__ = [
    "bernoulli",
    "bits",
    "categorical",
    "choice",
    "exponential",
    "fold_in",
    "gumbel",
    "key",
    "laplace",
    "normal",
    "orthogonal",
    "permutation",
    "rademacher",
    "randint",
    "split",
    "truncated_normal",
    "uniform",
]
