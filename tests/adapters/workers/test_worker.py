"""Fine-tune jobs on a real network, by the worker and in this process: done, refused, killed, cancelled."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy.exc import DBAPIError

from adapters.adaptation.rebase import InputsNotKept
from adapters.finetune.checkpoint import load_checkpoint, save_checkpoint
from adapters.finetune.config import FineTuneConfig
from adapters.finetune.data import samples_of
from adapters.finetune.export import TunedVersion, finish
from adapters.finetune.full_phase import Checkpoint
from adapters.finetune.model import Score
from adapters.finetune.trainer import FineTuned, fine_tune
from adapters.heads.head import Head
from adapters.jobs.config import WorkerConfig
from adapters.jobs.fine_tune import FineTuneJob
from adapters.jobs.lease import Cancelled, Lease, checkpoint_path, checkpoints
from adapters.jobs.runner import JobRunner
from adapters.jobs.stored_checkpoints import delete_spent
from adapters.jobs.submission import CannotTune, TooFewExamples
from adapters.probe.fit import Dataset, fit
from adapters.registry.database import Database
from adapters.registry.errors import RegistryUnavailable
from adapters.registry.jobs import upload_request
from adapters.registry.records import (
    Change,
    Committed,
    Creation,
    ExampleWrite,
    JobKind,
    JobRecord,
    NewVersion,
)
from adapters.registry.registry import Registry, new_uid
from adapters.registry.statements.job_rows import MAX_ATTEMPTS
from adapters.storage.artifact import Artifact, MissingArtifact, Store
from adapters.storage.formats import (
    Evidence,
    decode_evidence,
    encode_embeddings,
    encode_evidence,
    encode_inputs,
)
from adapters.storage.open import open_store
from adapters.storage.sweeper import sweep
from models.errors import DomainError
from models.export.loaders import load_network
from models.preprocess.pixels import normalised
from models.priority import NICENESS
from models.spec import ImageTransform
from models.store.manifest import CorruptExport
from service import background
from service.settings import Settings
from tests.support.adapters.job_records import PAST, expire, set_row
from tests.support.adapters.listener import Listener, listening
from tests.support.conditions import until
from tests.support.models.random_models import image_model
from tests.support.models.shades import NAMES, picture

pytestmark = pytest.mark.training

ROOT = Path(__file__).parents[3]
WORKER = [sys.executable, "-m", "adapters.workers.worker"]
# The worker with a small disk in place of a folder, which holds what the folder held.
SMALL = """
mkdir "$1.small" && mount -t tmpfs -o size="$2" tmpfs "$1.small" && cp -a "$1/." "$1.small" &&
mount --bind "$1.small" "$1" && exec "$0" -m adapters.workers.worker
"""
KINDS: tuple[JobKind, ...] = ("fine_tune",)
CONFIG = asdict(FineTuneConfig(epochs=2, full_size_epochs=2, pixels=32, batch=16, refit=False))
LONG = {**CONFIG, "epochs": 200, "full_size_epochs": 0, "patience": 200}


@pytest.fixture(scope="module")
def backbone() -> str:
    return f"timm:{image_model()}"


@dataclass(frozen=True, slots=True)
class Place:
    """A database and a store with one adapter, "shades"."""

    folder: Path
    registry: Registry
    store: Store
    uid: str

    @property
    def config(self) -> WorkerConfig:
        settings = Settings(
            home=self.folder,
            database_url=f"sqlite:///{self.folder / 'registry.db'}",
            store_url=str(self.folder / "artifacts"),
        )
        scratch = str(self.folder / "scratch")
        return replace(settings.worker, scratch=scratch, lease_seconds=8.0, poll_seconds=0.1)

    @property
    def tuning(self) -> FineTuneJob:
        return FineTuneJob(self.registry, self.store, self.folder / "scratch")

    def submit(self, config: dict[str, Any] = CONFIG) -> JobRecord:
        return self.registry.jobs.submit(
            "acme", "shades", "fine_tune", {"config": config}, deadline_seconds=600, max_open=3
        )

    def job(self, job_id: str) -> JobRecord:
        return self.registry.jobs.job("acme", job_id)

    def checkpoint(self, job: JobRecord) -> Path:
        return checkpoint_path(self.folder / "scratch", job.id)

    def objects(self) -> int:
        return sum(1 for _ in self.store.objects())

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        claim = self.registry.jobs.claim(60.0, kinds=KINDS, max_running_per_tenant=1)
        assert claim is not None
        with Lease(self.registry.jobs, claim, 60.0, threading.Event()) as lease:
            yield lease

    def change(self, **values: Any) -> Committed:
        adapter = self.registry.adapter("acme", "shades")
        return self.registry.commit(Change("acme", "shades", adapter.uid, adapter.revision, **values))


def make(
    folder: Path, backbone: str, labels: list[int], *, keep_inputs: bool = True, fitted: bool = True
) -> Place:
    """An adapter as /adapt leaves it: examples, embeddings and inputs, and a live linear probe if fitted."""
    registry, store = Registry(f"sqlite:///{folder / 'registry.db'}"), open_store(str(folder / "artifacts"))
    registry.migrate()
    network = load_network(backbone)
    rng = np.random.default_rng(4)
    pictures: list[bytes | str] = [picture(label, rng) for label in labels]
    (seen,) = samples_of(network.spec, pictures).plain(range(len(labels)))
    assert isinstance(network.spec.transform, ImageTransform)
    with torch.inference_mode():
        rows = network.forward(torch.from_numpy(normalised(seen.numpy(), network.spec.transform))).numpy()
    uid = new_uid()
    segment, inputs = store.publish_all(
        "acme", uid, [encode_embeddings(rows, network.spec.fingerprint), encode_inputs(pictures)]
    )
    ids = [f"e{row:03}" for row in range(len(labels))]
    digests = [f"{row:064x}" for row in range(len(labels))]
    targets = [NAMES[label] for label in labels]
    version = None
    if fitted and len(set(labels)) > 1:
        found = fit(Dataset(rows.copy(), targets, digests, "classification", network.spec.fingerprint))
        evidence = Evidence(tuple(ids), tuple(digests), tuple(targets), found.scores)
        head, kept = store.publish_all("acme", uid, [found.head.to_bytes(), encode_evidence(evidence)])
        version = NewVersion("linear_probe", head, kept, found.report, len(found.head.labels))
    registry.commit(
        Change(
            "acme",
            "shades",
            uid,
            0,
            create=Creation(backbone, network.spec.fingerprint, "image", "classification", keep_inputs),
            upserts=tuple(
                ExampleWrite(
                    ids[row], digests[row], targets[row], segment, row, inputs if keep_inputs else None
                )
                for row in range(len(labels))
            ),
            version=version,
            promote=version is not None,
        )
    )
    return Place(folder, registry, store, uid)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, backbone: str) -> Path:
    """The folder of a place with 75 examples of three labels, to be copied."""
    folder = tmp_path_factory.mktemp("untouched")
    make(folder, backbone, [row % 3 for row in range(75)]).registry.close()
    return folder


@pytest.fixture
def place(tmp_path: Path, untouched: Path) -> Iterator[Place]:
    copied = copy(untouched, tmp_path)
    yield copied
    copied.registry.close()


def copy(folder: Path, target: Path) -> Place:
    """A place as that in another folder."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    registry = Registry(f"sqlite:///{target / 'registry.db'}")
    adapter = registry.adapter("acme", "shades")
    return Place(target, registry, open_store(str(target / "artifacts")), adapter.uid)


