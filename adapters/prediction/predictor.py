"""The predict pipeline: inputs in, predictions of the live version out, without reading the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from adapters.cache.aliases import AliasCache
from adapters.cache.lru import ByteLRU
from adapters.cache.networks import NetworkPool
from adapters.examples.target import Task
from adapters.examples.validation import kind_of, wrong_kind
from adapters.heads.head import Head
from adapters.prediction.neighbours import Neighbour, NeighbourIndex
from adapters.prediction.scorer import HeadScorer, Prediction
from adapters.registry.records import Alias
from adapters.storage.artifact import MissingArtifact, Store
from adapters.threads import STORE
from models.arrays import Floats
from models.backbone import Embedded
from models.batching.batcher import Batcher
from models.errors import Conflict
from models.preprocess.limits import InputError
from models.spec import GRAPH_FILE, UnknownBackbone

Input = bytes | str | InputError
"""Encoded image bytes, a text, or the error in place of either."""


class NoLiveVersion(Conflict):
    """The adapter exists, but none of its versions is live."""

    code = "no_live_version"


class HeadMismatch(Conflict):
    """The version was fitted on a backbone other than the one served under its name."""

    code = "fingerprint_mismatch"


@dataclass(frozen=True, slots=True)
class PredictQuery:
    """A request to /predict.

    `version`: None for the live one. `explain`: number of nearest examples to return.
    """

    adapter: str
    inputs: Sequence[Input]
    version: int | None = None
    top_k: int = 3
    explain: int = 0
    min_epoch: int | None = None


@dataclass(frozen=True, slots=True)
class PredictAnswer:
    """Predictions in the order of the inputs; an input that failed has an error in its place.

    `timings`: seconds by stage.
    """

    adapter: str
    version: int
    task: Task
    items: Sequence[Prediction | InputError]
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version that is ready to answer."""

    alias: Alias
    version: int
    head: Head
    batcher: Batcher  # the shared backbone's; a fine-tuned version has its own network besides


