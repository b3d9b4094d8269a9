"""The links of all Markdown files resolve, and the README is short."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = (".github", "benchmarks", "csrc", "examples", "tests", "torchlars")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for part in PARTS for path in (ROOT / part).rglob("*.md"))])


def without_code(document):
    """Return a Markdown text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.M | re.S)


def anchors_of(document):
    """Return the anchors of a Markdown file's headings, as GitHub makes them."""
    seen, anchors = Counter(), []
    for heading in re.findall(r"^#+ +(.+?) *$", without_code(document), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def links_of(document):
    """Return the targets of a Markdown file's links and images that are in this repository."""
    text = re.sub(r"`[^`\n]+`", "", without_code(document))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(document):
    for link in links_of(document):
        path, _, anchor = unquote(link).partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:  # of a folder it is that of its README
            assert anchor in anchors_of(target / "README.md" if target.is_dir() else target), link


def test_anchors_are_those_of_github(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("# A `b`: c, d(2)\n\n```\n# no heading\n```\n\n## Why\n\n## Why\n", "utf-8")
    assert anchors_of(document) == ["a-b-c-d2", "why", "why-1"]


def test_the_readme_is_short():
    readme = ROOT / "README.md"
    assert len(readme.read_bytes()) <= 10_000
    assert len(links_of(readme)) > 10  # else the test above sees nothing
