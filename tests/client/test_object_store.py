"""What a worker makes of the shards' answers, without Ray: a call's reference is its answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from stepwell.client import object_store
from stepwell.client.object_store import ObjectStoreTransport
from stepwell.server.config import ServiceConfig
from stepwell.sharding.errors import ShardLostError
from stepwell.sharding.reports import StepResult
from stepwell.sharding.vote import Decision

TAKEN = StepResult(7, Decision.COMMIT, {})


def decided(*answers: list[StepResult | None]) -> StepResult | None:
    """What comes of a question after step 7 that each shard answers by its list, one after the other."""
    shards = [mock.Mock(**{"decided.remote.side_effect": list(each)}) for each in answers]
    service: Any = SimpleNamespace(config=ServiceConfig("test"), shards=shards)
    with mock.patch.object(object_store, "wait_for", lambda calls, **_: calls):
        return ObjectStoreTransport(service).decided(1, 7)


def test_step_that_no_shard_took_was_not_taken() -> None:
    assert decided([None], [None]) is None


def test_shard_that_was_asked_before_its_last_push_came_is_asked_again() -> None:
    assert decided([None, TAKEN], [TAKEN, TAKEN]) == TAKEN


def test_step_that_a_shard_did_not_take_with_the_others_is_lost() -> None:
    with pytest.raises(ShardLostError, match="step 7 was taken by 1 of 2 shards"):
        decided([None, None], [TAKEN, TAKEN])
