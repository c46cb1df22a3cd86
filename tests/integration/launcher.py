"""A process that launches a service in a Ray that is there: ``... launcher NAME WHAT``.

WHAT is ``exits`` or ``stays``, after three steps; ``unnamed``, which stays too; or ``dies``, between the shards and the
coordinator.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import ray
import torch

import stepwell
from stepwell.server import starting
from stepwell.server.coordinator import CoordinatorActor
from tests.integration.training import D0, Trainer, small_in_order


def main(name: str, what: str) -> None:
    """Say "ready" when it has trained."""
    torch.set_num_threads(1)
    ray.init(os.environ["RAY_ADDRESS"], namespace="of the launcher", log_to_driver=False, configure_logging=False)
    if what == "dies":
        die_before_the_coordinator_starts()
    launched = stepwell.launch(None if what == "unnamed" else name, num_shards=2, num_cpus_per_shard=0)
    Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service=launched).run(3)
    print("ready", flush=True)
    if what != "exits":
        time.sleep(600)


def die_before_the_coordinator_starts() -> None:
    patched: Any = starting
    start_actor = patched.start_actor

    def start(actor_class: type, *args: Any, **options: Any) -> Any:
        if actor_class is CoordinatorActor:
            os.kill(os.getpid(), signal.SIGKILL)
        return start_actor(actor_class, *args, **options)

    patched.start_actor = start


if __name__ == "__main__":
    main(*sys.argv[1:])
