"""Every name of the library that README and docs mention in passing exists."""

import re
from pathlib import Path

import pytest

import functorch_gen as fg

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_on_a_page_exist(page):
    for name in sorted(set(re.findall(r"`fg\.([\w.]*\w)", page.read_text()))):
        x = fg
        for part in name.split("."):
            assert hasattr(x, part), f"fg.{name}"
            x = getattr(x, part)
