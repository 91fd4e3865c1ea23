"""The work of a fine-tune job: an adapter's kept examples in, a published version out. Torch lives here."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.adaptation.adapt import terms_of, wanted
from adapters.adaptation.promotion import Promote, as_asked, decide_late
from adapters.adaptation.revision import LINEAR_PROBE, with_ids
from adapters.examples.copies import together
from adapters.finetune.checkpoint import load_checkpoint, save_checkpoint
from adapters.finetune.data import Samples, Tensors, samples_of
from adapters.finetune.export import TunedVersion, finish
from adapters.finetune.full_phase import Checkpoint, FineTuneConfig, Progress
from adapters.finetune.model import Model, TrainingSet
from adapters.finetune.pacing import cooperative_pauses
from adapters.finetune.trainer import fine_tune
from adapters.finetune.vocabulary import restricted_vocabulary
from adapters.jobs.lease import Lease, checkpoint_path
from adapters.jobs.submission import FINE_TUNE, CannotTune, check_tunable
from adapters.probe.fit import Dataset, FittedProbe, ProbeConfig, fit
from adapters.probe.folds import folds
from adapters.registry.records import (
    AdapterRecord,
    Change,
    Committed,
    Creation,
    ExampleRecord,
    NewVersion,
    RegistryUnavailable,
    RevisionMoved,
    UnknownVersion,
)
from adapters.registry.registry import Registry
from adapters.storage.artifact import Artifact, Store, StoreError
from adapters.storage.formats import (
    Evidence,
    decode_embeddings,
    decode_evidence,
    decode_inputs,
    encode_evidence,
)
from models.export.loaders import Network, load_network
from models.preprocess.preprocessor import InputLimits
from models.priority import use_idle_scheduling
from models.spec import FLOAT32, TOKENIZER_FILE

logger = logging.getLogger("topwork")

NO_BETTER = "no_better"
"""The outcome of a fine-tune that found nothing better than the backbone as it is."""

# One example in so many is held out.
_HELD_OUT = 5
# Of what a checkpoint holds: an older one is of no use to what trains now.
_CHECKPOINTS = 2


@dataclass(frozen=True, slots=True)
class _Kept:
    """An adapter as it was read: its examples with their embeddings and inputs, in the order of ids.

    terms: the adapter's, with what the job asks for in their place. revision: of the examples.
    """

    adapter: AdapterRecord
    revision: int
    terms: Creation
    examples: Sequence[ExampleRecord]
    embeddings: NDArray[np.float32]
    inputs: Sequence[bytes | str]


class _Watched:
    """Samples that look whether to go on before every batch."""

    def __init__(self, samples: Samples, lease: Lease) -> None:
        self._samples = samples
        self._lease = lease
        self.size = samples.size
        self.vocabulary = samples.vocabulary

    def plain(self, rows: Sequence[int]) -> Tensors:
        """See Samples.plain."""
        self._lease.check()
        return self._samples.plain(rows)

    def augmented(self, rows: Sequence[int], size: int) -> Tensors:
        """See Samples.augmented."""
        self._lease.check()
        return self._samples.augmented(rows, size)

    def pieces(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """See Samples.pieces."""
        return self._samples.pieces(rows, size)


class FineTuneJob:
    """Fine-tunes adapters. Blocking, one at a time.

    scratch: a folder for checkpoints, made where missing. limits: those that inputs were accepted with.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        scratch: Path,
        device: str = "cpu",
        limits: InputLimits = InputLimits(),
    ) -> None:
        self._registry = registry
        self._store = store
        self._scratch = scratch
        self._device = device
        self._limits = limits
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)

    def run(self, lease: Lease) -> Committed | None:
        """Does the job and records its version and its success together; nothing is published before.

        Where training found nothing better than the backbone, no network is published: the job succeeds
        without a version (None), and its progress says so. Where nothing is live yet, it makes a version of
        the head of all examples instead.

        The job's request: {"promote": …, "config": {…}, "answer_accuracy": …, "weights": …}, with the config
        of a FineTuneConfig; an older release's has no more than the first two. Raises CannotTune, Diverged,
        ExportRefused, InputError, StoreError, RegistryError, and what Lease.check raises.
        """
        job = lease.claim.job
        kept = self._read(job.tenant, job.adapter, job.request)
        config = FineTuneConfig(**job.request.get("config", {}))
        # Scheduling is a thread's own: the one that beats for the job, and the one that records, keep theirs.
        with ThreadPoolExecutor(1, "training", use_idle_scheduling) as training:
            found: TunedVersion | FittedProbe | None = training.submit(
                self._train, kept, config, lease
            ).result()
            if found is None and kept.adapter.live is None:
                # There would be nothing to answer from.
                found = training.submit(_probe, kept, range(len(kept.examples))).result()
        lease.check()
        lease.tell()
        if found is None:
            committed = None
            self._registry.jobs.succeed(lease.claim, {"share": 1.0, "outcome": NO_BETTER})
        else:
            committed = self._commit(kept, found, job.request, lease)
        checkpoint_path(self._scratch, job.id).unlink(missing_ok=True)
        return committed

    def _train(self, kept: _Kept, config: FineTuneConfig, lease: Lease) -> TunedVersion | None:
        network = load_network(kept.adapter.backbone)
        if network.spec.fingerprint != kept.adapter.fingerprint:
            raise CannotTune(
                "fingerprint_mismatch",
                "The backbone is not the one that the adapter was taught with. "
                "POST /adapters/{adapter}/rebase moves the adapter to it.",
            )
        names, lesson = self._lesson(kept, network, lease)
        probe = _probe(kept, lesson.training)
        model = Model(network.forward, probe.head, network.spec.transform).to(self._device)
        path = checkpoint_path(self._scratch, lease.claim.job.id)
        about = _about(kept, lesson, config)

        def tell(progress: Progress, checkpoint: Checkpoint | None) -> None:
            lease.check()
            if checkpoint is not None:
                save_checkpoint(path, checkpoint, about)
            lease.report(progress.share, _told(progress))

        resume = load_checkpoint(path, about)
        with contextlib.ExitStack() as meanwhile:
            meanwhile.enter_context(restricted_vocabulary(network.words, lesson.samples.vocabulary))
            if self._device == "cpu":
                # A GPU's work waits for no core. The service goes first, where it has started this process.
                meanwhile.enter_context(cooperative_pauses(network.forward, os.getppid() or None))
            outcome = fine_tune(model, lesson, probe.report["strength"], config, resume=resume, tell=tell)
        if outcome.measured.mix == 0.0:
            # The network would be the backbone's copy, with a head of fewer examples than the probe's.
            return None
        return finish(network, model, lesson, names, outcome, kept.terms.answer_accuracy)

    def _read(self, tenant: str, name: str, request: Mapping[str, Any]) -> _Kept:
        adapter = self._registry.adapter(tenant, name)
        revision, every = self._registry.all_examples(adapter.uid)
        # The inputs of some may be lost.
        examples = [example for example in every if example.inputs is not None and not example.excluded]
        check_tunable(adapter, examples)
        files = {example.segment for example in examples} | {
            example.inputs for example in examples if example.inputs is not None
        }
        data = {file: self._store.read(tenant, adapter.uid, file) for file in files}
        rows = {example.segment: decode_embeddings(data[example.segment]) for example in examples}
        inputs = {
            example.inputs: decode_inputs(data[example.inputs]) for example in examples if example.inputs
        }
        return _Kept(
            adapter,
            revision,
            wanted(terms_of(adapter), request.get("answer_accuracy"), request.get("weights")),
            examples,
            np.stack([rows[example.segment][example.row] for example in examples]),
            [inputs[example.inputs][example.row] for example in examples if example.inputs is not None],
        )

    def _lesson(self, kept: _Kept, network: Network, lease: Lease) -> tuple[tuple[str, ...], TrainingSet]:
        targets = [str(example.target) for example in kept.examples]
        names = tuple(sorted(set(targets)))
        place = {name: index for index, name in enumerate(names)}
        labels = np.array([place[target] for target in targets], dtype=np.int64)
        digests = [example.digest for example in kept.examples]
        belonging = together(kept.embeddings, digests, [example.group or "" for example in kept.examples])
        held_out = folds(belonging.keys, targets, _HELD_OUT) == 0
        sampled = np.array([example.sampled for example in kept.examples])
        with tempfile.TemporaryDirectory(prefix="topwork-tokenizer-") as folder:
            tokenizer = None
            if network.tokenizer is not None:
                tokenizer = Path(folder) / TOKENIZER_FILE
                tokenizer.write_bytes(network.tokenizer)
            samples = samples_of(network.spec, kept.inputs, tokenizer, self._limits)
        # What is trained is in single precision, whatever the backbone is served in.
        own = kept.embeddings if network.spec.precision == FLOAT32 else None
        return names, TrainingSet(_Watched(samples, lease), labels, held_out, own, sampled)

    def _commit(
        self, kept: _Kept, found: TunedVersion | FittedProbe, request: Mapping[str, Any], lease: Lease
    ) -> Committed:
        """Publishes the files, then records the version as the job's success, at whatever revision that is.

        What was learned must still be there: an example that was removed meanwhile takes the network with it,
        and one that was set aside keeps it from being promoted.
        """
        adapter, tenant = kept.adapter, kept.adapter.tenant
        asked: Promote = request.get("promote", "if_better")
        evidence = Evidence(
            tuple(example.id for example in kept.examples),
            tuple(example.digest for example in kept.examples),
            tuple(example.target for example in kept.examples),
            found.scores,
            tuple(example.sampled for example in kept.examples),
        )
        blobs = [found.head.to_bytes(), encode_evidence(evidence)]
        if isinstance(found, TunedVersion):
            blobs.append(found.onnx)
        published = self._store.publish_all(tenant, adapter.uid, blobs)
        try:
            while True:
                lease.check()
                now = self._registry.adapter(tenant, adapter.name)
                set_aside = self._check_kept(kept, now)
                promote = as_asked(asked, lease.claim.job.created_at, now)
                held = now.rolled_back_at is not None
                decision = decide_late(promote, adapter.task, evidence, self._live(now), held=held)
                if set_aside and decision.promote:
                    decision = replace(decision, promote=False, reason="example_set_aside")
                head, kept_evidence, *graph = published
                version = NewVersion(
                    FINE_TUNE if graph else LINEAR_PROBE,
                    head,
                    kept_evidence,
                    with_ids(found.report, evidence.ids) | {"promotion": decision.to_json()},
                    len(found.head.labels),
                    graph[0] if graph else None,
                    kept.revision,
                )
                change = Change(
                    tenant=tenant,
                    name=adapter.name,
                    uid=now.uid,
                    revision=now.revision,
                    version=version,
                    promote=decision.promote,
                    answer_accuracy=request.get("answer_accuracy"),
                    weights=request.get("weights"),
                    standing=now.standing,
                )
                # Others may change the adapter at any time; what was trained is not lost to them.
                with contextlib.suppress(RevisionMoved):
                    committed = self._registry.commit(change, job=lease.claim)
                    break
        except RegistryUnavailable:
            # It may have been recorded all the same; if not, a sweep finds the files.
            raise
        except Exception:
            self._delete(tenant, adapter.uid, published)
            raise
        self._delete(tenant, adapter.uid, committed.unreferenced)
        return committed

    def _check_kept(self, kept: _Kept, now: AdapterRecord) -> bool:
        """Whether what was learned has been set aside in part. Raises CannotTune where it was removed."""
        there = {example.id: example for example in self._registry.all_examples(now.uid)[1]}
        same = [there.get(one.id) for one in kept.examples]
        if now.uid != kept.adapter.uid or any(
            found is None or found.digest != one.digest
            for found, one in zip(same, kept.examples, strict=True)
        ):
            raise CannotTune(
                "examples_removed", "Examples that it learned from were removed meanwhile; fine-tune again."
            )
        return any(found is not None and found.excluded for found in same)

    def _live(self, adapter: AdapterRecord) -> Evidence | None:
        if adapter.live is None:
            return None
        try:
            version = self._registry.version(adapter.uid, adapter.live)
            if version.evidence is None:
                return None
            return decode_evidence(self._store.read(adapter.tenant, adapter.uid, version.evidence))
        except (UnknownVersion, StoreError) as error:
            logger.warning("no comparison with version %d: %s", adapter.live, error)
            return None

    def _delete(self, tenant: str, uid: str, artifacts: Sequence[Artifact]) -> None:
        try:
            self._store.delete(tenant, uid, artifacts)
        except StoreError as error:
            logger.warning("unreferenced artifacts stay until the next sweep: %s", error)


