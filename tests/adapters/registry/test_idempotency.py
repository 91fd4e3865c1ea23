from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from adapters.adaptation.commands import AdaptCommand, AdaptOutcome, RevisionResult
from adapters.adaptation.example_editor import Feedback
from adapters.jobs.submission import JobSubmitter
from adapters.registry.errors import TooManyJobs, UnknownAdapter
from adapters.registry.idempotency import MOST_BYTES, REPLIES_KEPT, AlreadyAnswered, PendingReply, StoredReply
from adapters.registry.records import Change, Committed, JobRecord
from adapters.registry.registry import Registry, new_uid
from adapters.registry.schema import database_now, replies
from tests.support.adapters.adapter_stack import TENANT, says, taught, world
from tests.support.adapters.records import TEXTS, append, artifact, change, create, example, version

KEY = hashlib.sha256(b"a key").hexdigest()
REQUEST = "1" * 64


def reply(key: str = KEY, request: str = REQUEST) -> PendingReply[Committed]:
    """Tells the number of the version and an example's id, as answers do."""

    def render(committed: Committed) -> StoredReply:
        number = committed.version and committed.version.number
        return StoredReply(request, 200, json.dumps({"version": number, "suspects": ["ünï"]}))

    return PendingReply(key, render)


def creation(name: str = "pets", tenant: str = "acme") -> Change:
    upserts = (example("a", artifact("segment")), example("b", artifact("segment"), 1))
    return Change(tenant, name, new_uid(), 0, create=TEXTS, upserts=upserts, version=version(), promote=True)


def told(number: int, request: str = REQUEST) -> StoredReply:
    return StoredReply(request, 200, json.dumps({"version": number, "suspects": ["ünï"]}))


def refused(call: Callable[[], object]) -> StoredReply:
    """The answer that was there before."""
    with pytest.raises(AlreadyAnswered) as caught:
        call()
    return caught.value.answered


def age(registry: Registry, seconds: float) -> None:
    """As if everything had been answered longer ago."""
    with registry._database.writing() as connection:
        (now,) = connection.execute(select(database_now())).one()
        connection.execute(update(replies).values(at=now - timedelta(seconds=seconds)))


def count(registry: Registry) -> int:
    with registry._database.reading() as connection:
        return connection.execute(select(func.count()).select_from(replies)).scalar_one()


def test_a_reply_is_found_by_its_tenant_and_key(registry: Registry) -> None:
    assert registry.replies.find("acme", KEY) is None
    registry.commit(creation(), reply=reply())
    assert registry.replies.find("acme", KEY) == told(1)
    assert registry.replies.find("umbrella", KEY) is None
    assert registry.replies.find("acme", "0" * 64) is None
    registry.commit(creation(tenant="umbrella"), reply=reply(request="2" * 64))
    assert registry.replies.find("umbrella", KEY) == told(1, "2" * 64)
    assert registry.replies.find("acme", KEY) == told(1)


def test_without_one_nothing_is_kept(registry: Registry) -> None:
    create(registry)
    assert count(registry) == 0


def test_what_was_answered_is_not_done_again(registry: Registry) -> None:
    adapter = registry.commit(creation(), reply=reply()).adapter
    again = replace(change(adapter), version=version(), promote=True)
    assert refused(lambda: registry.commit(again, reply=reply(request="2" * 64))) == told(1)
    # The stored reply comes before every other reason to refuse.
    for other in (creation(), replace(again, revision=7), replace(again, uid=new_uid())):
        assert refused(lambda other=other: registry.commit(other, reply=reply())) == told(1)  # type: ignore[misc]
    assert registry.adapter("acme", "pets") == adapter
    assert [one.number for one in registry.versions(adapter.uid)] == [1]
    assert registry.commit(again, reply=reply("2" * 64)).adapter.live == 2


def test_a_change_and_its_reply_are_written_together_or_not_at_all(registry: Registry) -> None:
    def render(committed: Committed) -> StoredReply:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        registry.commit(creation(), reply=PendingReply(KEY, render))
    with pytest.raises(UnknownAdapter):
        registry.adapter("acme", "pets")
    adapter = create(registry).adapter
    with pytest.raises(UnknownAdapter):
        registry.commit(replace(change(adapter), name="cars"), reply=reply())
    assert registry.replies.find("acme", KEY) is None


def test_of_many_at_once_one_is_first(registry_url: str) -> None:
    """Each with a connection of its own, to another adapter: nothing but the key makes them wait."""
    first = Registry(registry_url)
    first.migrate()
    others = [Registry(registry_url) for _ in range(7)]
    for round_ in range(10):
        key = f"{round_:064x}"
        together = threading.Barrier(8)

        def commit(place: int, registry: Registry, key: str = key, together: Any = together) -> str:
            together.wait(30)
            try:
                registry.commit(creation(f"a{place}", f"t{key[-1]}"), reply=reply(key, f"{place:064x}"))
                return f"{place:064x}"
            except AlreadyAnswered as error:
                return "not " + error.answered.request_sha256

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(commit, range(8), [first, *others]))
        (done,) = [one for one in found if not one.startswith("not ")]
        assert found.count(f"not {done}") == 7
        (adapter,) = first.adapters(f"t{key[-1]}")
        assert adapter.name == f"a{int(done, 16)}"
        assert first.replies.find(f"t{key[-1]}", key) == told(1, done)
    for registry in (first, *others):
        registry.close()


