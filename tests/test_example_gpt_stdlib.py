"""The GPT of the standard library's bytes: its corpus, what it is compared with, a tiny run, and the whole one."""

import bz2
import json
import math
from collections import Counter, defaultdict
from typing import Any

import gpt_stdlib
import pytest
import stdlib_text
import torch
from PIL import Image

from functorch_gen import random


def test_the_corpus_has_no_tests_and_is_split_by_whole_files() -> None:
    files = stdlib_text.stdlib_files()
    assert files == sorted(files)
    assert {"os.py", "typing.py"} <= {file.name for file in files}
    assert not {"test", "tests", "idle_test", "site-packages"} & {part for file in files for part in file.parts}
    text, held_out = stdlib_text.load()
    order = random.permutation(random.key(0), len(files))
    last = [files[i].read_bytes() for i in order[len(files) - len(files) // 10 :].tolist()]
    assert bytes(held_out.tolist()) == b"".join(last)
    assert len(text) + len(held_out) == sum(file.stat().st_size for file in files)


def test_compressed_bits_are_those_of_the_compressor() -> None:
    text = torch.tensor(list(b"import this\n" * 50), dtype=torch.uint8)
    data = bytes(text.tolist())
    assert stdlib_text.compressed(text)["bz2 -9"] == 8 * len(bz2.compress(data, 9)) / len(data)


def test_counted_contexts_give_the_probabilities_of_witten_and_bell() -> None:
    """By the formula, a byte and a dictionary at a time; and they sum to one over the next byte."""
    train, text = b"abracadabra, abracadabra!", b"abba cadabra"
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for n in range(4):
        padded = b"\n" * n + train
        for i, byte in enumerate(train):
            counts[padded[i : i + n]][byte] += 1

    def probability(context: bytes, byte: int) -> float:
        shorter = probability(context[1:], byte) if context else 1 / 256
        seen = counts[context]
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen)) if seen else shorter

    assert sum(probability(b"abr", byte) for byte in range(256)) == pytest.approx(1)
    as_tensor = lambda data: torch.tensor(list(data), dtype=torch.uint8)
    found = stdlib_text.ngram_bits(as_tensor(train), as_tensor(text), 3)
    for n in range(4):
        padded = b"\n" * n + text
        bits = [-math.log2(probability(padded[i : i + n], byte)) for i, byte in enumerate(text)]
        assert found[n] == pytest.approx(sum(bits) / len(bits), rel=1e-12)


TINY: dict[str, Any] = {"num_layers": 1, "num_heads": 1, "embed_dim": 16, "batch_size": 2, "progress": False}


def test_gpt_stdlib_writes_a_picture_a_sample_and_metrics(tmp_path: Any, monkeypatch: Any) -> None:
    text = torch.arange(2000).mul(7).remainder(97).to(torch.uint8)
    monkeypatch.setattr(stdlib_text, "load", lambda: (text, text[:300]))
    config = gpt_stdlib.Config(
        out=str(tmp_path), minutes=0.03, length=48, backend="aten", bfloat16="yes", prompt="def", orders=1, **TINY
    )
    metrics = gpt_stdlib.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["held-out bytes"] == 300
    assert 0 < metrics["GPT"] < 8.5
    assert (tmp_path / "sample.txt").read_text().startswith("def")
    with Image.open(tmp_path / "loss.png") as image:
        assert min(image.size) > 100
        assert len(image.getcolors(10**6)) > 2


def test_the_step_of_gpt_stdlib_is_one_program() -> None:
    config = gpt_stdlib.Config(minutes=1e-6, length=8, backend="aten", **TINY)
    gpt, text = gpt_stdlib.make_model(config), torch.arange(64, dtype=torch.uint8)
    steps = []
    jit = gpt_stdlib.fg.jit

    def spy(*args: Any, **kwargs: Any) -> Any:
        steps.append(jit(*args, **kwargs))
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_stdlib.fg, "jit", spy)
        _, losses = gpt_stdlib.train(config, gpt, text)
    assert len(losses) == 1
    assert steps[0].traces == 1


@pytest.mark.slow  # trains for four minutes
def test_gpt_stdlib_reaches_its_bar_in_less_than_half_of_the_time(tmp_path: Any) -> None:
    metrics = gpt_stdlib.main(gpt_stdlib.Config(out=str(tmp_path), minutes=4, held_out=100_000))
    assert metrics["GPT"] <= 2.10
