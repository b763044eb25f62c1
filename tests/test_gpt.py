"""GPT: torch's own encoder layers, causality, initial distribution, and derivatives of every example."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from functorch_gen import models, nn, random, tree
from functorch_gen.transforms import grad, hessian, hvp, jacrev, jit, scan, vmap
from functorch_gen.typing import Params

SIZES: dict[str, Any] = {"vocab_size": 7, "context": 6, "num_layers": 2, "num_heads": 2, "embed_dim": 4}
TOKENS = torch.tensor([[1, 5, 2, 2, 6], [0, 3, 3, 4, 1], [6, 6, 0, 1, 2]])


def drawn(layer: Any, seed: int = 0) -> Params:
    """float64 parameters in general position: no weight is one, no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64), layer.init(random.key(0)))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


# torch.nn's names of a block's parts.
TORCHS = {"attention": "self_attn", "mlp.0": "linear1", "mlp.2": "linear2"}


def torchs(params: Params) -> dict[str, Tensor]:
    """A block's parameters by torch's names."""
    names = tree.names(params)
    for ours, theirs in TORCHS.items():
        names = {name.replace(ours, theirs) if name.startswith(ours) else name: x for name, x in names.items()}
    return names


def reference_block(params: Params, embed_dim: int, num_heads: int) -> torch.nn.Module:
    """``torch.nn.TransformerEncoderLayer`` with the block's parameters."""
    module = torch.nn.TransformerEncoderLayer(
        embed_dim, num_heads, 4 * embed_dim, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    module.load_state_dict(torchs(params))
    return module


def hide_later(length: int) -> Tensor:
    return torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def reference(gpt: models.GPT, params: Params, tokens: Tensor) -> Tensor:
    """Logits by ``torch.nn``'s modules."""
    length = tokens.shape[1]
    x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][:length]
    for i in range(gpt.num_layers):
        x = reference_block(params[f"block{i}"], gpt.embed_dim, gpt.num_heads)(x, src_mask=hide_later(length))
    x = torch.nn.functional.layer_norm(x, (gpt.embed_dim,), params["norm"]["weight"], params["norm"]["bias"])
    table = params["tokens"] if gpt.tied else params["head"]
    return x @ table["weight"].T


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_equals_torchs_encoder_layers(tied: bool) -> None:
    gpt = models.GPT(**SIZES, tied=tied)
    params = drawn(gpt)
    torch.testing.assert_close(gpt(params, TOKENS), reference(gpt, params, TOKENS), rtol=1e-12, atol=1e-12)


