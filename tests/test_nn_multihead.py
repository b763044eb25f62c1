"""Multi-head attention: masks, packed projections, grouped queries, dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import nn, random, tree
from functorch_gen.transforms import grad, hessian, jacrev, jit, vmap
from functorch_gen.typing import Params


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


LAYER = nn.MultiHeadAttention(4, 2)
PARAMS = tree.cast(LAYER.init(random.key(0)), torch.float64)


def test_multi_head_attention_is_causal_by_the_support_of_its_gradient() -> None:
    jacobian = jacrev(lambda x: LAYER(PARAMS, x, is_causal=True))(draw(5, 4))  # (l, e, l, e)
    depends = jacobian.abs().amax((1, 3)) > 0
    assert torch.equal(depends, torch.ones(5, 5, dtype=torch.bool).tril())


def test_multi_head_attention_with_a_padding_mask_ignores_the_padding() -> None:
    x, keep = draw(2, 5, 4), torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    y = LAYER(PARAMS, x, mask=keep[:, None, None, :])
    assert_close(y[0, :3], LAYER(PARAMS, x[0, :3]))
    assert_close(y[1], LAYER(PARAMS, x[1]))


@pytest.mark.parametrize("additive", [False, True])
def test_multi_head_attention_with_a_mask_equals_torch(additive: bool) -> None:
    """torch's boolean mask says where *not* to attend."""
    module = torch.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    module.load_state_dict(tree.names(PARAMS))
    x, keep = draw(2, 5, 4), torch.ones(5, 5, dtype=torch.bool).triu(-1)
    mask, theirs = (draw(5, 5, seed=9),) * 2 if additive else (keep, ~keep)
    expected = module(x, x, x, attn_mask=theirs, need_weights=False)[0].detach()
    assert_close(LAYER(PARAMS, x, mask=mask), expected)


def test_multi_head_self_attention_projects_with_one_product() -> None:
    """Packed and in three products: the same values."""
    x = draw(2, 5, 4)
    assert_close(LAYER(PARAMS, x), LAYER(PARAMS, x, x.clone(), x.clone()))
    text = jit(LAYER, backend="aten").lower(PARAMS, x).text()
    assert text.count("linear(") + text.count("mm(") == 2


@pytest.mark.parametrize("kdim", [None, 3])
def test_multi_head_attention_with_grouped_queries_is_one_with_repeated_heads(kdim: int | None) -> None:
    """Four heads of queries share two of keys and values: as if each of these stood there twice."""
    few, all_heads = nn.MultiHeadAttention(8, 4, kdim=kdim, num_kv_heads=2), nn.MultiHeadAttention(8, 4, kdim=kdim)
    params = tree.cast(few.init(random.key(0)), torch.float64)
    params["in_proj_bias"] = draw(16)

    def repeat(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1)

    def repeat_packed(x: Tensor) -> Tensor:
        q, k, v = x.split((8, 4, 4))
        return torch.cat([q, repeat(k), repeat(v)])

    rules = {"in_proj_weight": repeat_packed, "in_proj_bias": repeat_packed}
    rules |= {"k_proj_weight": repeat, "v_proj_weight": repeat}
    repeated = {name: rules[name](x) if name in rules else x for name, x in params.items()}
    inputs = (draw(2, 5, 8),) if kdim is None else (draw(2, 5, 8), draw(2, 4, 3), draw(2, 4, 8))
    assert_close(few(params, *inputs), all_heads(repeated, *inputs))
    assert tree.names(few.init(random.key(0))).keys() == tree.names(all_heads.init(random.key(0))).keys()


def test_multi_head_attention_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="expected num_heads=4 divisible by num_kv_heads, got 3"):
        nn.MultiHeadAttention(8, 4, num_kv_heads=3)


def test_multi_head_attention_drops_only_with_a_key() -> None:
    layer, x = nn.MultiHeadAttention(4, 2, dropout=0.5), draw(2, 5, 4)
    first, again = (layer(PARAMS, x, key=random.key(3)) for _ in range(2))
    assert torch.equal(layer(PARAMS, x), LAYER(PARAMS, x))
    assert torch.equal(first, again)
    assert not torch.equal(first, LAYER(PARAMS, x))


# Beyond torch's layer: norms, rotations and biases of the scores.


def drawn(layer: nn.MultiHeadAttention) -> Params:
    """float64 parameters in general position: no weight is one, no bias zero."""
    named = tree.names(layer.init(random.key(0)))
    return tree.from_names({name: draw(*x.shape, seed=i) for i, (name, x) in enumerate(named.items())})


