"""What the pages show runs, what they link to is there, and what they tell of the code is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from stepwell.client.command_line import app
from stepwell.optim import RULES, ReducingRule
from tests.pages import PAGES, ROOT, Block, blocks_of, name_of

IS_RUN = "python"
NOT_RUN = ("py", "shell")
"""Tags of blocks that are no more than shown."""


def scripts_of(page: Path) -> list[Block]:
    """The blocks that run one after the other; what has a file's name as its title is run from that file."""
    return [block for block in blocks_of(page) if block.language == IS_RUN and not block.title]


@pytest.mark.parametrize("page", [page for page in PAGES if scripts_of(page)], ids=name_of)
def test_page_python_blocks_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in scripts_of(page):
        at_its_line = "\n" * (block.line - 1) + block.text
        exec(compile(at_its_line, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_block_that_is_not_run_says_why(page: Path) -> None:
    for block in blocks_of(page):
        where = f"{name_of(page)}, line {block.line}"
        if block.language in NOT_RUN:
            assert block.reason, f"{where}: tag it {IS_RUN}, or say why on the line before it: <!-- not run: ... -->"
        elif block.title:
            assert name_of(page) == "docs/start.md", f"{where}: nothing runs {block.title}"


def test_script_that_a_page_shows_is_run_by_a_test() -> None:
    shown = {
        name for page in PAGES for name in re.findall(r"^Script: \[[^]]*\]\(.*examples/(.*)\)", page.read_text(), re.M)
    }
    assert shown == {example.name for example in (ROOT / "examples").glob("*.py")}
    tests_of_examples = "".join(test.read_text() for test in (ROOT / "tests" / "examples").glob("test_*.py"))
    assert [name for name in sorted(shown) if f'"{name}"' not in tests_of_examples] == []


def commands_on(page: Path) -> list[list[str]]:
    lines = [line for block in blocks_of(page) if block.language == "sh" for line in block.text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("stepwell ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_on(page)], ids=name_of)
def test_page_commands_are_taken_by_the_command_line(page: Path) -> None:
    for _, *arguments in commands_on(page):
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert arguments[0] in command.commands, arguments
            command = command.commands[arguments.pop(0)]
        command.make_context(command.name, arguments)  # an argument that it does not know raises


def test_pages_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_rules_page_has_every_rule_with_its_sums_and_memory() -> None:
    page = (ROOT / "docs" / "rules.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \| .* \| ([\w-]+) \| (\d+) \|$", page, flags=re.MULTILINE)
    rules = [RULES.build(name, {}) for name in RULES.names()]
    expected = [
        (
            rule.name,
            f"{rule.scope.name.lower()}s" if isinstance(rule, ReducingRule) else "-",
            str(4 * (1 + len(rule.slots))),
        )
        for rule in rules
    ]
    assert sorted(shown) == sorted(expected)


def test_readme_quotes_the_goals_as_they_were_measured() -> None:
    pages = (ROOT / "README.md").read_text(), (ROOT / "benchmarks" / "results" / "TABLE.md").read_text()
    quoted, measured = (re.search(r"\| figure \| goal \|.*?\n\n", page, flags=re.DOTALL) for page in pages)
    assert quoted is not None
    assert measured is not None
    assert quoted[0] == measured[0]
