"""Runs a fine-tune job: trains on an adapter's kept examples and publishes a version. Imports torch."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapters.adaptation.artifacts import delete_unreferenced, evidence_of, kept_if_committed
from adapters.adaptation.options import FitOptions
from adapters.adaptation.promotion.candidate import with_ids
from adapters.adaptation.promotion.decision import Promote, as_asked, decide_late
from adapters.adaptation.revision.files import LINEAR_PROBE
from adapters.examples.copies import together
from adapters.finetune.checkpoint import load_checkpoint, save_checkpoint
from adapters.finetune.config import FineTuneConfig
from adapters.finetune.data import Samples, Tensors, samples_of
from adapters.finetune.export import TunedVersion, finish
from adapters.finetune.full_phase import Checkpoint, Progress
from adapters.finetune.model import Model, TrainingSet
from adapters.finetune.pacing import cooperative_pauses
from adapters.finetune.trainer import fine_tune
from adapters.finetune.vocabulary import restricted_vocabulary
from adapters.jobs.kept_examples import KeptExamples
from adapters.jobs.lease import Lease, checkpoint_path
from adapters.jobs.stored_checkpoints import CheckpointUploader, fetch_checkpoint
from adapters.jobs.submission import FINE_TUNE, CannotTune, check_trainable
from adapters.probe.fit import FittedProbe
from adapters.probe.folds import folds
from adapters.registry.errors import RevisionMoved
from adapters.registry.records import (
    Change,
    Committed,
    JobRecord,
    NewVersion,
)
from adapters.registry.registry import Registry
from adapters.storage.artifact import Artifact, Store
from adapters.storage.formats import (
    Evidence,
    encode_evidence,
)
from models.export.loaders import load_network
from models.export.network import Network
from models.preprocess.limits import InputLimits
from models.priority import use_idle_scheduling
from models.sources.source import entry_of
from models.spec import FLOAT32, PIECES_FILE, TOKENIZER_FILE

logger = logging.getLogger("topwork")

NO_BETTER = "no_better"
"""Outcome of a fine-tune that found nothing better than the unchanged backbone."""

_HELD_OUT = 5  # number of folds, one of which is held out
_CHECKPOINTS = 2  # version of the checkpoint format; older checkpoints are ignored


class _Watched:
    """Samples that check the lease before every batch."""

    def __init__(self, samples: Samples, lease: Lease) -> None:
        self._samples = samples
        self._lease = lease
        self.size = samples.size
        self.vocabulary = samples.vocabulary

    def plain(self, rows: Sequence[int]) -> Tensors:
        self._lease.check()
        return self._samples.plain(rows)

    def augmented(self, rows: Sequence[int], size: int) -> Tensors:
        self._lease.check()
        return self._samples.augmented(rows, size)

    def pieces(self, rows: Sequence[int], size: int) -> list[list[int]]:
        return self._samples.pieces(rows, size)


class FineTuneJob:
    """Fine-tunes adapters. Blocking, one at a time.

    `scratch`: folder for checkpoints, created if missing. `limits`: those that inputs were accepted with.
    `backbones`: entries of the settings, which have the short names.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        scratch: Path,
        device: str = "cpu",
        limits: InputLimits = InputLimits(),
        backbones: Sequence[str] = (),
    ) -> None:
        self._registry = registry
        self._store = store
        self._scratch = scratch
        self._device = device
        self._limits = limits
        self._backbones = backbones
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)

    def run(self, lease: Lease) -> Committed | None:
        """Run the job; record its version and its success in one transaction. No file is published before.

        If training finds nothing better than the backbone, no network is published: the job succeeds without
        a version (None), and its progress says so. If the adapter has no live version yet, the job makes a
        version from a linear probe on all examples instead.

        The job's request: {"promote": …, "config": {…}, …}, where "config" holds the fields of
        FineTuneConfig, and the rest those of FitOptions; older releases wrote fewer. Raises CannotTune,
        Diverged, ExportRefused, InputError, StoreError, RegistryUnavailable, and what Lease.check raises.
        """
        job = lease.claim.job
        kept = KeptExamples.read(self._registry, self._store, job, lease.check)
        config = FineTuneConfig(**job.request.get("config", {}))
        path = checkpoint_path(self._scratch, job.id)
        uploader = CheckpointUploader(self._registry.jobs, self._store, lease.claim, path)
        # Idle scheduling applies to one thread. The threads for heartbeats and for commits must keep theirs.
        with ThreadPoolExecutor(1, "training", use_idle_scheduling) as training, uploader:
            found: TunedVersion | FittedProbe | None = training.submit(
                self._train, kept, config, lease, uploader
            ).result()
            if found is None and kept.adapter.live is None:
                # The adapter would have no version to predict with.
                found = training.submit(kept.fit_probe, range(len(kept.examples))).result()
        lease.check()
        lease.tell()
        if found is None:
            committed = None
            self._registry.jobs.succeed(lease.claim, {"share": 1.0, "outcome": NO_BETTER})
        else:
            committed = self._commit(kept, found, lease)
        return committed

    def _train(
        self, kept: KeptExamples, config: FineTuneConfig, lease: Lease, uploader: CheckpointUploader
    ) -> TunedVersion | None:
        network = load_network(entry_of(kept.adapter.backbone, self._backbones))
        check_trainable(network.spec)
        if network.spec.fingerprint != kept.adapter.fingerprint:
            raise CannotTune(
                "fingerprint_mismatch",
                "The adapter was fitted with another build of its backbone. "
                "POST /adapters/{adapter}/rebase moves the adapter to it.",
            )
        names, training_set = self._training_set(kept, network, lease)
        probe = kept.fit_probe(training_set.training)
        model = Model(network.forward, probe.head, network.spec.transform).to(self._device)
        path = checkpoint_path(self._scratch, lease.claim.job.id)
        about = _about(kept, training_set, config)

        def tell(progress: Progress, checkpoint: Checkpoint | None) -> None:
            lease.check()
            if checkpoint is not None and save_checkpoint(path, checkpoint, about):
                uploader.written()
            lease.report(progress.share, _told(progress))

        resume = self._resume(lease.claim.job, path, about)
        with contextlib.ExitStack() as meanwhile:
            meanwhile.enter_context(restricted_vocabulary(network.words, training_set.samples.vocabulary))
            if self._device == "cpu":
                # On a GPU there is no core to share. The parent goes first: usually it is the service.
                meanwhile.enter_context(cooperative_pauses(network.forward, os.getppid() or None))
            outcome = fine_tune(
                model, training_set, probe.report["strength"], config, resume=resume, tell=tell
            )
        if outcome.measured.mix == 0.0:
            # The network would be a copy of the backbone, with a head of fewer examples than a probe's.
            return None
        return finish(network, model, training_set, names, outcome, kept.config)

    def _resume(self, job: JobRecord, path: Path, about: str) -> Checkpoint | None:
        """Return the checkpoint to go on from: this host's or the store's, whichever is further on."""
        copy = path.with_suffix(f".{job.attempt}.partial")
        try:
            fetched = fetch_checkpoint(self._store, job, copy)
            found = [load_checkpoint(path, about), load_checkpoint(copy, about) if fetched else None]
        finally:
            copy.unlink(missing_ok=True)
        known = [one for one in found if one is not None]
        return max(known, key=lambda one: (one.measured is not None, one.epoch), default=None)

    def _training_set(
        self, kept: KeptExamples, network: Network, lease: Lease
    ) -> tuple[tuple[str, ...], TrainingSet]:
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
            if network.pieces is not None:
                (Path(folder) / PIECES_FILE).write_bytes(network.pieces)
            samples = samples_of(network.spec, kept.inputs, tokenizer, self._limits)
        # Training is in single precision, so kept embeddings of any other precision cannot be used.
        own = kept.embeddings if network.spec.precision == FLOAT32 else None
        return names, TrainingSet(_Watched(samples, lease), labels, held_out, own, sampled)

    def _commit(self, kept: KeptExamples, found: TunedVersion | FittedProbe, lease: Lease) -> Committed:
        """Publish the files, then commit the version and the job's success at the adapter's current revision.

        Every example that was trained on must still exist, and the adapter have the same backbone: if not,
        the network is dropped (CannotTune). If an example was set aside, the network is not promoted.
        """
        adapter, tenant = kept.adapter, kept.adapter.tenant
        evidence = kept.evidence(found.scores)
        blobs = [found.head.to_bytes(), encode_evidence(evidence)]
        if isinstance(found, TunedVersion):
            blobs.append(found.onnx)
        published = self._store.publish_all(tenant, adapter.uid, blobs)
        with kept_if_committed(self._store, tenant, adapter.uid, published):
            while True:
                lease.check()
                change = self._change(kept, found, evidence, published, lease.claim.job)
                # Another request may change the adapter at any time; the commit is then retried.
                with contextlib.suppress(RevisionMoved):
                    committed = self._registry.commit(change, job=lease.claim)
                    break
        delete_unreferenced(self._store, tenant, adapter.uid, committed.unreferenced)
        return committed

    def _change(
        self,
        kept: KeptExamples,
        found: TunedVersion | FittedProbe,
        evidence: Evidence,
        published: Sequence[Artifact],
        job: JobRecord,
    ) -> Change:
        """Return the change that adds the version to the adapter as it is now."""
        tenant, request = kept.adapter.tenant, job.request
        now = self._registry.adapter(tenant, kept.adapter.name)
        set_aside = kept.check_unchanged(now, self._registry.all_examples(now.uid)[1])
        asked: Promote = request.get("promote", "if_better")
        promote = as_asked(asked, job.created_at, now)
        held = now.rolled_back_at is not None
        live = evidence_of(self._registry, self._store, now, now.live)
        decision = decide_late(promote, now.task, evidence, live, held=held)
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
        return Change(
            tenant=tenant,
            name=now.name,
            uid=now.uid,
            revision=now.revision,
            version=version,
            promote=decision.promote,
            **FitOptions.of_job(request).to_json(),
            standing=now.standing,
        )


def _told(progress: Progress) -> Mapping[str, Any]:
    return {
        "phase": progress.phase,
        "epoch": progress.epoch,
        "epochs": progress.epochs,
        "loss": progress.training_loss,
        "held_out_accuracy": None if progress.held_out is None else progress.held_out.accuracy,
    }


def _about(kept: KeptExamples, training_set: TrainingSet, config: FineTuneConfig) -> str:
    """Return a digest that ties a checkpoint to its backbone, its examples and its training config."""
    origin = (_CHECKPOINTS, kept.adapter.fingerprint, sorted(asdict(config).items()))
    digest = hashlib.sha256(repr(origin).encode())
    for example in kept.examples:
        digest.update(f"{example.id}\0{example.digest}\0{example.target}\n".encode())
    digest.update(training_set.held_out.tobytes())
    digest.update(repr((training_set.testing, kept.terms.weights, sorted(kept.terms.costs.items()))).encode())
    return digest.hexdigest()