@dataclass(frozen=True, slots=True)
class Training:
    """What came of a training of the place's examples, and of the export of its network."""

    outcome: FineTuned
    version: TunedVersion


@pytest.fixture(scope="module")
def training(untouched: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The results of one real job, for tests of what happens after that."""
    outcomes: list[FineTuned] = []
    versions: list[TunedVersion] = []

    def note_outcome(*arguments: Any, **options: Any) -> FineTuned:
        outcomes.append(fine_tune(*arguments, **options))
        return outcomes[-1]

    def note_version(*arguments: Any) -> TunedVersion:
        versions.append(finish(*arguments))
        return versions[-1]

    place = copy(untouched, tmp_path_factory.mktemp("training"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapters.jobs.fine_tune.fine_tune", note_outcome)
        patch.setattr("adapters.jobs.fine_tune.finish", note_version)
        place.submit()
        with place.lease() as lease:
            place.tuning.run(lease)
    place.registry.close()
    return Training(outcomes[0], versions[0])


@contextmanager
def worker(config: WorkerConfig, command: Sequence[str] = WORKER) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(config)) + "\n")
    process.stdin.flush()
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()
        process.stdin.close()


def done_and_cleared(place: Place, job: JobRecord) -> bool:
    """Whether the job has ended and its worker has deleted the checkpoint, which is just after the commit."""
    return place.job(job.id).finished_at is not None and not place.checkpoint(job).exists()


def check_tuned(place: Place, job: JobRecord, *, interrupted: bool = False) -> None:
    """The job's version is there as a whole, and no other.

    interrupted: an attempt ended at any moment, perhaps after it published a checkpoint that no row names.
    """
    if interrupted:
        sweep(place.store, place.registry, older_than=-1.0)
    versions = place.registry.versions(place.uid)
    assert [version.number for version in versions] == [2, 1]
    tuned = versions[0]
    assert (job.state, job.version, tuned.method) == ("succeeded", 2, "fine_tune")
    assert tuned.network is not None
    assert tuned.evidence is not None
    head = Head.from_bytes(place.store.read("acme", place.uid, tuned.artifact))
    graph = place.store.read("acme", place.uid, tuned.network)
    assert head.labels == NAMES
    assert len(graph) > 10_000
    evidence = decode_evidence(place.store.read("acme", place.uid, tuned.evidence))
    measured = evidence.scores[~np.isnan(evidence.scores)]
    assert tuned.report["accuracy"] == pytest.approx(float(measured.mean()))
    assert tuned.report["promotion"]["compared"] == len(measured)
    # A file for each row that refers to one, and none besides.
    assert place.objects() == len(place.registry.referenced(place.uid)) == 7
    assert not list((place.folder / "scratch").glob("*.safetensors"))


def test_a_worker_does_a_job_and_ends_with_its_parent(place: Place) -> None:
    job = place.submit()
    with worker(place.config) as process:
        until(lambda: done_and_cleared(place, job))
        check_tuned(place, place.job(job.id))
        assert place.job(job.id).progress == {**(place.job(job.id).progress or {}), "phase": 2}
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_killed_workers_job_goes_on_where_it_was(place: Place) -> None:
    job = place.submit({**CONFIG, "epochs": 6, "full_size_epochs": 6, "patience": 6})
    with worker(place.config) as process:
        until(place.checkpoint(job).exists)
        process.kill()
    assert place.job(job.id).state == "running"
    with worker(place.config):
        until(lambda: done_and_cleared(place, job))
    done = place.job(job.id)
    assert done.attempt == 2
    check_tuned(place, done, interrupted=True)


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_killed_workers_job_goes_on_on_another_host(
    place: Place, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config, store = place.config, place.store
    if where == "bucket":
        url, options = request.getfixturevalue("s3_url"), request.getfixturevalue("s3_options")
        config, store = replace(config, store=url, store_options=options), open_store(url, options)
        for file in place.registry.referenced(place.uid):
            store.put("acme", place.uid, file, place.store.read("acme", place.uid, file))
    job = place.submit({**CONFIG, "epochs": 6, "full_size_epochs": 6, "patience": 6})
    with worker(config) as process:
        until(lambda: place.job(job.id).checkpoint is not None)
        process.kill()
    set_row(place.registry, job, lease_until=PAST)
    resumed: list[Checkpoint | None] = []

    def train(*arguments: Any, resume: Checkpoint | None, **options: Any) -> FineTuned:
        resumed.append(resume)
        return fine_tune(*arguments, resume=resume, **options)

    monkeypatch.setattr("adapters.jobs.fine_tune.fine_tune", train)
    other = FineTuneJob(place.registry, store, place.folder / "scratch of another host")
    with place.lease() as lease:
        other.run(lease)
    (resume,) = resumed
    assert resume is not None
    assert resume.epoch >= 1
    delete_spent(place.registry.jobs, store)
    assert (place.job(job.id).state, place.job(job.id).attempt) == ("succeeded", 2)
    # The killed attempt may have published another checkpoint.
    sweep(store, place.registry, older_than=-1.0)
    kept = {file.name for file in place.registry.referenced(place.uid)}
    assert kept == {found.name for found in store.objects()}


def test_a_cancelled_job_ends_within_five_seconds_and_publishes_nothing(place: Place) -> None:
    job, before = place.submit(LONG), place.objects()
    with worker(place.config):
        until(place.checkpoint(job).exists)
        place.registry.jobs.request_cancel("acme", job.id)
        until(lambda: place.job(job.id).state == "cancelled", 5.0)
        # The heartbeat has recorded it; the work itself stops at its next look.
        until(lambda: not list((place.folder / "scratch").iterdir()), 5.0)
        until(lambda: place.objects() == before, 5.0)
    assert [version.number for version in place.registry.versions(place.uid)] == [1]


def test_a_deleted_adapter_leaves_no_checkpoint_behind(place: Place) -> None:
    job = place.submit(LONG)
    # As of an attempt that was killed while it wrote one.
    partial = place.folder / "scratch" / "gone.0a1b2c3d.partial"
    partial.mkdir(parents=True)
    (partial / ".tmpA1b2C3").touch()
    with worker(place.config):
        until(place.checkpoint(job).exists)
        place.registry.delete_adapter("acme", "shades")
        until(lambda: not place.checkpoint(job).exists(), 8.0)
        until(lambda: not partial.exists(), 8.0)


def test_a_worker_that_was_stopped_past_its_lease_publishes_nothing(place: Place) -> None:
    job = place.submit({**CONFIG, "epochs": 4, "full_size_epochs": 4, "patience": 4})
    database = Database(place.config.database, patience=1.0)
    with worker(place.config) as stopped:
        until(place.checkpoint(job).exists)
        until(lambda: stopped_without_the_write_lock(stopped, database))
        with worker(place.config):
            until(lambda: done_and_cleared(place, job))
        check_tuned(place, place.job(job.id), interrupted=True)
        stopped.send_signal(signal.SIGCONT)
        time.sleep(3.0)
        # It may write once more what it was at, and takes it away when it sees that the lease is lost: late,
        # where it gets no core.
        until(lambda: not place.checkpoint(job).exists())
    database.close()
    check_tuned(place, place.job(job.id), interrupted=True)


def stopped_without_the_write_lock(process: subprocess.Popen[str], database: Database) -> bool:
    """Stop the process, or let it go on if it holds the write lock, for which the other worker would wait."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.02)
    try:
        with database.writing():
            return True
    except RegistryUnavailable:
        process.send_signal(signal.SIGCONT)
        return False


def test_a_worker_that_is_told_to_end_leaves_the_job_to_another(place: Place) -> None:
    job = place.submit(LONG)
    with worker(replace(place.config, lease_seconds=300.0)) as process:
        until(place.checkpoint(job).exists)
        # A supervisor of the service may send it to every process: the service decides when its worker ends.
        process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0
    claim = place.registry.jobs.claim(60.0, kinds=KINDS, max_running_per_tenant=1)
    assert claim is not None
    assert (claim.job.id, claim.job.attempt, claim.job.released) == (job.id, 2, 1)


def test_an_outage_of_the_store_costs_no_attempts(place: Place) -> None:
    artifacts, away = place.folder / "artifacts", place.folder / "away"
    job = place.submit({**CONFIG, "epochs": 6, "full_size_epochs": 6, "patience": 6})
    with worker(replace(place.config, lease_seconds=2.0)):
        until(place.checkpoint(job).exists)
        artifacts.rename(away)
        artifacts.touch()
        until(lambda: place.job(job.id).released == MAX_ATTEMPTS)
        assert place.job(job.id).state == "queued"
        artifacts.unlink()
        away.rename(artifacts)
        until(lambda: done_and_cleared(place, job))
    assert place.job(job.id).attempt > MAX_ATTEMPTS
    check_tuned(place, place.job(job.id), interrupted=True)


@contextmanager
def hired(place: Place) -> Iterator[JobRunner]:
    """What a worker does jobs with, in this process."""
    made = JobRunner(place.config, threading.Event())
    yield made
    made.close()


def submit_upload(place: Place, **request: Any) -> tuple[JobRecord, Artifact]:
    """A job with a file that only it needs."""
    (part,) = place.store.publish_all("acme", place.uid, [b"a line"])
    request |= {"config": CONFIG, "upload": upload_request([part])}
    job = place.registry.jobs.submit("acme", "shades", "fine_tune", request, deadline_seconds=600, max_open=3)
    return job, part


def is_stored(place: Place, part: Artifact) -> bool:
    try:
        return place.store.read("acme", place.uid, part) != b""
    except MissingArtifact:
        return False


def heard(listener: Listener) -> list[tuple[object, object]]:
    """The states and error codes that were told."""
    errors = [told["error"] for _, told in listener.told]
    codes = [error["code"] if isinstance(error, dict) else None for error in errors]
    return [(told["state"], code) for (_, told), code in zip(listener.told, codes, strict=True)]


def test_an_attempt_that_was_overtaken_takes_nothing_away(tmp_path: Path, backbone: str) -> None:
    made = make(tmp_path, backbone, [0, 1] * 6)
    job, part = submit_upload(made)
    made.checkpoint(job).parent.mkdir()
    made.checkpoint(job).touch()
    old, new = (made.registry.jobs.claim(0.0, kinds=KINDS, max_running_per_tenant=1) for _ in range(2))
    assert old is not None
    assert new is not None
    made.registry.jobs.settle()
    with hired(made) as runner:
        # Both find too few examples; neither may record it.
        for claim in (old, new):
            runner.run(claim)
            assert made.job(job.id).state == "running"
            assert is_stored(made, part)
            assert made.checkpoint(job).exists()
        newest = made.registry.jobs.claim(60.0, kinds=KINDS, max_running_per_tenant=1)
        assert newest is not None
        runner.run(newest)
    assert made.job(job.id).error_code == "too_few_examples"
    assert not is_stored(made, part)
    assert not made.checkpoint(job).exists()
    made.registry.close()


def test_a_cancelled_job_ends_for_its_tenant_while_its_work_is_busy(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening([]) as listener, hired(place) as runner:
        job, part = submit_upload(place, callback=f"http://127.0.0.1:{listener.server_port}/")

        def cancel() -> None:
            place.registry.jobs.request_cancel("acme", job.id)
            until(lambda: place.job(job.id).state == "cancelled", 5.0)
            assert is_stored(place, part)
            assert not listener.told

        during(training, monkeypatch, cancel)
        claim = place.registry.jobs.claim(60.0, kinds=KINDS, max_running_per_tenant=1)
        assert claim is not None
        runner.run(claim)
        assert not is_stored(place, part)
        until(lambda: bool(listener.told))
        time.sleep(0.5)
        assert heard(listener) == [("cancelled", None)]
    assert [version.number for version in place.registry.versions(place.uid)] == [1]


def test_a_job_that_nobody_can_begin_again_is_cleared_up_and_told_of(place: Place) -> None:
    with listening([]) as listener:
        job, part = submit_upload(place, callback=f"http://127.0.0.1:{listener.server_port}/")
        place.checkpoint(job).parent.mkdir()
        place.checkpoint(job).touch()
        for _ in range(MAX_ATTEMPTS):
            claim = place.registry.jobs.claim(60.0, kinds=KINDS, max_running_per_tenant=1)
            assert claim is not None
            expire(place.registry, claim)
        with worker(place.config):
            until(lambda: bool(listener.told))
        assert heard(listener) == [("failed", "attempts_exhausted")]
    assert not is_stored(place, part)
    assert not place.checkpoint(job).exists()


def on_small_disk(folder: Path, room: int) -> list[str]:
    """A worker's command with a limited disk as its folder. Skips where mounting is not allowed."""
    may = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True)
    if may.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    folder.mkdir(exist_ok=True)
    # In pages, as such a disk counts.
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())
    start = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL]
    return [*start, sys.executable, str(folder), str(used + room)]