def _probe(kept: _Kept, rows: Sequence[int]) -> FittedProbe:
    """The linear probe of these examples: of those trained on it is what the first phase begins with."""
    examples = [kept.examples[row] for row in rows]
    data = Dataset(
        embeddings=kept.embeddings[list(rows)],
        targets=[example.target for example in examples],
        digests=[example.digest for example in examples],
        task="classification",
        fingerprint=kept.adapter.fingerprint,
        groups=[example.group or "" for example in examples],
        sampled=[example.sampled for example in examples],
    )
    config = ProbeConfig(
        answer_accuracy=kept.terms.answer_accuracy,
        balanced=kept.terms.weights == "balanced",
        limit_seconds=float("inf"),
    )
    return fit(data, config)


def _told(progress: Progress) -> Mapping[str, Any]:
    return {
        "phase": progress.phase,
        "epoch": progress.epoch,
        "epochs": progress.epochs,
        "loss": progress.training_loss,
        "held_out_accuracy": None if progress.held_out is None else progress.held_out.accuracy,
    }


def _about(kept: _Kept, lesson: TrainingSet, config: FineTuneConfig) -> str:
    """What a checkpoint belongs to: these examples, those of them held out, and this way of training."""
    digest = hashlib.sha256(repr((_CHECKPOINTS, sorted(asdict(config).items()))).encode())
    for example in kept.examples:
        digest.update(f"{example.id}\0{example.digest}\0{example.target}\n".encode())
    digest.update(lesson.held_out.tobytes())
    digest.update(repr((lesson.testing, kept.terms.weights)).encode())
    return digest.hexdigest()
