from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from adapters.registry.errors import (
    JobFinished,
    LeaseLost,
    RevisionMoved,
    TooManyJobs,
    UnknownAdapter,
    UnknownJob,
)
from adapters.registry.records import Claim, Committed, JobKind
from adapters.registry.registry import Registry
from adapters.registry.statements.job_rows import MAX_ATTEMPTS, held
from tests.support.adapters.job_records import PAST, begin, claim, expire, now_of, set_row, submit
from tests.support.adapters.records import append, artifact, change, create, version


def succeed(registry: Registry, claimed: Claim) -> Committed:
    adapter = registry.adapter(claimed.job.tenant, claimed.job.adapter)
    tuned = version(network=artifact("network"))
    return registry.commit(replace(change(adapter), version=tuned, promote=True), job=claimed)


def writes(registry: Registry, claimed: Claim) -> dict[str, Callable[[], object]]:
    """Every write of a job's worker."""
    queue = registry.jobs
    return {
        "heartbeat": lambda: queue.heartbeat(claimed, 60, {"epoch": 9}),
        "fail": lambda: queue.fail(claimed, "diverged", "The loss is not finite."),
        "cancelled": lambda: queue.cancelled(claimed),
        "release": lambda: queue.release(claimed),
        "commit": lambda: succeed(registry, claimed),
    }


def check_refused(registry: Registry, claimed: Claim) -> None:
    job, adapter = now_of(registry, claimed.job), registry.adapter("acme", "pets")
    referenced = registry.referenced(adapter.uid)
    for write in writes(registry, claimed).values():
        with pytest.raises(LeaseLost) as caught:
            write()
        assert caught.value.code == "lease_lost"
    assert now_of(registry, claimed.job) == job
    assert registry.adapter("acme", "pets") == adapter
    assert registry.referenced(adapter.uid) == referenced


def test_a_job_is_queued_with_its_request(registry: Registry) -> None:
    adapter = create(registry).adapter
    job = submit(registry, deadline=3600)
    assert (job.tenant, job.adapter, job.adapter_uid) == ("acme", "pets", adapter.uid)
    assert (job.kind, job.state, job.attempt) == ("fine_tune", "queued", 0)
    assert job.request == {"epochs": 3, "name": "ünï"}
    assert (job.progress, job.version, job.error_code, job.error_detail) == (None, None, None, None)
    assert (job.lease_until, job.started_at, job.finished_at, job.cancel_requested) == (
        None,
        None,
        None,
        False,
    )
    assert abs(datetime.now(UTC) - job.created_at) < timedelta(minutes=1)
    assert job.deadline_at == job.created_at + timedelta(hours=1)
    assert submit(registry).deadline_at is None
    assert uuid.UUID(job.id).version == 7
    assert now_of(registry, job) == job