def test_a_full_store_fails_the_job_and_leaves_the_old_version_live(place: Place) -> None:
    job = place.submit()
    with worker(place.config, on_small_disk(place.folder / "artifacts", 32 << 10)) as process:
        until(lambda: place.job(job.id).finished_at is not None)
        store = open_store(f"/proc/{process.pid}/root{place.folder / 'artifacts'}")
        assert sum(1 for _ in store.objects()) == place.objects()
    done = place.job(job.id)
    assert (done.state, done.error_code, done.version) == ("failed", "store_full", None)
    assert [version.number for version in place.registry.versions(place.uid)] == [1]
    assert place.registry.adapter("acme", "shades").live == 1


def test_a_full_database_stops_no_worker(tmp_path: Path, backbone: str) -> None:
    made = make(tmp_path / "small", backbone, [0, 1] * 6)
    job = made.submit()
    (made.folder / "more").write_bytes(bytes(4 << 20))
    with worker(made.config, on_small_disk(made.folder, 0)) as process:
        command = Path(f"/proc/{process.pid}/cmdline")
        until(lambda: command.read_bytes().startswith(sys.executable.encode()))
        inside = Path(f"/proc/{process.pid}/root{made.folder}")
        assert shutil.disk_usage(inside).free == 0

        def seen() -> JobRecord:
            # The test reads a copy, because SQLite would resolve the link out of the mount.
            copy = shutil.copyfile(inside / "registry.db", tmp_path / "seen.db")
            registry = Registry(f"sqlite:///{copy}")
            found = registry.jobs.job("acme", job.id)
            registry.close()
            return found

        time.sleep(5.0)
        assert process.poll() is None
        assert seen().state == "queued"
        (inside / "more").unlink()
        until(lambda: seen().finished_at is not None)
        assert seen().error_code == "too_few_examples"
    made.registry.close()


