"""The house itself: its links, its layers at run time, its version."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORT_WITHOUT_RAY = """
import importlib, pkgutil, sys

sys.modules["ray"] = None  # from here on `import ray` raises ImportError
layer = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(layer.__path__, f"{layer.__name__}."):
    importlib.import_module(module.name)
"""


@pytest.mark.parametrize("folder", ["client", "optim", "server", "sharding"])
def test_link_points_at_its_folder(folder: str) -> None:
    link = ROOT / "stepwell" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder), "an absolute link breaks in every other checkout"
    assert link.resolve() == ROOT.resolve() / folder
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("layer", ["stepwell.optim", "stepwell.sharding"])
def test_layer_imports_without_ray(layer: str) -> None:
    command = [sys.executable, "-c", IMPORT_WITHOUT_RAY, layer]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr


def test_shard_starts_without_the_compiler() -> None:
    """It takes longer to import than all else; a lost shard is waited for, and may have nothing to compile."""
    code = "import stepwell.server.shard_actor, sys; sys.exit('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr


def test_version_is_the_installed_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == importlib.metadata.version("stepwell")
