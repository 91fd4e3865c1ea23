"""Fine-tune jobs on a real network, by the worker and in this process: done, refused, killed, cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.curating import InputsNotKept
from adapters.head import Head
from adapters.lease import Cancelled, Lease, checkpoint_path
from adapters.linear_probe import Dataset, fit
from adapters.records import (
    Change,
    Committed,
    Creation,
    ExampleWrite,
    JobKind,
    JobRecord,
    LeaseLost,
    NewVersion,
)
from adapters.registry import Registry, new_uid
from adapters.samples import samples_of
from adapters.second_phase import FineTuneConfig
from adapters.segments import Evidence, decode_evidence, encode_embeddings, encode_evidence, encode_inputs
from adapters.store import Store, open_store
from adapters.submitting import CannotTune
from adapters.supervising import WorkerConfig
from adapters.tuned import finish
from adapters.tuning import Tuning
from models.network import load_network
from tests.adapters.test_fine_tune import NAMES, picture

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "adapters.worker"]
# The worker with a small disk in place of a folder, which holds what the folder held.
SMALL = """
mkdir "$1.small" && mount -t tmpfs -o size="$2" tmpfs "$1.small" && cp -a "$1/." "$1.small" &&
mount --bind "$1.small" "$1" && exec "$0" -m adapters.worker
"""
KINDS: tuple[JobKind, ...] = ("fine_tune",)
CONFIG = asdict(FineTuneConfig(epochs=2, full_size_epochs=1, pixels=32, batch=16))
LONG = {**CONFIG, "epochs": 200, "full_size_epochs": 0, "patience": 200}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("networks")
    command = [sys.executable, "-m", "tests.models.random_models", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return f"timm:{folder / 'image'}"


@dataclass(frozen=True, slots=True)
class Place:
    """A database and a store with one adapter, "shades"."""

    folder: Path
    registry: Registry
    store: Store
    uid: str

    @property
    def config(self) -> WorkerConfig:
        return WorkerConfig(
            f"sqlite:///{self.folder / 'registry.db'}",
            str(self.folder / "artifacts"),
            str(self.folder / "scratch"),
            lease_seconds=8.0,
            poll_seconds=0.1,
        )

    @property
    def tuning(self) -> Tuning:
        return Tuning(self.registry, self.store, self.folder / "scratch")

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


def make(folder: Path, backbone: str, labels: list[int], *, keep_inputs: bool = True) -> Place:
    """An adapter as /adapt leaves it: examples with embeddings and inputs, and a live linear probe."""
    registry, store = Registry(f"sqlite:///{folder / 'registry.db'}"), open_store(str(folder / "artifacts"))
    registry.migrate()
    network = load_network(backbone)
    rng = np.random.default_rng(4)
    pictures: list[bytes | str] = [picture(label, rng) for label in labels]
    with torch.inference_mode():
        rows = network.forward(*samples_of(network.spec, pictures).plain(range(len(labels)))).numpy()
    uid = new_uid()
    segment, inputs = store.publish_all(
        "acme", uid, [encode_embeddings(rows, network.spec.fingerprint), encode_inputs(pictures)]
    )
    ids = [f"e{row:03}" for row in range(len(labels))]
    digests = [f"{row:064x}" for row in range(len(labels))]
    targets = [NAMES[label] for label in labels]
    version = None
    if len(set(labels)) > 1:
        fitted = fit(Dataset(rows.copy(), targets, digests, "classification", network.spec.fingerprint))
        evidence = Evidence(tuple(ids), tuple(digests), tuple(targets), fitted.scores)
        head, kept = store.publish_all("acme", uid, [fitted.head.to_bytes(), encode_evidence(evidence)])
        version = NewVersion("linear_probe", head, kept, fitted.report, len(fitted.head.labels))
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


@pytest.fixture
def place(tmp_path: Path, backbone: str) -> Iterator[Place]:
    made = make(tmp_path, backbone, [row % 3 for row in range(75)])
    yield made
    made.registry.close()


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


def until(what: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def check_tuned(place: Place, job: JobRecord) -> None:
    """The job's version is there as a whole, and no other."""
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
        until(lambda: place.job(job.id).finished_at is not None)
        check_tuned(place, place.job(job.id))
        assert place.job(job.id).progress == {**(place.job(job.id).progress or {}), "phase": 2}
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_killed_workers_job_goes_on_where_it_was(place: Place) -> None:
    job = place.submit({**CONFIG, "epochs": 6, "patience": 6})
    with worker(place.config) as process:
        until(place.checkpoint(job).exists)
        process.kill()
    assert place.job(job.id).state == "running"
    with worker(place.config):
        until(lambda: place.job(job.id).finished_at is not None)
    done = place.job(job.id)
    assert done.attempt == 2
    check_tuned(place, done)


