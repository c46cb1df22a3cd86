"""The coordinator's part when another set of shards takes the present one's place.

See *Note: Another set of shards* in docs/design.md.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..sharding.errors import PlacementError, ServiceError
from ..sharding.saved import SavedCheckpoint
from .config import ServiceConfig
from .estate import Estate
from .keepers import Keepers
from .knowledge import Knowledge
from .saves import Saves
from .shards import FORMING_TIMEOUT_S, Shards
from .standby import ActorState, take_seats
from .watch import Watch

logger = logging.getLogger("stepwell")


@dataclasses.dataclass(frozen=True, slots=True)
class ShardSet:
    """A set of shards, as it was started or found.

    Attributes:
        config: Its settings.
        shards: Handles of its shards, by index.
        keepers: Handles of what keeps their copies, by index.
        is_whole: Whether it has its first shard, which is ended before any other.
        spares: Handles of its spares. Where there are some, the handles of shards may be those of other shards: who
            is which is to be asked, see :func:`take_seats`.
    """

    config: ServiceConfig
    shards: list[Any]
    keepers: list[Any]
    is_whole: bool = True
    spares: list[Any] = dataclasses.field(default_factory=list)


class ShardSets(abc.ABC):
    """The sets of shards of one service, wherever they run."""

    @abc.abstractmethod
    async def found(self) -> list[ShardSet]:
        """All of them, the oldest first: one, but for a time in which another takes its place."""

    @abc.abstractmethod
    async def start(self, config: ServiceConfig, avoid: Collection[str]) -> ShardSet:
        """Start a set on other nodes than ``avoid``; returns when all of its shards answer.

        Raises:
            PlacementError: If there is no room for it.
            ServiceError: If its shards do not start; nothing is left of them.
        """

    @abc.abstractmethod
    async def end(self, config: ServiceConfig) -> None:
        """End a set, or what is left of it."""

    @abc.abstractmethod
    async def nodes(self, config: ServiceConfig) -> list[str]:
        """Ids of the nodes of a set's shards, by index."""

    @abc.abstractmethod
    async def drained(self) -> list[str]:
        """Ids of the nodes that are about to go."""

    @abc.abstractmethod
    def here(self) -> str:
        """Id of the node that this coordinator is on."""

    @abc.abstractmethod
    async def states(self, actors: Sequence[Any]) -> list[ActorState]:
        """How each of some actors is; one that has no place is lost."""

    @abc.abstractmethod
    async def replace(self, config: ServiceConfig, index: int, lost: Any, node: str) -> Any:
        """Start a shard on a node, with nothing reserved, in place of an actor that does not run; its handle."""


class OneSet(ShardSets):
    """A set of shards that is the only one and stays."""

    async def found(self) -> list[ShardSet]:
        """None but the one that is known."""
        return []

    async def start(self, config: ServiceConfig, avoid: Collection[str]) -> ShardSet:
        """Refused."""
        raise PlacementError(f"service {config.name!r} has no place for another set of shards")

    async def end(self, config: ServiceConfig) -> None:
        """It stays."""

    async def nodes(self, config: ServiceConfig) -> list[str]:
        """Nowhere that could be named."""
        return []

    async def drained(self) -> list[str]:
        """None."""
        return []

    def here(self) -> str:
        """Nowhere that could be named."""
        return ""

    async def states(self, actors: Sequence[Any]) -> list[ActorState]:
        """All run."""
        return [ActorState.RUNS] * len(actors)

    async def replace(self, config: ServiceConfig, index: int, lost: Any, node: str) -> Any:
        """Refused."""
        raise PlacementError(f"service {config.name!r} has no other place for shard {index}")


