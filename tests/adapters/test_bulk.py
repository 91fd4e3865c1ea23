"""Bulk jobs whose attempts end early: what is stored stays, nothing happens twice, the dead write no more."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters import bulk
from adapters.bulk import Bulk
from adapters.jobs import upload_request
from adapters.lease import Cancelled, Lease, ShuttingDown
from adapters.records import Change, Claim, Creation, JobKind, JobRecord, LeaseLost
from adapters.registry import Registry, new_uid
from adapters.revising import AdapterLimits
from adapters.store import Store, open_store, sweep
from adapters.uploads import UploadLimits
from benchmarks.serving import Serving
from models.backbone import Backbone
from models.exported import find

KINDS: tuple[JobKind, ...] = ("bulk_adapt",)
EXAMPLES = 50
PART = 20


@dataclass(frozen=True, slots=True)
class Place:
    """A database and a store with an adapter without examples, and a queued upload of some."""

    registry: Registry
    store: Store
    uid: str
    job: JobRecord

    @contextmanager
    def lease(self, seconds: float = 60.0) -> Iterator[Lease]:
        claim = self.registry.jobs.claim(seconds, kinds=KINDS, max_running_per_tenant=1)
        assert claim is not None
        with Lease(self.registry.jobs, claim, seconds, threading.Event()) as lease:
            yield lease

    def now(self) -> JobRecord:
        return self.registry.jobs.job("acme", self.job.id)

    def segments(self) -> dict[str, str]:
        """By example: the file of its embedding."""
        return {one.id: one.segment.name for one in self.registry.all_examples(self.uid)[1]}

    def run(self, lease: Lease) -> None:
        Bulk(
            self.registry,
            self.store,
            device="cpu",
            threads=1,
            uploads=UploadLimits(),
            limits=AdapterLimits(),
        ).run(lease)


@pytest.fixture
def place(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(bulk, "_EXAMPLES", PART)
    export = find("minilm-l6-v2")
    assert export is not None, "the running service has exported it"
    backbone = Backbone.open(export)
    registry, store = (
        Registry(f"sqlite:///{tmp_path / 'registry.db'}"),
        open_store(str(tmp_path / "artifacts")),
    )
    registry.migrate()
    uid = new_uid()
    terms = Creation("minilm-l6-v2", backbone.spec.fingerprint, "text", "classification", True)
    backbone.close()
    registry.commit(Change("acme", "notes", uid, 0, create=terms))
    lines = [
        json.dumps(
            {
                "id": f"n{row:02}",
                "text": f"{'rain' if row % 2 else 'sun'} on day {row}",
                "label": str(row % 2),
            }
        )
        for row in range(EXAMPLES)
    ]
    content = "\n".join(lines).encode()
    parts = store.publish_all("acme", uid, [content[:1_000], content[1_000:]])
    request = {
        "form": "ndjson",
        "upload": upload_request(parts),
        "update": "append",
        "promote": "if_better",
        "fit": True,
    }
    job = registry.jobs.submit("acme", "notes", "bulk_adapt", request, deadline_seconds=600, max_open=3)
    yield Place(registry, store, uid, job)
    registry.close()


def stop_after_a_part(monkeypatch: pytest.MonkeyPatch, lease: Lease, why: Exception) -> None:
    report = lease.report

    def reporting(share: float, progress: Mapping[str, Any]) -> None:
        report(share, progress)
        monkeypatch.setattr(lease, "check", raising)

    def raising() -> None:
        raise why

    monkeypatch.setattr(lease, "report", reporting)
    monkeypatch.setattr(bulk, "_CHECK_SECONDS", 0.0)


def test_another_attempt_goes_on_where_one_was_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.lease() as lease, monkeypatch.context() as patch:
        stop_after_a_part(patch, lease, ShuttingDown())
        with pytest.raises(ShuttingDown):
            place.run(lease)
        place.registry.jobs.release(lease.claim)
    first = place.segments()
    assert sorted(first) == [f"n{row:02}" for row in range(PART)]
    with place.lease() as lease:
        place.run(lease)
    done = place.now()
    assert (done.state, done.attempt, done.version) == ("succeeded", 2, 1)
    assert done.progress is not None
    assert (done.progress["stored"], done.progress["rejected"]) == (EXAMPLES, 0)
    after = place.segments()
    assert len(after) == EXAMPLES
    # Not embedded again: what the first attempt stored lies where it lay.
    assert {example: after[example] for example in first} == first
    assert [version.number for version in place.registry.versions(place.uid)] == [1]


def test_what_was_stored_stays_when_a_job_is_cancelled(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.lease() as lease:
        stop_after_a_part(monkeypatch, lease, Cancelled())
        with pytest.raises(Cancelled):
            place.run(lease)
        place.registry.jobs.cancelled(lease.claim)
    assert len(place.segments()) == PART
    assert place.registry.versions(place.uid) == []


def test_an_attempt_that_was_overtaken_stores_nothing(place: Place) -> None:
    with place.lease() as lease:
        place.registry.jobs.release(lease.claim)
        newer = place.registry.jobs.claim(60.0, kinds=KINDS, max_running_per_tenant=1)
        assert isinstance(newer, Claim)
        with pytest.raises(LeaseLost):
            place.run(lease)
    assert place.segments() == {}
    assert place.now().state == "running"


def test_an_upload_is_swept_only_once_its_job_has_ended(place: Place) -> None:
    assert sweep(place.store, place.registry.referenced, older_than=-1.0) == 0
    place.registry.jobs.request_cancel("acme", place.job.id)
    assert sweep(place.store, place.registry.referenced, older_than=-1.0) == 2
