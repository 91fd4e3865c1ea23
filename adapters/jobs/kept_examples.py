"""The kept examples that a fine-tune learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adapters.adaptation.artifacts import rows_at
from adapters.adaptation.options import FitOptions, terms_of, with_options
from adapters.jobs.submission import CannotTune, check_tunable
from adapters.probe.fit import Dataset, FittedProbe, ProbeConfig, fit
from adapters.registry.records import AdapterRecord, Creation, ExampleRecord, JobRecord
from adapters.registry.registry import Registry
from adapters.storage.artifact import Artifact, MissingArtifact, Store
from adapters.storage.formats import Evidence, decode_embeddings, decode_inputs
from models.arrays import Floats


@dataclass(frozen=True, slots=True)
class KeptExamples:
    """An adapter as it was read, with its usable examples, their embeddings and inputs, ordered by id."""

    adapter: AdapterRecord
    revision: int  # of the examples
    terms: Creation  # the adapter's terms, changed as the job asks
    examples: Sequence[ExampleRecord]
    embeddings: Floats  # (n, dim)
    inputs: Sequence[bytes | str]

    @classmethod
    def read(
        cls, registry: Registry, store: Store, job: JobRecord, check: Callable[[], None]
    ) -> KeptExamples:
        """Read the examples of the job's adapter.

        `check`: called before each attempt; may raise to stop. Raises what check_tunable and Store.read
        raise.
        """
        while True:
            check()
            adapter = registry.adapter(job.tenant, job.adapter)
            revision, every = registry.all_examples(adapter.uid)
            try:
                return cls._at(adapter, revision, every, store, job)
            except MissingArtifact:
                # Another request may just have rewritten the file; its rows now lie in another one.
                now = registry.adapter(job.tenant, job.adapter)
                if (now.uid, now.revision) == (adapter.uid, revision):
                    raise

    @classmethod
    def _at(
        cls,
        adapter: AdapterRecord,
        revision: int,
        every: Sequence[ExampleRecord],
        store: Store,
        job: JobRecord,
    ) -> KeptExamples:
        # Some examples may have lost their inputs.
        examples = [example for example in every if example.inputs is not None and not example.excluded]
        terms = with_options(terms_of(adapter), FitOptions.of_job(job.request))
        check_tunable(adapter, terms, examples)

        def read(file: Artifact) -> bytes:
            return store.read(adapter.tenant, adapter.uid, file)

        return cls(
            adapter,
            revision,
            terms,
            examples,
            np.stack(rows_at([(one.segment, one.row) for one in examples], read, decode_embeddings)),
            rows_at([(one.inputs, one.row) for one in examples if one.inputs], read, decode_inputs),
        )

    @property
    def config(self) -> ProbeConfig:
        """How the adapter's heads are fitted, without a limit of time."""
        return ProbeConfig(
            answer_accuracy=self.terms.answer_accuracy,
            balanced=self.terms.weights == "balanced",
            costs=self.terms.costs,
            limit_seconds=float("inf"),
        )

    def fit_probe(self, rows: Sequence[int]) -> FittedProbe:
        """Fit a linear probe on these rows. On the training rows, it is where the first phase starts.

        It does not read the names of labels, which have too many examples for names to matter.
        """
        examples = [self.examples[row] for row in rows]
        data = Dataset(
            embeddings=self.embeddings[list(rows)],
            targets=[example.target for example in examples],
            digests=[example.digest for example in examples],
            task="classification",
            fingerprint=self.adapter.fingerprint,
            groups=[example.group or "" for example in examples],
            sampled=[example.sampled for example in examples],
        )
        return fit(data, self.config)

    def evidence(self, scores: Floats) -> Evidence:
        """Return the evidence of a version that was fitted on the examples. `scores`: out of fold, (n,)."""
        return Evidence(
            tuple(example.id for example in self.examples),
            tuple(example.digest for example in self.examples),
            tuple(example.target for example in self.examples),
            scores,
            tuple(example.sampled for example in self.examples),
        )

    def check_unchanged(self, adapter: AdapterRecord, now: Sequence[ExampleRecord]) -> bool:
        """Return whether an example has been set aside. `adapter`, with its examples `now`: read again.

        Raises CannotTune if an example was removed or has another input, or if the adapter was rebased.
        """
        if adapter.uid == self.adapter.uid and adapter.fingerprint != self.adapter.fingerprint:
            raise CannotTune(
                "fingerprint_mismatch",
                f"The adapter was moved to the backbone {adapter.backbone!r} while the fine-tune ran. "
                "Start it again.",
            )
        there = {example.id: example for example in now}
        same = [there.get(one.id) for one in self.examples]
        if adapter.uid != self.adapter.uid or any(
            found is None or found.digest != one.digest
            for found, one in zip(same, self.examples, strict=True)
        ):
            raise CannotTune(
                "examples_removed",
                "Examples that the fine-tune learned from were removed while it ran. Start it again.",
            )
        return any(found is not None and found.excluded for found in same)
