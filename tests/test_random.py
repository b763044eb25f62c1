"""random: jax's bits, the laws that hold for every sampler, bad input."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import random
from functorch_gen.random.threefry import counter, threefry2x32

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "random.json").read_text())
SEEDS = GOLDEN["seeds"]
SHAPES = [tuple(shape) for shape in GOLDEN["shapes"]]
KEY = random.key(0)

P = torch.tensor([0.1, 0.2, 0.3, 0.4])
TABLE = torch.log(torch.arange(1.0, 13.0).reshape(3, 4))
X = torch.arange(24).reshape(2, 3, 4)

# One draw of every sampler in every mode: what the laws below are checked on.
SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, 7),
    "bits": lambda key: random.bits(key, (3, 2)),
    "bits64": lambda key: random.bits(key, (3,), torch.int64),
    "uniform": lambda key: random.uniform(key, (5,)),
    "uniform_float64": lambda key: random.uniform(key, (5,), torch.float64, -1.0, 3.0),
    "uniform_bfloat16": lambda key: random.uniform(key, (5,), torch.bfloat16),
    "uniform_bounds": lambda key: random.uniform(key, (2, 3), minval=torch.zeros(3, device=key.device), maxval=2.0),
    "normal": lambda key: random.normal(key, (5,)),
    "normal_scalar": lambda key: random.normal(key),
    "normal_float64": lambda key: random.normal(key, (5,), torch.float64),
    "truncated_normal": lambda key: random.truncated_normal(key, -1.0, torch.tensor([0.5, 1.0], device=key.device)),
    "exponential": lambda key: random.exponential(key, (5,)),
    "laplace": lambda key: random.laplace(key, (5,)),
    "gumbel": lambda key: random.gumbel(key, (5,)),
    "gumbel_high": lambda key: random.gumbel(key, (5,), mode="high"),
    "orthogonal": lambda key: random.orthogonal(key, 3, (2,)),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (9,)),
    "bernoulli_tensor": lambda key: random.bernoulli(key, P.to(key.device)),
    "rademacher": lambda key: random.rademacher(key, (5,)),
    "randint": lambda key: random.randint(key, (5,), 0, 10),
    "randint_int32": lambda key: random.randint(key, (5,), 0, 10, torch.int32),
    "randint_tensor": lambda key: random.randint(key, (5,), 0, torch.arange(5, device=key.device) + 1),
    "categorical": lambda key: random.categorical(key, TABLE.to(key.device), shape=(2, 3)),
    "categorical_without": lambda key: random.categorical(key, TABLE.to(key.device), shape=(2, 3), replace=False),
    "choice": lambda key: random.choice(key, 7, (5,)),
    "choice_p": lambda key: random.choice(key, 4, (5,), p=P.to(key.device)),
    "choice_p_without": lambda key: random.choice(key, 4, (3,), replace=False, p=P.to(key.device)),
    "choice_axis": lambda key: random.choice(key, X.to(key.device), (2, 2), axis=1),
    "permutation": lambda key: random.permutation(key, 9),
    "permutation_independent": lambda key: random.permutation(key, X.to(key.device), axis=1, independent=True),
}


def unsigned(x: Tensor) -> list:
    return x.numpy().view(np.uint32).tolist()


def crc(x: Tensor) -> int:
    x = x.contiguous()
    return zlib.crc32((x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy().tobytes())


def ulps(x: Tensor, y: Tensor) -> int:
    """Largest number of representable values between two float32 tensors."""

    def ordinal(z: Tensor) -> Tensor:
        z = z.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(z < 0, -(2**31) - z, z)

    return int((ordinal(x) - ordinal(y)).abs().max())


# The generator, against Random123 and jax.


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [  # kat_vectors of Random123, threefry2x32, 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((-1, -1), (-1, -1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3 - 2**32), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry2x32_gives_known_answers(key, count, expected):
    x0, x1 = threefry2x32(torch.tensor(key, dtype=torch.int32), *torch.tensor(count, dtype=torch.int32))
    assert (x0.item() % 2**32, x1.item() % 2**32) == expected


def test_counter_carries_into_the_high_word():
    high, low = counter(2**33 - 2, 4, torch.device("cpu"))
    assert unsigned(high) == [1, 1, 2, 2]
    assert unsigned(low) == [2**32 - 2, 2**32 - 1, 0, 1]


@pytest.mark.parametrize("i", range(len(SEEDS)))
def test_keys_equal_jax(i):
    key = random.key(SEEDS[i])
    assert unsigned(key) == GOLDEN["key"][i]
    assert unsigned(random.split(key)) == GOLDEN["split"][i]
    assert unsigned(random.split(key, 5)) == GOLDEN["split_5"][i]
    assert unsigned(random.split(key, (2, 3))) == GOLDEN["split_2x3"][i]
    assert unsigned(random.split(random.split(random.split(key)[1], 3)[2])) == GOLDEN["nested"][i]
    assert [unsigned(random.fold_in(key, data)) for data in GOLDEN["folded"]] == GOLDEN["fold_in"][i]


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("bits", random.bits),
        ("uniform", random.uniform),
        ("uniform_bounds", lambda key, shape: random.uniform(key, shape, minval=-0.3, maxval=123.4)),
        ("uniform_float16", lambda key, shape: random.uniform(key, shape, torch.float16)),
        ("uniform_bfloat16", lambda key, shape: random.uniform(key, shape, torch.bfloat16, -0.3, 123.4)),
    ],
)
def test_bits_and_uniform_equal_jax(name, draw):
    assert [[crc(draw(random.key(seed), shape)) for shape in SHAPES] for seed in SEEDS] == GOLDEN["crc"][name]


def test_bits_and_uniform_of_64_bits_equal_jax_with_x64():
    for name, draw, dtype in (("bits", random.bits, torch.int64), ("uniform", random.uniform, torch.float64)):
        drawn = [[crc(draw(random.key(seed), shape, dtype)) for shape in SHAPES] for seed in SEEDS]
        assert drawn == GOLDEN["crc64"][name]


def test_normal_is_within_4_ulp_of_jax():
    for seed, expected in zip(SEEDS, GOLDEN["normal"], strict=True):
        assert ulps(random.normal(random.key(seed), (25,)), torch.tensor(expected)) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", GOLDEN["float32"])
def test_floating_samplers_equal_jax_up_to_rounding(name, dtype):
    draw = {
        "truncated_normal": lambda key: random.truncated_normal(key, -1.0, 2.5, (16,), dtype),
        "gumbel_high": lambda key: random.gumbel(key, (16,), dtype, mode="high"),
    }.get(name, lambda key: getattr(random, name)(key, (16,), dtype))
    drawn = torch.stack([draw(random.key(seed)) for seed in SEEDS[:3]])
    expected = torch.tensor(GOLDEN[str(dtype).removeprefix("torch.")][name], dtype=torch.float64)
    # a few roundings of numbers of order one; XLA's log1p(-x * x) costs its float64 normals up to 1e-10 in the tails
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(drawn.double(), expected, rtol=tolerance, atol=tolerance)


INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (50,)),
    "bernoulli_tensor": lambda key: random.bernoulli(key, P, (5, 4)),
    "rademacher": lambda key: random.rademacher(key, (50,)),
    "randint_int32": lambda key: random.randint(key, (20,), -5, 1000, torch.int32),
    "randint_wide": lambda key: random.randint(key, (20,), -(2**31), 2**31 - 1, torch.int32),
    "randint_uint8": lambda key: random.randint(key, (20,), 0, 256, torch.uint8),
    "randint_int8": lambda key: random.randint(key, (20,), -100, 100, torch.int8),
    "randint_tensor": lambda key: random.randint(
        key, (5, 3), torch.tensor([0, 5, 9]), torch.tensor([3, 500, 9]), torch.int32
    ),
    "categorical": lambda key: random.categorical(key, P.log(), shape=(30,)),
    "categorical_axis": lambda key: random.categorical(key, TABLE, axis=0, shape=(5, 4)),
    "categorical_high": lambda key: random.categorical(key, TABLE, mode="high"),
    "categorical_without": lambda key: random.categorical(key, TABLE, shape=(3, 3), replace=False),
    "choice": lambda key: random.choice(key, 10, (3, 5)),
    "choice_without": lambda key: random.choice(key, 10, (6,), replace=False),
    "choice_p": lambda key: random.choice(key, 4, (20,), p=P),
    "choice_p_without": lambda key: random.choice(key, 4, (3,), replace=False, p=P),
    "choice_axis": lambda key: random.choice(key, X, (2, 2), axis=1),
    "permutation": lambda key: random.permutation(key, 30),
    "permutation_axis": lambda key: random.permutation(key, X, axis=2),
    "permutation_independent": lambda key: random.permutation(key, X, axis=1, independent=True),
    "permutation_large": lambda key: torch.tensor(crc(random.permutation(key, 3000).to(torch.int32))),
    "bits_uint8": lambda key: random.bits(key, (9,), torch.uint8),
    "bits_uint16": lambda key: random.bits(key, (9,), torch.int16).to(torch.int32) & 0xFFFF,
}


@pytest.mark.parametrize("name", GOLDEN["integers"])
def test_integer_samplers_equal_jax(name):
    drawn = [INTEGERS[name](random.key(seed)).to(torch.int64).tolist() for seed in SEEDS[:3]]
    assert drawn == GOLDEN["integers"][name]


@pytest.mark.parametrize(
    ("name", "low", "high"), [("randint", 0, 10), ("randint_wide", -(2**63), 2**63 - 1), ("randint_odd", -7, 3**35)]
)
def test_randint_int64_equals_jax_with_x64(name, low, high):
    drawn = [random.randint(random.key(seed), (20,), low, high).tolist() for seed in SEEDS[:3]]
    assert drawn == GOLDEN["int64"][name]


def test_orthogonal_equals_jax_up_to_rounding():
    torch.testing.assert_close(random.orthogonal(KEY, 3, (2,)), torch.tensor(GOLDEN["orthogonal"]), rtol=0, atol=3e-6)
    wide = random.orthogonal(KEY, 2, m=4)
    torch.testing.assert_close(wide, torch.tensor(GOLDEN["orthogonal_wide"]), rtol=0, atol=3e-6)


# Laws of every sampler.


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_under_vmap_equals_a_loop(name):
    keys = random.split(KEY, 4)
    loop = torch.stack([SAMPLERS[name](key) for key in keys])
    assert torch.equal(vmap(SAMPLERS[name])(keys), loop)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_traced_over_fake_tensors_equals_eager(name):
    traced = make_fx(SAMPLERS[name], tracing_mode="fake", _allow_non_fake_inputs=True)(KEY)
    other = random.key(1)
    assert torch.equal(traced(other), SAMPLERS[name](other))


@pytest.mark.parametrize(
    "names",
    [
        ("uniform_bounds", "randint", "categorical", "permutation"),
        pytest.param(tuple(SAMPLERS), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_samplers_compile_to_one_graph_that_equals_eager(names):
    def draw(key: Tensor) -> dict[str, Tensor]:
        return {name: SAMPLERS[name](random.fold_in(key, i)) for i, name in enumerate(names)}

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(KEY)
    for name, expected in draw(KEY).items():
        assert torch.equal(compiled[name], expected), name


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it imports Inductor
def test_draws_compiled_by_inductor_equal_eager():
    def draw(key: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        key = random.fold_in(key, step)
        return random.bits(key, (1000,)), random.normal(key, (1000,))

    step = torch.tensor(5)
    bits, x = torch.compile(draw, fullgraph=True)(KEY, step)
    expected_bits, expected_x = draw(KEY, step)
    assert torch.equal(bits, expected_bits)
    assert ulps(x, expected_x) <= 4  # another log1p


def test_draws_of_a_symbolic_size_equal_eager():
    draw = torch.compile(lambda key, x: random.normal(key, x.shape), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 8, 5):
        assert torch.equal(draw(KEY, torch.zeros(n, 2)), random.normal(KEY, (n, 2)))


def test_samplers_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    for sampler in SAMPLERS.values():
        sampler(KEY)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: compares its bits with the CPU's")
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_on_cuda_equals_cpu(name):
    draw = SAMPLERS[name]
    drawn = draw(random.key(0, device="cuda"))
    assert drawn.device.type == "cuda"
    rounded = drawn.is_floating_point() and not name.startswith("uniform")  # logarithms and QR differ by roundings
    torch.testing.assert_close(drawn.cpu(), draw(KEY), **({} if rounded else {"rtol": 0, "atol": 0}))


def test_split_and_fold_in_share_their_keys():
    # as in jax: whoever splits a key does not fold into the same one
    assert torch.equal(random.split(KEY, 4), torch.stack([random.fold_in(KEY, i) for i in range(4)]))


# Bad input.


@pytest.mark.parametrize("name", sorted(set(random.__all__) - {"key"}))
def test_sampler_refuses_a_bad_key(name):
    arguments = {"split": (), "fold_in": (1,), "truncated_normal": (-1.0, 1.0), "randint": ((2,), 0, 5)}
    arguments |= {"categorical": (P,), "choice": (5,), "permutation": (5,), "orthogonal": (3,)}
    draw = getattr(random, name)
    with pytest.raises(TypeError, match=f"^{name}: expected key to be .* got torch.float32"):
        draw(torch.zeros(2), *arguments.get(name, ()))
    with pytest.raises(TypeError, match=f"^{name}: expected key to be .* got int"):
        draw(0, *arguments.get(name, ()))
    with pytest.raises(ValueError, match=f"^{name}: expected key of shape .* got \\(3, 2\\)"):
        draw(random.split(KEY, 3), *arguments.get(name, ()))


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: random.key(0.5), TypeError, "key: seed: expected an integer, got float"),
        (lambda: random.key(2**63), ValueError, "key: seed: expected an integer in"),
        (lambda: random.key(torch.zeros(2).long()), ValueError, "key: seed: expected a 0-d tensor"),
        (lambda: random.fold_in(KEY, torch.tensor(0.5)), TypeError, "fold_in: data: expected an integer, got a tensor"),
        (lambda: random.fold_in(KEY, 2**32), ValueError, "fold_in: data: expected an integer in"),
        (lambda: random.split(KEY, -1), ValueError, "split: expected num to have sizes >= 0"),
        (lambda: random.normal(KEY, 3), TypeError, "normal: expected shape to be a tuple of sizes, got int"),
        (lambda: random.normal(KEY, (2.0,)), TypeError, "normal: expected shape to hold integers, got float"),
        (lambda: random.normal(KEY, (-2,)), ValueError, "normal: expected shape to have sizes >= 0"),
        (lambda: random.normal(KEY, (2,), torch.int32), ValueError, "normal: expected dtype to be one of"),
        (lambda: random.bits(KEY, (2,), torch.float32), ValueError, "bits: expected dtype to be one of"),
        (lambda: random.uniform(KEY, (2,), minval=1.0, maxval=0.0), ValueError, "uniform: expected minval <= maxval"),
        (lambda: random.uniform(KEY, (2,), minval=torch.zeros(3)), ValueError, "uniform: expected parameters that"),
        (lambda: random.truncated_normal(KEY, 1.0, 1.0), ValueError, "truncated_normal: expected lower < upper"),
        (lambda: random.gumbel(KEY, mode="highest"), ValueError, "gumbel: expected mode to be one of"),
        (lambda: random.orthogonal(KEY, -1), ValueError, "orthogonal: expected n, m to have sizes >= 0"),
        (lambda: random.bernoulli(KEY, 1.5), ValueError, r"bernoulli: expected p in \[0, 1\], got 1.5"),
        (lambda: random.bernoulli(KEY, torch.tensor(1)), TypeError, "bernoulli: p: expected a floating-point tensor"),
        (lambda: random.bernoulli(KEY, P, (3,)), ValueError, "bernoulli: expected parameters that broadcast"),
        (lambda: random.randint(KEY, (2,), 5, 5), ValueError, "randint: expected minval < maxval, got 5 and 5"),
        (lambda: random.randint(KEY, (2,), 0, 0.5), TypeError, "randint: maxval: expected an integer, got float"),
        (lambda: random.randint(KEY, (2,), 0, 300, torch.uint8), ValueError, "randint: expected maxval in"),
        (lambda: random.categorical(KEY, X), TypeError, "categorical: logits: expected a floating-point tensor"),
        (lambda: random.categorical(KEY, P, axis=1), ValueError, "categorical: expected axis in"),
        (lambda: random.categorical(KEY, P, shape=(5,), replace=False), ValueError, "categorical: expected shape"),
        (lambda: random.choice(KEY, 3, (4,), replace=False), ValueError, "choice: expected a to hold enough"),
        (lambda: random.choice(KEY, 0, (1,)), ValueError, "choice: expected a to hold enough"),
        (lambda: random.choice(KEY, 3, (4,), p=P), ValueError, "choice: p: expected shape"),
        (lambda: random.permutation(KEY, -1), ValueError, "permutation: expected x to have sizes >= 0"),
        (lambda: random.permutation(KEY, X, axis=3), ValueError, "permutation: expected axis in"),
    ],
)
def test_bad_arguments_are_named(draw, error, message):
    with pytest.raises(error, match="^" + message):
        draw()
