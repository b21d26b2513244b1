"""Every link of a Markdown file to a file of the repository leads to one, and every anchor to a heading."""

import re
from pathlib import Path

import pytest
from paths import ROOT

LEFT_OUT = {".venv", ".venv-ci", ".venv-serve", ".venv-newest", ".git", "site", "runs", "build"}
LINK = re.compile(r"\]\(([^)\s]+)(?:\s[^)]*)?\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
MARKDOWN = [
    path for path in sorted(ROOT.rglob("*.md"))
    if not LEFT_OUT & set(path.relative_to(ROOT).parts) and not any(parent.is_symlink() for parent in path.parents)
]  # fmt: skip


def links_of(path: Path) -> list[str]:
    """Targets of a file's links, those in code left out."""
    return LINK.findall(CODE.sub("", path.read_text(encoding="utf-8")))


def anchors_of(path: Path) -> set[str]:
    """What GitHub and the site call the headings of a file."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    for link in links_of(path):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else path.parent / name
        assert target.exists(), f"{path.relative_to(ROOT)} links to {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{path.relative_to(ROOT)} links to {link}, which has no such heading"


def test_pages_of_the_site_are_there():
    """What the site's menu names exists, and nothing in docs/ is left out of it."""
    menu = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(menu) == len(set(menu)) > 15
    assert all((ROOT / "docs" / name).is_file() or (ROOT / name).is_file() for name in menu)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(menu)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