def submit(registry: Registry, keyed: PendingReply[JobRecord] | None, max_open: int = 1) -> JobRecord:
    return registry.jobs.submit(
        "acme", "pets", "fine_tune", {}, deadline_seconds=None, max_open=max_open, reply=keyed
    )


def test_a_job_is_submitted_once(registry: Registry) -> None:
    create(registry)
    keyed: PendingReply[JobRecord] = PendingReply(
        KEY, lambda job: StoredReply(REQUEST, 202, json.dumps({"id": job.id}))
    )
    job = submit(registry, keyed)
    answered = StoredReply(REQUEST, 202, json.dumps({"id": job.id}))
    assert registry.replies.find("acme", KEY) == answered
    # Though there is no room for another one.
    assert refused(lambda: submit(registry, keyed)) == answered
    with pytest.raises(TooManyJobs):
        submit(registry, None)
    assert registry.jobs.jobs("acme") == [job]
    assert refused(lambda: registry.commit(creation("cars"), reply=reply())) == answered


def test_a_reply_to_a_whole_is_one_to_its_parts() -> None:
    whole: PendingReply[list[int]] = PendingReply(KEY, lambda found: StoredReply(REQUEST, 200, str(found)))
    part: PendingReply[int] = whole.of(lambda number: [number, 2 * number])
    assert (part.key_sha256, part.render(4).body) == (KEY, "[4, 8]")


def test_a_reply_is_kept_for_a_day(registry: Registry) -> None:
    adapter = registry.commit(creation(), reply=reply()).adapter
    age(registry, REPLIES_KEPT - 60)
    assert registry.replies.find("acme", KEY) == told(1)
    age(registry, REPLIES_KEPT + 60)
    assert registry.replies.find("acme", KEY) is None
    again = replace(change(adapter), version=version(), promote=True)
    registry.commit(again, reply=reply(request="2" * 64))
    assert registry.replies.find("acme", KEY) == told(2, "2" * 64)


def test_old_replies_are_forgotten_a_few_at_a_time(registry: Registry) -> None:
    adapter = create(registry).adapter
    old = {
        "tenant": "umbrella",
        "request_sha256": REQUEST,
        "adapter_uid": "f" * 32,
        "status": 200,
        "body": "{}",
        "at": datetime(2000, 1, 1, tzinfo=UTC),
    }
    with registry._database.writing() as connection:
        connection.execute(insert(replies), [{**old, "key_sha256": f"{n:064x}"} for n in range(150)])
    for place, left in enumerate((50, 0, 0)):
        adapter = registry.commit(
            replace(change(adapter), version=version()), reply=reply(f"{place}" * 64)
        ).adapter
        assert count(registry) == left + place + 1
    assert registry.replies.find("acme", "0" * 64) == told(2)


def test_replies_go_with_their_adapter(registry: Registry) -> None:
    registry.commit(creation(), reply=reply())
    registry.commit(creation("cars"), reply=reply("2" * 64))
    registry.delete_adapter("acme", "pets")
    assert registry.replies.find("acme", KEY) is None
    assert registry.replies.find("acme", "2" * 64) == told(1)
    registry.commit(creation(), reply=reply())
    assert registry.replies.find("acme", KEY) == told(1)


def test_replies_go_with_examples_that_they_may_name(registry: Registry) -> None:
    adapter = registry.commit(creation(), reply=reply()).adapter
    registry.commit(creation("cars"), reply=reply("2" * 64))
    adapter = append(registry, adapter, "c").adapter
    assert registry.replies.find("acme", KEY) == told(1)
    registry.commit(replace(change(adapter), removals=("a", "b")))
    assert registry.replies.find("acme", KEY) is None
    assert registry.replies.find("acme", "2" * 64) == told(1)


