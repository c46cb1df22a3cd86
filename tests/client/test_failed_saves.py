"""Saves that fail: what is told, what is left behind, and that training and the last good checkpoint do not mind."""

from __future__ import annotations

import errno

import fsspec
import pytest
import torch

import stepwell
from stepwell.sharding.checkpoint import find_damages
from stepwell.sharding.errors import CheckpointError
from tests.client.training import assert_equal, make_net, train
from tests.failing_files import failing

NUM_SHARDS = 2

DENIALS = {
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "vanished bucket": FileNotFoundError(errno.ENOENT, "The specified bucket does not exist"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "network": TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
}


def make_optimizer(net: torch.nn.Module) -> tuple[stepwell.ServiceOptimizer, stepwell.InProcessService]:
    service = stepwell.InProcessService(num_shards=NUM_SHARDS)
    return stepwell.Prodigy(net.parameters(), service=service), service


def names(uri: str) -> list[str]:
    files = fsspec.filesystem("failing")
    return sorted(path.rsplit("/", 1)[1] for path in files.ls(uri, detail=False)) if files.exists(uri) else []


def require_whole(uri: str, step: int) -> None:
    """See that a checkpoint is intact and restores."""
    assert find_damages(uri) == []
    optimizer, service = make_optimizer(make_net())
    assert service.restore(uri) == step
    optimizer.close()


def test_disk_that_is_full_at_any_point_costs_the_save_alone() -> None:
    """One more try for every few thousand bytes that the disk has left."""
    net, undisturbed = make_net(), make_net()
    optimizer, service = make_optimizer(net)
    num_failed = 0
    with failing() as (disk, uri):
        train(net, optimizer, range(1))
        service.save(uri)
        before = names(uri)
        for step in range(1, 40):
            train(net, optimizer, range(step, step + 1))
            disk.free_bytes = num_failed * 1500
            try:
                service.save(uri)
            except CheckpointError as error:
                told = str(error)
            else:
                break
            num_failed += 1
            assert told.startswith(f"{uri}: ")
            assert "No space left on device" in told
            assert "free or mend that place, or save to another" in told
            assert "-shard-0000" in told or "the manifest" in told
            assert names(uri) == before
            require_whole(uri, 1)
        assert 3 < num_failed < 38
        require_whole(uri, step + 1)
        assert len(names(uri)) == 1 + NUM_SHARDS
    train(undisturbed, make_optimizer(undisturbed)[0], range(step + 1))
    assert_equal(net.parameters(), undisturbed.parameters())


@pytest.mark.parametrize("name", DENIALS)
def test_save_that_is_denied_says_so_and_training_goes_on(name: str) -> None:
    net = make_net()
    optimizer, service = make_optimizer(net)
    train(net, optimizer, range(1))
    with failing() as (disk, uri):
        service.save(f"{uri}/good")
        train(net, optimizer, range(1, 2))
        disk.denied = DENIALS[name]
        for target in (f"{uri}/good", f"{uri}/other"):
            with pytest.raises(CheckpointError, match=rf"{target}: .*-shard-00000-of-00002.*{DENIALS[name].strerror}"):
                service.save(target)
        train(net, optimizer, range(2, 3))
        with pytest.raises(CheckpointError, match=str(DENIALS[name].strerror)):
            service.save(uri, keep_last=1)
        require_whole(f"{uri}/good", 1)
        disk.denied = None
        assert service.save(f"{uri}/good") == 3
        require_whole(f"{uri}/good", 3)


def test_file_that_cannot_be_read_is_told_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, undisturbed = make_net(), make_net()
    optimizer, service = make_optimizer(net)
    train(net, optimizer, range(2))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with failing() as (_, uri):
        service.save(uri)
        train(net, optimizer, range(2, 3))
        for operation in ("open", "size"):
            with monkeypatch.context() as patch:
                patch.setattr(fsspec.get_filesystem_class("failing"), operation, denied)
                with pytest.raises(CheckpointError, match=rf"{uri}.*Permission denied"):
                    service.restore(uri)
                assert "Permission denied" in str(find_damages(uri)[0])
    train(net, optimizer, range(3, 5))
    train(undisturbed, make_optimizer(undisturbed)[0], range(5))
    assert_equal(net.parameters(), undisturbed.parameters())
