"""A service without tensors: the real coordinator with many shards and workers, and how many calls that costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulate
from simulate import Cost

from stepwell.sharding.coverage import Gradients

NUMEL = 20_000_000


def costs(num_shards: int, num_workers: int, gradients: Gradients) -> dict[str, Cost]:
    return {cost.what: cost for cost in simulate.simulate(num_shards, num_workers, gradients, numel=NUMEL)}


@pytest.mark.parametrize("gradients", ["replicated", "sharded"])
def test_calls_grow_with_the_shards_and_not_with_the_workers_too(gradients: Gradients) -> None:
    """Only a step's own calls go from every worker to every shard."""
    few, many, wide = (costs(*size, gradients) for size in ((16, 16), (16, 64), (64, 64)))
    for what in ("registration of all", "refresh of all", "goodbye of all", "save", "forming a group"):
        # Workers that come while the first are served may make one more round.
        assert many[what].calls <= few[what].calls + 3 * 16, what
        assert wide[what].calls <= 4 * many[what].calls + 3 * 64, what
    assert [each["a step's pushes, each shard"].calls for each in (few, many, wide)] == [16 * 16, 16 * 64, 64 * 64]


def test_page_has_a_line_for_each_size(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    simulate.main(["--max-shards", "16", "--max-workers", "16", "--gradients", "replicated", "--out", str(out)])
    page = out.read_text()
    for what in ("## Registration of all", "## Forming a group", "## A step's pushes, each shard"):
        assert f"{what}\n\n| shards |" in page
    assert page.count("\n| 16 | 16 | replicated |") == page.count("\n## ")
