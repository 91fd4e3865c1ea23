"""Rows of a registry, written in one call each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adapters.registry.records import AdapterRecord, Change, Committed, Creation, ExampleWrite, NewVersion
from adapters.registry.registry import Registry, new_uid
from adapters.storage.artifact import Artifact

TEXTS = Creation("minilm-l6-v2", "f" * 64, "text", "classification", keep_inputs=True)


def artifact(content: str = "") -> Artifact:
    return Artifact.describe(content.encode())


def example(name: str, segment: Artifact, row: int = 0, inputs: Artifact | None = None) -> ExampleWrite:
    return ExampleWrite(name, "d" * 64, "cat", segment, row, inputs)


def version(
    *, head: Artifact | None = None, evidence: Artifact | None = None, network: Artifact | None = None
) -> NewVersion:
    report = {"accuracy": 0.5}
    return NewVersion("linear_probe", head or artifact("head"), evidence, report, labels=2, network=network)


def create(
    registry: Registry, name: str = "pets", ids: Sequence[str] = ("a", "b"), tenant: str = "acme"
) -> Committed:
    """An adapter with its examples in one segment and a live version."""
    segment, inputs = artifact("segment"), artifact("inputs")
    return registry.commit(
        Change(
            tenant,
            name,
            new_uid(),
            0,
            create=TEXTS,
            upserts=tuple(example(identity, segment, row, inputs) for row, identity in enumerate(ids)),
            version=version(evidence=artifact("evidence")),
            promote=True,
        )
    )


def change(adapter: AdapterRecord) -> Change:
    return Change(adapter.tenant, adapter.name, adapter.uid, adapter.revision)


def append(registry: Registry, adapter: AdapterRecord, *ids: str) -> Committed:
    segment = artifact("more")
    return registry.commit(
        replace(
            change(adapter),
            upserts=tuple(example(identity, segment, row) for row, identity in enumerate(ids)),
            version=version(),
            promote=True,
        )
    )


def refit(registry: Registry, adapter: AdapterRecord, *, promote: bool = True) -> Committed:
    return registry.commit(replace(change(adapter), version=version(), promote=promote))
