"""The repository's own pages in the site: recipes, changes, contributing; files that a page links to come along.

A link in a Markdown file is relative to that file, as it is read in the repository. In the site a link to a page leads
to the page, and one to any other file of the repository to a copy of it below `source/`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "recipes/*/README.md",
    "recipes/*/results/**/*.md",
    "model_cards/example/*.md",
)
OUTSIDE = [path.relative_to(ROOT).as_posix() for pattern in SHOWN for path in sorted(ROOT.glob(pattern))]
"""Pages that do not lie in `docs/`."""

LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside `docs/`, and the files that any page links to."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        for target in targets(page.content_string, in_repository(page.src_uri)):
            if files.get_file_from_path(in_site(target)) is None:
                files.append(File.generated(config, in_site(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = in_repository(page.file.src_uri)

    def moved(match: re.Match) -> str:
        target = resolved(match[2], here)
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(in_site(target), posixpath.dirname(page.file.src_uri) or ".") + match[3]

    return outside_fences(markdown, lambda text: LINK.sub(moved, text))


def outside_fences(markdown: str, change: Any) -> str:
    """A text with all that is no code block changed."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def targets(markdown: str, here: str) -> list[str]:
    """Files of the repository that a page links to."""
    found: list[str] = []
    outside_fences(markdown, lambda text: found.extend(match[2] for match in LINK.finditer(text)) or text)
    return [target for target in (resolved(link, here) for link in found) if target is not None]


def resolved(link: str, here: str) -> str | None:
    """The file of the repository that a link in the file `here` names; None for another kind of link."""
    if ":" in link:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    return target if (ROOT / target).is_file() else None


def in_repository(uri: str) -> str:
    """Where the source of a page lies in the repository."""
    return uri if uri in OUTSIDE else f"docs/{uri}"


def in_site(target: str) -> str:
    """Where a file of the repository lies in the site."""
    if target in OUTSIDE or target.endswith((".png", ".svg")):
        return target.removeprefix("docs/")
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}"