def test_gpt_takes_any_leading_axes() -> None:
    gpt = models.GPT(**SIZES)
    params = drawn(gpt)
    logits = gpt(params, TOKENS)
    torch.testing.assert_close(gpt(params, TOKENS[1]), logits[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gpt(params, TOKENS[:, None]), logits[:, None], rtol=1e-12, atol=1e-12)


def test_gpt_is_causal_by_the_support_of_its_gradient() -> None:
    """Logits at i depend on the positions 0 .. i, and on all of them."""
    gpt = models.GPT(**SIZES, tied=False)
    params = drawn(gpt)

    def logits(positions: Tensor) -> Tensor:
        return gpt({**params, "positions": {"weight": positions}}, TOKENS[0])

    jacobian = jacrev(logits)(params["positions"]["weight"])  # (l, v, context, e)
    depends = jacobian.abs().amax((1, 3)) > 0
    assert torch.equal(depends, torch.ones(5, 6, dtype=torch.bool).tril())


# Initial distribution.


def test_gpt_starts_with_the_deviations_of_gpt2() -> None:
    """Within five standard errors, std / sqrt(2 n)."""
    gpt = models.GPT(vocab_size=64, context=32, num_layers=3, num_heads=4, embed_dim=64, tied=False)
    for name, x in tree.names(gpt.init(random.key(0))).items():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(x, torch.full_like(x, float("norm" in name and name.endswith("weight"))))
            continue
        ends_branch = name.endswith(("out_proj.weight", "mlp.2.weight"))
        expected = 0.02 / math.sqrt(6) if ends_branch else 0.02
        assert abs(float(x.std()) / expected - 1) < 5 / math.sqrt(2 * x.numel()), name


def test_gpt_has_a_head_only_when_untied() -> None:
    tied, untied = (tree.names(models.GPT(**SIZES, tied=tied).init(random.key(0))) for tied in (True, False))
    assert untied.keys() - tied.keys() == {"head.weight"}
    assert all(torch.equal(x, untied[name]) for name, x in tied.items())


def test_gpt_starts_near_the_uniform_distribution() -> None:
    """Small weights: a loss of log(vocab_size), up to what logits of deviation 0.02 sqrt(e) change."""
    gpt = models.GPT(**SIZES)
    logits = gpt(gpt.init(random.key(0)), TOKENS)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
    assert abs(float(loss) - math.log(7)) < 0.04 * 3


# Dropout.


def test_gpt_drops_only_with_a_key() -> None:
    gpt, dropped = models.GPT(**SIZES), models.GPT(**SIZES, dropout=0.3)
    params = drawn(gpt)
    first, again = (dropped(params, TOKENS, key=random.key(1)) for _ in range(2))
    assert torch.equal(dropped(params, TOKENS), gpt(params, TOKENS))
    assert torch.equal(first, again)
    assert not torch.equal(first, gpt(params, TOKENS))
    assert not nn.draws(gpt)
    assert nn.draws(dropped)


def test_block_drops_its_branches_and_its_attention_weights() -> None:
    """With probability 1 nothing is left but the skip."""
    block = models.GPTBlock(4, 2, dropout=1.0)
    x = draw(3, 4)
    assert torch.equal(block(drawn(block), x, key=random.key(0)), x)


# Cached decoding.

MODELS = {
    "learned positions": models.GPT(**SIZES),
    "alibi": models.GPT(**SIZES, alibi=True, tied=False),
    "rotary, grouped, normalised, gated": models.GPT(
        **SIZES, rotary_base=1e4, num_kv_heads=1, qk_norm=True, norm=nn.RMSNorm, gated=True, hidden_features=6
    ),
}


@pytest.mark.parametrize("sizes", [[1] * 5, [2, 3]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gpt_with_a_cache_equals_the_whole_forward_pass(name: str, sizes: list[int]) -> None:
    gpt = MODELS[name]
    params = drawn(gpt)

    def call(params: Params, tokens: Tensor, cache: Any) -> Any:
        return gpt(params, tokens, cache=cache)

    step = jit(call, backend="aten") if sizes[0] == 1 else call  # one program
    cache, found = gpt.init_cache(3, dtype=torch.float64), []
    for tokens in TOKENS.split(sizes, 1):
        logits, cache = step(params, tokens, cache)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), gpt(params, TOKENS), rtol=1e-11, atol=1e-11)
    assert [c.lengths.tolist() for c in cache.values()] == [[5, 5, 5]] * 2


@pytest.mark.parametrize("name", MODELS)
def test_gpt_with_a_cache_takes_prompts_of_several_lengths(name: str) -> None:
    """Padded prompts of 3, 5 and 1 tokens; then one token more for each, to the end of the context."""
    gpt = MODELS[name]
    params, lengths = drawn(gpt), torch.tensor([3, 5, 1])
    logits, cache = gpt(params, TOKENS, cache=gpt.init_cache(3, dtype=torch.float64), lengths=lengths)
    expected = gpt(params, TOKENS)
    new = torch.tensor([[4], [2], [6]])
    after, cache = gpt(params, new, cache=cache)
    for i, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[i, :length], expected[i, :length], rtol=1e-11, atol=1e-11)
        whole = gpt(params, torch.cat([TOKENS[i, :length], new[i]]))
        torch.testing.assert_close(after[i, 0], whole[-1], rtol=1e-11, atol=1e-11)
    assert cache["block0"].lengths.tolist() == [4, 6, 2]


