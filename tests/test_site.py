"""The documentation's site: it builds without a warning, has every public name, and needs no network."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stepwell
from stepwell.optim import RULES
from tests.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: a link or an anchor that leads nowhere ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stderr
    return folder


def anchors_of(page: Path) -> set[str]:
    return set(re.findall(r' id="([^"]+)"', page.read_text(encoding="utf-8")))


def test_reference_has_every_public_name(site: Path) -> None:
    found = set().union(*(anchors_of(page) for page in (site / "reference").glob("*.html")))
    assert {f"stepwell.{name}" for name in stepwell.__all__} <= found
    assert {f"stepwell.optim.{name}Rule" for name in RULES.names()} <= found
    assert {"stepwell.Service.save", "stepwell.ServiceOptimizer.step", "stepwell.ServiceOptimizer.close"} <= found


def test_reference_is_all_markdown(site: Path) -> None:
    for page in (site / "reference").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r":(?:class|func|meth|attr|data):", text) == []
        assert re.findall(r"::</p>", text) == []
    optimizers = (site / "reference" / "optimizers.html").read_text(encoding="utf-8")
    assert 'href="services.html#stepwell.launch"' in optimizers, "a role has become a link"


def text_of(page: Path) -> str:
    return html.unescape(re.sub("<[^>]*>", "", page.read_text(encoding="utf-8")))


def test_file_that_a_page_links_to_is_a_page(site: Path) -> None:
    assert 'href="sharding/errors.py.html"' in (site / "errors.html").read_text(encoding="utf-8")
    for source in (ROOT / "sharding" / "errors.py", ROOT / "examples" / "plain_loop.py"):
        assert source.read_text() in text_of(site / source.relative_to(ROOT).with_suffix(".py.html"))
    assert (site / "deploy" / "index.html").exists()
    assert (site / "benchmarks" / "results" / "results.png").exists()


def test_trainer_page_shows_its_script(site: Path) -> None:
    assert (ROOT / "examples" / "ray_train.py").read_text() in text_of(site / "trainers" / "ray-train.html")


def test_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"', text) == [], page
        assert re.findall(r'<link\b[^>]*\bhref="(?:https?:)?//[^"]*"', text) == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")) == [], sheet


def test_page_lists_and_tables_are_shown_as_such(site: Path) -> None:
    """Where pages are read in other places a list may follow a paragraph at once; here it needs an empty line."""
    for page in site.rglob("*.html"):
        for paragraph in re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            assert re.findall(r"^(?:[-*] |\d+\. |\|)", paragraph, flags=re.MULTILINE) == [], (page.name, paragraph)
