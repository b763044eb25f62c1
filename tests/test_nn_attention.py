"""Attention: masks, causality, dropout."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacrev

from functorch_gen import nn, random, tree


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


Q, K, V = draw(2, 3, 4, 5, seed=1), draw(2, 3, 6, 5, seed=2), draw(2, 3, 6, 7, seed=3)
KEEP = random.bernoulli(random.key(4), 0.6, (2, 1, 4, 6)) | (torch.arange(6) == 2)
SHIFT = draw(4, 6, seed=5)
OPTIONS = [
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"mask": KEEP},
    {"mask": SHIFT},
    {"mask": torch.where(KEEP, SHIFT, -torch.inf)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "scale", "bool", "additive", "minus infinity"])
def test_attention_equals_scaled_dot_product_attention(options: dict[str, Any]) -> None:
    """Outputs and gradients to 1e-12 in float64."""
    torch_options = {{"mask": "attn_mask"}.get(name, name): value for name, value in options.items()}
    cotangent = draw(2, 3, 4, 7, seed=6)
    inputs = [x.clone().requires_grad_() for x in (Q, K, V)]
    y = F.scaled_dot_product_attention(*inputs, **torch_options)
    expected = torch.autograd.grad((y * cotangent).sum(), inputs)
    actual = grad(lambda *a: (nn.attention(*a, **options) * cotangent).sum(), (0, 1, 2))(Q, K, V)
    torch.testing.assert_close(nn.attention(Q, K, V, **options), y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_attention_combines_a_mask_with_causality() -> None:
    causal = torch.ones(4, 6, dtype=torch.bool).tril()
    keep = KEEP | (torch.arange(6) == 0)
    expected = F.scaled_dot_product_attention(Q, K, V, attn_mask=keep & causal)
    torch.testing.assert_close(nn.attention(Q, K, V, mask=keep, is_causal=True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("additive", [False, True])
def test_query_without_any_key_gets_zeros_and_zero_gradients(additive: bool) -> None:
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1] = False
    mask = torch.where(keep, 0.0, -torch.inf).double() if additive else keep
    y = nn.attention(Q, K, V, mask=mask)
    others = torch.tensor([0, 2, 3])
    assert torch.equal(y[..., 1, :], torch.zeros(2, 3, 7, dtype=torch.float64))
    torch.testing.assert_close(y[..., others, :], nn.attention(Q, K, V)[..., others, :])
    for gradient in grad(lambda *a: nn.attention(*a, mask=mask)[..., 1, :].sum(), (0, 1, 2))(Q, K, V):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_additive_mask_gets_its_gradient() -> None:
    """A learned position bias: against autograd through torch's own."""
    bias = SHIFT.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(Q, K, V, attn_mask=bias).square().sum(), bias)
    actual = grad(lambda mask: nn.attention(Q, K, V, mask=mask).square().sum())(SHIFT)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


LAYER = nn.MultiHeadAttention(4, 2)
PARAMS = tree.cast(LAYER.init(random.key(0)), torch.float64)


def test_multi_head_attention_is_causal_by_the_support_of_its_gradient() -> None:
    jacobian = jacrev(lambda x: LAYER(PARAMS, x, is_causal=True))(draw(5, 4))  # (l, e, l, e)
    depends = jacobian.abs().amax((1, 3)) > 0
    assert torch.equal(depends, torch.ones(5, 5, dtype=torch.bool).tril())


def test_multi_head_attention_with_a_padding_mask_ignores_the_padding() -> None:
    x, keep = draw(2, 5, 4), torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    y = LAYER(PARAMS, x, mask=keep[:, None, None, :])
    torch.testing.assert_close(y[0, :3], LAYER(PARAMS, x[0, :3]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[1], LAYER(PARAMS, x[1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("additive", [False, True])
def test_multi_head_attention_with_a_mask_equals_torch(additive: bool) -> None:
    """torch's boolean mask says where *not* to attend."""
    module = torch.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    module.load_state_dict(tree.names(PARAMS))
    x, keep = draw(2, 5, 4), torch.ones(5, 5, dtype=torch.bool).triu(-1)
    mask, theirs = (draw(5, 5, seed=9),) * 2 if additive else (keep, ~keep)
    expected = module(x, x, x, attn_mask=theirs, need_weights=False)[0].detach()
    torch.testing.assert_close(LAYER(PARAMS, x, mask=mask), expected, rtol=1e-12, atol=1e-12)


def test_attention_dropout_keeps_the_mean() -> None:
    """4,000 draws; the spread of the mean of each element is below 0.02, five of them 0.1."""
    keys = random.split(random.key(0), 4000)
    y = torch.func.vmap(lambda key: nn.attention(Q, K, V, dropout=0.2, key=key))(keys)
    error = y.std(0) / 4000**0.5
    assert ((y.mean(0) - nn.attention(Q, K, V)).abs() < 5 * error).all()


def test_multi_head_attention_drops_only_with_a_key() -> None:
    layer, x = nn.MultiHeadAttention(4, 2, dropout=0.5), draw(2, 5, 4)
    first, again = (layer(PARAMS, x, key=random.key(3)) for _ in range(2))
    assert torch.equal(layer(PARAMS, x), LAYER(PARAMS, x))
    assert torch.equal(first, again)
    assert not torch.equal(first, LAYER(PARAMS, x))