class Predictor:
    """Answers with heads in memory. For one event loop.

    `observe(stage, seconds)` is called with the stage head.
    """

    def __init__(
        self,
        aliases: AliasCache,
        store: Store,
        heads: ByteLRU[Head],
        batchers: Mapping[str, Batcher],
        neighbour_index: NeighbourIndex,
        networks: NetworkPool,
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        self.batchers = batchers
        self._aliases = aliases
        self._store = store
        self._heads = heads
        self._neighbour_index = neighbour_index
        self._networks = networks
        self._scorer = HeadScorer(lambda seconds: observe("head", seconds))

    def check_room(self, tenant: str, name: str) -> None:
        """Raise QueueFull or BatcherClosed if a prediction would raise it, as far as is known.

        For callers that know the adapter before they have read the inputs.
        """
        alias = self._aliases.known(tenant, name)
        if alias is not None and alias.network is None and alias.backbone in self.batchers:
            self.batchers[alias.backbone].check_room(tenant)

    async def predict(self, tenant: str, query: PredictQuery) -> PredictAnswer:
        """Return one prediction, or an error, for each input.

        Errors that concern the adapter are raised before any work. Raises UnknownAdapter, UnknownVersion,
        NoLiveVersion, HeadMismatch, CorruptArtifact, MissingArtifact, CorruptHead, QueueFull,
        DeadlineExceeded, BatcherClosed.
        """
        started = time.perf_counter()
        loaded = await self.load(tenant, query.adapter, query.version, query.min_epoch)
        async with self._embedding(loaded) as batcher:
            embedded = await embed(batcher, query.inputs, tenant)
        good = [index for index in range(len(query.inputs)) if index not in embedded.errors]
        vectors = embedded.embeddings[good] if embedded.errors else embedded.embeddings
        answers = await self._scorer.answer(loaded.head, vectors, query.top_k, alone=embedded.callers == 1)
        if embedded.unknown:
            answers = [
                _without_words(one, loaded.head) if index in embedded.unknown else one
                for index, one in zip(good, answers, strict=True)
            ]
        if embedded.truncated:
            answers = [
                replace(one, truncated=True) if index in embedded.truncated else one
                for index, one in zip(good, answers, strict=True)
            ]
        if query.explain and good:
            if loaded.alias.network is not None:
                # The kept embeddings of examples are the backbone's, not the network's.
                inputs = [query.inputs[index] for index in good]
                vectors = (await embed(loaded.batcher, inputs, tenant)).embeddings
            near = await self._nearest(loaded.alias, query, vectors)
            answers = [replace(one, nearest=found) for one, found in zip(answers, near, strict=True)]
        placed: dict[int, Prediction] = dict(zip(good, answers, strict=True))
        items = [placed.get(index) or embedded.errors[index] for index in range(len(query.inputs))]
        timings = {**embedded.timings, "total": time.perf_counter() - started}
        return PredictAnswer(query.adapter, loaded.version, loaded.head.task, items, timings)

    async def load(
        self, tenant: str, name: str, version: int | None = None, min_epoch: int | None = None
    ) -> Loaded:
        """Return the version that is to answer, checked against the served backbone.

        Raises what `predict` raises.
        """
        alias = await self._aliases.get(tenant, name, version=version, min_epoch=min_epoch)
        try:
            return await self._load(alias)
        except MissingArtifact:
            # Another process may just have removed the version; the registry knows.
            newer = await self._newer(alias, version)
            if newer.artifact == alias.artifact:
                raise
            return await self._load(newer)

    async def _newer(self, alias: Alias, version: int | None) -> Alias:
        """Return the alias as the registry has it now. Raises UnknownAdapter, UnknownVersion."""
        return await self._aliases.get(alias.tenant, alias.name, version=version, min_epoch=alias.epoch + 1)

    async def _nearest(
        self, alias: Alias, query: PredictQuery, vectors: Floats
    ) -> list[tuple[Neighbour, ...]]:
        """Return the nearest examples; if files are missing, look again where the examples are now."""
        try:
            return await self._neighbour_index.nearest(alias, vectors, query.explain)
        except MissingArtifact:
            newer = await self._newer(alias, query.version)
            if newer.epoch == alias.epoch:
                raise
            return await self._neighbour_index.nearest(newer, vectors, query.explain)

    async def _load(self, alias: Alias) -> Loaded:
        if alias.version is None or alias.artifact is None:
            raise NoLiveVersion(
                f"No version of {alias.name!r} is live. Send examples to /adapt, or PUT aliases/live."
            )
        artifact = alias.artifact

        async def read() -> Head:
            def load() -> Head:
                return Head.from_bytes(self._store.read(alias.tenant, alias.uid, artifact))

            return await STORE.run(load)

        head = await self._heads.get(artifact.sha256, read, (alias.tenant, alias.name))
        batcher = self.batchers.get(alias.backbone)
        # The head of a fine-tuned version belongs to its own network, which was trained from the backbone.
        wanted = alias.fingerprint if alias.network is not None else head.fingerprint
        if batcher is None or batcher.backbone.fingerprint != wanted:
            raise HeadMismatch(
                f"Version {alias.version} was fitted on another backbone than the {alias.backbone!r} served "
                "here, for example of an earlier release. POST /adapters/{adapter}/rebase with "
                f'{{"backbone": "{alias.backbone}"}} moves the adapter to it; or serve the backbone that it '
                "was fitted on."
            )
        return Loaded(alias, alias.version, head, batcher)

    @asynccontextmanager
    async def _embedding(self, loaded: Loaded) -> AsyncIterator[Batcher]:
        """Yield the batcher that embeds for the version: the shared backbone's, or its own network's."""
        if loaded.alias.network is None:
            yield loaded.batcher
            return
        async with self._networks.running(loaded.alias, loaded.batcher.backbone) as batcher:
            yield batcher

    async def graph(self, loaded: Loaded) -> bytes:
        """Return the ONNX bytes of the version's network or backbone. Raises what `predict` raises."""
        alias, network = loaded.alias, loaded.alias.network
        if network is None:
            path = loaded.batcher.backbone.path / GRAPH_FILE
            return await asyncio.to_thread(path.read_bytes)
        try:
            return await STORE.run(self._store.read, alias.tenant, alias.uid, network)
        except MissingArtifact:
            # This raises UnknownVersion if the version has just been removed.
            await self._newer(alias, alias.version)
            raise

    async def embed(self, tenant: str, backbone: str, inputs: Sequence[Input]) -> Embedded:
        """Return bare embeddings. Raises UnknownBackbone, QueueFull, DeadlineExceeded, BatcherClosed."""
        if backbone not in self.batchers:
            raise UnknownBackbone(
                f"The service does not serve the backbone {backbone!r}. GET /backbones lists those "
                "that it serves."
            )
        started = time.perf_counter()
        found = await embed(self.batchers[backbone], inputs, tenant)
        return replace(found, timings={**found.timings, "total": time.perf_counter() - started})


async def embed(batcher: Batcher, inputs: Sequence[Input], tenant: str) -> Embedded:
    """Embed the valid inputs; those that failed before, or of the wrong kind, get errors in their places."""
    spec = batcher.backbone.spec
    errors: dict[int, InputError] = {}
    good: dict[int, bytes | str] = {}
    for index, value in enumerate(inputs):
        if isinstance(value, InputError):
            errors[index] = value
        elif kind_of(value) != spec.kind:
            errors[index] = wrong_kind(spec.kind)
        else:
            good[index] = value
    if not good:
        return Embedded(np.zeros((len(inputs), spec.dim), np.float32), errors)
    embedded = await batcher.embed(list(good.values()), source=tenant)
    if len(good) == len(inputs):
        return embedded
    embeddings = np.zeros((len(inputs), spec.dim), np.float32)
    embeddings[list(good)] = embedded.embeddings
    places = list(good)
    errors |= {places[index]: error for index, error in embedded.errors.items()}
    return replace(
        embedded,
        embeddings=embeddings,
        errors=errors,
        unknown=frozenset(places[index] for index in embedded.unknown),
        truncated=frozenset(places[index] for index in embedded.truncated),
    )


def _without_words(one: Prediction, head: Head) -> Prediction:
    """Return the answer for a text without a known token: abstained, as any such text gets the same."""
    if one.abstention_reason == "not_measured":
        return one
    uncertain = one.uncertain
    if one.labels is not None:
        answered = {*one.labels, *(label for label, _ in one.probabilities)}
        uncertain = tuple(label for label in head.labels if label in answered)
    return replace(one, abstention_reason="no_known_tokens", uncertain=uncertain)