@pytest.mark.anyio
async def test_what_was_prepared_for_nothing_leaves_no_file(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        adapted: PendingReply[AdaptOutcome] = PendingReply(KEY, lambda found: told(len(found.rejected)))
        taught_once = await here.pipeline.adapt(TENANT, AdaptCommand("words", taught()), adapted)
        revision = taught_once.revised.adapter.revision
        more = AdaptCommand("words", taught(8))
        with pytest.raises(AlreadyAnswered) as caught:
            await here.pipeline.adapt(TENANT, more, adapted)
        assert caught.value.answered == told(0)
        revised: PendingReply[RevisionResult] = PendingReply(KEY, lambda found: told(1))
        feedback = Feedback("two", says("one", 99))
        with pytest.raises(AlreadyAnswered):
            await here.editor.feedback(TENANT, "words", feedback, revised)
        assert here.registry.adapter(TENANT, "words").revision == revision
        here.check()


async def lines() -> AsyncIterator[bytes]:
    for one in ("one", "two"):
        yield json.dumps({"text": says(one, 1), "label": one}).encode() + b"\n"


@pytest.mark.anyio
async def test_an_upload_for_nothing_leaves_no_file(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        submitter = JobSubmitter(here.pipeline, max_open=10, deadline_seconds=60)
        submitted: PendingReply[JobRecord] = PendingReply(KEY, lambda job: StoredReply(REQUEST, 202, job.id))
        job = await submitter.bulk(TENANT, "ndjson", AdaptCommand("words"), lines(), submitted)
        kept = here.files()
        with pytest.raises(AlreadyAnswered) as caught:
            await submitter.bulk(TENANT, "ndjson", AdaptCommand("words"), lines(), submitted)
        assert caught.value.answered.body == job.id
        assert here.registry.jobs.jobs(TENANT) == [job]
        assert here.files() == kept
        here.check()


def test_a_reply_of_the_release_before_is_given_again(registry: Registry) -> None:
    registry.commit(creation(), reply=reply())
    with registry._database.writing() as connection:
        connection.execute(update(replies).values(body=told(1).body))
    assert registry.replies.find("acme", KEY) == told(1)


def stored(registry: Registry, tenant: str) -> int:
    """Bytes of all bodies of the tenant."""
    with registry._database.reading() as connection:
        bodies = connection.scalars(select(replies.c.body).where(replies.c.tenant == tenant))
        return sum(len(body) for body in bodies)


def test_replies_of_a_tenant_take_so_much_and_no_more(registry: Registry, registry_url: str) -> None:
    """Ones of a megabyte each, which do not compress; the newest are given again."""
    adapter = create(registry).adapter
    registry.commit(creation(tenant="umbrella"), reply=reply())
    half = MOST_BYTES // 2

    def large(number: int) -> StoredReply:
        rng = random.Random(number)
        return StoredReply(REQUEST, 200, json.dumps({"number": number, "hex": rng.randbytes(700_000).hex()}))

    def commit(number: int) -> None:
        answered: PendingReply[Committed] = PendingReply(f"{number:064x}", lambda committed: large(number))
        registry.commit(replace(change(adapter), version=version()), reply=answered)

    commit(0)
    one = stored(registry, "acme")
    assert one > 900_000
    with registry._database.writing() as connection:
        (row,) = connection.execute(select(replies).where(replies.c.tenant == "acme")).mappings()
        # As if there were half as much again as may be, all of it from before.
        many = 3 * half // one
        connection.execute(
            insert(replies),
            [
                {**row, "key_sha256": f"f{n:063x}", "at": row["at"] - timedelta(seconds=n)}
                for n in range(1, many)
            ],
        )
    assert stored(registry, "acme") > 1.4 * MOST_BYTES
    size = file_size(registry_url)
    for number in range(1, 12):
        commit(number)
        assert stored(registry, "acme") <= MOST_BYTES
    assert stored(registry, "acme") > MOST_BYTES - 2 * one
    # The pages of what went are used again.
    assert file_size(registry_url) <= size + 2 * one
    for number in range(12):
        assert registry.replies.find("acme", f"{number:064x}") == large(number)
    assert registry.replies.find("acme", f"f{1:063x}") is not None
    assert registry.replies.find("acme", f"f{many - 1:063x}") is None
    assert registry.replies.find("umbrella", KEY) == told(1)


def file_size(url: str) -> int:
    """The size of a SQLite database's file; 0 for PostgreSQL, which frees pages when it vacuums."""
    return Path(url.partition("///")[2]).stat().st_size if url.startswith("sqlite") else 0


def test_small_replies_are_bounded_too(registry: Registry) -> None:
    """They are added up once in a while, and not with each."""
    adapter = create(registry).adapter
    body = "x" * (1 << 16)
    rows = [
        {
            "tenant": "acme",
            "key_sha256": f"f{n:063x}",
            "request_sha256": REQUEST,
            "adapter_uid": adapter.uid,
            "status": 200,
            "body": body,
            "at": datetime.now(UTC) - timedelta(hours=1),
        }
        for n in range(MOST_BYTES // len(body) + 10)
    ]
    with registry._database.writing() as connection:
        connection.execute(insert(replies), rows)
    for number in range(400):
        # About one in ten of these adds up; that none of 400 does is as good as impossible.
        rng = random.Random(number)
        answered: PendingReply[Committed] = PendingReply(
            f"{number:064x}",
            lambda committed, rng=rng: StoredReply(REQUEST, 200, rng.randbytes(80_000).hex()),  # type: ignore[misc]
        )
        registry.commit(replace(change(adapter), version=version()), reply=answered)
        if stored(registry, "acme") <= MOST_BYTES:
            break
    assert stored(registry, "acme") <= MOST_BYTES
