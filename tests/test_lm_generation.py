"""Generation against whole passes, beam search against all sequences, speculation against the law of its model."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import lm, models, nn, random, tree
from functorch_gen.nn import KVCache
from functorch_gen.transforms import jit
from functorch_gen.typing import Params
from tests.bench.generation import CACHED, makers

SIZES: dict[str, Any] = {"vocab_size": 7, "context": 16, "num_layers": 2, "num_heads": 2, "embed_dim": 4}
MODELS = {
    "learned positions": models.GPT(**SIZES),
    "rotary, grouped, normalised, gated, capped": models.GPT(
        **SIZES, rotary_base=1e4, num_kv_heads=1, qk_norm=True, norm=nn.RMSNorm, gated=True, soft_cap=5.0
    ),
}
GPT = MODELS["rotary, grouped, normalised, gated, capped"]
PROMPT, LENGTHS = torch.tensor([[1, 5, 2, 2], [0, 3, 3, 4], [6, 6, 0, 1]]), torch.tensor([2, 4, 1])
KEY = random.key(0)
OPTIONS: dict[str, Any] = {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.02}


def drawn(layer: Any, seed: int = 0) -> Params:
    """float64 parameters in general position."""
    shapes = tree.names(layer.init(random.key(0)))
    keys = random.split(random.key(seed), len(shapes))
    return tree.from_names(
        {name: random.normal(key, x.shape, torch.float64) for (name, x), key in zip(shapes.items(), keys, strict=True)}
    )


def one_by_one(key: Tensor, gpt: models.GPT, params: Params, prompt: Tensor, n: int, **options: Any) -> Tensor:
    """The definition of ``generate`` for one prompt (1, l): a whole pass for every token, with the same keys."""
    tokens = prompt
    for subkey in random.split(key, n):
        token = lm.sample_token(subkey, gpt(params, tokens)[:, -1], **options)
        tokens = torch.cat([tokens, token[:, None]], 1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("options", [{"temperature": 0}, OPTIONS], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_a_whole_pass_for_every_token(name: str, options: dict[str, Any]) -> None:
    gpt, key = MODELS[name], random.key(1)
    params = drawn(gpt)
    expected = one_by_one(key, gpt, params, PROMPT, 8, **options)

    def generate(key: Tensor, params: Params, prompt: Tensor) -> Tensor:
        return lm.generate(key, gpt, params, prompt, 8, **options)

    for run in (generate, jit(generate, backend="aten")):
        assert torch.equal(run(key, params, PROMPT), expected)


@pytest.mark.parametrize("name", MODELS)
def test_generate_takes_prompts_of_several_lengths(name: str) -> None:
    """Greedy: each sequence as if it were alone. The padding is never seen."""
    gpt = MODELS[name]
    params, padding = drawn(gpt), torch.arange(4) >= LENGTHS[:, None]
    for filler in (0, 6):
        prompt = torch.where(padding, filler, PROMPT)
        found = lm.generate(random.key(1), gpt, params, prompt, 8, temperature=0, lengths=LENGTHS)
        for i, length in enumerate(LENGTHS.tolist()):
            alone = one_by_one(random.key(1), gpt, params, PROMPT[i : i + 1, :length], 8, temperature=0)
            assert torch.equal(found[i], alone[0])


def test_prefill_gives_the_logits_of_the_last_token_of_each_prompt() -> None:
    params = drawn(GPT)
    logits, cache = lm.prefill(GPT, params, PROMPT, 5, lengths=LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(logits[i], GPT(params, PROMPT[i, :length])[-1], rtol=1e-10, atol=1e-10)
    assert cache["block1"].lengths.tolist() == LENGTHS.tolist()
    assert cache["block1"].keys.dtype == torch.float64


def test_generate_is_one_program_whatever_the_number_of_tokens() -> None:
    params = drawn(GPT)

    def program(n: int) -> Any:
        run = jit(lambda key, params, prompt: lm.generate(key, GPT, params, prompt, n), backend="aten")
        return run.lower(random.key(0), params, PROMPT)

    few, many = (program(n).text().count("\n") for n in (3, 11))
    assert few == many


def test_a_jitted_step_in_a_loop_gives_the_same_tokens() -> None:
    params, n = drawn(GPT), 8
    step = jit(
        lambda key, params, token, cache: lm.decode(key, GPT, params, token, cache, **OPTIONS),
        donate_argnums=3,
        backend="aten",
    )
    keys = random.split(random.key(1), n)
    logits, cache = lm.prefill(GPT, params, PROMPT, n, lengths=LENGTHS)
    tokens = [lm.sample_token(keys[0], logits, **OPTIONS)]
    for key in keys[1:]:
        token, cache = step(key, params, tokens[-1], cache)
        tokens.append(token)
    expected = lm.generate(random.key(1), GPT, params, PROMPT, n, lengths=LENGTHS, **OPTIONS)
    assert torch.equal(torch.stack(tokens, -1), expected)
    assert step.traces == 1


def test_generate_takes_any_leading_axes_and_stops_at_a_token() -> None:
    params = drawn(GPT)
    free = lm.generate(random.key(2), GPT, params, PROMPT, 9)
    stopped = lm.generate(random.key(2), GPT, params, PROMPT, 9, stop_token=3)
    for row, until in zip(free.tolist(), stopped.tolist(), strict=True):
        end = row.index(3) if 3 in row else 9
        assert until == row[:end] + [3] * (9 - end)
    assert (stopped == 3).any()
    assert (stopped != free).any()
    greedy = lm.generate(random.key(2), GPT, params, PROMPT, 9, temperature=0)
    single = lm.generate(random.key(2), GPT, params, PROMPT[1], 9, temperature=0)
    nested = lm.generate(random.key(2), GPT, params, PROMPT[:, None], 9, temperature=0)
    assert torch.equal(single, greedy[1])
    assert torch.equal(nested, greedy[:, None])


# Beam search.


def log_probs(gpt: models.GPT, params: Params, prompt: Tensor, continuations: Tensor) -> Tensor:
    """Of each continuation (k, n) of a prompt (l,), by one whole pass over each."""
    tokens = torch.cat([prompt.expand(len(continuations), -1), continuations], 1)
    nll = lm.token_nll(gpt(params, tokens[:, :-1]), tokens[:, 1:])
    return -nll[:, len(prompt) - 1 :].sum(-1)


def all_sequences(v: int, n: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(v), repeat=n)))


SMALL = models.GPT(3, 8, 1, 1, 4, rotary_base=100.0)


def test_beam_search_with_enough_beams_finds_the_best_of_all_sequences() -> None:
    params, prompt = drawn(SMALL), torch.tensor([[0, 1, 2], [2, 2, 0]])
    found = lm.beam_search(SMALL, params, prompt, 4, beams=27)
    again = jit(lambda params, prompt: lm.beam_search(SMALL, params, prompt, 4, beams=27), backend="aten")
    for beams in (found, again(params, prompt)):
        for i in range(2):
            every = all_sequences(3, 4)
            best = log_probs(SMALL, params, prompt[i], every).sort(descending=True)
            assert torch.equal(beams.tokens[i], every[best.indices[:27]])
            torch.testing.assert_close(beams.log_prob[i], best.values[:27], rtol=1e-10, atol=1e-10)


def test_beam_search_ends_sequences_at_the_stop_token() -> None:
    """The best of all distinct sequences that end at their first 0, with the probability up to it."""
    params, prompt, n = drawn(SMALL), torch.tensor([2, 1]), 4
    every: dict[tuple[int, ...], float] = {}
    for row in all_sequences(3, n):
        end = next((i + 1 for i, token in enumerate(row.tolist()) if token == 0), n)
        log_prob = log_probs(SMALL, params, prompt, row[None, :end])
        every[(*row[:end].tolist(), *[0] * (n - end))] = float(log_prob)
    best = sorted(every, key=lambda row: -every[row])[:10]
    found = lm.beam_search(SMALL, params, prompt, n, beams=27, stop_token=0)
    assert [tuple(row) for row in found.tokens[:10].tolist()] == best
    expected = torch.tensor([every[row] for row in best], dtype=torch.float64)
    torch.testing.assert_close(found.log_prob[:10], expected, rtol=1e-10, atol=1e-10)
    count = len(every)
    wide = lm.beam_search(SMALL, params, prompt, n, beams=count + 2, stop_token=0).log_prob
    assert wide.isneginf().tolist() == [False] * count + [True] * 2


def test_one_beam_is_greedy_and_more_are_no_worse() -> None:
    params = drawn(GPT)
    greedy = lm.generate(KEY, GPT, params, PROMPT, 8, temperature=0, lengths=LENGTHS)
    one = lm.beam_search(GPT, params, PROMPT, 8, beams=1, lengths=LENGTHS)
    four = lm.beam_search(GPT, params, PROMPT, 8, beams=4, lengths=LENGTHS)
    assert torch.equal(one.tokens[:, 0], greedy)
    assert (four.log_prob[:, 0] >= one.log_prob[:, 0]).all()
    for i, length in enumerate(LENGTHS.tolist()):
        expected = log_probs(GPT, params, PROMPT[i, :length], four.tokens[i])
        torch.testing.assert_close(four.log_prob[i], expected, rtol=1e-10, atol=1e-10)


def test_beam_search_of_16_bit_parameters_sums_in_float32() -> None:
    """The log-probability is that of a token after the other, by the same cached passes; in bfloat16 it loses a nat."""
    gpt = models.GPT(50, 100, 1, 1, 8)
    params = tree.cast(tree.scale(gpt.init(KEY), 10.0), torch.bfloat16)
    found = lm.beam_search(gpt, params, torch.tensor([1]), 99, beams=2)
    logits, cache = lm.prefill(gpt, params, torch.tensor([1]), 99)
    total = torch.zeros(())
    for token in found.tokens[0]:
        total = total + logits.float().log_softmax(-1)[token]
        logits, cache = gpt(params, token[None], cache=cache)
        logits = logits[0]
    torch.testing.assert_close(found.log_prob[0], total, rtol=1e-5, atol=0)


# Speculative decoding.


class Bigram:
    """A Markov chain as a cached model: the logits are the row of the last token in a table (v, v)."""

    def init_cache(self, batch: tuple[int, ...], max_length: int, dtype: torch.dtype, device: Any) -> Any:
        empty = torch.zeros(*batch, 1, max_length, 1, dtype=dtype)
        return {"block0": KVCache(empty, empty, torch.zeros(batch, dtype=torch.int64))}

    def __call__(self, params: Params, tokens: Tensor, *, cache: Any, lengths: Tensor | None = None) -> Any:
        lengths = torch.full_like(cache["block0"].lengths, tokens.shape[-1]) if lengths is None else lengths
        cache = {name: c._replace(lengths=c.lengths + lengths) for name, c in cache.items()}
        return params["table"][tokens], cache


def chain(*rows: tuple[float, ...]) -> Params:
    return {"table": torch.tensor(rows, dtype=torch.float64).log()}


TARGET, DRAFT = chain((0.9, 0.1), (0.3, 0.7)), chain((0.6, 0.4), (0.6, 0.4))


def frequencies(tokens: Tensor, v: int) -> Tensor:
    """Of all sequences of n tokens: (b, n) -> (v^n,)."""
    n = tokens.shape[-1]
    index = (tokens * v ** torch.arange(n - 1, -1, -1)).sum(-1)
    return torch.bincount(index, minlength=v**n) / len(tokens)


def assert_law(tokens: Tensor, v: int, expected: Tensor) -> None:
    """Frequencies within four standard errors, and chi-square within four of its own."""
    found, b = frequencies(tokens, v), len(tokens)
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / b).sqrt()).all()
    possible = expected > 0
    statistic = (b * (found - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert abs(statistic - freedom) <= 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("way", ["generate", "speculative"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "min_p": 0.2}], ids=["plain", "filtered"])
def test_generated_sequences_of_a_markov_chain_have_its_law(way: str, options: dict[str, Any]) -> None:
    """All 16 sequences of four tokens after state 1; the draft knows nothing of the state."""
    prompt, model, every = torch.ones(8000, 1, dtype=torch.int64), Bigram(), all_sequences(2, 4)
    table = lm.filter_logits(TARGET["table"], **options).log_softmax(-1)
    path = torch.cat([torch.ones(16, 1, dtype=torch.int64), every], 1)
    expected = table[path[:, :-1], path[:, 1:]].sum(-1).exp()
    if way == "generate":
        tokens = lm.generate(KEY, model, TARGET, prompt, 4, **options)
    else:
        result = lm.generate_speculative(KEY, model, TARGET, model, DRAFT, prompt, 4, lookahead=2, **options)
        tokens = result.tokens
        assert 0 < result.accepted.double().mean() < 2 * result.rounds.double().mean()
    assert_law(tokens, 2, expected)


def test_speculation_of_a_gpt_has_the_law_of_the_gpt() -> None:
    """All 27 sequences of three tokens, with another network as its draft, and prompts of two lengths."""
    params, draft = tree.scale(drawn(SMALL), 0.7), tree.scale(drawn(SMALL, 5), 0.7)
    prompt, lengths = torch.tensor([[1, 2], [0, 0]]).repeat(3000, 1), torch.tensor([2, 1]).repeat(3000)
    result = lm.generate_speculative(
        random.key(3), SMALL, params, SMALL, draft, prompt, 3, lookahead=2, lengths=lengths
    )
    for i, length in enumerate((2, 1)):
        expected = log_probs(SMALL, params, prompt[i, :length], all_sequences(3, 3)).exp()
        assert_law(result.tokens[i::2], 3, expected)


@pytest.mark.parametrize("lookahead", [1, 4])
def test_greedy_speculation_gives_the_tokens_of_the_model_alone(lookahead: int) -> None:
    """Token for token, whatever the draft: another network, or itself; then all its tokens are kept."""
    params, draft = drawn(GPT), models.GPT(**{**SIZES, "num_layers": 1})
    options: Any = {"lookahead": lookahead, "temperature": 0, "lengths": LENGTHS}
    other = lm.generate_speculative(KEY, GPT, params, draft, drawn(draft, 7), PROMPT, 7, **options)
    itself = lm.generate_speculative(KEY, GPT, params, GPT, params, PROMPT, 7, **options)
    expected = lm.generate(KEY, GPT, params, PROMPT, 7, temperature=0, lengths=LENGTHS)
    for result in (other, itself):
        assert torch.equal(result.tokens, expected)
        count = 1 + result.accepted + result.rounds  # every round adds what it keeps and one more
        assert ((count >= 7) & (count <= 7 + lookahead)).all()
    rounds = math.ceil(6 / (lookahead + 1))
    assert itself.rounds.tolist() == [rounds] * 3
    assert itself.accepted.tolist() == [rounds * lookahead] * 3


def test_speculation_of_16_bit_parameters_has_the_law_of_the_model() -> None:
    """The first token, and the second, which the draft proposes; in bfloat16 the rare ones would be too rare."""
    target, draft = ({"table": (2 * random.normal(random.key(i), (8,))).bfloat16().expand(8, 8)} for i in (0, 1))
    prompt, model = torch.zeros(60_000, 1, dtype=torch.int64), Bigram()
    result = lm.generate_speculative(random.key(2), model, target, model, draft, prompt, 2, lookahead=1)
    for tokens in result.tokens.split(1, -1):
        assert_law(tokens, 8, target["table"][0].double().softmax(-1))


def test_speculation_keeps_as_many_tokens_as_expected() -> None:
    """(1 - a^(g+1)) / (1 - a) in a round, a = sum min(p, q), without memory: Leviathan et al. 2023, eq. 1."""
    p, q, g, rounds = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double(), 3, 150
    model, (target, draft) = Bigram(), ({"table": x.log().expand(3, 3)} for x in (p, q))
    prompt = torch.zeros(100, 1, dtype=torch.int64)
    result = lm.generate_speculative(KEY, model, target, model, draft, prompt, rounds, lookahead=g)
    a = float(torch.minimum(p, q).sum())
    expected = (1 - a ** (g + 1)) / (1 - a)
    of_round = (result.accepted + result.rounds).double() / result.rounds
    assert abs(of_round.mean() - expected) < 4 * of_round.std() / math.sqrt(len(of_round))


def test_speculation_is_one_program() -> None:
    def run(key: Tensor, params: Params, draft: Params, prompt: Tensor) -> Any:
        return lm.generate_speculative(key, SMALL, params, SMALL, draft, prompt, 5, lookahead=2)

    arguments = KEY, drawn(SMALL), drawn(SMALL, 5), torch.tensor([[1], [2]])
    jitted = jit(run, backend="aten")
    assert tree.equal(jitted(*arguments), run(*arguments))
    assert jitted.traces == 1


def test_speculation_stops_at_a_token() -> None:
    options: Any = {"lookahead": 2, "temperature": 0}
    params = drawn(GPT)
    free = lm.generate_speculative(KEY, GPT, params, GPT, params, PROMPT, 7, **options).tokens
    token = int(free[0, 3])
    stopped = lm.generate_speculative(KEY, GPT, params, GPT, params, PROMPT, 7, stop_token=token, **options)
    assert torch.equal(stopped.tokens, lm.fill_after(free, token))
    assert not torch.equal(stopped.tokens, free)


@pytest.mark.slow  # compiles three programs
@pytest.mark.parametrize("way", ["generate", "beam_search", "generate_speculative"])
def test_compiled_programs_give_the_same_tokens(way: str) -> None:
    params, draft = drawn(SMALL), drawn(SMALL, 5)

    def run(key: Tensor, params: Params, draft: Params, prompt: Tensor, lengths: Tensor) -> Any:
        if way == "generate":
            return lm.generate(key, SMALL, params, prompt, 4, lengths=lengths, top_p=0.9, stop_token=0)
        if way == "beam_search":
            return lm.beam_search(SMALL, params, prompt, 4, beams=4, lengths=lengths, stop_token=0)
        return lm.generate_speculative(key, SMALL, params, SMALL, draft, prompt, 4, lookahead=2, lengths=lengths)

    arguments = KEY, params, draft, torch.tensor([[1, 2], [2, 0]]), torch.tensor([2, 1])
    assert tree.allclose(jit(run)(*arguments), run(*arguments), rtol=1e-10)


# The benchmark.


def test_every_form_of_the_benchmark_gives_the_same_tokens() -> None:
    sizes = {"vocab_size": 5, "num_layers": 1, "num_heads": 1, "embed_dim": 4}
    runs = {name: make() for name, make in makers("aten", 7, 2, **sizes).items()}
    expected = runs[CACHED]()
    assert expected.shape == (1, 5)
    for run in runs.values():
        assert torch.equal(run(), expected)
        assert torch.equal(run(), expected)  # nothing that a run needs again is donated


# Errors.

PARAMS = drawn(GPT)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: lm.generate(KEY, GPT, PARAMS, PROMPT, 0),
            ValueError,
            "generate: expected max_new_tokens >= 1, got 0",
        ),
        (
            lambda: lm.generate(KEY, GPT, PARAMS, PROMPT[:, :0], 1),
            ValueError,
            r"prefill: prompt: expected at least one token, got shape \(3, 0\)",
        ),
        (
            lambda: lm.generate(KEY, GPT, PARAMS, PROMPT.double(), 1),
            TypeError,
            r"prefill: prompt: expected a tensor of integers, got torch\.float64",
        ),
        (
            lambda: lm.generate(KEY, GPT, PARAMS, PROMPT, 13),
            ValueError,
            "GPT: expected max_length <= context=16, got 17",
        ),
        (
            lambda: lm.beam_search(GPT, PARAMS, PROMPT, 2, beams=0),
            ValueError,
            "beam_search: expected beams >= 1, got 0",
        ),
        (
            lambda: lm.generate_speculative(KEY, GPT, PARAMS, GPT, PARAMS, PROMPT, 2, lookahead=0),
            ValueError,
            "generate_speculative: expected lookahead >= 1, got 0",
        ),
        (
            lambda: lm.generate_speculative(KEY, GPT, PARAMS, SMALL, drawn(SMALL), PROMPT % 3, 2, lookahead=1),
            ValueError,
            r"generate_speculative: logits of the draft: expected shape \(..., v=7\), got \(3, 3\)",
        ),
        (lambda: lm.generate(KEY, GPT, {}, PROMPT, 2), KeyError, "expected parameters for part 'tokens'"),
    ],
    ids=["count", "empty", "dtype", "context", "beams", "lookahead", "vocabulary", "params"],
)
def test_generation_names_what_it_expects(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
