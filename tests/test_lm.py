"""The next-token loss against torch, windows over a text against a loop, and the entropy rate of a Markov chain."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import lm, models, optim, random
from functorch_gen import step as training
from functorch_gen.transforms import grad, jit, scan


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


TOKENS = torch.tensor([[1, 0, 2, 2, 1], [0, 0, 1, 2, 0]])
LOGITS = draw(2, 4, 3)


def test_loss_is_torchs_cross_entropy_of_the_tokens_that_follow() -> None:
    seen = []

    def network(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return LOGITS

    found = lm.loss(network, TOKENS)
    expected = torch.nn.functional.cross_entropy(LOGITS.mT, TOKENS[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert torch.equal(seen[0], TOKENS[:, :-1])


def test_loss_averages_over_the_tokens_of_its_mask() -> None:
    """Three of the first sequence, of which one is its first token and never counts; none of the second."""
    mask = torch.tensor([[True, False, True, False, True], [False] * 5])
    nll = lm.token_nll(LOGITS, TOKENS[:, 1:])
    expected = torch.stack([(nll[0, 1] + nll[0, 3]) / 2, torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(lm.loss(lambda _: LOGITS, TOKENS, mask=mask), expected, rtol=1e-14, atol=0)


def test_loss_of_masked_tokens_has_no_gradient_even_where_they_are_impossible() -> None:
    logits, mask = LOGITS.clone(), torch.ones(2, 5, dtype=torch.bool)
    logits[0, 1], mask[0, 2] = torch.tensor([0.0, 0.0, -math.inf]), False
    slope = grad(lambda x: lm.loss(lambda _: logits + x, TOKENS, mask=mask).sum())(torch.zeros_like(logits))
    assert slope.isfinite().all()
    assert torch.equal(slope[0, 1], torch.zeros(3, dtype=torch.float64))


def test_token_nll_of_half_precision_is_rounded_once() -> None:
    logits = 30 * LOGITS.bfloat16()
    found = lm.token_nll(logits, TOKENS[:, 1:])
    assert torch.equal(found, lm.token_nll(logits.float(), TOKENS[:, 1:]).bfloat16())


def test_units_of_the_loss() -> None:
    """8 equally likely tokens of 2 bytes: 3 bits, 1.5 bits per byte, perplexity 8."""
    nats = torch.tensor(8.0, dtype=torch.float64).log()
    torch.testing.assert_close(lm.bits_per_byte(nats).item(), 3.0, rtol=1e-15, atol=0)
    torch.testing.assert_close(lm.bits_per_byte(nats, 2).item(), 1.5, rtol=1e-15, atol=0)
    torch.testing.assert_close(lm.perplexity(nats).item(), 8.0, rtol=1e-14, atol=0)


# A long text.


def blend(tokens: Tensor) -> Tensor:
    """Logits that depend on all tokens so far, and on how many they are."""
    table, decay = draw(5, 5, seed=1), 0.7
    x = table[tokens]
    weights = decay ** (torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-2])).tril()
    return weights.tril().double() @ x


def nll_by_a_loop(text: Tensor, window: int, stride: int, start: int) -> Tensor:
    """Token i from the first window that reaches it."""
    given, nll = [start, *text.tolist()], []
    for i, token in enumerate(text.tolist()):
        first = stride * max(0, math.ceil((i + 1 - window) / stride))
        logits = blend(torch.tensor(given[first : i + 1]))[-1]
        nll.append(-logits.log_softmax(-1)[token])
    return torch.stack(nll)


@pytest.mark.parametrize(
    ("n", "window", "stride", "batch_size"),
    [(23, 6, 2, 4), (23, 6, 6, 100), (24, 6, 3, 1), (4, 6, 5, 4), (1, 3, 1, 2), (17, 5, 1, 3)],
)
def test_text_nll_predicts_every_token_once_from_its_window(n: int, window: int, stride: int, batch_size: int) -> None:
    text = random.randint(random.key(0), (n,), 0, 5)
    shapes = set()

    def network(tokens: Tensor) -> Tensor:
        shapes.add(tuple(tokens.shape))
        return torch.stack([blend(row) for row in tokens])

    found = lm.text_nll(network, text, window=window, stride=stride, start=3, batch_size=batch_size)
    torch.testing.assert_close(found, nll_by_a_loop(text, window, stride, 3), rtol=1e-12, atol=1e-12)
    assert len(shapes) == 1  # a jitted network compiles once


def test_text_nll_moves_by_half_a_window_and_takes_bytes() -> None:
    text = random.randint(random.key(0), (19,), 0, 5).to(torch.uint8)
    found = lm.text_nll(lambda x: torch.stack([blend(row) for row in x]), text, window=6)
    torch.testing.assert_close(found, nll_by_a_loop(text, 6, 3, 0), rtol=1e-12, atol=1e-12)


# A source whose entropy is known.

CHANGE = torch.tensor([0.1, 0.3])  # probability of leaving the states 0 and 1


def markov(key: Tensor, batch: int, length: int) -> Tensor:
    """Sequences (batch, length) of two states, from the stationary distribution."""
    keys = random.split(key, length)
    first = random.bernoulli(keys[0], float(CHANGE[0] / CHANGE.sum()), (batch,)).long()

    def step(state: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.where(random.bernoulli(key, CHANGE[state]), 1 - state, state)
        return state, state

    return torch.cat([first[None], scan(step, first, keys[1:])[1]]).mT


def entropy_rate() -> float:
    """sum_i pi_i H(p_i), pi = (p_1, p_0) / (p_0 + p_1)."""
    p = CHANGE.double()
    of_state = -p * p.log() - (1 - p) * (1 - p).log()
    return float((p.flip(0) / p.sum() * of_state).sum())


def test_gpt_learns_a_markov_chain_to_its_entropy_rate() -> None:
    """The mean loss is the entropy rate plus the Kullback-Leibler divergence, which is known for every context."""
    gpt = models.GPT(2, 16, 1, 1, 8, rotary_base=100.0)

    def loss_fn(params: Any, key: Tensor, batch: Tensor) -> Tensor:
        return lm.loss(lambda tokens: gpt(params, tokens), batch).mean()

    steps = 150
    tx = optim.adam(optim.cosine_decay_schedule(2e-2, steps))
    step = jit(training.make_step(loss_fn, tx), donate_argnums=0, backend="aten")
    state = training.init_state(gpt.init(random.key(0)), tx, random.key(1))
    data = markov(random.key(2), steps * 64, 17).split(64)
    for batch in data:
        state, _ = step(state, batch)
    assert step.traces == 1
    fresh = markov(random.key(3), 1000, 17)
    logits = gpt(state.params, fresh[:, :-1])
    p = CHANGE[fresh[:, :-1]]
    truth = torch.where(fresh[:, :-1, None] == torch.arange(2), 1 - p[..., None], p[..., None])
    divergence = (truth * (truth.log() - logits.log_softmax(-1))).sum(-1).mean()
    assert 0 <= divergence < 2e-3
    nll = lm.loss(lambda tokens: gpt(state.params, tokens), fresh)
    error = nll.std() / math.sqrt(len(nll))
    assert abs(nll.mean() - entropy_rate() - divergence) < 4 * error
    assert entropy_rate() == pytest.approx(0.3966, abs=1e-4)  # below the entropy 0.5623 of the states themselves


# Errors.

LIST: Any = [True]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lm.loss(blend, TOKENS[:, :1]), ValueError, r"loss: tokens: expected at least two of each .* \(2, 1\)"),
        (lambda: lm.loss(blend, TOKENS[0]), ValueError, r"loss: tokens: expected shape \(b, l\), got \(5,\)"),
        (
            lambda: lm.loss(lambda _: LOGITS, TOKENS, mask=torch.ones(2, 5)),
            TypeError,
            r"loss: mask: expected a bool tensor, got torch\.float32",
        ),
        (
            lambda: lm.loss(lambda _: LOGITS, TOKENS, mask=torch.ones(2, 4, dtype=torch.bool)),
            ValueError,
            r"loss: mask: expected shape \(b=2, l=5\), got \(2, 4\)",
        ),
        (
            lambda: lm.loss(lambda _: LOGITS, TOKENS, mask=LIST),
            TypeError,
            "loss: mask: expected a bool tensor, got list",
        ),
        (
            lambda: lm.text_nll(blend, TOKENS[0], window=2, start=-1),
            ValueError,
            "text_nll: expected start >= 0, got -1",
        ),
        (lambda: lm.token_nll(LOGITS, TOKENS), ValueError, r"token_nll: tokens: expected shape \(2, 4\), got \(2, 5\)"),
        (lambda: lm.token_nll(LOGITS, LOGITS[..., 0]), TypeError, "token_nll: tokens: expected a tensor of integers"),
        (lambda: lm.text_nll(blend, TOKENS, window=2), ValueError, r"text_nll: text: expected shape \(n,\)"),
        (
            lambda: lm.text_nll(blend, TOKENS[0], window=2, stride=3),
            ValueError,
            "text_nll: expected stride <= window=2, got 3",
        ),
        (lambda: lm.text_nll(blend, TOKENS[0], window=0), ValueError, "text_nll: expected window >= 1, got 0"),
        (lambda: lm.text_nll(blend, TOKENS[0, :0], window=1), ValueError, "text_nll: expected tokens >= 1, got 0"),
        (lambda: lm.bits_per_byte(LOGITS, 0.0), ValueError, "bits_per_byte: expected bytes_per_token > 0, got 0"),
        (lambda: lm.perplexity(TOKENS), TypeError, "perplexity: nats: expected a floating-point tensor"),
    ],
    ids=range(14),
)
def test_objective_names_what_it_expects(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
