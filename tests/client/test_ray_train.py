"""What the first worker does for all when Ray Train has started them, and what shards call Train's storage."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pyarrow.fs
import pytest

from stepwell.client import ray_train
from stepwell.sharding.errors import (
    CheckpointError,
    CheckpointRestoreNeededError,
    NotRegisteredError,
    ServiceExistsError,
    ServiceNotFoundError,
    ShardLostError,
)

URI = "/run/step-00000003"
ABSENT, CUT_SHORT = ServiceNotFoundError(), ServiceExistsError()
NEW, WHOLE, LOST, GONE = NotRegisteredError(), None, CheckpointRestoreNeededError(), ShardLostError()


@pytest.mark.parametrize(
    ("found", "stands", "uri", "roll_back", "expected"),
    [
        (ABSENT, None, None, True, ["launch None"]),
        (ABSENT, None, URI, False, [f"launch {URI}"]),
        (CUT_SHORT, None, URI, True, ["end", f"launch {URI}"]),
        (None, NEW, None, True, ["dismiss"]),
        (None, NEW, URI, True, ["dismiss", f"restore {URI}"]),
        (None, NEW, URI, False, ["dismiss", f"restore {URI}"]),
        (None, WHOLE, None, True, ["dismiss", "end", "launch None"]),
        (None, WHOLE, URI, True, ["dismiss", f"restore {URI}"]),
        (None, WHOLE, None, False, ["dismiss"]),
        (None, WHOLE, URI, False, ["dismiss"]),
        (None, LOST, None, True, ["dismiss", "end", "launch None"]),
        (None, LOST, URI, True, ["dismiss", f"restore {URI}", "dismiss"]),
        (None, LOST, None, False, ["dismiss", "end", "launch None"]),
        (None, GONE, URI, False, ["dismiss", f"restore {URI}", "dismiss"]),
    ],
)
def test_service_is_made_to_stand_where_the_loop_begins(
    found: Exception | None, stands: Exception | None, uri: str | None, roll_back: bool, expected: list[str]
) -> None:
    done: list[str] = []
    outcomes = [stands, None]

    def dismiss() -> None:
        done.append("dismiss")
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    def launch(name: str, *, restore: str | None, num_shards: int) -> None:
        assert (name, num_shards) == ("trainer", 2)
        done.append(f"launch {restore}")

    service: Any = mock.Mock(dismiss_workers=dismiss, restore=lambda uri: done.append(f"restore {uri}"))
    service.config.redundancy = 0
    with mock.patch.multiple(
        ray_train,
        connect=mock.Mock(side_effect=found, return_value=service),
        launch=launch,
        end=lambda name: done.append("end"),
    ):
        ray_train._take_over("trainer", uri, roll_back=roll_back, num_shards=2)
    assert done == expected


@pytest.mark.parametrize("uri", ["/shared/run", "s3://bucket/run", "gs://bucket/run"])
def test_shards_reach_trains_storage_by_the_uri_that_it_was_given(uri: str) -> None:
    region = "?region=us-east-1" if uri.startswith("s3") else ""  # else it asks the bucket
    assert ray_train._uri(*pyarrow.fs.FileSystem.from_uri(uri + region)) == uri


def test_storage_that_shards_have_no_name_for_is_refused() -> None:
    filesystem = pyarrow.fs.SubTreeFileSystem("/shared", pyarrow.fs.LocalFileSystem())
    with pytest.raises(CheckpointError, match=r"/run: expected .* one of local, s3, gcs, abfs, got subtree: give"):
        ray_train._uri(filesystem, "/run")