def by_hand(layer: nn.MultiHeadAttention, params: Params, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Self-attention, head by head and query by query, of an unbatched sequence."""
    heads, groups = layer.num_heads, layer.num_kv_heads or layer.num_heads
    d = layer.embed_dim // heads
    q, k, v = (x @ params["in_proj_weight"].T + params["in_proj_bias"]).split((heads * d, groups * d, groups * d), -1)
    outputs = []
    for h in range(heads):
        g = h * groups // heads
        q_h, k_h, v_h = q[:, h * d : (h + 1) * d], k[:, g * d : (g + 1) * d], v[:, g * d : (g + 1) * d]
        if layer.qk_norm:
            eps = torch.finfo(torch.float64).eps
            q_h = q_h / (q_h.square().mean(-1, keepdim=True) + eps).sqrt() * params["q_norm"]["weight"]
            k_h = k_h / (k_h.square().mean(-1, keepdim=True) + eps).sqrt() * params["k_norm"]["weight"]
        scores = (
            torch.stack(
                [
                    torch.stack([turn(layer, a, i) @ turn(layer, b, j) for j, b in enumerate(k_h)])
                    for i, a in enumerate(q_h)
                ]
            )
            / d**0.5
        )
        if layer.alibi:
            at = torch.arange(len(x))
            scores = scores - 2.0 ** (-8 * (h + 1) / heads) * (at[:, None] - at).abs()
        scores = scores if mask is None else torch.where(mask, scores, -torch.inf)
        outputs.append(scores.softmax(-1) @ v_h)
    return torch.cat(outputs, -1) @ params["out_proj"]["weight"].T + params["out_proj"]["bias"]


def turn(layer: nn.MultiHeadAttention, x: Tensor, position: int) -> Tensor:
    """The rotation as one matrix of blocks, eq. 15 of the paper."""
    if layer.rotary_base is None:
        return x
    d = len(x)
    angles = [torch.tensor(position * layer.rotary_base ** (-2 * i / d), dtype=torch.float64) for i in range(d // 2)]
    blocks = [torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])]) for a in angles]
    return torch.block_diag(*blocks) @ x


EXTRAS = {
    "norms": nn.MultiHeadAttention(8, 2, qk_norm=True),
    "rotary": nn.MultiHeadAttention(8, 2, rotary_base=100.0),
    "alibi": nn.MultiHeadAttention(8, 4, alibi=True),
    "all": nn.MultiHeadAttention(16, 4, num_kv_heads=2, qk_norm=True, rotary_base=1e4, alibi=True),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", EXTRAS)
def test_multi_head_attention_with_extras_is_the_formula(name: str, is_causal: bool) -> None:
    layer = EXTRAS[name]
    params, x = drawn(layer), 0.3 * draw(5, layer.embed_dim)
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if is_causal else None
    assert_close(layer(params, x, is_causal=is_causal), by_hand(layer, params, x, mask))
    keep = torch.ones(5, 5, dtype=torch.bool).triu(-2)
    assert_close(layer(params, x, mask=keep), by_hand(layer, params, x, keep))
    assert_close(layer(params, x, mask=torch.where(keep, 0.0, -torch.inf)), by_hand(layer, params, x, keep))


@pytest.mark.parametrize("name", EXTRAS)
def test_multi_head_attention_with_extras_passes_the_transforms(name: str) -> None:
    """The derivatives of the formula."""
    layer = EXTRAS[name]
    params, x = drawn(layer), 0.3 * draw(2, 3, layer.embed_dim)

    def energy(x: Tensor) -> Tensor:
        return layer(params, x).sin().sum()

    def expected(x: Tensor) -> Tensor:
        return by_hand(layer, params, x).sin().sum()

    found = jit(vmap(grad(energy)), backend="aten")(x)
    torch.testing.assert_close(found, torch.stack([grad(expected)(x) for x in x]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hessian(energy)(x[0, :2]), hessian(expected)(x[0, :2]), rtol=1e-9, atol=1e-9)


def test_multi_head_attention_with_rotations_does_not_see_where_the_sequence_stands() -> None:
    """The last five of eight positions, seen alone through a mask: the same as a sequence of five."""
    layer = EXTRAS["rotary"]
    params, x = drawn(layer), draw(8, 8)
    keep = torch.arange(8) >= 3
    assert_close(layer(params, x, mask=keep)[3:], layer(params, x[3:]))


def test_multi_head_attention_with_qk_norm_has_two_more_parameters_and_draws_the_others_alike() -> None:
    plain, normed = (tree.names(nn.MultiHeadAttention(8, 2, qk_norm=on).init(random.key(0))) for on in (False, True))
    assert normed.keys() - plain.keys() == {"q_norm.weight", "k_norm.weight"}
    assert torch.equal(normed["q_norm.weight"], torch.ones(4))
    assert all(torch.equal(x, normed[name]) for name, x in plain.items())


def test_multi_head_attention_with_extras_keeps_bf16() -> None:
    layer = EXTRAS["all"]
    params = tree.cast(layer.init(random.key(0)), torch.bfloat16)
    assert layer(params, torch.ones(2, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 6, "rotary_base": 1e4}, "expected an even size of heads to rotate, got 3"),
        ({"embed_dim": 8, "rotary_base": 0.0}, "expected rotary_base > 0, got 0.0"),
    ],
    ids=["odd", "base"],
)
def test_multi_head_attention_refuses_rotations_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MultiHeadAttention: {message}"):
        nn.MultiHeadAttention(num_heads=2, **options)


@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_multi_head_attention_refuses_a_mask_of_integers(alibi: bool, cached: bool) -> None:
    """Zeros and ones meant as "attend or not" would be added to the scores."""
    layer: Any = nn.MultiHeadAttention(4, 2, alibi=alibi)
    cache = {"cache": layer.init_cache((), 3)} if cached else {}
    with pytest.raises(TypeError, match=r"mask: expected .* floating.*, got torch\.int64"):
        layer(layer.init(random.key(0)), torch.ones(3, 4), mask=torch.ones(3, 3, dtype=torch.int64), **cache)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"kdim": 3, "vdim": 5}], ids=["packed", "of three sizes"])
def test_multi_head_attention_names_the_missing_parameter(options: dict[str, Any]) -> None:
    layer = nn.MultiHeadAttention(4, 2, **options)
    _, kdim, vdim = layer._dims
    params = layer.init(random.key(0))
    inputs = torch.ones(3, 4), torch.ones(2, kdim), torch.ones(2, vdim)
    for missing in params:
        rest = {name: p for name, p in params.items() if name != missing}
        with pytest.raises(KeyError, match=f"MultiHeadAttention: expected a parameter '{missing}', got only"):
            layer(rest, *inputs)
    with pytest.raises(KeyError, match=r"MultiHeadAttention: out_proj: expected a parameter 'bias'"):
        layer({**params, "out_proj": {"weight": torch.ones(4, 4)}}, *inputs)