def test_gpt_generates_in_one_scan() -> None:
    """Greedy tokens: those of the whole forward pass, run anew for each."""
    gpt = MODELS["rotary, grouped, normalised, gated"]
    params = drawn(gpt)

    def generate(params: Params, first: Tensor) -> Tensor:
        def step(carry: Any, _: None) -> Any:
            token, cache = carry
            logits, cache = gpt(params, token[:, None], cache=cache)
            token = logits[:, -1].argmax(-1)
            return (token, cache), token

        return scan(step, (first, gpt.init_cache(3, dtype=torch.float64)), length=5)[1].mT

    tokens = TOKENS[:, :1]
    for _ in range(5):
        tokens = torch.cat([tokens, gpt(params, tokens)[:, -1:].argmax(-1)], 1)
    for run in (generate, jit(generate, backend="aten")):
        assert torch.equal(run(params, TOKENS[:, 0]), tokens[:, 1:])


@pytest.mark.parametrize("name", MODELS)
def test_gpt_is_causal_by_the_support_of_the_gradient_of_its_embeddings(name: str) -> None:
    """d logits_i / d embedding_j is 0 for j > i, exactly, and not 0 for j <= i; every token occurs once."""
    gpt = models.GPT(**{**vars(MODELS[name]), "tied": False})
    params = drawn(gpt)

    def logits(embeddings: Tensor) -> Tensor:
        return gpt({**params, "tokens": {"weight": embeddings}}, torch.arange(5))

    jacobian = jacrev(logits)(params["tokens"]["weight"])  # (l, v, v, e)
    depends = jacobian.abs().amax((1, 3))[:, :5] > 0
    assert torch.equal(depends, torch.ones(5, 5, dtype=torch.bool).tril())


