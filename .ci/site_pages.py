"""Has mkdocs show the repository: pages that lie beside what they are of, and the files that pages link to.

A page links to any file of the repository by its path, so that the link works wherever the repository is read. In the
site that file is a page too: Markdown as it is, anything else as a listing. A folder has no page, so a link to one is
its text alone. Below a line "Script: [...](...)" the file is shown at once. There is no second copy of anything, and no
list of what is to be there but the links themselves.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SHOWN_AS_THEY_ARE = (".md", ".png")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
"""A link to a path; an address with a scheme is none."""
SCRIPT = re.compile(rf"^Script: {LINK.pattern}.*$", flags=re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add every file that a page links to, and what these link to in their turn."""
    waiting = list(files.documentation_pages())
    while waiting:
        for linked in _files_linked_from(waiting.pop()):
            if files.get_file_from_path(_site_uri(linked)) is None:
                added = _file_of(linked, config)
                files.append(added)
                if added.is_documentation_page():
                    waiting.append(added)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where the site has what they are to; mkdocs itself tells of those that lead nowhere."""
    if page.file.abs_src_path is None:
        return markdown  # a listing
    source, here = Path(page.file.abs_src_path), posixpath.dirname(page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        target = _target_of(link, source)
        if not target.exists():
            return link[0]
        if target.is_dir():
            return link["text"]
        return f"[{link['text']}]({posixpath.relpath(_site_uri(target), here)}{link['anchor'] or ''})"

    def shown(line: re.Match[str]) -> str:
        return f"{line[0]}\n\n{_listing_of(_target_of(line, source))}"

    return LINK.sub(rewritten, SCRIPT.sub(shown, markdown))


def _target_of(link: re.Match[str], source: Path) -> Path:
    return (source.parent / link["path"]).resolve()


def _files_linked_from(page: File) -> Iterator[Path]:
    if page.abs_src_path is None:
        return
    source = Path(page.abs_src_path)
    for link in LINK.finditer(source.read_text(encoding="utf-8")):
        if (target := _target_of(link, source)).is_file():
            yield target


def _site_uri(path: Path) -> str:
    """Where a file stands among the site's sources, whose root is docs/; its first page stands for the README."""
    uri = path.relative_to(ROOT).as_posix()
    if uri == "README.md":
        return "index.md"
    return uri.removeprefix("docs/") if path.suffix in SHOWN_AS_THEY_ARE else f"{uri}.md"


def _file_of(path: Path, config: MkDocsConfig) -> File:
    if path.suffix in SHOWN_AS_THEY_ARE:
        return File.generated(config, _site_uri(path), abs_src_path=str(path))
    return File.generated(config, _site_uri(path), content=_page_of(path), inclusion=InclusionLevel.NOT_IN_NAV)


def _page_of(path: Path) -> str:
    """A page that shows a text file; a search finds what is written for readers alone."""
    name = path.relative_to(ROOT).as_posix()
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n{_listing_of(path)}"


def _listing_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    fence = max(["``", *re.findall("`+", text)], key=len) + "`"
    return f"{fence}{path.suffix.removeprefix('.') or path.name.lower()}\n{text}\n{fence}\n"
