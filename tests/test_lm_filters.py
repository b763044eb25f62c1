"""Filters of logits against brute force over all sets of tokens; draws against the filtered distribution."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import lm, random
from functorch_gen.transforms import jit


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


LOGITS = 2 * draw(20, 6)


def kept(logits: Tensor) -> list[set[int]]:
    """The tokens of each row that are left."""
    return [set((row > -math.inf).nonzero()[:, 0].tolist()) for row in logits]


def sets(size: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(6), size))


@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_top_k_keeps_the_most_probable_set(k: int) -> None:
    found = lm.keep_top_k(LOGITS, k)
    for row, tokens in zip(LOGITS.softmax(-1), kept(found), strict=True):
        best = max(sets(min(k, 6)), key=lambda chosen: float(row[list(chosen)].sum()))
        assert tokens == set(best)
    torch.testing.assert_close(torch.where(found > -math.inf, found, LOGITS), LOGITS, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_holds_p(p: float) -> None:
    for row, tokens in zip(LOGITS.softmax(-1), kept(lm.keep_top_p(LOGITS, p)), strict=True):
        mass = lambda chosen, row=row: float(row[list(chosen)].sum())
        size = next(n for n in range(1, 7) if n == 6 or max(map(mass, sets(n))) >= p)
        assert tokens == set(max(sets(size), key=mass))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_is_p_times_as_probable_as_the_best(p: float) -> None:
    for row, tokens in zip(LOGITS.softmax(-1), kept(lm.keep_min_p(LOGITS, p)), strict=True):
        assert tokens == {i for i in range(6) if float(row[i]) >= p * max(row.tolist())}


def test_filters_keep_ties_together() -> None:
    """The second and third are equally probable: where one is kept, so is the other."""
    logits = torch.tensor([0.2, 0.4, 0.2, 0.1, 0.1]).log()
    for found, tokens in [
        (lm.keep_top_k(logits, 2), {0, 1, 2}),
        (lm.keep_top_k(logits, 4), {0, 1, 2, 3, 4}),
        (lm.keep_top_p(logits, 0.5), {0, 1, 2}),
        (lm.keep_min_p(logits, 0.45), {0, 1, 2}),
        (lm.keep_top_p(torch.zeros(5), 0.1), {0, 1, 2, 3, 4}),
    ]:
        assert kept(found[None]) == [tokens]


def test_top_p_of_one_keeps_the_whole_tail_in_float32() -> None:
    """Where the sum from the top rounds to 1 long before the end."""
    logits = torch.cat([torch.zeros(1), torch.full((50,), -20.0)])
    assert lm.keep_top_p(logits, 1.0).isfinite().all()
    assert kept(lm.keep_top_p(logits, 1e-12)[None]) == [{0}]


def test_a_removed_token_stays_removed() -> None:
    logits = torch.tensor([0.0, -math.inf, 1.0])
    for found in (lm.keep_top_k(logits, 3), lm.keep_top_p(logits, 1.0), lm.apply_temperature(logits, 0.5)):
        assert kept(found[None]) == [{0, 2}]


def test_temperature_sharpens_and_at_zero_leaves_the_first_of_the_best() -> None:
    torch.testing.assert_close(lm.apply_temperature(LOGITS, 0.25), 4 * LOGITS, rtol=1e-15, atol=0)
    at_zero = lm.apply_temperature(torch.tensor([[1.0, 2.0, 2.0]]), 0)
    assert torch.equal(at_zero, torch.tensor([[-math.inf, 0.0, -math.inf]]))
    for number in (torch.tensor(0.0), torch.tensor(0.25)):
        expected = lm.apply_temperature(LOGITS, float(number))
        assert torch.equal(lm.apply_temperature(LOGITS, number), expected)
        assert torch.equal(jit(lm.apply_temperature, backend="aten")(LOGITS, float(number)), expected)
    cold = lm.apply_temperature(LOGITS, torch.tensor(1e-4, dtype=torch.float64)).softmax(-1)
    torch.testing.assert_close(cold, lm.apply_temperature(LOGITS, 0).softmax(-1), rtol=0, atol=1e-10)


def test_filters_apply_one_after_the_other() -> None:
    """The nucleus is that of the top k at the temperature, not of all tokens."""
    found = lm.filter_logits(LOGITS, temperature=2.0, top_k=4, top_p=0.8, min_p=0.3)
    expected = lm.keep_min_p(lm.keep_top_p(lm.keep_top_k(LOGITS / 2, 4), 0.8), 0.3)
    assert torch.equal(found, expected)
    assert torch.equal(lm.filter_logits(LOGITS), LOGITS)


def test_tokens_are_drawn_from_the_filtered_distribution() -> None:
    """Frequencies of 20,000 draws within four standard errors."""
    n, logits = 20_000, LOGITS[0]
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9}
    expected = lm.filter_logits(logits, **options).softmax(-1)
    tokens = lm.sample_token(random.key(0), logits.expand(n, 6), **options)
    found = torch.bincount(tokens, minlength=6) / n
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_tokens_of_16_bit_logits_are_drawn_in_float32() -> None:
    """16-bit noise would shift the law by a per cent, twelve standard errors of these draws."""
    n, logits = 100_000, (2 * draw(8)).bfloat16()
    expected = logits.double().softmax(-1)
    found = torch.bincount(lm.sample_token(random.key(1), logits.expand(n, 8)), minlength=8) / n
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert lm.filter_logits(logits, top_p=0.9).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lm.keep_top_k(LOGITS, 0), "keep_top_k: expected k to be an integer >= 1, got 0"),
        (lambda: lm.keep_top_p(LOGITS, 1.5), "keep_top_p: expected 0 <= p <= 1, got 1.5"),
        (lambda: lm.keep_min_p(LOGITS, -0.1), "keep_min_p: expected 0 <= p <= 1, got -0.1"),
        (lambda: lm.apply_temperature(LOGITS, -1.0), "apply_temperature: expected 0 <= temperature, got -1.0"),
        (lambda: lm.keep_top_p(torch.zeros(()), 0.5), r"keep_top_p: logits: expected shape \(..., v\), got \(\)"),
        (lambda: lm.keep_top_p(torch.zeros(2, 0), 0.5), "keep_top_p: logits: expected v > 0, got 0"),
    ],
    ids=["top_k", "top_p", "min_p", "temperature", "shape", "empty"],
)
def test_filters_name_what_they_expect(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match=r"keep_top_k: logits: expected a floating-point tensor, got torch\.int64"):
        lm.keep_top_k(torch.arange(3), 1)
