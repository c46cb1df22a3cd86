"""What needs a GPU: nothing here runs without one, and each module says so."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave this folder's tests out where torch finds no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))
