"""Checkpoints in an object store: S3, served on this machine, with shards in this process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import fsspec
import pytest

import stepwell
from stepwell.sharding.checkpoint import find_damages
from stepwell.sharding.errors import CheckpointError
from tests.client.training import assert_same_state, make_net, train

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module", autouse=True)
def _s3() -> Iterator[None]:
    """The server that ``s3://`` leads to in this module."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    filesystem = fsspec.get_filesystem_class("s3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        filesystem.clear_instance_cache()
        yield
    filesystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def bucket() -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    return name


class Run:
    """A run that has taken some steps."""

    def __init__(self, num_shards: int = 2) -> None:
        self.net = make_net()
        self.service = stepwell.InProcessService(num_shards=num_shards)
        self.optimizer = stepwell.Prodigy(self.net.parameters(), service=self.service)
        train(self.net, self.optimizer, range(2))


def test_checkpoint_in_s3_restores_and_replaces_another(bucket: str) -> None:
    run, successor, uri = Run(), Run(3), f"s3://{bucket}/run"
    run.service.save(uri)
    train(run.net, run.optimizer, range(2, 4))
    assert run.service.save(uri) == 4
    assert len(fsspec.filesystem("s3").find(bucket)) == 2 + 1
    assert find_damages(uri) == []
    assert successor.service.restore(uri) == 4
    successor.optimizer.refresh()
    assert_same_state(successor.optimizer.state_dict(), run.optimizer.state_dict())


def test_run_in_s3_keeps_its_last_checkpoints(bucket: str) -> None:
    run = Run()
    for step in range(2, 5):
        train(run.net, run.optimizer, [step])
        run.service.save(f"s3://{bucket}/run", keep_last=2)
    assert [checkpoint.step for checkpoint in run.service.checkpoints(f"s3://{bucket}/run")] == [4, 5]
    assert len(fsspec.filesystem("s3").find(bucket)) == 2 * (2 + 1)


def test_damage_in_s3_is_found(bucket: str) -> None:
    run, uri = Run(), f"s3://{bucket}/run"
    run.service.save(uri)
    files = fsspec.filesystem("s3")
    victim = next(path for path in files.find(bucket) if "-shard-00001-" in path)
    data = files.cat_file(victim)
    files.pipe_file(victim, data[:-1] + bytes([data[-1] ^ 1]))
    (damage,) = find_damages(uri)
    assert victim.endswith(damage.file)
    before = run.optimizer.state_dict()
    with pytest.raises(CheckpointError, match=damage.file):
        run.service.restore(uri)
    assert_same_state(run.optimizer.state_dict(), before)


def test_bucket_that_vanished_is_told_and_not_made_again(bucket: str) -> None:
    run = Run()
    run.service.save(f"s3://{bucket}/run")
    fsspec.filesystem("s3").rm(bucket, recursive=True)
    train(run.net, run.optimizer, [2])
    with pytest.raises(CheckpointError, match=rf"s3://{bucket}/run: .*-shard-00000-.*bucket does not exist"):
        run.service.save(f"s3://{bucket}/run")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.service.restore(f"s3://{bucket}/run")
    train(run.net, run.optimizer, [3])
    assert not fsspec.filesystem("s3").exists(bucket)
