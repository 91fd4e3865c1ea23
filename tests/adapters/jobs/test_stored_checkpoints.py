"""Checkpoints in the store: replaced, fenced by the lease, read by another host, and gone with their job."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.finetune.checkpoint import save_checkpoint
from adapters.finetune.full_phase import Checkpoint
from adapters.finetune.model import Score
from adapters.jobs.fine_tune import FineTuneJob
from adapters.jobs.lease import checkpoint_path
from adapters.jobs.runner import JobRunner
from adapters.jobs.stored_checkpoints import CheckpointUploader, delete_spent, fetch_checkpoint
from adapters.registry.records import Claim, JobRecord
from adapters.registry.registry import Registry
from adapters.storage.artifact import Artifact, Store
from adapters.storage.open import open_store
from adapters.storage.sweeper import Swept, sweep
from service.settings import Settings
from tests.support.adapters.job_records import begin, expire, now_of, submit
from tests.support.adapters.records import create
from tests.support.conditions import until


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "artifacts"))
    return open_store(request.getfixturevalue("s3_url"), request.getfixturevalue("s3_options"))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry with a queued fine-tune."""
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    registry.migrate()
    create(registry)
    submit(registry)
    yield registry
    registry.close()


def upload(registry: Registry, store: Store, claim: Claim, path: Path, data: bytes) -> Artifact | None:
    """Write an epoch's checkpoint; return what the job has in the store once it is uploaded."""
    before = now_of(registry, claim.job).checkpoint
    path.write_bytes(data)
    with CheckpointUploader(registry.jobs, store, claim, path, rest=0.0) as uploader:
        uploader.written()
        until(lambda: now_of(registry, claim.job).checkpoint != before)
    return now_of(registry, claim.job).checkpoint


def names(store: Store) -> set[str]:
    return {found.name for found in store.objects()}


