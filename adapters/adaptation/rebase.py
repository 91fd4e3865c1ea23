"""The move of an adapter to another backbone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.commands import RevisionResult
from adapters.adaptation.input_embedder import no_known_tokens
from adapters.adaptation.options import terms_of
from adapters.adaptation.promotion.decision import Promote
from adapters.adaptation.publication import Publication
from adapters.adaptation.repository import AdapterRepository, AdapterSnapshot
from adapters.adaptation.revision.files import new_version
from adapters.adaptation.revision.layout import PlannedExample
from adapters.adaptation.revision.writer import RevisionWriter
from adapters.registry.errors import UnknownAdapter
from adapters.registry.records import Change, ExampleRecord, Rebase, Repoint
from adapters.storage.artifact import Artifact
from adapters.storage.formats import encode_embeddings, encode_evidence
from models.arrays import Floats
from models.errors import Conflict
from models.preprocess.limits import InputError


class InputsNotKept(Conflict):
    """The adapter does not have its inputs, so they cannot be embedded again."""

    code = "inputs_not_kept"


class Rebaser:
    """Moves adapters to other backbones. For one event loop."""

    def __init__(self, pipeline: AdaptPipeline) -> None:
        self._embedder = pipeline.embedder
        self._writer: RevisionWriter = pipeline.writer
        self._repository: AdapterRepository = pipeline.writer.repository

    async def rebase(self, tenant: str, name: str, backbone: str, promote: Promote) -> RevisionResult:
        """Move the adapter to another backbone of its kind: embed the kept inputs again, and fit.

        Raises UnknownAdapter, UnknownBackbone, InputError (wrong_kind), InputsNotKept, and what
        Batcher.embed, CandidateFitter.fit and Publication.commit raise.
        """
        started = time.perf_counter()

        async def step(state: AdapterSnapshot | None) -> RevisionResult:
            if state is None:
                raise UnknownAdapter(name)
            return await self._rebase(state, backbone, promote)

        return (await self._writer.in_turn(tenant, name, step)).with_total(started)

    async def _rebase(self, state: AdapterSnapshot, backbone: str, promote: Promote) -> RevisionResult:
        spec = self._embedder.spec(backbone)
        adapter = state.adapter
        if spec.kind != adapter.kind:
            raise InputError(
                "wrong_kind",
                f"The adapter takes {adapter.kind}s, and the backbone {backbone!r} takes {spec.kind}s.",
            )
        if not adapter.keep_inputs or any(one.inputs is None for one in state.examples):
            raise InputsNotKept(
                "The adapter does not keep all its inputs. Create a new adapter with the other backbone."
            )
        terms = replace(terms_of(adapter), backbone=backbone, fingerprint=spec.fingerprint)
        segments, truncated = await self._embed_again(state, backbone)
        rows = [PlannedExample.of(one, one) for one in state.in_use]
        vectors = [segments[one.segment][one.row] for one in state.in_use]
        embeddings = np.stack(vectors) if vectors else np.empty((0, spec.dim), np.float32)
        timings: dict[str, float] = {}
        fit = await self._writer.candidates.fit(
            adapter, terms, rows, embeddings, promote, timings, tenant=adapter.tenant
        )
        encoders = [partial(encode_embeddings, array, spec.fingerprint) for array in segments.values()]
        async with Publication(self._repository, adapter.tenant, adapter.uid) as publication:
            *moved, head, evidence = await publication.publish(
                [*encoders, fit.head.to_bytes, partial(encode_evidence, fit.evidence)]
            )
            change = Change(
                tenant=adapter.tenant,
                name=adapter.name,
                uid=adapter.uid,
                revision=state.revision,
                rebase=Rebase(backbone, spec.fingerprint),
                repoints=_repoints(state.examples, dict(zip(segments, moved, strict=True))),
                version=new_version(fit, head, evidence),
                promote=fit.decision.promote,
                standing=adapter.standing,
            )
            committed = await publication.commit(change)
        await self._writer.candidates.warm(committed, fit)
        return RevisionResult(committed, fit.decision, timings, truncated)

    async def _embed_again(self, state: AdapterSnapshot, backbone: str) -> tuple[dict[Artifact, Floats], int]:
        """Return the embeddings of every kept segment by the other backbone, rows in their places.

        Also returns how many of the examples are texts of which that backbone reads only the start. Raises
        InputError for an example that it cannot take, or of which it knows no token.
        """
        rows: dict[Artifact, set[int]] = defaultdict(set)
        inputs: dict[Artifact, Artifact] = {}
        for one in state.examples:
            assert one.inputs is not None
            rows[one.segment].add(one.row)
            inputs[one.segment] = one.inputs
        segments: dict[Artifact, Floats] = {}
        truncated = 0
        for segment, source in inputs.items():
            values = await self._repository.inputs(state.adapter, source)
            batcher = self._embedder.batchers[backbone]
            embedded = await batcher.embed(values, bulk=True, source=state.adapter.tenant)
            for row in rows[segment] & embedded.errors.keys():
                raise embedded.errors[row]
            if rows[segment] & embedded.unknown:
                unknown = next(
                    one.id for one in state.examples if one.segment == segment and one.row in embedded.unknown
                )
                raise no_known_tokens(backbone, f"the example {unknown!r}")
            segments[segment] = embedded.embeddings
            truncated += len(rows[segment] & embedded.truncated)
        return segments, truncated


def _repoints(examples: Sequence[ExampleRecord], moved: Mapping[Artifact, Artifact]) -> tuple[Repoint, ...]:
    return tuple(Repoint(one.id, moved[one.segment], one.row, one.inputs) for one in examples)