def test_transformer_block_sees_all_positions_unless_causal() -> None:
    block = models.TransformerBlock(4, 2)
    params, x, keep = drawn(block), draw(3, 4), torch.ones(3, 3, dtype=torch.bool).tril()
    causal = models.TransformerBlock(4, 2, is_causal=True)
    expected = reference_block(params, 4, 2)(x[None])[0].detach()
    torch.testing.assert_close(block(params, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block(params, x, mask=keep), causal(params, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(models.GPTBlock(4, 2)(params, x), causal(params, x))


# Derivatives of every example.


def token_loss(gpt: models.GPT, params: Params, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(gpt(params, tokens[:-1]), tokens[1:])


def test_per_example_gradients_of_a_gpt_are_those_of_a_loop() -> None:
    gpt = models.GPT(**SIZES)
    params = drawn(gpt)
    one = grad(lambda params, tokens: token_loss(gpt, params, tokens))
    all_at_once = vmap(one, (None, 0))
    expected = tree.stack([one(params, tokens) for tokens in TOKENS])
    for found in (all_at_once(params, TOKENS), jit(all_at_once, backend="aten")(params, TOKENS)):
        for x, y in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


BLOCK = models.GPTBlock(4, 2)
X = draw(3, 3, 4)


def block_loss(params: Params, x: Tensor) -> Tensor:
    return BLOCK(params, x).sin().sum()


def test_per_example_hessian_traces_of_a_block_are_those_of_a_loop() -> None:
    """Hutchinson's estimate v^T H v over all parameters: four probes of each of three examples."""
    params = drawn(BLOCK)
    flat, unravel = tree.ravel(params)
    probes = random.rademacher(random.key(3), (4, flat.numel()), torch.float64)

    def estimate(flat: Tensor, probe: Tensor, x: Tensor) -> Tensor:
        return probe @ hvp(lambda flat: block_loss(unravel(flat), x), (flat,), (probe,))

    over_all = vmap(vmap(estimate, (None, 0, None)), (None, None, 0))
    expected = torch.stack([torch.stack([curvature(params, unravel(probe), x) for probe in probes]) for x in X])
    for found in (over_all(flat, probes, X), jit(over_all, backend="aten")(flat, probes, X)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def curvature(params: Params, probe: Params, x: Tensor) -> Tensor:
    """v^T H v of one example, by two backward passes through torch's module and its unfused attention."""
    module, v = reference_block(params, 4, 2), torchs(probe)
    with sdpa_kernel(SDPBackend.MATH):
        loss = module(x[None], src_mask=hide_later(3)).sin().sum()
        names, weights = zip(*module.named_parameters(), strict=True)
        first = torch.autograd.grad(loss, weights, create_graph=True)
        slope = torch.stack([(g * v[name]).sum() for name, g in zip(names, first, strict=True)]).sum()
        second = torch.autograd.grad(slope, weights)
    return torch.stack([(h * v[name]).sum() for name, h in zip(names, second, strict=True)]).sum()


def test_per_example_hessian_trace_of_a_block_is_that_of_its_matrix() -> None:
    """Exact, over the twelve inputs of each example."""
    params = drawn(BLOCK)
    basis = torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)

    def trace(x: Tensor) -> Tensor:
        return vmap(lambda e: (e * hvp(lambda x: block_loss(params, x), (x,), (e,))).sum())(basis).sum()

    matrices = [hessian(lambda x: block_loss(params, x))(x).reshape(12, 12) for x in X]
    torch.testing.assert_close(vmap(trace)(X), torch.stack([m.trace() for m in matrices]), rtol=1e-10, atol=1e-10)


# Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "GPT: expected embed_dim divisible by num_heads=3, got 4"),
        ({"num_layers": 0}, "GPT: expected num_layers >= 1, got 0"),
        ({"dropout": 1.5}, "GPT: expected 0 <= dropout <= 1, got 1.5"),
        ({"soft_cap": 0.0}, "GPT: expected soft_cap > 0, got 0.0"),
        ({"num_kv_heads": 3}, "MultiHeadAttention: expected num_heads=2 divisible by num_kv_heads, got 3"),
        ({"embed_dim": 6, "rotary_base": 1e4}, "MultiHeadAttention: expected an even size of heads to rotate, got 3"),
        ({"hidden_features": 0}, "GPTBlock: expected hidden_features >= 1, got 0"),
    ],
    ids=["heads", "layers", "dropout", "soft_cap", "kv_heads", "rotary", "hidden"],
)
def test_gpt_names_the_size_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.GPT(**{**SIZES, **change})


def test_gpt_refuses_a_norm_that_is_no_function() -> None:
    name: Any = "rms"
    with pytest.raises(TypeError, match=r"GPT: expected norm to be a function of the width, as nn\.RMSNorm, got 'rms'"):
        models.GPT(**SIZES, norm=name)


def test_gpt_refuses_more_tokens_than_its_context() -> None:
    gpt = models.GPT(**SIZES)
    with pytest.raises(ValueError, match="GPT: tokens: expected at most context=6 positions, got 7"):
        gpt(gpt.init(random.key(0)), torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"expected an int64 or int32 tensor, got torch\.float32"):
        gpt(gpt.init(random.key(0)), torch.zeros(2, 3))


def test_gpt_refuses_lengths_without_a_cache() -> None:
    gpt = models.GPT(**SIZES)
    with pytest.raises(ValueError, match="GPT: expected lengths only with a cache, got them without"):
        gpt(gpt.init(random.key(0)), TOKENS, lengths=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=["plain", "qk_norm"])
def test_gpt_takes_norms_without_parameters(options: dict[str, Any]) -> None:
    def norm(width: int) -> nn.LayerNorm:
        return nn.LayerNorm(width, elementwise_affine=False)

    free, usual = models.GPT(**SIZES, norm=norm, **options), models.GPT(**SIZES, **options)
    params, both = free.init(random.key(0)), usual.init(random.key(0))
    expected = {name: x for name, x in tree.names(both).items() if name in tree.names(params)}
    assert tree.equal(tree.names(params), expected)
    torch.testing.assert_close(free(params, TOKENS), usual(both, TOKENS))


def test_gpt_refuses_a_cache_that_does_not_fit() -> None:
    gpt = models.GPT(**SIZES)
    with pytest.raises(ValueError, match="GPT: expected max_length <= context=6, got 7"):
        gpt.init_cache(1, 7)
    others: tuple[Any, ...] = ({}, 3)
    for cache, got in zip(others, (r"\[\]", "int"), strict=True):
        with pytest.raises(ValueError, match=f"GPT: expected a cache of block0, .*, got {got}"):
            gpt(gpt.init(random.key(0)), TOKENS, cache=cache)
