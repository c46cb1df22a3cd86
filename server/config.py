"""What a service is made of, and the one place that reads the environment."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal, cast, get_args

from ..sharding.compiling import KERNEL_CHOICES, KernelChoice

Placement = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

LogFormat = Literal["text", "json"]

NAMESPACE = "stepwell"
COLLECTIVE_MARGIN_S = 30.0
"""How much longer a shard waits for its peers than they wait for a rank."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A service's settings, fixed when it is launched.

    Attributes:
        name: Its name in the cluster.
        num_shards: Shards.
        num_gpus_per_shard: GPUs of each, 0 for CPU shards.
        num_cpus_per_shard: CPUs of each.
        placement: Ray's placement strategy for the shards.
        chunk_numel: Elements in a chunk, a power of two; None chooses by the model's size.
        kernel: How passes run: compiled, eagerly, or "auto".
        detached: Whether it outlives the process that launches it.
        worker_timeout_s: How long a step waits for the last rank after the first.
        placement_timeout_s: How long a launch waits for room in the cluster.
        redundancy: How many keepers hold each shard's copy and log: 0, 1 or 2.
        log_steps: How many steps are kept for a shard that is lost.
        standby: How many spares there are, processes that a lost shard's place is given to at once.
        elastic: Whether ranks may come and go between steps, and a step goes on without one that does not push in time.
        shard_set: Which set of shards these settings are of: its number, and the epoch of the coordinator that started
            it; see *Note: Another set of shards* in docs/design.md.
        log_format: Of what its processes log.

    Raises:
        ValueError: If a value is out of range; the message holds it.
    """

    name: str
    num_shards: int = 1
    num_gpus_per_shard: float = 0
    num_cpus_per_shard: float = 1
    placement: Placement = "SPREAD"
    chunk_numel: int | None = None
    kernel: KernelChoice = "auto"
    detached: bool = True
    worker_timeout_s: float = 1800.0
    placement_timeout_s: float = 60.0
    redundancy: int = 1
    log_steps: int = 8
    standby: int = 0
    elastic: bool = False
    shard_set: tuple[int, int] = (0, 0)
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "name", "a name without '/'", self.name)
        _require(self.num_shards >= 1, "num_shards", "at least 1", self.num_shards)
        _require(self.num_gpus_per_shard >= 0, "num_gpus_per_shard", "0 or more", self.num_gpus_per_shard)
        _require(self.num_cpus_per_shard >= 0, "num_cpus_per_shard", "0 or more", self.num_cpus_per_shard)
        _require(self.placement in get_args(Placement), "placement", f"one of {get_args(Placement)}", self.placement)
        _require(self.kernel in KERNEL_CHOICES, "kernel", f"one of {KERNEL_CHOICES}", self.kernel)
        _require(self.worker_timeout_s > 0, "worker_timeout_s", "more than 0", self.worker_timeout_s)
        _require(self.redundancy in (0, 1, 2), "redundancy", "0, 1 or 2", self.redundancy)
        _require(self.log_steps >= 2, "log_steps", "at least 2", self.log_steps)
        _require(self.standby >= 0, "standby", "0 or more", self.standby)
        able = self.redundancy > 0 and self.num_gpus_per_shard == 0
        expected = "0 without keepers (redundancy=0) and for shards on GPUs, as a spare could be none of these"
        _require(able or self.standby == 0, "standby", expected, self.standby)
        _require(self.log_format in get_args(LogFormat), "log_format", f"one of {get_args(LogFormat)}", self.log_format)
        _require(self.placement_timeout_s > 0, "placement_timeout_s", "more than 0", self.placement_timeout_s)

    @property
    def coordinator_name(self) -> str:
        """The coordinator's actor name."""
        return f"{self.name}/coordinator"

    @property
    def set_name(self) -> str:
        """What the names of a set's actors begin with, and its places are called."""
        return f"{self.name}/set-{self.shard_set[0]}.{self.shard_set[1]}"

    def keeper_name(self, keeper: int) -> str:
        """A keeper's actor name."""
        return f"{self.set_name}/keeper-{keeper}"

    def shard_name(self, shard: int) -> str:
        """A shard's actor name."""
        return f"{self.set_name}/shard-{shard}"

    def spare_name(self, spare: int) -> str:
        """The actor name of a seat that is a spare at first."""
        return f"{self.set_name}/spare-{spare}"

    def next_set(self, num_shards: int, epoch: int) -> ServiceConfig:
        """The settings of the set of shards that the coordinator of ``epoch`` puts in this one's place."""
        return dataclasses.replace(self, num_shards=num_shards, shard_set=(self.shard_set[0] + 1, epoch))


def default_service() -> str | None:
    """The service that ``$STEPWELL_SERVICE`` names, if any."""
    return os.environ.get("STEPWELL_SERVICE") or None


def default_kernel() -> KernelChoice:
    """How passes run where nobody says so: as ``$STEPWELL_KERNEL`` does, else compiled if there is a compiler.

    Raises:
        ValueError: If it names no kernel.
    """
    wanted = os.environ.get("STEPWELL_KERNEL") or "auto"
    _require(wanted in KERNEL_CHOICES, "$STEPWELL_KERNEL", f"one of {KERNEL_CHOICES}", wanted)
    return cast(KernelChoice, wanted)


def default_log_format() -> LogFormat:
    """How a service's processes log: as ``$STEPWELL_LOG`` says, else as text.

    Raises:
        ValueError: If it names no format.
    """
    wanted = os.environ.get("STEPWELL_LOG") or "text"
    _require(wanted in get_args(LogFormat), "$STEPWELL_LOG", f"one of {get_args(LogFormat)}", wanted)
    return cast(LogFormat, wanted)


def ray_address() -> str | None:
    """The cluster that ``$RAY_ADDRESS`` names, if any."""
    return os.environ.get("RAY_ADDRESS") or None


def state_folder() -> Path:
    """Where the command line remembers the Ray that it started: ``$XDG_STATE_HOME/stepwell``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "stepwell"


def token_file() -> Path:
    """The token of the Ray that the command line starts."""
    return state_folder() / "ray-token"


def ray_auth_mode() -> str | None:
    """What ``$RAY_AUTH_MODE`` says, if anything: whether Ray asks for a token."""
    return os.environ.get("RAY_AUTH_MODE") or None


def use_token(token: str) -> None:
    """Have Ray, and the processes that this one starts, ask for a token and show it."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)


def use_token_file(path: Path) -> None:
    """The same with the token in a file."""
    os.environ.pop("RAY_AUTH_TOKEN", None)  # goes before a file
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))


def set_ray_defaults() -> None:
    """Settle what Ray would otherwise decide by itself: no usage reports, no niceness for shards, and bad news soon.

    Training processes wait for shards in every step; with the 15 that Ray gives them, anything else that computes on
    the machine comes first. And when a process has ended Ray would wait a second or two to be told why it has.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", "100")


def _require(condition: bool, what: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{what}: expected {expected}, got {got!r}")
