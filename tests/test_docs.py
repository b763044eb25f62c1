"""Runs the code of README.md and docs/*.md: one test a page, its blocks in order in one namespace.

- A fenced ``python`` block is executed; with ``>>>`` prompts it is a doctest.
- ``<!-- no-run: reason -->`` before a block leaves it out.
- ``<!-- output -->`` before a ``text`` block compares it with what the python block before it printed.
"""

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"<!--\s*(?P<text>(?:(?!-->).)*?)\s*-->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    code: str
    line: int
    comment: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, each with the HTML comment right before it."""
    for match in FENCE.finditer(text):
        before = COMMENT.search(text[: match.start()])
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 2
        yield Block(match["language"], code, line, before["text"] if before else "")


def run_page(text: str, name: str) -> None:
    """Executes a page; an error's traceback shows the page's own line numbers."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    printed = ""
    for block in blocks(text):
        if block.comment.startswith("no-run"):
            assert re.fullmatch(r"no-run: .+", block.comment), f"{name}:{block.line}: no-run without a reason"
        elif block.language == "python" and ">>> " in block.code:
            run_doctest(block, namespace, name)
        elif block.language == "python":
            printed = run_code(block, namespace, name)
        elif block.language == "text" and block.comment == "output":
            assert printed.rstrip() == block.code.rstrip(), f"{name}:{block.line}: another output"


def run_code(block: Block, namespace: dict[str, Any], name: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
    return output.getvalue()


def run_doctest(block: Block, namespace: dict[str, Any], name: str) -> None:
    test = doctest.DocTestParser().get_doctest(block.code, namespace, name, name, block.line - 1)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    failed = runner.run(test, out=report.write, clear_globs=False).failed
    namespace.update(test.globs)
    assert not failed, report.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), str(page))


# The runner itself.


def test_runner_shares_names_between_blocks_and_compares_output():
    run_page("```python\nx = 2\n```\nand\n```python\nprint(x + 1)\n```\n<!-- output -->\n```text\n3\n```\n", "page")


def test_runner_refuses_another_output():
    with pytest.raises(AssertionError, match="page:6: another output"):
        run_page("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n", "page")


def test_runner_runs_doctests_with_the_names_of_the_page():
    run_page("```python\nx = 2\n```\n```python\n>>> y = x\n>>> y\n2\n```\n```python\nassert y == 2\n```\n", "page")
    with pytest.raises(AssertionError, match=r"Expected:\s+3"):
        run_page("```python\n>>> 1 + 1\n3\n```\n", "page")


def test_runner_leaves_out_only_with_a_reason():
    run_page("<!-- no-run: needs a GPU -->\n```python\n1 / 0\n```\n", "page")
    with pytest.raises(AssertionError, match="no-run without a reason"):
        run_page("<!-- no-run -->\n```python\n1 / 0\n```\n", "page")


def test_runner_takes_indented_blocks_and_other_languages():
    run_page("- item\n\n  ```python\n  x = 1\n  if x:\n      y = 2\n  ```\n\n```sh\nmake demo\n```\n", "page")


def test_runner_names_the_line_of_an_error():
    with pytest.raises(ZeroDivisionError) as error:
        run_page("text\n\n```python\nx = 1\n1 / 0\n```\n", "page")
    assert error.traceback[-1].lineno == 4  # counted from zero: line 5 of the page
