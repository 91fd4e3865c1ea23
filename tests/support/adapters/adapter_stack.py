"""All that the flows are made of, real and small: tiny backbones, a database, a folder, a fitting process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.catalog import AdapterCatalog
from adapters.adaptation.commands import AdaptCommand, AdapterLimits, AdaptOutcome
from adapters.adaptation.erasure import Eraser
from adapters.adaptation.example_editor import ExampleEditor
from adapters.adaptation.names.label_names import LabelNameEmbedder
from adapters.adaptation.rebase import Rebaser
from adapters.adaptation.repository import AdapterRepository
from adapters.adaptation.revision.writer import RevisionWriter
from adapters.cache.aliases import AliasCache
from adapters.cache.feed import ChangeFeed
from adapters.cache.lru import ByteLRU
from adapters.cache.networks import NetworkPool
from adapters.examples.validation import PostedExample
from adapters.heads.head import Head
from adapters.prediction.neighbours import NeighbourIndex
from adapters.prediction.predictor import PredictAnswer, Predictor, PredictQuery
from adapters.prediction.scorer import Prediction
from adapters.processes.fit_client import Fitter
from adapters.registry.registry import Registry
from adapters.storage.artifact import Store
from adapters.storage.open import open_store
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.store.manifest import write_manifest
from tests.support.models.tiny_backbones import image_export, text_export

TENANT = "acme"


@dataclass
class World:
    """One process's worth of flows.

    outcomes: of adapts, in order. embedded: batch sizes, in order. ended: tenants whose requests were broken
    off.
    """

    registry: Registry
    store: Store
    aliases: AliasCache
    repository: AdapterRepository
    writer: RevisionWriter
    pipeline: AdaptPipeline
    editor: ExampleEditor
    rebaser: Rebaser
    catalog: AdapterCatalog
    eraser: Eraser
    neighbour_index: NeighbourIndex
    heads: ByteLRU[Head]
    ended: list[str]
    predictor: Predictor
    batchers: dict[str, Batcher]
    outcomes: list[str] = field(default_factory=list)
    embedded: list[int] = field(default_factory=list)

    async def adapt(
        self, posted: Sequence[PostedExample], name: str = "words", **options: object
    ) -> AdaptOutcome:
        """Adapts the tenant's adapter."""
        return await self.pipeline.adapt(TENANT, replace(AdaptCommand(name, posted), **options))  # type: ignore[arg-type]

    async def predict(
        self, inputs: Sequence[bytes | str], name: str = "words", **options: object
    ) -> PredictAnswer:
        """Predicts with the tenant's adapter."""
        return await self.predictor.predict(TENANT, replace(PredictQuery(name, inputs), **options))  # type: ignore[arg-type]

    async def labels(self, inputs: Sequence[str], name: str = "words") -> list[str | None]:
        """The labels that the live version answers."""
        items = (await self.predict(inputs, name)).items
        return [item.label for item in items if isinstance(item, Prediction)]

    def files(self) -> dict[str, set[str]]:
        """The names of all stored objects by adapter uid."""
        found: dict[str, set[str]] = {}
        for one in self.store.objects():
            found.setdefault(one.adapter_uid, set()).add(one.name)
        return found

    def check(self, name: str = "words") -> None:
        """Every file is referred to, and every reference has its file."""
        uid = self.registry.adapter(TENANT, name).uid
        assert self.files()[uid] == {artifact.name for artifact in self.registry.referenced(uid)}


def says(label: str, seed: int) -> str:
    """A text of the class "one" or "two", which share no syllable."""
    syllables = "ba be bi bo bu" if label == "one" else "tan ten tin ton tun"
    return " ".join(np.random.default_rng(seed).choice(syllables.split(), 6))


def taught(count: int = 4) -> list[PostedExample]:
    """Examples of two classes, `count` of each, with the ids one0, two0, one1 and so on."""
    return [
        PostedExample(says(label, seed), label, f"{label}{seed}")
        for seed in range(count)
        for label in ("one", "two")
    ]


def other_text_export(folder: Path, name: str = "other-text") -> Path:
    """The tiny text backbone under another fingerprint, as if its pooling were another."""
    export = text_export(folder / name)
    backbone = Backbone.open(export, threads=1)
    write_manifest(export, replace(backbone.spec, name=name, pooling="another"))
    backbone.close()
    return export


@asynccontextmanager
async def world(
    folder: Path,
    *,
    url: str | None = None,
    store: Store | None = None,
    limits: AdapterLimits = AdapterLimits(),
    exports: Mapping[str, Path] | None = None,
) -> AsyncIterator[World]:
    """A process over the database and the store; several over the same ones are several processes."""
    registry = Registry(url or f"sqlite:///{folder / 'registry.db'}")
    registry.migrate()
    opened = store or open_store(str(folder / "artifacts"))
    outcomes: list[str] = []
    embedded: list[int] = []
    exports = exports or {"tiny-text": text_export(folder), "tiny-image": image_export(folder)}
    backbones = {name: Backbone.open(export, threads=1) for name, export in exports.items()}
    batchers = {
        name: Batcher(backbone, max_queue=1_000, workers=2, observe_batch=embedded.append)
        for name, backbone in backbones.items()
    }
    fitter = Fitter()
    aliases = AliasCache(registry)
    repository = AdapterRepository(registry, opened, aliases)
    networks = NetworkPool(opened, 64 << 20, lambda backbone: Batcher(backbone, max_queue=1_000, workers=2))
    heads: ByteLRU[Head] = ByteLRU(1 << 20, lambda head: head.nbytes)
    names = LabelNameEmbedder(batchers)
    writer = RevisionWriter(repository, fitter, heads, names, limits)
    pipeline = AdaptPipeline(writer, batchers, outcomes.append)
    neighbour_index = NeighbourIndex(repository)
    predictor = Predictor(aliases, opened, heads, batchers, neighbour_index, networks)
    ended: list[str] = []
    eraser = Eraser(
        repository, (heads, networks, neighbour_index, names), lambda tenant, _: ended.append(tenant)
    )
    await fitter.start()
    feed = ChangeFeed(registry, interval=0.05)
    await feed.start([aliases], eraser.heard)
    for batcher in batchers.values():
        await batcher.start()
    try:
        yield World(
            registry,
            opened,
            aliases,
            repository,
            writer,
            pipeline,
            ExampleEditor(pipeline),
            Rebaser(pipeline),
            AdapterCatalog(repository),
            eraser,
            neighbour_index,
            heads,
            ended,
            predictor,
            batchers,
            outcomes,
            embedded,
        )
    finally:
        for batcher in batchers.values():
            await batcher.close()
        for backbone in backbones.values():
            backbone.close()
        repository.close()
        await networks.close()
        await feed.close()
        await aliases.close()
        await fitter.close()
        registry.close()
