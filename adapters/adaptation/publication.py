"""The files of one change: published first, then recorded together with its rows, or deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from adapters.adaptation.repository import AdapterRepository
from adapters.completion import to_its_end
from adapters.registry.idempotency import PendingReply
from adapters.registry.records import Change, Committed
from adapters.storage.artifact import Artifact, Buffer

T = TypeVar("T")


@dataclass(slots=True)
class BackgroundPublish:
    """A file of inputs that is published while other work goes on. `digests`: of its inputs, in order."""

    uid: str
    digests: tuple[str, ...]
    publishing: asyncio.Task[tuple[Artifact, ...]]
    taken: bool = False

    def fits(self, uid: str, digests: Sequence[str]) -> bool:
        """Return whether the file is not taken yet and holds exactly these inputs."""
        return not self.taken and self.uid == uid and self.digests == tuple(digests)

    async def take(self) -> Artifact:
        """Wait for the file and take ownership: the caller must commit or delete it.

        Raises what AdapterRepository.publish raises.
        """
        (artifact,) = await asyncio.shield(self.publishing)
        self.taken = True
        return artifact


@asynccontextmanager
async def published_early(
    repository: AdapterRepository, tenant: str, uid: str, digests: Sequence[str], encode: Callable[[], Buffer]
) -> AsyncIterator[BackgroundPublish]:
    """Publish a file during the block; it is deleted again unless the block takes it."""
    publishing = asyncio.ensure_future(repository.publish(tenant, uid, [encode], aside=True))
    file = BackgroundPublish(uid, tuple(digests), publishing)
    try:
        yield file
    finally:
        if not file.taken:
            await to_its_end(repository.delete_published(tenant, uid, publishing))


class Publication:
    """Files of an adapter that are published in a block, which deletes them again unless it records them.

    Both hold if the block is cancelled: no file is left over, and no row is without its files.
    """

    def __init__(self, repository: AdapterRepository, tenant: str, uid: str) -> None:
        self._repository = repository
        self._tenant = tenant
        self._uid = uid
        self._files: list[Artifact] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if left := self._hand_over():
            await to_its_end(self._repository.delete_files(self._tenant, self._uid, left))

    @property
    def files(self) -> Sequence[Artifact]:
        """The files published so far, in order."""
        return tuple(self._files)

    async def publish(self, encoders: Sequence[Callable[[], Buffer]]) -> tuple[Artifact, ...]:
        """Publish what the encoders return; they run in the thread that writes."""
        published = await self._repository.publish(self._tenant, self._uid, encoders)
        self._files += published
        return published

    async def take(self, early: BackgroundPublish) -> Artifact:
        """Add the file that is published in the background, once it is."""
        artifact = await early.take()
        self._files.append(artifact)
        return artifact

    async def commit(self, change: Change, reply: PendingReply[Committed] | None = None) -> Committed:
        """Commit the change, which refers to the files: see AdapterRepository.commit."""
        return await self._repository.commit(change, self._hand_over(), reply)

    async def record(self, write: Callable[[], T]) -> T:
        """Run `write` in a thread: it records rows that refer to the files.

        It completes even if the caller is cancelled. If it raises an error, the files are deleted.
        """
        return await to_its_end(self._repository.record(self._tenant, self._uid, self._hand_over(), write))

    def _hand_over(self) -> list[Artifact]:
        """Return the files, for which this publication is not responsible from now on."""
        files, self._files = self._files, []
        return files
