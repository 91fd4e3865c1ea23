"""Storage of adapters: registry rows and files together, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from adapters.adaptation.artifacts import delete_unreferenced, evidence_file, evidence_in
from adapters.adaptation.revision.layout import Stored
from adapters.cache.aliases import AliasCache
from adapters.cache.lru import ByteLRU
from adapters.completion import to_its_end
from adapters.registry.errors import RegistryUnavailable, UnknownAdapter, UnknownVersion
from adapters.registry.idempotency import PendingReply
from adapters.registry.records import AdapterRecord, Change, Claim, Committed, ExampleRecord, VersionRecord
from adapters.registry.registry import Registry
from adapters.storage.artifact import Artifact, Buffer, CorruptArtifact, MissingArtifact, Store, StoreError
from adapters.storage.formats import Evidence, decode_embeddings, decode_inputs
from adapters.threads import DATABASE, STORE
from adapters.turns import Gate
from models.arrays import Floats
from models.priority import lower_thread_priority

logger = logging.getLogger("topwork")

T = TypeVar("T")

# Number of low-priority threads for work that must not delay predictions.
_ASIDE = 2


@dataclass(frozen=True, slots=True)
class AdapterSnapshot:
    """An adapter with all its examples, as of one revision."""

    adapter: AdapterRecord
    revision: int
    examples: tuple[ExampleRecord, ...]

    @property
    def in_use(self) -> tuple[ExampleRecord, ...]:
        """The examples that are learned from: all that are not set aside."""
        return tuple(one for one in self.examples if not one.excluded)

    def same_as(self, other: AdapterSnapshot) -> bool:
        """Return whether nothing changed between the two."""
        return (self.adapter.uid, self.revision) == (other.adapter.uid, other.revision)


class AdapterRepository:
    """The registry and the store as one. For one event loop.

    Embeddings that were read stay in a bounded cache. `job`: the job that every commit is a part of, see
    Registry.commit.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        aliases: AliasCache,
        *,
        embeddings_bytes: int = 64 << 20,
        job: Claim | None = None,
    ) -> None:
        self.registry = registry
        self.aliases = aliases
        self._job = job
        self._store = store
        self._embeddings: ByteLRU[Floats] = ByteLRU(embeddings_bytes, lambda array: array.nbytes)
        self._tasks: set[asyncio.Future[None]] = set()
        self._aside = ThreadPoolExecutor(
            _ASIDE, thread_name_prefix="aside", initializer=lower_thread_priority
        )
        self._aside_gate = Gate(_ASIDE)

    def close(self) -> None:
        """Wait for the work given to `aside`, and end its threads."""
        self._aside.shutdown()

    async def aside(self, tenant: str, work: Callable[[], T]) -> T:
        """Run `work` in a low-priority thread, so that megabytes of inputs do not delay predictions.

        Tenants take turns.
        """
        async with self._aside_gate.passed(tenant):
            return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    async def state(
        self, tenant: str, name: str, known: AdapterSnapshot | None = None
    ) -> AdapterSnapshot | None:
        """Return the adapter and its examples, or None if there is none.

        The examples are not read again if `known` is still of the current revision.
        """

        def read() -> AdapterSnapshot | None:
            try:
                adapter = self.registry.adapter(tenant, name)
                if known and (known.adapter.uid, known.revision) == (adapter.uid, adapter.revision):
                    return AdapterSnapshot(adapter, known.revision, known.examples)
                revision, examples = self.registry.all_examples(adapter.uid)
            except UnknownAdapter:
                return None
            return AdapterSnapshot(adapter, revision, tuple(examples))

        return await DATABASE.run(read)

    async def embeddings(self, adapter: AdapterRecord, places: Sequence[Stored]) -> Floats:
        """The embeddings at the places, float32 (n, dim), n > 0. Raises MissingArtifact, CorruptArtifact."""
        loaded: dict[str, Floats] = {}
        for place in places:
            if place.segment.nonce not in loaded:
                found = await self.segment(adapter.tenant, adapter.uid, place.segment)
                loaded[place.segment.nonce] = found
        return await asyncio.to_thread(_pick, loaded, places)

    async def known(self, tenant: str, fingerprint: str, digests: Collection[str]) -> dict[str, Floats]:
        """Return embeddings, float32 (dim,), by digest, of the inputs that some adapter of the tenant has."""
        if not digests:
            return {}
        places = await DATABASE.run(self.registry.places_of, tenant, fingerprint, digests)
        rows: dict[tuple[str, Artifact], list[tuple[str, int]]] = {}
        for digest, (uid, segment, row) in places.items():
            rows.setdefault((uid, segment), []).append((digest, row))
        found: dict[str, Floats] = {}
        for (uid, segment), wanted in rows.items():
            # The adapter may just have been deleted; damaged files concern that adapter only.
            with suppress(MissingArtifact, CorruptArtifact):
                vectors = await self.segment(tenant, uid, segment)
                found |= {digest: vectors[row] for digest, row in wanted}
        return found

    async def segment(self, tenant: str, uid: str, segment: Artifact) -> Floats:
        """Return all embeddings of a segment, float32 (rows, dim). Raises what Store.read raises."""

        async def load() -> Floats:
            return await self.read(tenant, uid, segment, decode_embeddings)

        return await self._embeddings.get(segment.name, load, (tenant, None))

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Drop the tenant's embeddings from memory."""
        self._embeddings.drop_of(tenant, name)

    async def inputs(self, adapter: AdapterRecord, inputs: Artifact) -> list[bytes | str]:
        """Return all inputs of a segment, by row. Raises what Store.read raises."""
        return await self.read(adapter.tenant, adapter.uid, inputs, decode_inputs)

    async def rival(self, adapter: AdapterRecord, removals: Collection[str]) -> VersionRecord | None:
        """Return the version that a new one is compared with: the live one, unless `removals` erase it.

        Then it is the newest one left that was promoted. None if there is none, or nothing is live.
        """

        def read() -> VersionRecord | None:
            if adapter.live is None:
                return None
            if not removals:
                with suppress(UnknownVersion):
                    return self.registry.version(adapter.uid, adapter.live)
                return None
            staying = self.registry.versions_without(adapter.uid, removals)
            live = [version for version in staying if version.number == adapter.live]
            promoted = (one for one in staying if one.report.get("promotion", {}).get("promoted"))
            return live[0] if live else next(promoted, None)

        return await DATABASE.run(read)

    async def evidence(self, adapter: AdapterRecord, number: int | None) -> Evidence | None:
        """Return the evidence of a version; None if there is no such version, or its evidence is lost."""
        file = await DATABASE.run(evidence_file, self.registry, adapter, number)
        return None if file is None else await STORE.run(evidence_in, self._store, adapter, file)

    async def read(self, tenant: str, uid: str, artifact: Artifact, decode: Callable[[bytes], T]) -> T:
        """Read a published file, and decode it in the same thread. Raises what Store.read raises."""
        return await STORE.run(lambda: decode(self._store.read(tenant, uid, artifact)))

    async def publish(
        self, tenant: str, uid: str, encoders: Sequence[Callable[[], Buffer]], *, aside: bool = False
    ) -> tuple[Artifact, ...]:
        """Publish what the encoders return; they run in the thread that writes, with `aside` in one of those.

        If the caller is cancelled, files that are published all the same are deleted again. Raises what
        Store.publish_all raises.
        """

        def publish() -> tuple[Artifact, ...]:
            return self._store.publish_all(tenant, uid, [encode() for encode in encoders])

        publishing = asyncio.ensure_future(self.aside(tenant, publish) if aside else STORE.run(publish))
        try:
            return await asyncio.shield(publishing)
        except asyncio.CancelledError:
            self._behind(self.delete_published(tenant, uid, publishing))
            raise

    def _behind(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the background, as a task that is not garbage-collected."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def delete_published(
        self, tenant: str, uid: str, publishing: Awaitable[Sequence[Artifact]]
    ) -> None:
        """Delete what is being published, once it is."""
        # A store that failed has stored nothing, and a caller that needed the files has got the error.
        with suppress(StoreError):
            await self.delete_files(tenant, uid, await publishing)

    async def commit(
        self,
        change: Change,
        published: Sequence[Artifact] = (),
        reply: PendingReply[Committed] | None = None,
    ) -> Committed:
        """Commit, update the alias cache, and delete the files that are no longer referenced.

        The commit completes even if the caller is cancelled. Files published for a refused change are
        deleted. `reply`: see Registry.commit, whose errors this raises.
        """
        return await to_its_end(self._commit(change, published, reply))

    async def _commit(
        self, change: Change, published: Sequence[Artifact], reply: PendingReply[Committed] | None
    ) -> Committed:
        committed = await self.record(
            change.tenant,
            change.uid,
            published,
            lambda: self.registry.commit(change, job=self._job, reply=reply),
        )
        await self.settle(committed)
        return committed

    async def record(self, tenant: str, uid: str, files: Sequence[Artifact], write: Callable[[], T]) -> T:
        """Run `write` in a thread: it records rows that refer to the files.

        The files are deleted if it raises an error: see kept_if_committed. Not to be cancelled.
        """
        try:
            return await DATABASE.run(write)
        except RegistryUnavailable:
            # The change may have been committed all the same; if not, a sweep finds the files.
            raise
        except Exception:
            await self.delete_files(tenant, uid, files)
            raise

    async def settle(self, committed: Committed) -> None:
        """Update the alias cache after a commit, and delete the files that it left unreferenced."""
        self.aliases.put(committed.alias)
        adapter = committed.adapter
        await self.delete_files(adapter.tenant, adapter.uid, committed.unreferenced)

    async def delete_files_of(self, tenant: str, uid: str | None = None) -> None:
        """Delete all files of an erased adapter, or of an erased tenant.

        ErasureSweeper tries again to delete those that cannot be deleted now.
        """
        try:
            if uid is None:
                await STORE.run(self._store.delete_tenant, tenant)
            else:
                await STORE.run(self._store.delete_adapter, tenant, uid)
        except StoreError as error:
            logger.warning("files of what was erased are deleted later: %s", error)

    async def delete_files(self, tenant: str, uid: str, artifacts: Sequence[Artifact]) -> None:
        """Delete unreferenced files; those that cannot be deleted now are swept later."""
        if not artifacts:
            return
        for artifact in artifacts:
            self._embeddings.drop(artifact.name)
        await STORE.run(delete_unreferenced, self._store, tenant, uid, artifacts)


def _pick(segments: Mapping[str, Floats], places: Sequence[Stored]) -> Floats:
    """Return the rows at the places. `segments`: embeddings by nonce."""
    by_segment: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        by_segment.setdefault(place.segment.nonce, []).append(index)
    picked = np.empty((len(places), next(iter(segments.values())).shape[1]), np.float32)
    for nonce, indexes in by_segment.items():
        picked[indexes] = segments[nonce][[places[index].row for index in indexes]]
    return picked