def test_the_newest_checkpoint_of_a_job_replaces_the_one_before(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    claim, path = begin(registry), tmp_path / "checkpoint"
    for data in (b"first epoch", b"second epoch"):
        kept = upload(registry, store, claim, path, data)
        assert kept is not None
        assert names(store) == {kept.name}
        other = tmp_path / "another host's"
        assert fetch_checkpoint(store, now_of(registry, claim.job), other)
        assert other.read_bytes() == data


def test_another_host_goes_on_from_whichever_checkpoint_is_further_on(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    def checkpoint(epoch: int) -> Checkpoint:
        score = Score(0.5, 0.75)
        return Checkpoint({"weight": torch.full((8,), float(epoch))}, epoch, 0, epoch, score, score)

    claim = begin(registry)
    path = tmp_path / "one host's"
    assert save_checkpoint(path, checkpoint(3), "this work")
    upload(registry, store, claim, path, path.read_bytes())
    job, scratch = now_of(registry, claim.job), tmp_path / "another host's"
    tuning, own = FineTuneJob(registry, store, scratch), checkpoint_path(scratch, job.id)
    assert tuning._resume(job, own, "other work") is None
    for epoch, expected in ((None, 3), (2, 3), (5, 5)):
        if epoch is not None:
            assert save_checkpoint(own, checkpoint(epoch), "this work")
        found = tuning._resume(job, own, "this work")
        assert found is not None
        assert found.epoch == expected
        assert found.tensors["weight"].tolist() == [float(expected)] * 8
    assert list(scratch.iterdir()) == [own]


def test_epochs_during_an_upload_are_uploaded_as_one(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    claim, path = begin(registry), tmp_path / "checkpoint"
    with CheckpointUploader(registry.jobs, store, claim, path, rest=0.0) as uploader:
        for epoch in range(200):
            path.write_bytes(b"epoch %d" % epoch)
            uploader.written()
        until(lambda: read(registry, store, claim.job) == b"epoch 199")
    # Each upload has a nonce of its own, and only the last is left.
    assert len(names(store)) == 1


def read(registry: Registry, store: Store, job: JobRecord) -> bytes | None:
    kept = now_of(registry, job).checkpoint
    return None if kept is None else store.read(job.tenant, job.adapter_uid, kept)


def test_an_old_attempt_that_wakes_up_does_not_replace_the_newer_ones(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    old, path = begin(registry), tmp_path / "old"
    upload(registry, store, old, path, b"old attempt")
    expire(registry, old)
    new = begin(registry)
    assert new.job.checkpoint is not None
    kept = upload(registry, store, new, tmp_path / "new", b"new attempt")
    assert kept is not None
    path.write_bytes(b"the old attempt's next epoch")
    with CheckpointUploader(registry.jobs, store, old, path, rest=0.0) as uploader:
        uploader.written()
        until(lambda: not uploader._thread.is_alive())
    assert now_of(registry, new.job).checkpoint == kept
    assert names(store) == {kept.name}


def test_a_failed_upload_is_logged_and_a_later_one_is_kept(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "artifacts"
    store, claim, path = open_store(str(root)), begin(registry), tmp_path / "checkpoint"
    # Where the tenant's folder would be there is a file.
    (root / "acme").touch()
    path.write_bytes(b"an epoch")
    with CheckpointUploader(registry.jobs, store, claim, path, rest=0.0) as uploader:
        uploader.written()
        until(lambda: "is not in the store" in caplog.text)
        (root / "acme").unlink()
        uploader.written()
        until(lambda: now_of(registry, claim.job).checkpoint is not None)


def test_a_checkpoint_that_is_missing_or_damaged_is_not_used(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    claim, path = begin(registry), tmp_path / "checkpoint"
    kept = upload(registry, store, claim, path, b"an epoch")
    assert kept is not None
    job = now_of(registry, claim.job)
    damaged = replace(job, checkpoint=replace(kept, length=3))
    assert not fetch_checkpoint(store, damaged, path)
    store.delete(job.tenant, job.adapter_uid, [kept])
    assert not fetch_checkpoint(store, job, path)
    assert not fetch_checkpoint(store, replace(job, checkpoint=None), path)


def test_a_sweep_leaves_the_checkpoint_of_an_open_job(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    claim = begin(registry)
    kept = upload(registry, store, claim, tmp_path / "checkpoint", b"an epoch")
    assert kept is not None
    assert sweep(store, registry, older_than=-60.0) == Swept()
    registry.jobs.release(claim)
    assert sweep(store, registry, older_than=-60.0) == Swept()
    assert names(store) == {kept.name}


@pytest.mark.parametrize("how", ["fail", "cancelled", "succeed", "cancelled while queued", "lost"])
def test_a_job_that_ends_leaves_no_checkpoint(
    registry: Registry, store: Store, tmp_path: Path, how: str
) -> None:
    claim = begin(registry)
    upload(registry, store, claim, tmp_path / "checkpoint", b"an epoch")
    delete_spent(registry.jobs, store)
    assert len(names(store)) == 1
    if how == "fail":
        registry.jobs.fail(claim, "diverged", "It did.")
    elif how == "cancelled":
        registry.jobs.cancelled(claim)
    elif how == "succeed":
        registry.jobs.succeed(claim)
    elif how == "cancelled while queued":
        registry.jobs.release(claim)
        registry.jobs.request_cancel("acme", claim.job.id)
    else:
        registry.jobs.request_cancel("acme", claim.job.id)
        expire(registry, claim)
        assert [job.state for job in registry.jobs.settle()] == ["cancelled"]
    delete_spent(registry.jobs, store)
    assert names(store) == set()
    assert now_of(registry, claim.job).checkpoint is None


def test_an_idle_worker_deletes_the_checkpoints_of_ended_jobs(registry: Registry, tmp_path: Path) -> None:
    """Whoever ended them: here the tenant, while no attempt was under way."""
    settings = Settings(
        home=tmp_path,
        database_url=f"sqlite:///{tmp_path / 'registry.db'}",
        store_url=str(tmp_path / "artifacts"),
    )
    store = open_store(str(tmp_path / "artifacts"))
    claim = begin(registry)
    upload(registry, store, claim, tmp_path / "checkpoint", b"an epoch")
    registry.jobs.release(claim)
    registry.jobs.request_cancel("acme", claim.job.id)
    runner = JobRunner(settings.worker, threading.Event())
    runner.tidy()
    runner.close()
    assert names(store) == set()


def test_an_erased_adapter_takes_its_checkpoint_with_it(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    claim, path = begin(registry), tmp_path / "checkpoint"
    upload(registry, store, claim, path, b"an epoch")
    uid = claim.job.adapter_uid
    registry.delete_adapter("acme", "pets")
    store.delete_adapter("acme", uid)
    assert names(store) == set()
    # The attempt has not heard of it yet.
    with CheckpointUploader(registry.jobs, store, claim, path, rest=0.0) as uploader:
        uploader.written()
        until(lambda: not uploader._thread.is_alive())
    assert names(store) == set()