def test_a_cancelled_job_ends_within_five_seconds_and_publishes_nothing(place: Place) -> None:
    job, before = place.submit(LONG), place.objects()
    with worker(place.config):
        until(place.checkpoint(job).exists)
        place.registry.jobs.request_cancel("acme", job.id)
        until(lambda: place.job(job.id).state == "cancelled", 5.0)
    assert place.objects() == before
    assert [version.number for version in place.registry.versions(place.uid)] == [1]
    assert not list((place.folder / "scratch").glob("*.safetensors"))


def test_a_deleted_adapter_leaves_no_checkpoint_behind(place: Place) -> None:
    job = place.submit(LONG)
    # As of an attempt that was killed while it wrote one.
    partial = place.folder / "scratch" / "gone.partial"
    partial.parent.mkdir()
    partial.touch()
    with worker(place.config):
        until(place.checkpoint(job).exists)
        place.registry.delete_adapter("acme", "shades")
        until(lambda: not place.checkpoint(job).exists(), 8.0)
        until(lambda: not partial.exists(), 8.0)


def test_a_worker_that_was_stopped_past_its_lease_publishes_nothing(place: Place) -> None:
    job = place.submit({**CONFIG, "epochs": 4, "patience": 4})
    with worker(place.config) as stopped:
        until(place.checkpoint(job).exists)
        stopped.send_signal(signal.SIGSTOP)
        with worker(place.config):
            until(lambda: place.job(job.id).finished_at is not None)
        check_tuned(place, place.job(job.id))
        stopped.send_signal(signal.SIGCONT)
        time.sleep(3.0)
    check_tuned(place, place.job(job.id))


def test_a_worker_that_is_told_to_end_leaves_the_job_to_another(place: Place) -> None:
    job = place.submit(LONG)
    with worker(replace(place.config, lease_seconds=300.0)) as process:
        until(place.checkpoint(job).exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    claim = place.registry.jobs.claim(60.0, kinds=KINDS, max_running_per_tenant=1)
    assert claim is not None
    assert (claim.job.id, claim.job.attempt) == (job.id, 2)


def on_small_disk(folder: Path, room: int) -> list[str]:
    """A worker's command with so many bytes left in the folder. Skips where nobody may mount."""
    may = subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True)
    if may.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    folder.mkdir(exist_ok=True)
    # In pages, as such a disk counts.
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))
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


def test_a_full_scratch_folder_costs_the_checkpoints_only(place: Place) -> None:
    job = place.submit()
    with worker(place.config, on_small_disk(place.folder / "scratch", 4 << 10)):
        until(lambda: place.job(job.id).finished_at is not None)
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
    with made.lease() as lease, pytest.raises((CannotTune, InputsNotKept)) as refused:
        made.tuning.run(lease)
    assert getattr(refused.value, "code", None) == code
    assert made.objects() == before
    made.registry.close()


def test_examples_added_meanwhile_do_no_harm(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    during(place, monkeypatch, lambda: add(place))
    place.submit()
    with place.lease() as lease:
        committed = place.tuning.run(lease)
    assert committed.version is not None
    assert committed.adapter.examples == 76


def test_an_example_removed_meanwhile_takes_the_network_with_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_all() -> None:
        add(place, clear_first=True)

    during(place, monkeypatch, replace_all)
    place.submit()
    with place.lease() as lease, pytest.raises(CannotTune) as refused:
        place.tuning.run(lease)
    assert refused.value.code == "examples_removed"
    assert [version.method for version in place.registry.versions(place.uid)] == ["linear_probe"]


def test_an_adapter_deleted_meanwhile_takes_the_job_with_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    during(place, monkeypatch, lambda: place.registry.delete_adapter("acme", "shades"))
    place.submit()
    with place.lease() as lease, pytest.raises((LeaseLost, LookupError, RuntimeError)):
        place.tuning.run(lease)
    assert place.registry.adapters("acme") == []


def test_a_cancel_before_the_commit_publishes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job, before = place.submit(), place.objects()

    def cancel() -> None:
        place.registry.jobs.request_cancel("acme", job.id)
        time.sleep(2.5)

    during(place, monkeypatch, cancel)
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


def during(place: Place, monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    """Lets something happen once training has ended and before its result is recorded."""

    def finish_then(*arguments: Any) -> Any:
        made = finish(*arguments)
        happens()
        return made

    monkeypatch.setattr("adapters.tuning.finish", finish_then)
