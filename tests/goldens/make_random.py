"""Writes random.json: what jax.random 0.10 draws. Run it where jax is installed: ``python make_random.py``.

Long arrays are kept as the CRC-32 of their bytes; floats as the float64 that equals them.
"""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = [
    0,
    1,
    2,
    3,
    7,
    42,
    123,
    999,
    1234,
    31337,
    65536,
    10**6,
    10**9,
    2**31 - 1,
    2**31,
    2**32 - 1,
    -1,
    -12345,
    2**40 + 7,
    2**63 - 1,
]
SHAPES = [(), (1,), (5,), (2, 3), (2, 3, 4), (0, 3), (7, 33), (1000,)]
FOLDED = [0, 1, 17, 2**31 - 1, 2**31, 2**32 - 1]
random = jax.random
KEYS = [random.key(seed) for seed in SEEDS]  # with x64 off, as users have it: the low 32 bits of the seed


def crc(x) -> int:
    return zlib.crc32(np.ascontiguousarray(np.asarray(x)).tobytes())


def data(key) -> list:
    return np.asarray(random.key_data(key)).tolist()


def values(x) -> list:
    return np.asarray(x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x).tolist()


def keys() -> dict:
    return {
        "key": [data(key) for key in KEYS],
        "split": [data(random.split(key)) for key in KEYS],
        "split_5": [data(random.split(key, 5)) for key in KEYS],
        "split_2x3": [data(random.split(key, (2, 3))) for key in KEYS],
        "nested": [data(random.split(random.split(random.split(key)[1], 3)[2])) for key in KEYS],
        "fold_in": [[data(random.fold_in(key, x)) for x in FOLDED] for key in KEYS],
    }


def checksums(samplers: dict) -> dict:
    """CRC-32 by sampler, seed and shape."""
    return {name: [[crc(draw(key, shape)) for shape in SHAPES] for key in KEYS] for name, draw in samplers.items()}


def floats(dtype, shape=(16,)) -> dict:
    """Draws of three keys from the samplers that round."""
    samplers = {
        "normal": lambda key: random.normal(key, shape, dtype),
        "exponential": lambda key: random.exponential(key, shape, dtype),
        "laplace": lambda key: random.laplace(key, shape, dtype),
        "gumbel": lambda key: random.gumbel(key, shape, dtype),
        "gumbel_high": lambda key: random.gumbel(key, shape, dtype, mode="high"),
        "truncated_normal": lambda key: random.truncated_normal(key, -1.0, 2.5, shape, dtype),
    }
    return {name: [values(draw(key)) for key in KEYS[:3]] for name, draw in samplers.items()}


def integers() -> dict:
    p = jnp.array([0.1, 0.2, 0.3, 0.4])
    logits = jnp.log(p)
    table = jnp.log(jnp.arange(1.0, 13.0).reshape(3, 4))
    x = jnp.arange(24).reshape(2, 3, 4)
    samplers = {
        "bernoulli": lambda key: random.bernoulli(key, 0.3, (50,)),
        "bernoulli_tensor": lambda key: random.bernoulli(key, p, (5, 4)),
        "rademacher": lambda key: random.rademacher(key, (50,)),
        "randint_int32": lambda key: random.randint(key, (20,), -5, 1000),
        "randint_wide": lambda key: random.randint(key, (20,), -(2**31), 2**31 - 1),
        "randint_uint8": lambda key: random.randint(key, (20,), 0, 256, jnp.uint8),
        "randint_int8": lambda key: random.randint(key, (20,), -100, 100, jnp.int8),
        "randint_tensor": lambda key: random.randint(key, (5, 3), jnp.array([0, 5, 9]), jnp.array([3, 500, 9])),
        "categorical": lambda key: random.categorical(key, logits, shape=(30,)),
        "categorical_axis": lambda key: random.categorical(key, table, axis=0, shape=(5, 4)),
        "categorical_high": lambda key: random.categorical(key, table, mode="high"),
        "categorical_without": lambda key: random.categorical(key, table, shape=(3, 3), replace=False),
        "choice": lambda key: random.choice(key, 10, (3, 5)),
        "choice_without": lambda key: random.choice(key, 10, (6,), replace=False),
        "choice_p": lambda key: random.choice(key, 4, (20,), p=p),
        "choice_p_without": lambda key: random.choice(key, 4, (3,), replace=False, p=p),
        "choice_axis": lambda key: random.choice(key, x, (2, 2), axis=1),
        "permutation": lambda key: random.permutation(key, 30),
        "permutation_axis": lambda key: random.permutation(key, x, axis=2),
        "permutation_independent": lambda key: random.permutation(key, x, axis=1, independent=True),
        "bits_uint8": lambda key: random.bits(key, (9,), jnp.uint8),
        "bits_uint16": lambda key: random.bits(key, (9,), jnp.uint16),
    }
    drawn = {name: [values(draw(key).astype(int)) for key in KEYS[:3]] for name, draw in samplers.items()}
    drawn["permutation_large"] = [crc(random.permutation(key, 3000).astype(jnp.int32)) for key in KEYS[:3]]
    return drawn


def wide_integers() -> dict:
    samplers = {
        "randint": lambda key: random.randint(key, (20,), 0, 10),
        "randint_wide": lambda key: random.randint(key, (20,), -(2**63), 2**63 - 1),
        "randint_odd": lambda key: random.randint(key, (20,), -7, 3**35),
    }
    return {name: [values(draw(key)) for key in KEYS[:3]] for name, draw in samplers.items()}


def main() -> None:
    bounds = {"minval": -0.3, "maxval": 123.4}
    golden = {
        "jax": jax.__version__,
        "seeds": SEEDS,
        "shapes": SHAPES,
        "folded": FOLDED,
        **keys(),
        "crc": checksums(
            {
                "bits": random.bits,
                "uniform": random.uniform,
                "uniform_bounds": lambda key, shape: random.uniform(key, shape, **bounds),
                "uniform_float16": lambda key, shape: random.uniform(key, shape, jnp.float16),
                "uniform_bfloat16": lambda key, shape: random.uniform(key, shape, jnp.bfloat16, **bounds),
            }
        ),
        "float32": floats(jnp.float32),
        "bfloat16": floats(jnp.bfloat16),
        "float16": floats(jnp.float16),
        "normal": [values(random.normal(key, (25,))) for key in KEYS],
        "integers": integers(),
        "orthogonal": values(random.orthogonal(KEYS[0], 3, (2,))),
        "orthogonal_wide": values(random.orthogonal(KEYS[0], 2, m=4)),
    }
    with jax.enable_x64(True):
        golden["crc64"] = checksums(
            {"bits": lambda key, shape: random.bits(key, shape, jnp.uint64), "uniform": random.uniform}
        )
        golden["float64"] = floats(jnp.float64)
        golden["int64"] = wide_integers()
    Path(__file__).with_name("random.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
