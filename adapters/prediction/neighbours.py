"""The nearest training examples, as evidence for a prediction."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapters.adaptation.repository import AdapterRepository
from adapters.cache.lru import ByteLRU
from adapters.examples.target import Target
from adapters.registry.records import Alias, ExampleRecord
from adapters.storage.artifact import Artifact
from adapters.storage.formats import Evidence, decode_evidence
from adapters.threads import DATABASE
from models.arrays import Floats, Integers


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A training example near an input.

    `target`: as it was when the version was fitted. `similarity`: cosine, -1..1.
    """

    id: str
    target: Target
    similarity: float


@dataclass(frozen=True, slots=True)
class Known:
    """The examples that a version was fitted on and that are still kept.

    `segments`: by segment, the indexes of its examples in `ids` and their rows, int64 (k,) each.
    """

    ids: Sequence[str]
    targets: Sequence[Target]
    segments: Mapping[Artifact, tuple[Integers, Integers]]

    @property
    def nbytes(self) -> int:
        """Approximate size in memory."""
        return 300 * len(self.ids) + 200


class NeighbourIndex:
    """Finds nearest examples. Reads the database and the segments once per commit. For one event loop."""

    def __init__(self, repository: AdapterRepository, *, max_bytes: int = 16 << 20) -> None:
        self._repository = repository
        self._known: ByteLRU[Known] = ByteLRU(max_bytes, lambda known: known.nbytes)

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Drop the tenant's data from memory, or only that of its adapter of this name."""
        self._known.drop_of(tenant, name)

    async def nearest(self, alias: Alias, embeddings: Floats, count: int) -> list[tuple[Neighbour, ...]]:
        """Return, for each embedding, float32 (n, dim), the `count` most similar examples, nearest first.

        Examples that were removed, or got another input, since the version was fitted are left out. Raises
        MissingArtifact, CorruptArtifact, RegistryUnavailable.
        """
        if alias.evidence is None:
            return [() for _ in embeddings]
        key = f"{alias.evidence.name}@{alias.epoch}"
        known = await self._known.get(key, lambda: self._load(alias), (alias.tenant, alias.name))
        queries = _unit(embeddings)
        best: list[list[tuple[float, int]]] = [[] for _ in embeddings]
        for segment, (indexes, rows) in known.segments.items():
            vectors = await self._repository.segment(alias.tenant, alias.uid, segment)
            similarities = await asyncio.to_thread(_similarities, queries, vectors, rows)
            for row, found in enumerate(similarities):
                top = np.argsort(-found, kind="stable")[:count].tolist()
                best[row] += [(-float(found[place]), int(indexes[place])) for place in top]
        return [
            tuple(
                Neighbour(known.ids[index], known.targets[index], -negative)
                for negative, index in sorted(candidates)[:count]
            )
            for candidates in best
        ]

    async def _load(self, alias: Alias) -> Known:
        assert alias.evidence is not None
        evidence = await self._repository.read(alias.tenant, alias.uid, alias.evidence, decode_evidence)
        _, examples = await DATABASE.run(self._repository.registry.all_examples, alias.uid)
        return await asyncio.to_thread(_join, evidence, examples)


def _join(evidence: Evidence, examples: Sequence[ExampleRecord]) -> Known:
    """Return the fitted examples in their present places. An id with another input is another example."""
    kept = {example.id: example for example in examples}
    places: dict[Artifact, list[tuple[int, int]]] = {}
    for index, (name, digest) in enumerate(zip(evidence.ids, evidence.digests, strict=True)):
        example = kept.get(name)
        if example is not None and example.digest == digest:
            places.setdefault(example.segment, []).append((index, example.row))
    segments = {}
    for segment, pairs in places.items():
        array = np.array(pairs, np.int64)
        segments[segment] = (array[:, 0], array[:, 1])
    return Known(evidence.ids, evidence.targets, segments)


def _similarities(queries: Floats, vectors: Floats, rows: Integers) -> Floats:
    similarities: Floats = queries @ _unit(vectors[rows]).T
    return similarities


def _unit(vectors: Floats) -> Floats:
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    unit: Floats = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
