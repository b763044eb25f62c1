"""Multi-head attention: masks, packed projections, grouped queries, dropout."""

import pytest
import torch
from torch import Tensor

from functorch_gen import nn, random, tree
from functorch_gen.transforms import jacrev, jit


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
