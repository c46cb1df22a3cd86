"""What a Ray of Stepwell's own asks for, without one."""

from __future__ import annotations

import os

import pytest

from stepwell.server import cluster


@pytest.mark.parametrize(("mode", "asks"), [(None, True), ("token", True), ("disabled", False)])
def test_embedded_ray_asks_for_a_token_of_its_own_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch, mode: str | None, asks: bool
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-user's")
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        cluster, "_init", lambda *_, **__: asked.append((os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]))
    )
    cluster.start_embedded(num_cpus=1)
    cluster.start_embedded(num_cpus=1)
    (first_mode, first), (_, second) = asked
    if asks:
        assert first_mode == "token"
        assert len({first, second, "the-user's"}) == 3, "each has a token of its own"
    else:
        assert (first_mode, first) == ("disabled", "the-user's")