def test_a_full_scratch_folder_costs_the_checkpoints_only(place: Place) -> None:
    job = place.submit()
    with worker(place.config, on_small_disk(place.folder / "scratch", 4 << 10)):
        until(lambda: done_and_cleared(place, job))
    check_tuned(place, place.job(job.id))


def test_a_failure_is_recorded_with_its_reason(tmp_path: Path, backbone: str) -> None:
    made = make(tmp_path, backbone, [0, 1] * 6)
    job = made.submit()
    with worker(made.config):
        until(lambda: made.job(job.id).finished_at is not None)
    failed = made.job(job.id)
    assert (failed.state, failed.error_code) == ("failed", "too_few_examples")
    assert "50 examples" in (failed.error_detail or "")
    made.registry.close()


def test_a_failure_tells_its_tenant_nothing_of_the_inside(place: Place) -> None:
    runner = JobRunner(place.config, threading.Event())
    statement = DBAPIError("INSERT INTO jobs VALUES (?)", ("secret",), Exception("UNIQUE"))
    for error, code in (
        (statement, "internal_error"),
        (CorruptExport("/srv/bentoml/models/lite0 is no complete export"), "corrupt_export"),
    ):
        job = place.submit()
        with place.lease() as lease:
            runner.give_up(lease, error)
        ended = place.job(job.id)
        assert (ended.state, ended.error_code) == ("failed", code)
        assert ended.error_detail == "The worker's log has the cause."
    runner.close()


