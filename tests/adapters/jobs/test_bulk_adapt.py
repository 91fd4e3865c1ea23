"""Bulk jobs: what is stored stays when they end early, nothing happens twice, a replacement is one step."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.adaptation.commands import AdaptCommand, AdapterFull, AdapterLimits
from adapters.examples.upload import UploadLimits
from adapters.examples.upload_forms import Form
from adapters.jobs import bulk_attempt
from adapters.jobs.bulk_adapt import BulkAdaptJob
from adapters.jobs.lease import Cancelled, Lease, ShuttingDown
from adapters.jobs.submission import JobSubmitter
from adapters.registry.errors import LeaseLost, TooManyJobs
from adapters.registry.idempotency import PendingReply
from adapters.registry.jobs import upload_request
from adapters.registry.records import Change, Claim, Committed, Creation, ExampleWrite, JobKind, JobRecord
from adapters.registry.registry import Registry, new_uid
from adapters.storage.artifact import Artifact, Buffer, Store
from adapters.storage.formats import decode_inputs, encode_embeddings, encode_inputs
from adapters.storage.local import LocalStore
from adapters.storage.open import open_store
from adapters.storage.sweeper import Swept, sweep
from benchmarks.harness.service_process import Serving
from models.backbone import Backbone
from models.store.exports import find
from tests.support.adapters.adapter_stack import TENANT, taught, world
from tests.support.conditions import eventually

pytestmark = pytest.mark.anyio

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
        """The file of each example's embedding."""
        return {one.id: one.segment.name for one in self.registry.all_examples(self.uid)[1]}

    def run(self, lease: Lease, limits: AdapterLimits = AdapterLimits()) -> None:
        uploads = UploadLimits()
        BulkAdaptJob(self.registry, self.store, device="cpu", threads=1, uploads=uploads, limits=limits).run(
            lease
        )

    def queue(self, content: bytes, form: Form = "ndjson", update: str = "append", **more: Any) -> JobRecord:
        parts = self.store.publish_all("acme", self.uid, [content[:1_000], content[1_000:]])
        request: dict[str, Any] = {"form": form, "upload": upload_request(parts), "update": update}
        request |= {"promote": "always", "fit": True, **more}
        return self.registry.jobs.submit(
            "acme", "notes", "bulk_adapt", request, deadline_seconds=600, max_open=3
        )

    def do(
        self, job: JobRecord | None = None, limits: AdapterLimits = AdapterLimits()
    ) -> tuple[JobRecord, Mapping[str, Any]]:
        """The job and its progress, once it has succeeded."""
        with self.lease() as lease:
            assert lease.claim.job.id == (job or self.job).id
            self.run(lease, limits)
        done = self.registry.jobs.job("acme", (job or self.job).id)
        assert done.state == "succeeded"
        assert done.progress is not None
        self.store.delete("acme", self.uid, [Artifact(*part) for part in done.request["upload"]])
        return done, done.progress

    def texts(self) -> dict[str, bytes | str]:
        """The input of each example."""
        found: dict[str, bytes | str] = {}
        for one in self.registry.all_examples(self.uid)[1]:
            assert one.inputs is not None
            found[one.id] = decode_inputs(self.store.read("acme", self.uid, one.inputs))[one.row]
        return found


def told(ids: Sequence[str], labels: Sequence[str] = ("0", "1"), about: str = "") -> list[dict[str, str]]:
    """Notes of two labels."""
    return [
        {
            "id": name,
            "text": f"{about}{('sun', 'rain')[place % 2]} on day {place}",
            "label": labels[place % 2],
        }
        for place, name in enumerate(ids)
    ]


