"""No test of this folder is to reach a service that the person who runs it has running."""

import pytest


@pytest.fixture(autouse=True)
def _no_named_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPWELL_SERVICE", raising=False)