@pytest.mark.parametrize(
    ("labels", "keep_inputs", "code"),
    [
        ([0] * 60, True, "too_few_examples"),
        ([0] * 57 + [1] * 3, True, "too_few_examples"),
        ([0, 1] * 30, False, "inputs_not_kept"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    tmp_path: Path, backbone: str, labels: list[int], keep_inputs: bool, code: str
) -> None:
    made = make(tmp_path, backbone, labels, keep_inputs=keep_inputs)
    made.submit()
    before = made.objects()
    with made.lease() as lease, pytest.raises((CannotTune, TooFewExamples, InputsNotKept)) as refused:
        made.tuning.run(lease)
    assert getattr(refused.value, "code", None) == code
    assert made.objects() == before
    made.registry.close()


def test_examples_added_meanwhile_do_no_harm(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(training, monkeypatch, lambda: add(place))
    place.submit()
    with place.lease() as lease:
        committed = place.tuning.run(lease)
    assert committed is not None
    assert committed.version is not None
    assert committed.adapter.examples == 76


def test_an_example_removed_meanwhile_takes_the_network_with_it(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_all() -> None:
        add(place, clear_first=True)

    during(training, monkeypatch, replace_all)
    place.submit()
    with place.lease() as lease, pytest.raises(CannotTune) as refused:
        place.tuning.run(lease)
    assert refused.value.code == "examples_removed"
    assert [version.method for version in place.registry.versions(place.uid)] == ["linear_probe"]


@pytest.mark.parametrize(
    ("happens", "why"), [("set_aside", "example_set_aside"), ("roll_back", "rolled_back")]
)
def test_a_network_does_not_go_live_past_what_a_person_decided_meanwhile(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch, happens: str, why: str
) -> None:
    def set_aside() -> None:
        one = place.registry.example(place.uid, "e000")
        write = ExampleWrite(one.id, one.digest, one.target, one.segment, one.row, one.inputs, excluded=True)
        place.change(upserts=(write,))

    def roll_back() -> None:
        version = place.registry.version(place.uid, 1)
        again = NewVersion("linear_probe", version.artifact, version.evidence, {}, 3)
        place.change(version=again, promote=True)
        place.registry.promote(place.uid, 1)

    during(training, monkeypatch, {"set_aside": set_aside, "roll_back": roll_back}[happens])
    read = place.registry.adapter("acme", "shades").revision
    request = {"config": CONFIG, "promote": "always"}
    place.registry.jobs.submit("acme", "shades", "fine_tune", request, deadline_seconds=600, max_open=3)
    with place.lease() as lease:
        committed = place.tuning.run(lease)
    assert committed is not None
    assert committed.version is not None
    assert committed.version.method == "fine_tune"
    assert committed.version.revision == read
    assert (committed.version.report["promotion"]["reason"], committed.adapter.live) == (why, 1)
    # It has learned from the example, whenever that was set aside.
    assert place.registry.versions_without(place.uid, ["e000"]) == []


def test_an_adapter_deleted_meanwhile_takes_the_job_with_it(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(training, monkeypatch, lambda: place.registry.delete_adapter("acme", "shades"))
    place.submit()
    with place.lease() as lease, pytest.raises(DomainError):
        place.tuning.run(lease)
    assert place.registry.adapters("acme") == []


def test_a_cancel_before_the_commit_publishes_nothing(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, before = place.submit(), place.objects()

    def cancel() -> None:
        place.registry.jobs.request_cancel("acme", job.id)
        time.sleep(2.5)

    during(training, monkeypatch, cancel)
    with place.lease() as lease, pytest.raises(Cancelled):
        place.tuning.run(lease)
    assert place.objects() == before


def add(place: Place, **values: Any) -> None:
    """One example more, committed as another request would."""
    rows = np.ones((1, 1), np.float32)
    segment, inputs = place.store.publish_all(
        "acme", place.uid, [encode_embeddings(rows, "f"), encode_inputs([b"x"])]
    )
    place.change(upserts=(ExampleWrite("more", "f" * 64, "red", segment, 0, inputs),), **values)


def during(training: Training, monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    """Lets something happen once training has ended and before its result is recorded.

    The place's examples are not trained on again: the result is that of `training`.
    """

    def finish_then(*arguments: Any) -> TunedVersion:
        happens()
        return training.version

    monkeypatch.setattr("adapters.jobs.fine_tune.fine_tune", lambda *_, **__: training.outcome)
    monkeypatch.setattr("adapters.jobs.fine_tune.finish", finish_then)


SAVING = """
import sys
from pathlib import Path
import torch
from adapters.finetune.checkpoint import save_checkpoint
from adapters.finetune.model import Score
from adapters.finetune.full_phase import Checkpoint

tensors = {"weight": torch.zeros(16 << 20)}
while True:
    save_checkpoint(Path(sys.argv[1]), Checkpoint(tensors, 1, 0, 1, Score(1.0, 0.5), Score(1.0, 0.5)), "old")
"""


def test_an_attempt_that_is_stopped_while_it_writes_has_no_hold_on_a_newer_checkpoint(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, "a" * 32)
    score = Score(0.5, 0.75)
    with subprocess.Popen([sys.executable, "-c", SAVING, str(path)], cwd=ROOT) as old:
        try:
            until(lambda: stopped_while_writing(old.pid, tmp_path))
            save_checkpoint(path, Checkpoint({"weight": torch.ones(8)}, 2, 0, 2, score, score), "new")
            assert path.stat().st_ino not in opened(old.pid)
        finally:
            old.kill()
    # The worker can find all files of the killed attempt, and delete them when the job has ended.
    assert set(tmp_path.iterdir()) == set(checkpoints(tmp_path)) != {path}
    found = load_checkpoint(path, "new")
    assert found is not None
    assert found.tensors["weight"].tolist() == [1.0] * 8


def opened(pid: int) -> set[int]:
    """The files that a process has open, by inode."""
    return {os.stat(link).st_ino for link in Path(f"/proc/{pid}/fd").iterdir()}


def stopped_while_writing(pid: int, folder: Path) -> bool:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.02)
    writing = {path.stat().st_ino for path in folder.glob("*.partial/*")} & opened(pid)
    if not writing:
        os.kill(pid, signal.SIGCONT)
    return bool(writing)


NICED = """
import asyncio, os, sys, threading
from pathlib import Path
from tests.support.adapters.adapter_stack import world

def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

async def main():
    async with world(Path(sys.argv[1])) as one:
        await one.batchers["tiny-text"].embed(["ba be"], bulk=True)
        print(niceness(), await one.repository.aside("acme", niceness))

asyncio.run(main())
"""


def test_a_process_that_is_niced_already_does_bulk_work_without_privileges(tmp_path: Path) -> None:
    plain = [] if os.geteuid() else ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice"]
    command = [*plain, "nice", "-n", "15", sys.executable, "-c", NICED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1


def test_a_worker_of_its_own_gives_way_in_all_threads_but_one_and_exports_what_it_lacks(
    place: Place, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    lines = [
        json.dumps(
            {"id": f"b{row}", "image": base64.b64encode(picture(row % 3, rng)).decode(), "label": label}
        )
        for row, label in enumerate(NAMES * 2)
    ]
    parts = place.store.publish_all("acme", place.uid, ["\n".join(lines).encode()])
    request = {
        "form": "ndjson",
        "upload": upload_request(parts),
        "update": "append",
        "promote": "always",
        "fit": True,
    }
    job = place.registry.jobs.submit(
        "acme", "shades", "bulk_adapt", request, deadline_seconds=600, max_open=3
    )
    own = {
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "HF_HUB_OFFLINE": "1",
        "TOPWORK_DATABASE_URL": place.config.database,
        "TOPWORK_HOME": str(place.folder),
        "TOPWORK_LEASE_SECONDS": "300",
    }
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name} | own
    command = [str(Path(sys.executable).with_name("topwork")), "worker"]
    with subprocess.Popen(command, env=environment) as process:
        try:
            until(lambda: place.job(job.id).started_at is not None)
            running = place.job(job.id)
            assert running.started_at is not None
            assert running.lease_until is not None
            assert (running.lease_until - running.started_at).total_seconds() > 290
            nices = Counter(
                os.getpriority(os.PRIO_PROCESS, int(task.name))
                for task in Path(f"/proc/{process.pid}/task").iterdir()
            )
            usual = os.getpriority(os.PRIO_PROCESS, 0)
            assert nices.keys() == {usual, min(19, usual + NICENESS)}
            # The one that commits: others wait for the lock that it holds.
            assert nices[usual] == 1
            until(lambda: place.job(job.id).finished_at is not None)
        finally:
            process.terminate()
    assert process.returncode == 0
    done = place.job(job.id)
    assert (done.state, done.error_detail, done.version) == ("succeeded", None, 2)
    assert place.registry.adapter("acme", "shades").examples == 81


def test_the_store_is_swept_while_the_service_runs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SWEEP_INTERVAL", 0.1)
    monkeypatch.setattr(background, "SWEPT_AGE", -1.0)
    closing = threading.Event()
    arguments = (place.registry, place.store, closing)
    sweeping = threading.Thread(target=background.sweep_artifacts, args=arguments)
    sweeping.start()
    time.sleep(0.5)
    before = place.objects()
    (orphan,) = place.store.publish_all("acme", place.uid, [b"nobody's"])
    (file,) = (place.folder / "artifacts").rglob(orphan.name)
    os.utime(file, (0, 0))
    until(lambda: not file.exists(), 10.0)
    closing.set()
    sweeping.join(10.0)
    assert not sweeping.is_alive()
    assert place.objects() == before


def test_training_gives_way_and_what_surrounds_it_does_not(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[int] = []
    during(training, monkeypatch, lambda: policies.append(os.sched_getscheduler(0)))
    place.submit()
    with place.lease() as lease:
        place.tuning.run(lease)
        beating = next(thread for thread in threading.enumerate() if thread.name == "lease")
        assert beating.native_id is not None
        assert os.sched_getscheduler(beating.native_id) == os.SCHED_OTHER
    assert policies == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_fine_tune_that_is_no_better_leaves_the_head_live(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the head has learned of an example meanwhile."""

    def learn_more() -> None:
        before = place.registry.version(place.uid, 1)
        assert before.evidence is not None
        known = decode_evidence(place.store.read("acme", place.uid, before.evidence))
        better = Evidence(
            (*known.ids, "more"), (*known.digests, "f" * 64), (*known.targets, "red"), np.ones(76, np.float32)
        )
        add(place)
        head, evidence = place.store.publish_all("acme", place.uid, [b"head", encode_evidence(better)])
        version = NewVersion("linear_probe", head, evidence, {}, 3)
        place.change(version=version, promote=True)

    during(training, monkeypatch, learn_more)
    place.submit()
    with place.lease() as lease:
        committed = place.tuning.run(lease)
    assert committed is not None
    assert committed.version is not None
    assert committed.version.report["promotion"]["reason"] == "not_better"
    assert committed.adapter.live == 2


def test_a_fine_tune_keeps_groups_together_and_measures_on_what_is_sampled(place: Place) -> None:
    groups = {one.id: f"g{row // 5}" for row, one in enumerate(place.registry.all_examples(place.uid)[1])}
    learned = {name for row, name in enumerate(groups) if row % 7 == 0}
    _write_groups(place, groups, learned)
    request = {"config": CONFIG, "answer_accuracy": 0.6, "weights": "balanced"}
    place.registry.jobs.submit("acme", "shades", "fine_tune", request, deadline_seconds=600, max_open=3)
    with place.lease() as lease:
        committed = place.tuning.run(lease)
    assert committed is not None
    assert (committed.adapter.answer_accuracy, committed.adapter.weights) == (0.6, "balanced")
    assert committed.version is not None
    assert committed.version.evidence is not None
    evidence = decode_evidence(place.store.read("acme", place.uid, committed.version.evidence))
    measured = {name for name, score in zip(evidence.ids, evidence.scores, strict=True) if score == score}
    assert measured
    assert not measured & learned
    held_out = {groups[name] for name in measured}
    assert {name for name in groups if groups[name] in held_out} - learned == measured


def test_what_is_not_measured_on_is_too_little_to_tune_on(place: Place) -> None:
    names = [one.id for one in place.registry.all_examples(place.uid)[1]]
    _write_groups(place, dict.fromkeys(names), set(names[:30]))
    place.submit()
    with place.lease() as lease, pytest.raises(TooFewExamples):
        place.tuning.run(lease)


def _write_groups(place: Place, groups: Mapping[str, str | None], learned: Container[str]) -> None:
    """Give the examples these groups; those learned are not measured on."""
    place.change(
        upserts=tuple(
            ExampleWrite(
                one.id,
                one.digest,
                one.target,
                one.segment,
                one.row,
                one.inputs,
                groups[one.id],
                one.id not in learned,
            )
            for one in place.registry.all_examples(place.uid)[1]
        )
    )


def find_nothing(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = replace(training.outcome, measured=replace(training.outcome.measured, mix=0.0))
    monkeypatch.setattr("adapters.jobs.fine_tune.fine_tune", lambda *_, **__: nothing)


def test_a_fine_tune_that_finds_nothing_makes_no_version(
    place: Place, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No version is made: its network would be a copy of the backbone."""
    find_nothing(training, monkeypatch)
    before, job = place.objects(), place.submit()
    with place.lease() as lease:
        assert place.tuning.run(lease) is None
    ended = place.job(job.id)
    assert (ended.state, ended.version) == ("succeeded", None)
    assert ended.progress == {"share": 1.0, "seconds_left": 0.0, "outcome": "no_better"}
    assert place.objects() == before
    assert [version.number for version in place.registry.versions(place.uid)] == [1]
    assert not place.checkpoint(job).exists()


def test_a_fine_tune_that_finds_nothing_makes_a_head_where_nothing_is_live(
    tmp_path: Path, backbone: str, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_nothing(training, monkeypatch)
    place = make(tmp_path, backbone, [row % 3 for row in range(75)], fitted=False)
    job = place.submit()
    with place.lease() as lease:
        committed = place.tuning.run(lease)
    assert committed is not None
    assert committed.version is not None
    assert (committed.version.number, committed.version.method) == (1, "linear_probe")
    assert (committed.version.network, committed.adapter.live) == (None, 1)
    assert committed.version.report["method"] == "10-fold out-of-fold"
    assert place.job(job.id).state == "succeeded"
    place.registry.close()
