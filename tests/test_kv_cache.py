"""The cache of keys and values: decoding equals the whole causal forward pass, for every size of step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import nn, random, tree
from functorch_gen.nn import KVCache
from functorch_gen.transforms import grad, hessian, jit, remat, scan, vmap
from functorch_gen.typing import Params

LAYERS = {
    "plain": nn.MultiHeadAttention(8, 4),
    "rotary": nn.MultiHeadAttention(8, 4, rotary_base=100.0),
    "grouped, normalised, rotary": nn.MultiHeadAttention(8, 4, num_kv_heads=2, qk_norm=True, rotary_base=1e4),
    "one key for all, alibi": nn.MultiHeadAttention(8, 4, bias=False, num_kv_heads=1, alibi=True),
}
over_layers = pytest.mark.parametrize("name", LAYERS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def drawn(layer: Any) -> Params:
    """float64 parameters in general position."""
    named = tree.names(layer.init(random.key(0)))
    return tree.from_names({name: 0.5 * draw(*x.shape, seed=i) for i, (name, x) in enumerate(named.items())})


def empty(layer: nn.MultiHeadAttention, batch: int | tuple[int, ...], max_length: int) -> KVCache:
    return layer.init_cache(batch, max_length, torch.float64)


def decode(call: Any, params: Params, x: Tensor, cache: KVCache, sizes: list[int]) -> tuple[Tensor, KVCache]:
    outputs = []
    for chunk in x.split(sizes, -2):
        y, cache = call(params, chunk, cache=cache)
        outputs.append(y)
    return torch.cat(outputs, -2), cache


@pytest.mark.parametrize("sizes", [[1] * 6, [6], [3, 3], [2, 1, 3]], ids=str)
@over_layers
def test_cached_attention_equals_the_causal_one(name: str, sizes: list[int]) -> None:
    layer, x = LAYERS[name], draw(2, 6, 8)
    params = drawn(layer)
    y, cache = decode(layer, params, x, empty(layer, 2, 9), sizes)
    torch.testing.assert_close(y, layer(params, x, is_causal=True), rtol=1e-12, atol=1e-12)
    assert cache.lengths.tolist() == [6, 6]


@over_layers
def test_cached_attention_lets_each_sequence_have_its_own_length(name: str) -> None:
    """A chunk of 5 and 2 positions, then one of 1 and 4: padding leaves no trace."""
    layer, x = LAYERS[name], draw(2, 6, 8)
    params = drawn(layer)
    expected = layer(params, x, is_causal=True)
    first = torch.stack([x[0, :5], torch.cat([x[1, :2], draw(3, 8, seed=9)])])
    second = torch.stack([torch.cat([x[0, 5:6], draw(3, 8, seed=9)]), x[1, 2:6]])
    y, cache = layer(params, first, cache=empty(layer, 2, 6), lengths=torch.tensor([5, 2]))
    z, cache = layer(params, second, cache=cache, lengths=torch.tensor([1, 4]))
    for found, wanted in [(y[0], expected[0, :5]), (y[1, :2], expected[1, :2])]:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for found, wanted in [(z[0, :1], expected[0, 5:]), (z[1], expected[1, 2:])]:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert cache.lengths.tolist() == [6, 6]


@over_layers
def test_cached_step_is_one_program(name: str) -> None:
    layer, x, traces = LAYERS[name], draw(2, 5, 8), []
    params = drawn(layer)

    def step(params: Params, x: Tensor, *, cache: KVCache) -> Any:
        traces.append(None)
        return layer(params, x, cache=cache)

    y, _ = decode(jit(step, backend="aten"), params, x, empty(layer, 2, 7), [1] * 5)
    assert len(traces) == 1
    torch.testing.assert_close(y, layer(params, x, is_causal=True), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_cached_step_compiles_with_a_donated_cache() -> None:
    layer, x = LAYERS["grouped, normalised, rotary"], draw(2, 5, 8)
    params = drawn(layer)
    step = jit(lambda params, x, cache: layer(params, x, cache=cache), donate_argnums=2)
    y, _ = decode(lambda params, x, *, cache: step(params, x, cache), params, x, empty(layer, 2, 7), [1] * 5)
    torch.testing.assert_close(y, layer(params, x, is_causal=True), rtol=1e-12, atol=1e-12)


@over_layers
def test_cached_attention_passes_the_transforms(name: str) -> None:
    """scan, vmap over sequences, gradients and curvature through the cache: those of the causal forward pass."""
    layer, x = LAYERS[name], draw(2, 3, 8)
    params = drawn(layer)

    def decoded(x: Tensor) -> Tensor:
        def step(cache: KVCache, token: Tensor) -> tuple[KVCache, Tensor]:
            y, cache = layer(params, token[None], cache=cache)
            return cache, y[0]

        return scan(step, empty(layer, (), 4), x)[1]

    def energy(x: Tensor) -> Tensor:
        return decoded(x).sin().sum()

    def expected(x: Tensor) -> Tensor:
        return layer(params, x, is_causal=True).sin().sum()

    torch.testing.assert_close(vmap(energy)(x), vmap(expected)(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vmap(grad(energy))(x), vmap(grad(expected))(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        jit(grad(remat(energy)), backend="aten")(x[0]), grad(expected)(x[0]), rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(hessian(energy)(x[0, :2]), hessian(expected)(x[0, :2]), rtol=1e-10, atol=1e-10)


def test_cached_attention_traces_under_torch_compile() -> None:
    layer, x = LAYERS["grouped, normalised, rotary"], draw(2, 3, 8)
    params = drawn(layer)
    step = torch.compile(lambda x, cache: layer(params, x, cache=cache), fullgraph=True, backend="aot_eager")
    y, cache = step(x, empty(layer, 2, 4))
    expected, other = layer(params, x, cache=empty(layer, 2, 4))
    torch.testing.assert_close((y, tuple(cache)), (expected, tuple(other)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("additive", [False, True])
def test_cached_attention_takes_a_mask_of_its_slots(additive: bool) -> None:
    """Slots 0 and 3 are hidden: as if those keys did not exist, or weighed by exp(-0.7)."""
    layer, x = LAYERS["one key for all, alibi"], draw(2, 5, 8)
    params = drawn(layer)
    hidden = torch.tensor([True, False, False, True, False, False])
    mask = torch.where(hidden, -0.7, 0.0) if additive else ~hidden
    y, _ = layer(params, x, cache=empty(layer, 2, 6), mask=mask)
    torch.testing.assert_close(y, layer(params, x, mask=mask[:5], is_causal=True), rtol=1e-12, atol=1e-12)


def test_cached_attention_is_nan_beyond_the_cache_but_not_in_padding() -> None:
    layer, x = LAYERS["rotary"], draw(2, 4, 8)
    params = drawn(layer)
    y, cache = layer(params, x, cache=empty(layer, 2, 3), lengths=torch.tensor([4, 2]))
    assert y.isnan().any(-1).tolist() == [[False, False, False, True], [False] * 4]
    assert not cache.keys.isnan().any()
    torch.testing.assert_close(y[0, :3], layer(params, x[0, :3], is_causal=True), rtol=1e-12, atol=1e-12)


def test_cached_attention_leaves_the_given_cache_as_it_is() -> None:
    layer, x = LAYERS["plain"], draw(2, 1, 8)
    cache = empty(layer, 2, 3)
    before = tree.map(torch.clone, cache)
    layer(drawn(layer), x, cache=cache)
    assert tree.equal(cache, before)


def test_cache_keeps_its_dtype_and_takes_no_positions_and_empty_batches() -> None:
    layer = nn.MultiHeadAttention(8, 4)
    params = layer.init(random.key(0))
    cache = layer.init_cache(2, 3, torch.bfloat16)
    y, new = layer(params, torch.ones(2, 2, 8), cache=cache)
    assert (y.dtype, new.keys.dtype, new.lengths.dtype) == (torch.float32, torch.bfloat16, torch.int64)
    y, new = layer(params, torch.ones(2, 0, 8), cache=cache)
    assert y.shape == (2, 0, 8)
    assert tree.equal(new, cache)
    y, _ = layer(params, torch.ones(0, 2, 8), cache=layer.init_cache(0, 3))
    assert y.shape == (0, 2, 8)


PLAIN = LAYERS["plain"]
NO_CACHE: Any = 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p, x: PLAIN(p, x, x, cache=empty(PLAIN, 2, 3)),
            ValueError,
            "expected no context beside a cache, got one",
        ),
        (
            lambda p, x: PLAIN(p, x, lengths=torch.ones(2)),
            ValueError,
            "expected lengths only with a cache, got them without",
        ),
        (
            lambda p, x: PLAIN(p, x, cache=empty(PLAIN, 3, 3)),
            ValueError,
            r"expected x with the cache's leading axes \(3,\), got \(2,\)",
        ),
        (
            lambda p, x: PLAIN(p, x, cache=empty(nn.MultiHeadAttention(8, 2), 2, 3)),
            ValueError,
            r"cache.keys: expected shape \(..., h=4, m, d=2\), got \(2, 2, 3, 4\)",
        ),
        (lambda p, x: PLAIN(p, x, cache=NO_CACHE), TypeError, "expected cache to be a KVCache, got int"),
    ],
    ids=["context", "lengths", "batch", "heads", "type"],
)
def test_cached_attention_names_what_it_expects(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"MultiHeadAttention: {message}"):
        call(drawn(PLAIN), draw(2, 2, 8))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 2, 1]), ValueError, r"expected the cache's shape \(2,\), got \(3,\)"),
        (torch.tensor(1), ValueError, r"expected the cache's shape \(2,\), got \(\)"),
        (torch.tensor([1.0, 2.0]), TypeError, r"expected an int64 or int32 tensor, got torch\.float32"),
        ([1, 2], TypeError, "expected an int64 or int32 tensor, got list"),
    ],
    ids=["too many", "one for all", "floating", "list"],
)
def test_cached_attention_names_lengths_that_do_not_fit(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"lengths: {message}"):
        PLAIN(drawn(PLAIN), draw(2, 2, 8), cache=empty(PLAIN, 2, 3), lengths=lengths)


def test_cached_attention_keeps_the_dtype_of_its_lengths() -> None:
    """So that a scan over calls with int32 lengths has one type of carry."""
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    _, cache = PLAIN(drawn(PLAIN), draw(2, 2, 8), cache=empty(PLAIN, 2, 3), lengths=lengths)
    assert cache.lengths.dtype == torch.int64
    assert cache.lengths.tolist() == [1, 2]
