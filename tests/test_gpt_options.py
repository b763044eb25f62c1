"""GPT's options: RoPE, RMSNorm, SwiGLU, QK norm, grouped queries, tied head, soft cap, and the cache with them all."""

import math
from typing import Any

import torch
from torch import Tensor

from functorch_gen import models, nn, random, tree
from functorch_gen.typing import Params

SIZES: dict[str, Any] = {"vocab_size": 7, "context": 6, "num_layers": 2, "num_heads": 4, "embed_dim": 16}
OPTIONS: dict[str, Any] = {"rotary_base": 500.0, "num_kv_heads": 2, "qk_norm": True, "gated": True, "norm": nn.RMSNorm}
TOKENS = torch.tensor([[1, 5, 2, 2, 6], [0, 3, 3, 4, 1], [6, 6, 0, 1, 2]])


def drawn(layer: Any, seed: int = 0) -> Params:
    """float64 parameters in general position: no weight is one, no bias zero."""
    named = tree.names(layer.init(random.key(0)))
    keys = random.split(random.key(seed), len(named))
    return tree.from_names({n: random.normal(k, x.shape, torch.float64) for (n, x), k in zip(named.items(), keys)})


def written_out(gpt: models.GPT, params: Params, tokens: Tensor) -> Tensor:
    """Logits (l, v) by the papers' formulas, a head and a query at a time: all options on."""
    length, d, group = len(tokens), gpt.embed_dim // gpt.num_heads, gpt.num_heads // (gpt.num_kv_heads or 1)
    eps, base = torch.finfo(torch.float64).eps, gpt.rotary_base or 0.0

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def turned(x: Tensor, position: int) -> Tensor:
        """Pairs of elements as complex numbers, times exp(i position base^(-2 m / d))."""
        angle = position * base ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        pairs = torch.view_as_complex(x.reshape(d // 2, 2).contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(pairs).flatten()

    x = params["tokens"]["weight"][tokens]
    for i in range(gpt.num_layers):
        p, attention = params[f"block{i}"], params[f"block{i}"]["attention"]
        h = rms(x, p["norm1"]["weight"]) @ attention["in_proj_weight"].T + attention["in_proj_bias"]
        q, k, v = (
            part.unflatten(-1, (-1, d)) for part in h.split([gpt.embed_dim, *[d * (gpt.num_kv_heads or 1)] * 2], 1)
        )
        q, k = rms(q, attention["q_norm"]["weight"]), rms(k, attention["k_norm"]["weight"])
        heads = torch.zeros(length, gpt.num_heads, d, dtype=torch.float64)
        for t, n in ((t, n) for t in range(length) for n in range(gpt.num_heads)):
            scores = [turned(q[t, n], t) @ turned(k[s, n // group], s) / math.sqrt(d) for s in range(t + 1)]
            heads[t, n] = torch.stack(scores).softmax(0) @ v[: t + 1, n // group]
        x = x + heads.flatten(1) @ attention["out_proj"]["weight"].T + attention["out_proj"]["bias"]
        h, mlp = rms(x, p["norm2"]["weight"]), p["mlp"]
        gate, up = (h @ mlp[name]["weight"].T + mlp[name]["bias"] for name in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ mlp["down"]["weight"].T + mlp["down"]["bias"]
    logits = rms(x, params["norm"]["weight"]) @ params["tokens"]["weight"].T
    return (gpt.soft_cap or 0.0) * (logits / (gpt.soft_cap or 1.0)).tanh()


def test_gpt_with_all_options_is_their_formulas() -> None:
    """RoPE, RMSNorm, SwiGLU, QK norm, grouped queries, tied head and soft cap; then padded prompts with a cache."""
    gpt = models.GPT(**SIZES, **OPTIONS, hidden_features=10, soft_cap=3.0)
    params = drawn(gpt)
    expected = torch.stack([written_out(gpt, params, row) for row in TOKENS])
    torch.testing.assert_close(gpt(params, TOKENS), expected, rtol=1e-11, atol=1e-11)
    cache, lengths = gpt.init_cache(3, dtype=torch.float64), torch.tensor([2, 5, 1])
    found, cache = gpt(params, TOKENS, cache=cache, lengths=lengths)
    rest, _ = gpt(params, torch.stack([row.roll(-n) for row, n in zip(TOKENS, lengths.tolist())])[:, :1], cache=cache)
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[i, :n], expected[i, :n], rtol=1e-11, atol=1e-11)
        if n < 5:
            torch.testing.assert_close(rest[i, 0], expected[i, n], rtol=1e-11, atol=1e-11)


def test_gpt_with_options_is_the_composition_of_its_layers() -> None:
    gpt = models.GPT(**SIZES, **OPTIONS, hidden_features=6)
    params = drawn(gpt)
    assert "positions" not in params
    attention = nn.MultiHeadAttention(16, 4, num_kv_heads=2, qk_norm=True, rotary_base=500.0)
    norm, mlp = nn.RMSNorm(16), nn.GatedMLP(16, 6, 16)
    x = params["tokens"]["weight"][TOKENS]
    for i in range(2):
        p = params[f"block{i}"]
        x = x + attention(p["attention"], norm(p["norm1"], x), is_causal=True)
        x = x + mlp(p["mlp"], norm(p["norm2"], x))
    expected = norm(params["norm"], x) @ params["tokens"]["weight"].T
    torch.testing.assert_close(gpt(params, TOKENS), expected, rtol=1e-12, atol=1e-12)


def test_gpt_with_a_soft_cap_keeps_its_logits_within_it() -> None:
    """cap tanh(logits / cap), in the cached pass too; the order stays."""
    free, capped = models.GPT(**SIZES), models.GPT(**SIZES, soft_cap=2.0)
    params = drawn(free)
    logits, found = free(params, TOKENS), capped(params, TOKENS)
    torch.testing.assert_close(found, 2 * torch.tanh(logits / 2), rtol=1e-14, atol=0)
    assert found.abs().max() < 2 < logits.abs().max()
    cached, _ = capped(params, TOKENS, cache=capped.init_cache(3, dtype=torch.float64))
    torch.testing.assert_close(cached, found, rtol=1e-11, atol=1e-11)


def test_gpt_with_options_starts_with_the_deviations_of_gpt2() -> None:
    """Within five standard errors, std / sqrt(2 n); what ends a branch is scaled down."""
    options: dict[str, Any] = {"gated": True, "qk_norm": True, "norm": nn.RMSNorm, "rotary_base": 1e4}
    gpt = models.GPT(vocab_size=64, context=32, num_layers=3, num_heads=4, embed_dim=64, **options)
    for name, x in tree.names(gpt.init(random.key(0))).items():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(x, torch.full_like(x, float("norm" in name))), name
            continue
        expected = 0.02 / math.sqrt(6) if name.endswith(("out_proj.weight", "mlp.down.weight")) else 0.02
        assert abs(float(x.std()) / expected - 1) < 5 / math.sqrt(2 * x.numel()), name
