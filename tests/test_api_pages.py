"""docs/api holds what the docstrings say now, and the generator says what it should."""

from typing import Any

import api_pages
import pytest

from functorch_gen import nn, optim, tree

PAGES = api_pages.pages()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name):
    path = api_pages.DOCS / name
    assert path.exists(), "run make docs"
    assert path.read_text() == PAGES[name], "run make docs"


def test_there_are_no_other_pages():
    assert {path.name for path in api_pages.DOCS.iterdir()} == set(PAGES)


def test_every_public_name_has_a_section():
    for module in (nn, optim, tree):
        page = PAGES[f"{module.__name__.removeprefix('functorch_gen.')}.md"]
        assert all(f"\n## {name}\n" in page for name in module.__all__)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (nn.Linear, "(in_features: int, out_features: int, bias: bool = True, gain: float = 1.0)"),
        (nn.Sequential, "(*layers: Layer | Callable[[Tensor], Tensor])"),
        (optim.clip, "(max_delta: Number) -> GradientTransformation"),
        (optim.GradientTransformation, "(init: Callable[[Params], State], update: Callable[..., tuple[Tree, State]])"),
    ],
    ids=["dataclass", "init", "function", "record"],
)
def test_signature_is_that_of_the_source(x: Any, expected: str):
    assert api_pages.signature(x) == expected


def test_signature_marks_keywords():
    assert ", *, kdim: int | None = None" in api_pages.signature(nn.MultiHeadAttention)


def test_prose_turns_sections_into_lists_and_examples_into_code():
    text = """First ``line``, see :func:`functorch_gen.optim.adam`.

Args:
    x: one,
        two.
Source: a paper.

>>> 1 + 1
2

After."""
    expected = """First `line`, see `optim.adam`.

**Args:**

- `x`: one,
  two.

**Source:** a paper.

```pycon
>>> 1 + 1
2
```

After."""
    assert api_pages.prose(text).replace("\n\n\n", "\n\n") == expected
