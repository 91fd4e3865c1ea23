"""Embeds a large upload's inputs on several nodes of a Ray cluster, ahead of the attempt that stores them.

The attempt stays the only one that stores and commits. What Ray does not bring, for whatever reason, the
attempt embeds itself, so Ray decides on nothing but the time that a job takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Hashable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from adapters.examples.target import input_digest
from adapters.jobs.config import WorkerConfig
from adapters.registry.records import AdapterRecord, JobRecord
from models.arrays import Floats
from models.backbone import Backbone, Embedded
from models.batching.batcher import Batcher
from models.preprocess.limits import InputError

logger = logging.getLogger("topwork")

# Seconds without a block after which the attempt goes on without Ray. Actors start within 20.
_SILENT_SECONDS = 90.0


class _Row(NamedTuple):
    """What became of one input."""

    embedding: Floats | None
    error: InputError | None
    unknown: bool
    truncated: bool


class RayEmbedder:
    """Embeds inputs of one upload, on other nodes or, where these bring nothing, here. For one event loop."""

    def __init__(
        self, config: WorkerConfig, batcher: Batcher, adapter: AdapterRecord, job: JobRecord
    ) -> None:
        self._config = config
        self._batcher = batcher
        self._adapter = adapter
        self._job = job
        self._thread = ThreadPoolExecutor(1, "ray-data")
        self._blocks: Iterator[pa.Table] | None = None
        self._coming: set[str] = set()
        self._rows: dict[str, _Row] = {}
        self._received = 0

    @property
    def backbone(self) -> Backbone:
        """The backbone, as it is loaded here."""
        return self._batcher.backbone

    async def begin(self, digests: Collection[str]) -> None:
        """Have the upload's inputs with these digests embedded, if they are many and nodes are free."""
        if len(digests) < self._config.ray_spread:
            return
        try:
            self._blocks = await self._aside(self._started, frozenset(digests))
        except Exception as error:
            self._go_on_alone(error)
        else:
            self._coming = set(digests) if self._blocks is not None else set()

    async def embed(
        self, inputs: Sequence[bytes | str], *, bulk: bool = False, source: Hashable = None
    ) -> Embedded:
        """Embed the inputs, in their order. Raises what Batcher.embed raises."""
        digests = [input_digest(one) for one in inputs]
        await self._receive(frozenset(digests))
        rows = [self._rows.pop(digest, None) for digest in digests]
        places = [place for place, row in enumerate(rows) if row is None]
        own = await self._batcher.embed([inputs[place] for place in places], bulk=bulk, source=source)
        embeddings = np.zeros((len(inputs), self.backbone.spec.dim), np.float32)
        embeddings[places] = own.embeddings
        errors = {places[place]: error for place, error in own.errors.items()}
        unknown = {places[place] for place in own.unknown}
        truncated = {places[place] for place in own.truncated}
        for place, row in enumerate(rows):
            if row is None:
                continue
            if row.error is not None:
                errors[place] = row.error
            if row.embedding is not None:
                embeddings[place] = row.embedding
            unknown |= {place} if row.unknown else set()
            truncated |= {place} if row.truncated else set()
        return Embedded(
            embeddings, errors, own.timings, unknown=frozenset(unknown), truncated=frozenset(truncated)
        )

    def close(self) -> None:
        """Have the nodes stop. Does not wait for them."""
        if self._received:
            logger.info("job %s: other nodes embedded %d inputs", self._job.id, self._received)
        self._coming.clear()
        # Without its iterator, Ray ends what it began.
        self._blocks = None
        self._thread.shutdown(wait=False)

    async def _receive(self, wanted: AbstractSet[str]) -> None:
        """Wait until those of the wanted inputs that other nodes embed are here."""
        while self._blocks is not None and not self._coming.isdisjoint(wanted):
            try:
                async with asyncio.timeout(_SILENT_SECONDS):
                    block = await self._aside(next, self._blocks, None)
            except Exception as error:
                self._go_on_alone(error)
                return
            if block is None:
                self._coming.clear()
                return
            for digest, row in _rows(block, self.backbone.spec.dim):
                self._coming.discard(digest)
                self._received += 1
                self._rows[digest] = row

    def _go_on_alone(self, error: Exception) -> None:
        logger.warning("job %s: embeds the rest itself, because Ray failed: %r", self._job.id, error)
        self._coming.clear()
        self._blocks = None

    def _started(self, digests: frozenset[str]) -> Iterator[pa.Table] | None:
        # Importing Ray's data library takes seconds, and most uploads are small.
        from adapters.workers.ray_dataset import embedded_blocks

        return embedded_blocks(self._config, self._adapter, self._job, digests)

    async def _aside(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def _rows(block: pa.Table, dim: int) -> Iterator[tuple[str, _Row]]:
    """Yield what became of each input of a block, with its digest."""
    for row in block.to_pylist():
        error = None if row["code"] is None else InputError(row["code"], row["detail"])
        embedding = None if error else np.frombuffer(row["embedding"], np.float32, dim)
        yield row["digest"], _Row(embedding, error, row["unknown"], row["truncated"])