def test_success_is_recorded_with_the_version(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    claimed = begin(registry)
    running = claimed.job
    assert (running.id, running.state, running.attempt) == (job.id, "running", 1)
    assert running.request == job.request
    assert running.started_at is not None
    assert running.lease_until == running.started_at + timedelta(seconds=60)
    assert now_of(registry, job) == running
    committed = succeed(registry, claimed)
    assert committed.version is not None
    assert committed.adapter.live == committed.version.number == 2
    done = now_of(registry, job)
    assert (done.state, done.version, done.lease_until) == ("succeeded", 2, None)
    assert done.finished_at is not None
    assert running.started_at <= done.finished_at
    check_refused(registry, claimed)
    assert claim(registry) is None


def test_a_job_without_a_version_commits_in_parts_and_ends_by_itself(registry: Registry) -> None:
    adapter = create(registry).adapter
    job = submit(registry, kind="bulk_adapt")
    claimed = begin(registry)
    registry.commit(change(adapter), job=claimed)
    assert now_of(registry, job).state == "running"
    registry.jobs.succeed(claimed)
    assert (now_of(registry, job).state, now_of(registry, job).version) == ("succeeded", None)
    with pytest.raises(LeaseLost):
        registry.jobs.succeed(claimed)


def test_a_commit_that_is_refused_leaves_the_job_running(registry: Registry) -> None:
    first, other = create(registry), create(registry, "other")
    job = submit(registry)
    claimed = begin(registry)
    append(registry, first.adapter, "c")
    with pytest.raises(RevisionMoved):
        registry.commit(replace(change(first.adapter), version=version()), job=claimed)
    with pytest.raises(ValueError, match="another adapter"):
        registry.commit(replace(change(other.adapter), version=version()), job=claimed)
    assert now_of(registry, job) == claimed.job
    assert registry.adapter("acme", "other") == other.adapter
    succeed(registry, claimed)
    assert now_of(registry, job).version == 3


def test_a_heartbeat_extends_the_lease_and_reports(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    claimed = begin(registry, lease=5)
    beat = registry.jobs.heartbeat(claimed, 600, {"epoch": 1, "loss": 0.5})
    assert (beat.cancel_requested, beat.deadline_passed) == (False, False)
    extended = now_of(registry, job)
    assert extended.progress == {"epoch": 1, "loss": 0.5}
    assert extended.lease_until is not None
    assert claimed.job.lease_until is not None
    assert extended.lease_until > claimed.job.lease_until + timedelta(seconds=500)
    registry.jobs.heartbeat(claimed, 600, None)
    assert now_of(registry, job).progress == {"epoch": 1, "loss": 0.5}


def test_progress_agrees_with_how_the_job_ended(registry: Registry) -> None:
    """The end of a job overrides the work and the time left that its last heartbeat reported."""
    create(registry)
    report = {"phase": "fit", "share": 0.95, "seconds_left": 1.5, "stored": 3}
    queue = registry.jobs
    endings: dict[str, Callable[[Claim], object]] = {
        "succeeded": queue.succeed,
        "failed": lambda claimed: queue.fail(claimed, "one_label", "There is one label."),
        "cancelled": queue.cancelled,
    }
    for state, finish in endings.items():
        for told in (None, report):
            submit(registry)
            claimed = begin(registry)
            queue.heartbeat(claimed, 60, told)
            assert now_of(registry, claimed.job).progress == told
            finish(claimed)
            ended = now_of(registry, claimed.job)
            assert ended.state == state
            if state == "succeeded":
                assert ended.progress == {**(told or {}), "share": 1.0, "seconds_left": 0.0}
            else:
                assert ended.progress == (told and {**told, "seconds_left": None})
    submit(registry)
    assert succeed(registry, begin(registry)).version is not None
    (newest, *_) = queue.jobs("acme", limit=1)
    assert newest.progress == {"share": 1.0, "seconds_left": 0.0}


def test_a_failure_and_a_cancellation_end_the_job(registry: Registry) -> None:
    create(registry)
    first, second = submit(registry), submit(registry)
    claims = {claimed.job.id: claimed for claimed in (begin(registry), begin(registry))}
    registry.jobs.fail(claims[first.id], "diverged", "The loss is not finite.")
    registry.jobs.cancelled(claims[second.id])
    failed, cancelled = now_of(registry, first), now_of(registry, second)
    assert (failed.state, failed.error_code, failed.error_detail) == (
        "failed",
        "diverged",
        "The loss is not finite.",
    )
    assert (cancelled.state, cancelled.error_code) == ("cancelled", None)
    assert failed.finished_at is not None
    assert cancelled.finished_at is not None
    assert claim(registry) is None
    for claimed in claims.values():
        check_refused(registry, claimed)


def test_a_released_job_is_queued_again(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    first = begin(registry)
    registry.jobs.heartbeat(first, 60, {"epoch": 1})
    registry.jobs.release(first)
    released = now_of(registry, job)
    assert (released.state, released.attempt, released.released) == ("queued", 1, 1)
    check_refused(registry, first)
    second = begin(registry)
    assert (second.job.id, second.job.attempt, second.job.progress) == (job.id, 2, None)
    assert second.job.started_at == first.job.started_at
    check_refused(registry, first)
    succeed(registry, second)


def test_a_pause_passes_before_a_released_job_is_begun_again(registry: Registry) -> None:
    create(registry)
    job, other = submit(registry), submit(registry)
    first, _ = (begin(registry) for _ in range(2))
    registry.jobs.release(first, 0.5)
    # Meanwhile it holds no place of its tenant's.
    third = submit(registry)
    assert first.job.id in {job.id, other.id}
    assert begin(registry).job.id == third.id
    assert claim(registry) is None
    time.sleep(0.6)
    assert (begin(registry).job.id, now_of(registry, first.job).attempt) == (first.job.id, 2)


def test_released_attempts_do_not_count(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    for number in range(1, 6):
        claimed = begin(registry)
        assert claimed.job.attempt == number
        registry.jobs.release(claimed)
    for _ in range(MAX_ATTEMPTS):
        assert registry.jobs.settle() == []
        expire(registry, begin(registry))
    assert claim(registry) is None
    (failed,) = registry.jobs.settle()
    assert (failed.id, failed.error_code, failed.attempt) == (job.id, "attempts_exhausted", 5 + MAX_ATTEMPTS)


def test_a_released_job_can_be_cancelled(registry: Registry) -> None:
    create(registry)
    before, after = submit(registry), submit(registry)
    claims = {claimed.job.id: claimed for claimed in (begin(registry), begin(registry))}
    registry.jobs.request_cancel("acme", before.id)
    for claimed in claims.values():
        registry.jobs.release(claimed, 60.0)
    cancelled = registry.jobs.request_cancel("acme", after.id)
    assert (cancelled.state, cancelled.lease_until) == ("cancelled", None)
    assert [(one.id, one.state) for one in registry.jobs.settle()] == [(before.id, "cancelled")]
    assert now_of(registry, before).finished_at is not None


def test_what_is_settled_is_told_to_one_of_many(registry: Registry) -> None:
    create(registry)
    late = {submit(registry, deadline=0.0).id for _ in range(5)}
    with ThreadPoolExecutor(6) as pool:
        told = [job for some in pool.map(lambda _: registry.jobs.settle(), range(6)) for job in some]
    assert sorted(job.id for job in told) == sorted(late)
    assert {(job.state, job.error_code) for job in told} == {("failed", "deadline_exceeded")}


def test_another_tenants_job_is_as_unknown_as_none(registry: Registry) -> None:
    create(registry)
    create(registry, tenant="other")
    job = submit(registry)
    for call in (registry.jobs.job, registry.jobs.request_cancel):
        with pytest.raises(UnknownJob) as theirs:
            call("other", job.id)
        set_row(registry, job, tenant="third")
        with pytest.raises(UnknownJob) as nobodys:
            call("acme", job.id)
        set_row(registry, job, tenant="acme")
        assert str(theirs.value) == str(nobodys.value)
        assert theirs.value.code == "unknown_job"
        with pytest.raises(UnknownJob):
            call("acme", "0" * 32)
    assert registry.jobs.jobs("other") == []
    assert now_of(registry, job) == job
    create(registry, "theirs", tenant="other")
    for name in ("theirs", "nobodys"):
        with pytest.raises(UnknownAdapter):
            submit(registry, name)


def test_a_tenant_has_only_so_many_jobs_at_once(registry: Registry) -> None:
    create(registry)
    create(registry, tenant="other")
    submit(registry, max_open=2)
    claimed = begin(registry)
    queued = submit(registry, max_open=2)
    with pytest.raises(TooManyJobs) as caught:
        submit(registry, max_open=2)
    assert caught.value.code == "too_many_jobs"
    submit(registry, tenant="other", max_open=2)
    registry.jobs.fail(claimed, "diverged", "")
    submit(registry, max_open=2)
    registry.jobs.request_cancel("acme", queued.id)
    submit(registry, max_open=2)
    with pytest.raises(TooManyJobs):
        submit(registry, max_open=2)


def test_submissions_at_once_do_not_pass_the_limit(registry: Registry) -> None:
    # Each job has its own adapter: jobs of one would wait for its row.
    for number in range(16):
        create(registry, f"pets-{number}")
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(submit, registry, f"pets-{number}", max_open=3) for number in range(16)]
    errors = [future.exception() for future in futures]
    assert errors.count(None) == 3
    assert all(isinstance(error, TooManyJobs) for error in errors if error is not None)


def test_tenants_take_turns(registry: Registry) -> None:
    """A tenant with many jobs does not hold those of others, nor does one that always has another one."""
    for tenant in ("acme", "other", "third"):
        create(registry, tenant=tenant)
    many = [submit(registry).id for _ in range(3)]
    one, third = (submit(registry, tenant=tenant).id for tenant in ("other", "third"))

    def turn() -> Claim:
        time.sleep(0.01)
        return begin(registry)

    begun = []
    for _ in range(4):
        claimed = turn()
        begun.append(claimed.job.id)
        registry.jobs.fail(claimed, "diverged", "It did.")
    assert begun == [many[0], one, third, many[1]]
    again = submit(registry, tenant="other").id
    assert turn().job.id == again
    last = turn()
    assert last.job.id == many[2]
    # A released job comes before the tenant's newer ones.
    submit(registry)
    registry.jobs.release(last)
    assert turn().job.id == many[2]


def test_the_oldest_job_of_the_kinds_is_claimed_first(registry: Registry) -> None:
    create(registry)
    kinds: list[JobKind] = ["bulk_adapt", "fine_tune", "bulk_adapt", "fine_tune"]
    oldest = sorted((submit(registry, kind=kind) for kind in kinds), key=lambda job: job.id)
    tunes = [job.id for job in oldest if job.kind == "fine_tune"]
    bulks = [job.id for job in oldest if job.kind == "bulk_adapt"]
    for expected in tunes:
        claimed = claim(registry, kinds=["fine_tune"])
        assert claimed is not None
        assert claimed.job.id == expected
    assert claim(registry, kinds=["fine_tune"]) is None
    assert claim(registry, kinds=[]) is None
    assert [begin(registry).job.id for _ in bulks] == bulks
    assert claim(registry) is None


def test_a_lease_that_ran_out_is_lost_before_anybody_takes_it(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    claimed = begin(registry, lease=0.05)
    time.sleep(0.1)
    check_refused(registry, claimed)
    assert now_of(registry, job).state == "running"
    assert begin(registry).job.attempt == 2


def test_an_old_attempt_can_write_nothing(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    old = begin(registry)
    expire(registry, old)
    new = begin(registry)
    assert (new.job.id, new.job.attempt) == (job.id, 2)
    check_refused(registry, old)
    registry.jobs.heartbeat(new, 60, {"epoch": 1})
    succeed(registry, new)
    check_refused(registry, old)
    assert (now_of(registry, job).state, now_of(registry, job).attempt) == ("succeeded", 2)


def test_threads_claim_each_job_once(registry: Registry, registry_url: str) -> None:
    create(registry)
    submitted = {submit(registry).id for _ in range(40)}

    def work(number: int) -> list[str]:
        mine = Registry(registry_url)
        taken = []
        while (claimed := claim(mine)) is not None:
            assert claimed.job.attempt == 1
            taken.append(claimed.job.id)
        mine.close()
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for some in pool.map(work, range(8)) for job_id in some]
    assert len(taken) == 40
    assert set(taken) == submitted


def test_an_expired_job_is_taken_by_one_of_many(registry: Registry) -> None:
    create(registry)
    submit(registry)
    expire(registry, begin(registry))
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim(registry), range(8)))
    assert [claimed.job.attempt for claimed in claims if claimed is not None] == [2]


def test_a_job_that_is_being_committed_is_passed_by(postgres_url: str) -> None:
    registry = Registry(postgres_url)
    registry.migrate()
    create(registry)
    submit(registry)
    claimed = begin(registry, lease=0.3)
    with registry._database.writing() as connection:
        held(connection, claimed)
        time.sleep(0.4)
        started = time.monotonic()
        assert claim(registry) is None
        assert time.monotonic() - started < 5
    assert begin(registry).job.attempt == 2
    registry.close()


def test_a_job_is_begun_three_times_at_most(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        claimed = begin(registry)
        assert claimed.job.attempt == attempt == now_of(registry, job).attempt
        expire(registry, claimed)
    assert claim(registry) is None
    assert registry.jobs.settle() == [now_of(registry, job)]
    failed = now_of(registry, job)
    assert (failed.state, failed.error_code, failed.attempt) == ("failed", "attempts_exhausted", 3)
    assert failed.finished_at is not None
    assert failed.error_detail
    check_refused(registry, claimed)


def test_a_job_past_its_deadline_is_not_begun(registry: Registry) -> None:
    create(registry)
    queued, expired, running = (submit(registry, deadline=3600) for _ in range(3))
    claims = {claimed.job.id: claimed for claimed in (begin(registry) for _ in range(3))}
    set_row(registry, queued, state="queued", attempt=0, lease_until=None, deadline_at=PAST)
    set_row(registry, expired, deadline_at=PAST, lease_until=PAST)
    set_row(registry, running, deadline_at=PAST)
    assert claim(registry) is None
    assert {job.id for job in registry.jobs.settle()} == {queued.id, expired.id}
    for late in (queued, expired):
        failed = now_of(registry, late)
        assert (failed.state, failed.error_code) == ("failed", "deadline_exceeded")
        assert failed.finished_at is not None
    assert now_of(registry, running).state == "running"
    assert registry.jobs.heartbeat(claims[running.id], 60, None).deadline_passed
    registry.jobs.fail(claims[running.id], "deadline_exceeded", "")


def test_a_queued_job_is_cancelled_at_once(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    cancelled = registry.jobs.request_cancel("acme", job.id)
    assert (cancelled.state, cancelled.cancel_requested, cancelled.started_at) == ("cancelled", True, None)
    assert cancelled.finished_at is not None
    assert cancelled == now_of(registry, job)
    assert claim(registry) is None


def test_a_running_job_is_told_of_its_cancellation(registry: Registry) -> None:
    create(registry)
    job = submit(registry)
    claimed = begin(registry)
    for _ in range(2):
        told = registry.jobs.request_cancel("acme", job.id)
        assert (told.state, told.cancel_requested, told.finished_at) == ("running", True, None)
    assert registry.jobs.heartbeat(claimed, 60, None).cancel_requested
    registry.jobs.cancelled(claimed)
    assert now_of(registry, job).state == "cancelled"


@pytest.mark.parametrize("attempts", [1, MAX_ATTEMPTS])
def test_a_cancelled_job_whose_worker_is_gone_is_not_begun_again(registry: Registry, attempts: int) -> None:
    create(registry)
    job = submit(registry)
    for _ in range(attempts):
        claimed = begin(registry)
        if claimed.job.attempt == attempts:
            registry.jobs.request_cancel("acme", job.id)
        expire(registry, claimed)
    assert claim(registry) is None
    assert registry.jobs.settle() == [now_of(registry, job)]
    cancelled = now_of(registry, job)
    assert (cancelled.state, cancelled.error_code, cancelled.attempt) == ("cancelled", None, attempts)
    check_refused(registry, claimed)


def test_a_finished_job_cannot_be_cancelled(registry: Registry) -> None:
    create(registry)
    for name in ("fail", "cancelled", "commit"):
        job = submit(registry)
        writes(registry, begin(registry))[name]()
        ended = now_of(registry, job)
        with pytest.raises(JobFinished, match=ended.state) as caught:
            registry.jobs.request_cancel("acme", job.id)
        assert caught.value.code == "job_finished"
        assert now_of(registry, job) == ended


def test_a_tenant_runs_only_so_many_at_once(registry: Registry) -> None:
    create(registry)
    create(registry, tenant="other")
    for _ in range(3):
        submit(registry)
    theirs = submit(registry, tenant="other")
    first, second, third = (claim(registry, max_running=1) for _ in range(3))
    assert first is not None
    assert second is not None
    assert first.job.tenant == "acme"
    assert second.job.id == theirs.id
    assert third is None
    expire(registry, first)
    again = claim(registry, max_running=1)
    assert again is not None
    assert (again.job.id, again.job.attempt) == (first.job.id, 2)
    assert claim(registry, max_running=1) is None
    succeed(registry, again)
    after = claim(registry, max_running=1)
    assert after is not None
    assert after.job.id not in {again.job.id, theirs.id}


def test_claims_at_once_do_not_pass_a_tenants_limit(registry: Registry) -> None:
    create(registry)
    for _ in range(16):
        submit(registry)
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim(registry, max_running=3), range(16)))
    assert sum(claimed is not None for claimed in claims) == 3


def test_an_adapter_takes_its_jobs_with_it(registry: Registry) -> None:
    create(registry)
    create(registry, "other")
    job, finished, kept = submit(registry), submit(registry), submit(registry, "other")
    claims = {claimed.job.id: claimed for claimed in (begin(registry), begin(registry))}
    registry.jobs.fail(claims[finished.id], "diverged", "")
    registry.delete_adapter("acme", "pets")
    assert [found.id for found in registry.jobs.jobs("acme")] == [kept.id]
    with pytest.raises(UnknownJob):
        now_of(registry, job)
    again = create(registry)
    for write in writes(registry, claims[job.id]).values():
        with pytest.raises(LeaseLost):
            write()
    with pytest.raises(LeaseLost):
        registry.commit(replace(change(again.adapter), uid=job.adapter_uid), job=claims[job.id])
    assert registry.adapter("acme", "pets") == again.adapter
    assert begin(registry).job.id == kept.id


def test_deletions_beside_claims_and_commits_wait_for_none_in_a_circle(registry: Registry) -> None:
    def work(number: int) -> None:
        name = f"pets-{number % 2}"
        for _ in range(4):
            try:
                submit(registry, name)
                claimed = claim(registry)
                if claimed is not None:
                    succeed(registry, claimed)
                registry.delete_adapter("acme", name)
                create(registry, name)
            except (UnknownAdapter, LeaseLost, RevisionMoved):
                continue

    for number in range(2):
        create(registry, f"pets-{number}")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_lists_newest_first_from_a_cursor(registry: Registry) -> None:
    for name in ("pets", "birds"):
        create(registry, name)
    create(registry, tenant="other")
    submitted = [submit(registry, name) for name in ("pets", "birds") * 4]
    submit(registry, tenant="other")
    newest = sorted(submitted, key=lambda job: job.id, reverse=True)
    times = [job.created_at for job in newest]
    assert times == sorted(times, reverse=True)
    assert registry.jobs.jobs("acme") == newest
    pages, after = [], None
    while page := registry.jobs.jobs("acme", after=after, limit=3):
        pages += page
        after = page[-1].id
        submit(registry, "birds")
    assert pages == newest
    pets = [job for job in newest if job.adapter == "pets"]
    assert registry.jobs.jobs("acme", "pets") == pets
    assert registry.jobs.jobs("acme", "pets", after=pets[1].id, limit=1) == pets[2:3]
    assert registry.jobs.jobs("acme", "nope") == []
    registry.delete_adapter("acme", "pets")
    rest = [job for job in newest if job.adapter == "birds" and job.id < pets[1].id]
    assert registry.jobs.jobs("acme", after=pets[1].id) == rest


def test_the_record_of_finished_jobs_is_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.registry.statements.job_rows.KEPT_JOBS", 3)
    create(registry)
    create(registry, tenant="other")
    theirs = submit(registry, tenant="other")
    registry.jobs.request_cancel("other", theirs.id)
    running = submit(registry)
    begin(registry)
    ended = []
    for _ in range(5):
        time.sleep(0.002)
        ended.append(submit(registry).id)
        registry.jobs.request_cancel("acme", ended[-1])
    assert [job.id for job in registry.jobs.jobs("acme")] == [*reversed(ended[-3:]), running.id]
    assert now_of(registry, theirs).state == "cancelled"