class Resizing:
    """Lives on the coordinator's event loop.

    Args:
        shards: The shards that count, in whose place others are put.
        keepers: Theirs.
        sets: All sets.
        saves: The saves of the service.
        watch: The eye on the shards.
        changing: Held by what changes the job or its state.
        known: What the coordinator knows.
        resign: Ends this coordinator, for another one to find out what became of it.
    """

    def __init__(
        self,
        shards: Shards,
        keepers: Keepers,
        sets: ShardSets,
        *,
        saves: Saves,
        watch: Watch,
        changing: asyncio.Lock,
        known: Callable[[], Knowledge],
        resign: Callable[[], None],
    ) -> None:
        self._shards, self._keepers, self._sets, self._saves, self._watch = shards, keepers, sets, saves, watch
        self._changing, self._known, self._resign = changing, known, resign
        self._resizing = asyncio.Lock()

    async def decide(self) -> None:
        """Find out which set counts, and end all others. Before an epoch begins.

        The newest set that has a shard in office counts; if there is none, the oldest. Who asks has begun an epoch on
        each set that is newer before it is left out: none of them takes office any more.
        """
        found = await self._sets.found()
        for each in [each for each in found if each.is_whole and each.config.shard_set > self._present]:
            newer = self._shards.beside(each.config, each.shards, each.spares)
            await take_seats(newer, self._sets.states)
            reports = await newer.claim()
            self._shards.epoch = newer.epoch
            if any(report.is_in_office for report in reports):
                await newer.all("take_office", what="the new shards to take office")
                self._become(newer, self._keepers.beside(each.keepers, newer))
        for each in found:
            if each.config.shard_set != self._present:
                await self._sets.end(each.config)

    async def to(self, num_shards: int, request: str, avoid: Collection[str] = ()) -> None:
        """Go on with other shards, in the same state.

        Args:
            num_shards: How many.
            request: Names this change; who asks again gets it once.
            avoid: Ids of nodes that none of them may be on.

        Raises:
            PlacementError: If there is no room for them beside the present ones. Nothing has changed.
            ServiceError: If they could not take over. Nothing has changed.
            NotRegisteredError: If there is no whole state. Nothing has changed.
        """
        async with self._resizing:
            if request in self._known().requests:
                return
            if not self._shards.config.detached:
                raise ServiceError(
                    "a service without a name lives in the process that launched it, and keeps its shards. "
                    "Give it a name: stepwell.launch(NAME), or `stepwell up NAME`"
                )
            before, after = self._shards.config, self._shards.config.next_set(num_shards, self._shards.epoch)
            logger.info("service %r: starting %d new shards", before.name, num_shards)
            started = await self._sets.start(after, avoid)
            successors = self._shards.beside(after, started.shards, started.spares)
            keepers = self._keepers.beside(started.keepers, successors)
            try:
                await self._prepare(successors, keepers)
                async with self._saves.at_rest(), self._changing:
                    await self._hand_over(successors, request)
                    self._watch.end()
                    self._become(successors, keepers)
                    self._watch.begin()
                    self._known().requests.append(request)
            except BaseException:
                if self._present == before.shard_set:
                    await self._sets.end(after)
                raise
            await self._sets.end(before)
            logger.warning("service %r: %d shards have gone over to %d", before.name, before.num_shards, num_shards)

    async def leave(self, nodes: Collection[str], request: str) -> bool:
        """Go on without shards on these nodes; whether there were any. Raises as :meth:`to`."""
        config = self._shards.config
        if request not in self._known().requests and not set(nodes).intersection(await self._sets.nodes(config)):
            return False
        await self.to(config.num_shards, request, nodes)
        return True

    async def go(self) -> None:
        """End this coordinator between two changes, for Ray to start the next one on another node."""
        async with self._resizing, self._saves.at_rest(), self._changing:
            self._resign()

    async def _prepare(self, successors: Shards, keepers: Keepers) -> None:
        """Do what takes long, while steps go on."""
        await successors.begin_epoch()
        await keepers.arrange()
        if self._known().spec is not None:
            estate, _ = await self._estate()
            await successors.all("register", estate.job, estate.code, what="the new shards to allocate their buffers")
        await successors.form_group()

    async def _estate(self) -> tuple[Estate, SavedCheckpoint | None]:
        found: tuple[Estate, SavedCheckpoint | None] = await self._shards.first(
            "estate", what="shard 0 to tell what it knows"
        )
        return found

    async def _hand_over(self, successors: Shards, request: str) -> None:
        """Have the new shards inherit the state between two steps, and take office."""
        try:
            if self._known().spec is not None:
                await self._shards.settle()
                args = *await self._estate(), request, self._shards.handles
                await successors.all("inherit", *args, what="the new shards to take over the state")
        except BaseException:
            await self._shards.release()
            raise
        try:
            await successors.all("take_office", what="the new shards to take office", timeout_s=FORMING_TIMEOUT_S)
        except BaseException:
            self._resign()  # some may have: another coordinator asks them
            raise

    def _become(self, shards: Shards, keepers: Keepers) -> None:
        self._shards.become(shards)
        self._keepers.become(keepers)

    @property
    def _present(self) -> tuple[int, int]:
        return self._shards.config.shard_set
