"""Reads the names of labels with the served backbones, for fits."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from adapters.adaptation.input_embedder import BatchEmbedder
from adapters.cache.lru import ByteLRU, SingleFlight
from adapters.examples.meanings import readable
from adapters.probe.label_names import LabelNames, names_of_images, names_of_texts
from adapters.registry.records import Creation
from models.arrays import Floats
from models.errors import Conflict
from models.feeds import typical_inputs
from models.store.classes import Classes, read_classes

_CACHE_BYTES: Final = 16 << 20  # embeddings of names that are kept in memory
_NAMED: Final = 5  # labels that a warning lists


class LabelsNotReadable(Conflict):
    """The names of labels cannot be read for this adapter: they need a backbone that is not served."""

    code = "labels_not_readable"


@dataclass(frozen=True, slots=True)
class NamesRead:
    """What the names of an adapter's labels say."""

    names: LabelNames = field(default_factory=LabelNames)
    warnings: Sequence[Mapping[str, str]] = ()  # for the report: which names say nothing, and why


class LabelNameEmbedder:
    """Embeds the names or descriptions of labels. For one event loop.

    The name of a text's label is a text to its own backbone. The name of an image's label is compared with
    the names of the classes that the network was trained with, by the first backbone for texts.
    """

    def __init__(self, batchers: Mapping[str, BatchEmbedder], max_bytes: int = _CACHE_BYTES) -> None:
        self._batchers = batchers
        self._vectors: ByteLRU[Floats] = ByteLRU(max_bytes, lambda vector: vector.nbytes + 200)
        self._classifiers: dict[str, Classes | None] = {}
        # Embeddings of the names of classes, by the fingerprints of the text and of the image backbone, and
        # centres of typical inputs, by the fingerprint of their backbone and "".
        self._tables: dict[tuple[str, str], Floats] = {}
        self._flights: SingleFlight[Floats] = SingleFlight()

    def drop_of(self, tenant: str, name: str | None = None) -> None:
        """Drop the tenant's names from memory."""
        self._vectors.drop_of(tenant, name)

    async def check(self, terms: Creation) -> None:
        """Raise LabelsNotReadable if no served backbone reads names for an adapter with these terms."""
        if terms.kind == "image":
            await self._classifier(terms)
            self._reader()

    async def read(self, tenant: str, terms: Creation) -> NamesRead:
        """Return what the adapter's names say. Names that cannot be read are left out, with a warning.

        Raises what Batcher.embed raises.
        """
        if not terms.meanings:
            return NamesRead()
        if terms.kind == "text":
            reader = self._batchers[terms.backbone]
            vectors = await self._of_labels(tenant, reader, terms.meanings)
            names = names_of_texts(vectors, await self._centre(reader))
            return NamesRead(names, _unknown(reader, terms.meanings.keys() - vectors.keys()))
        try:
            classes, reader = await self._classifier(terms), self._reader()
        except LabelsNotReadable as error:
            return NamesRead(warnings=[{"code": error.code, "detail": error.detail}])
        vectors = await self._of_labels(tenant, reader, terms.meanings)
        class_names = await self._of_classes(reader, terms, classes)
        centre = await self._centre(self._batchers[terms.backbone])
        names = await asyncio.to_thread(names_of_images, vectors, class_names, classes.weight, centre)
        return NamesRead(names, _unknown(reader, terms.meanings.keys() - vectors.keys()))

    def _reader(self) -> BatchEmbedder:
        """Return the backbone that reads the names of images' labels."""
        for batcher in self._batchers.values():
            if batcher.backbone.spec.kind == "text":
                return batcher
        raise LabelsNotReadable(
            "Names of images' labels are read by a backbone for texts, and the service has none. Leave "
            "`labels` out, or ask the operator to add one to TOPWORK_BACKBONES."
        )

    async def _classifier(self, terms: Creation) -> Classes:
        """Return the classes that the adapter's image network was trained with."""
        if terms.fingerprint not in self._classifiers:
            export = self._batchers[terms.backbone].backbone.path
            self._classifiers[terms.fingerprint] = await asyncio.to_thread(read_classes, export)
        found = self._classifiers[terms.fingerprint]
        if found is None:
            raise LabelsNotReadable(
                f"The export of {terms.backbone!r} has no classes to compare names with: only packaged image "
                "backbones have, exported by this release. Leave `labels` out, use another backbone, or ask "
                f"the operator to run `python -m models.export {terms.backbone}` again."
            )
        return found

    async def _of_classes(self, reader: BatchEmbedder, terms: Creation, classes: Classes) -> Floats:
        """Return the embeddings, float32 (classes, d), of the names of classes; computed once."""
        key = (reader.backbone.fingerprint, terms.fingerprint)
        if key not in self._tables:

            async def load() -> Floats:
                # The first of several synonyms is the usual name.
                names = [name.partition(",")[0] for name in classes.names]
                return (await reader.embed(names, bulk=True)).embeddings

            # Another request may have kept the same table meanwhile.
            self._tables[key] = await self._flights.join(key, load)
        return self._tables[key]

    async def _centre(self, reader: BatchEmbedder) -> Floats:
        """Return the mean, float32 (dim,), of typical inputs as LabelNames wants it; computed once."""
        key = (reader.backbone.fingerprint, "")
        if key not in self._tables:

            async def load() -> Floats:
                embedded = await reader.embed(typical_inputs(reader.backbone.spec.kind), bulk=True)
                rows = embedded.embeddings
                if reader.backbone.spec.kind == "image":
                    rows = np.sqrt(np.maximum(rows, 0.0))
                return np.asarray(rows.mean(axis=0), np.float32)

            self._tables[key] = await self._flights.join(key, load)
        return self._tables[key]

    async def _of_labels(
        self, tenant: str, reader: BatchEmbedder, meanings: Mapping[str, str]
    ) -> dict[str, Floats]:
        """Return embeddings, float32 (d,), by label, of those of which the backbone knows a token."""
        texts = {label: readable(label, description) for label, description in meanings.items()}
        vectors = await self._of_texts(tenant, reader, sorted(set(texts.values())))
        return {label: vectors[text] for label, text in texts.items() if vectors[text].size}

    async def _of_texts(
        self, tenant: str, reader: BatchEmbedder, texts: Sequence[str]
    ) -> Mapping[str, Floats]:
        """Return embeddings by text, empty for one of which the backbone knows no token."""
        owner = (tenant, None)
        origin = f"{tenant}\0{reader.backbone.fingerprint}\0"
        keys = {text: hashlib.sha256(f"{origin}{text}".encode()).hexdigest() for text in texts}
        found: dict[str, Floats] = {}
        for text, key in keys.items():
            if key in self._vectors:
                found[text] = await self._vectors.get(key, _absent, owner)
        missing = [text for text in texts if text not in found]
        if missing:
            embedded = await reader.embed(missing, bulk=True, source=tenant)
            for place, text in enumerate(missing):
                useless = place in embedded.unknown or place in embedded.errors
                vector = np.empty(0, np.float32) if useless else embedded.embeddings[place].copy()

                async def kept(vector: Floats = vector) -> Floats:
                    return vector

                found[text] = await self._vectors.get(keys[text], kept, owner)
        return found


async def _absent() -> Floats:
    raise KeyError


def _unknown(reader: BatchEmbedder, labels: Collection[str]) -> list[Mapping[str, str]]:
    """Return a warning about labels whose name the backbone does not know, if there are any."""
    if not labels:
        return []
    named = ", ".join(sorted(labels)[:_NAMED]) + (" and others" if len(labels) > _NAMED else "")
    detail = (
        f"The backbone {reader.backbone.spec.name!r} knows no word of what `labels` says of {named}, so that "
        "teaches nothing. Describe them in other words."
    )
    return [{"code": "label_name_unknown", "detail": detail}]