def lines(examples: Sequence[Mapping[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, examples)).encode()


NAMES = [f"n{row:02}" for row in range(EXAMPLES)]


@pytest.fixture
def place(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(bulk_attempt, "BATCH_EXAMPLES", PART)
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
    made = Place(registry, store, uid, None)  # type: ignore[arg-type]
    made = replace(made, job=made.queue(lines(told(NAMES))))
    yield made
    registry.close()


def stop_after_a_part(monkeypatch: pytest.MonkeyPatch, lease: Lease, why: Exception) -> None:
    report = lease.report

    def reporting(share: float, progress: Mapping[str, Any]) -> None:
        report(share, progress)
        monkeypatch.setattr(lease, "check", raising)

    def raising() -> None:
        raise why

    monkeypatch.setattr(lease, "report", reporting)
    monkeypatch.setattr(bulk_attempt, "_CHECK_SECONDS", 0.0)


def test_another_attempt_goes_on_where_one_was_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.lease() as lease, monkeypatch.context() as patch:
        stop_after_a_part(patch, lease, ShuttingDown())
        with pytest.raises(ShuttingDown):
            place.run(lease)
        place.registry.jobs.release(lease.claim)
    first = place.segments()
    assert sorted(first) == NAMES[:PART]
    with place.lease() as lease:
        place.run(lease)
    done = place.now()
    assert (done.state, done.attempt, done.version) == ("succeeded", 2, 1)
    assert done.progress is not None
    assert (done.progress["stored"], done.progress["rejected"]) == (EXAMPLES, 0)
    after = place.segments()
    assert len(after) == EXAMPLES
    # Nothing is embedded again: the first attempt's files are still in place.
    assert {example: after[example] for example in first} == first
    assert [version.number for version in place.registry.versions(place.uid)] == [1]


def test_a_job_from_before_a_rollback_gives_way_and_a_later_one_lifts_it(place: Place) -> None:
    place.do()
    place.do(place.queue(lines(told([f"m{row}" for row in range(4)], about="later "))))
    assert place.registry.adapter("acme", "notes").live == 2
    before = place.queue(lines(told([f"o{row}" for row in range(4)], about="before ")))
    held = place.registry.promote(place.uid, 1).adapter
    done, _ = place.do(before)
    assert done.version == 3
    assert place.registry.version(place.uid, 3).report["promotion"]["reason"] == "rolled_back"
    assert place.registry.adapter("acme", "notes").standing == held.standing
    time.sleep(0.01)
    again = lines(told([f"p{row}" for row in range(4)], about="again "))
    done, _ = place.do(place.queue(again, promote="if_better"))
    assert place.registry.version(place.uid, 4).report["promotion"]["reason"] == "rolled_back"
    done, _ = place.do(place.queue(again))
    assert place.registry.adapter("acme", "notes").standing == (5, None)


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
    assert sweep(place.store, place.registry, older_than=-1.0) == Swept()
    place.registry.jobs.request_cancel("acme", place.job.id)
    assert sweep(place.store, place.registry, older_than=-1.0) == Swept(aside=2)


def test_what_is_replaced_counts_for_nothing_while_its_replacement_comes(place: Place) -> None:
    """Neither towards the limits of the adapter, nor as the spelling of a label."""
    old = place.queue(lines(told(NAMES, ["\ufb01ne", "bad"])), update="replace")
    limits = AdapterLimits(max_examples=60, max_labels=2)
    place.do()
    place.do(old, limits)
    assert sorted(place.texts()) == NAMES
    fresh = [f"m{row:02}" for row in range(EXAMPLES)]
    new = place.queue(lines(told(fresh, ["fine", "poor"], "Again ")), update="replace")
    done, progress = place.do(new, limits)
    assert (progress["stored"], progress["rejected"], done.version) == (EXAMPLES, 0, 3)
    assert sorted(place.texts()) == fresh
    assert {str(one.target) for one in place.registry.all_examples(place.uid)[1]} == {"fine", "poor"}
    too_many = place.queue(lines(told([f"l{row:02}" for row in range(61)])), update="replace")
    with place.lease() as lease:
        assert lease.claim.job.id == too_many.id
        with pytest.raises(AdapterFull):
            place.run(lease, limits)


def test_rejected_examples_are_reported_even_if_the_adapter_is_full(place: Place) -> None:
    place.do()
    content = [{"id": "m00", "text": "Without a label"}, *told(["m01"], about="Again ")]
    job = place.queue(lines(content))
    with place.lease() as lease, pytest.raises(AdapterFull):
        place.run(lease, AdapterLimits(max_examples=EXAMPLES))
    progress = place.registry.jobs.job("acme", job.id).progress
    assert progress is not None
    assert progress["rejected"] == 1
    assert [(one["place"], one["code"]) for one in progress["errors"]] == [("line 1", "label_missing")]


def test_a_replacement_is_not_joined_and_what_it_replaces_leaves_the_files(place: Place) -> None:
    place.do()
    kept = told(NAMES)[::10]
    fresh = told([f"m{row:02}" for row in range(45)], about="Again ")
    place.do(place.queue(lines([*kept, *fresh]), update="replace"))
    wanted = {one["id"]: one["text"] for one in [*kept, *fresh]}
    assert place.texts() == wanted
    # Each part lies where it was stored; the few that were known are in files without what lay beside them.
    segments = place.segments()
    assert len({segments[one["id"]] for one in fresh}) == 3
    assert not {segments[one["id"]] for one in kept} & {segments[one["id"]] for one in fresh}
    names = {one.name for one in place.store.objects()}
    assert names == {artifact.name for artifact in place.registry.referenced(place.uid)}
    held = {artifact for one in place.registry.all_examples(place.uid)[1] if (artifact := one.inputs)}
    texts = [text for one in held for text in decode_inputs(place.store.read("acme", place.uid, one))]
    assert sorted(map(str, texts)) == sorted(wanted.values())


def test_a_replacement_that_is_cancelled_leaves_what_answers(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.do()
    before = place.registry.resolve("acme", "notes")
    texts = place.texts()
    job = place.queue(
        lines(told([f"m{row:02}" for row in range(EXAMPLES)], about="Again ")), update="replace"
    )
    with place.lease() as lease:
        stop_after_a_part(monkeypatch, lease, Cancelled())
        with pytest.raises(Cancelled):
            place.run(lease, AdapterLimits(max_examples=EXAMPLES))
        place.registry.jobs.cancelled(lease.claim)
    after = place.registry.resolve("acme", "notes")
    assert replace(after, epoch=before.epoch) == before
    assert before.artifact is not None
    assert place.store.read("acme", place.uid, before.artifact)
    assert texts.items() <= place.texts().items()
    assert len(place.texts()) == EXAMPLES + PART
    assert place.registry.jobs.job("acme", job.id).state == "cancelled"


async def test_what_is_over_a_limit_may_shrink_and_be_fitted(tmp_path: Path) -> None:
    """As a replacement that was cancelled may leave it."""
    async with world(tmp_path) as wide:
        await wide.adapt(taught(4))
    async with world(tmp_path, limits=AdapterLimits(max_examples=6)) as narrow:
        assert (await narrow.editor.remove(TENANT, "words", ["one0"])).adapter.examples == 7
        assert (await narrow.adapt([])).revised.version is not None
        with pytest.raises(AdapterFull):
            await narrow.adapt(taught(4)[:1])


def test_an_id_with_two_meanings_is_rejected_wherever_it_stands(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.do()
    notes = told([f"m{row:02}" for row in range(EXAMPLES)], about="Again ")
    same, other_label, other_text = notes[0], {**notes[1], "label": "other"}, {**notes[2], "text": "Snow"}
    place.queue(lines([*notes, same, other_label, other_text]))
    with place.lease() as lease, monkeypatch.context() as patch:
        stop_after_a_part(patch, lease, ShuttingDown())
        with pytest.raises(ShuttingDown):
            place.run(lease)
        place.registry.jobs.release(lease.claim)
    with place.lease() as lease:
        place.run(lease)
    done = place.registry.jobs.jobs("acme")[0]
    assert done.progress is not None
    assert [(one["place"], one["code"]) for one in done.progress["errors"]] == [
        ("line 2", "conflicting_labels"),
        ("line 3", "conflicting_inputs"),
        ("line 52", "conflicting_labels"),
        ("line 53", "conflicting_inputs"),
    ]
    assert {"m00", "m01", "m02", "m03"} & place.texts().keys() == {"m00", "m03"}


def test_what_progress_says_of_an_error_is_short(place: Place) -> None:
    place.do()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/1.txt", b"one")
        archive.writestr("b/" + "2" * 60_000 + ".txt", b"\x81")
        archive.writestr("l" * 256 + "/3.txt", b"three")
        archive.writestr("\uff4c" * 256 + "/4.txt", b"four")
    _, progress = place.do(place.queue(buffer.getvalue(), "zip"))
    first, second = progress["errors"]
    assert (first["code"], second["code"]) == ("invalid_text", "label_collision")
    assert (len(first["place"]), first["place"][:3], first["place"][-1]) == (200, "b/2", "…")
    assert (len(second["detail"]), second["detail"][-1]) == (200, "…")


class Contested(Registry):
    """A registry where another process commits to the adapter before the first commits of a job."""

    def __init__(self, url: str, others: int, write: ExampleWrite) -> None:
        super().__init__(url)
        self.others = others
        self._write = write

    def commit(
        self, change: Change, *, job: Claim | None = None, reply: PendingReply[Committed] | None = None
    ) -> Committed:
        if job is not None and self.others:
            self.others -= 1
            revision = self.adapter(change.tenant, change.name).revision
            super().commit(Change(change.tenant, change.name, change.uid, revision, upserts=(self._write,)))
        return super().commit(change, job=job, reply=reply)


def test_others_that_go_on_posting_do_not_fail_an_upload(place: Place, tmp_path: Path) -> None:
    fingerprint = place.registry.adapter("acme", "notes").fingerprint
    vector = np.ones((1, 384), np.float32)
    files: list[Buffer] = [encode_embeddings(vector, fingerprint), encode_inputs(["theirs"])]
    segment, inputs = place.store.publish_all("acme", place.uid, files)
    theirs = ExampleWrite("theirs", "0" * 64, "0", segment, 0, inputs)
    contested = Contested(f"sqlite:///{tmp_path / 'registry.db'}", 7, theirs)
    replace(place, registry=contested).do()
    assert contested.others == 0
    assert len(place.texts()) == EXAMPLES + 1
    contested.close()


class Slow(LocalStore):
    """A folder that takes its time."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked, self.go_on, self.done = threading.Event(), threading.Event(), threading.Event()

    def publish_all(self, tenant: str, adapter_uid: str, blobs: Sequence[Buffer]) -> tuple[Artifact, ...]:
        self.asked.set()
        self.go_on.wait(10)
        published = super().publish_all(tenant, adapter_uid, blobs)
        self.done.set()
        return published


async def sent(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def test_a_caller_who_hangs_up_leaves_no_part_behind(tmp_path: Path) -> None:
    store = Slow(tmp_path / "artifacts")
    async with world(tmp_path, store=store) as here:
        submitter = JobSubmitter(here.pipeline, max_open=1, deadline_seconds=60)
        upload = submitter.bulk(TENANT, "ndjson", AdaptCommand("words"), sent(lines(told(NAMES))))
        receiving = asyncio.ensure_future(upload)
        await asyncio.to_thread(store.asked.wait, 10)
        receiving.cancel()
        await asyncio.sleep(0.05)
        store.go_on.set()
        with suppress(asyncio.CancelledError):
            await receiving
        assert await asyncio.to_thread(store.done.wait, 10)
        await eventually(lambda: not list(store.objects()))


async def test_two_first_uploads_to_one_adapter_are_both_taken(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        submitter = JobSubmitter(here.pipeline, max_open=100, deadline_seconds=60)
        for round_ in range(10):
            command = AdaptCommand(f"words{round_}")
            uploads = [submitter.bulk(TENANT, "ndjson", command, sent(lines(told(NAMES)))) for _ in "ab"]
            first, second = await asyncio.gather(*uploads)
            assert first.adapter_uid == second.adapter_uid


async def test_one_job_too_many_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        submitter = JobSubmitter(here.pipeline, max_open=1, deadline_seconds=60)
        command = AdaptCommand("words")
        await submitter.bulk(TENANT, "ndjson", command, sent(lines(told(NAMES))))
        body = sent(lines(told(NAMES)))
        with pytest.raises(TooManyJobs):
            await submitter.bulk(TENANT, "ndjson", command, body)
        assert await anext(body), "nobody has asked for it yet"


def test_groups_and_what_is_wanted_of_answers_come_with_an_upload(place: Place) -> None:
    place.do()
    adapter = place.registry.adapter("acme", "notes")
    assert (adapter.answer_accuracy, adapter.weights) == (0.95, "none"), "the job asked for neither"
    notes: list[dict[str, Any]] = [
        {**one, "group": f"day {row // 5}", "sampled": row % 5 > 0}
        for row, one in enumerate(told(NAMES, about="Again "))
    ]
    place.do(place.queue(lines(notes), update="replace", answer_accuracy=0.9, weights="balanced"))
    kept = {one.id: (one.group, one.sampled) for one in place.registry.all_examples(place.uid)[1]}
    assert kept == {one["id"]: (one["group"], one["sampled"]) for one in notes}
    adapter = place.registry.adapter("acme", "notes")
    assert (adapter.answer_accuracy, adapter.weights) == (0.9, "balanced")
    place.do(place.queue(lines(notes), fit=False, answer_accuracy=0.8))
    adapter = place.registry.adapter("acme", "notes")
    assert (adapter.answer_accuracy, adapter.weights) == (0.8, "balanced")
    assert [one.number for one in place.registry.versions(place.uid)] == [2, 1]


def test_an_upload_is_learned_beside_the_names_that_the_adapter_has(place: Place) -> None:
    adapter = place.registry.adapter("acme", "notes")
    meanings = {"0": "a day of sunshine", "1": "a day of rain", "2": "a day of snow"}
    named = Change("acme", "notes", place.uid, adapter.revision, meanings=meanings, costs={"1": 2.0})
    place.registry.commit(named)
    place.do()
    adapter = place.registry.adapter("acme", "notes")
    assert (adapter.meanings, adapter.costs) == (meanings, {"1": 2.0})
    (version,) = place.registry.versions(place.uid)
    assert version.labels == 3
    # A job of this release may carry others.
    place.do(place.queue(lines(told(NAMES)), meanings={"0": ""}, costs={}))
    adapter = place.registry.adapter("acme", "notes")
    assert (adapter.meanings, adapter.costs) == ({"0": ""}, {})


def test_an_upload_is_told_of_groups_that_differ_and_of_texts_without_a_known_token(place: Place) -> None:
    place.do()
    first, second, third = told(["m00", "m01", "m02"], about="Again ")
    content = [{**first, "group": "a"}, second, {**third, "text": "สวัสดี"}, {**first, "group": "b"}]
    _, progress = place.do(place.queue(lines(content)))
    assert [(one["place"], one["code"]) for one in progress["errors"]] == [
        ("line 1", "conflicting_groups"),
        ("line 3", "no_known_tokens"),
        ("line 4", "conflicting_groups"),
    ]
    assert {"m00", "m01", "m02"} & place.texts().keys() == {"m01"}
