"""Tenants and keys, on SQLite and PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from adapters.registry.database import Database
from adapters.registry.errors import UnknownTenant
from adapters.registry.quotas import QuotaExceeded, Quotas
from adapters.registry.registry import Registry
from adapters.registry.schema import keys
from adapters.registry.tenants import (
    MAX_KEYS,
    HeldKey,
    KeyNotInUse,
    TenantExists,
    TooManyKeys,
    UnknownKey,
    split_key,
)
from tests.support.adapters.job_records import claim, submit
from tests.support.adapters.records import artifact, change, create, example

ARTIFACT = artifact("more")
PAST = datetime(2000, 1, 1, tzinfo=UTC)


def found(registry: Registry, key: str) -> HeldKey | None:
    parts = split_key(key)
    assert parts is not None
    held = registry.tenants.find(parts[0])
    assert held is None or held.opens_with(parts[1])
    return held


def set_key(registry: Registry, key_id: str, **values: Any) -> None:
    with registry._database.writing() as connection:
        connection.execute(update(keys).where(keys.c.id == key_id).values(**values))


def test_a_key_is_found_by_its_id_and_opens_with_its_secret_alone(registry: Registry) -> None:
    registry.tenants.create("acme")
    record, key = registry.tenants.create_key("acme", ["adapt", "predict", "adapt"], note="shop")
    assert (record.tenant, record.scopes, record.note) == ("acme", ("adapt", "predict"), "shop")
    assert (record.expires_at, record.revoked_at) == (None, None)
    held = found(registry, key)
    assert held is not None
    assert (held.id, held.tenant, held.scopes) == (record.id, "acme", frozenset({"adapt", "predict"}))
    assert held.in_use_for is None
    assert not held.opens_with(key.rpartition("_")[2][:-1])
    assert not held.opens_with("")
    assert registry.tenants.find("0" * 16) is None


def test_the_database_holds_no_secret(registry: Registry, registry_url: str) -> None:
    registry.tenants.create("acme")
    _, key = registry.tenants.create_key("acme", ["predict"])
    secret = split_key(key)[1]  # type: ignore[index]
    database = Database(registry_url)
    with database.reading() as connection:
        rows = connection.execute(keys.select()).all()
    database.close()
    assert len(rows) == 1
    assert secret not in str(rows)


@pytest.mark.parametrize(
    "text",
    ["", "tw", "tw_", "tw__", "tw_0123456789abcdef", "tw_0123456789abcdef_", "xx_0123456789abcdef_s",
     "tw_0123456789ABCDEF_s", "tw_01234\x00789abcdef_s", "tw_'; drop table keys_s"],
)  # fmt: skip
def test_what_is_no_key(text: str) -> None:
    parts = split_key(text)
    assert parts is None or parts[1] == ""


def test_a_secret_may_hold_what_separates_the_parts() -> None:
    assert split_key("tw_0123456789abcdef_a_b-c_") == ("0123456789abcdef", "a_b-c_")


def test_a_key_ends_by_revoking_and_by_time(registry: Registry) -> None:
    tenants = registry.tenants
    tenants.create("acme")
    record, key = tenants.create_key("acme", ["predict"], lifetime=timedelta(hours=1))
    held = found(registry, key)
    assert held is not None
    assert held.in_use_for is not None
    assert 3_500 < held.in_use_for <= 3_600
    set_key(registry, record.id, expires_at=PAST)
    held = found(registry, key)
    assert held is not None
    assert held.in_use_for == 0
    record, key = tenants.create_key("acme", ["predict"])
    revoked = tenants.revoke("acme", record.id)
    assert revoked.revoked_at is not None
    assert tenants.revoke("acme", record.id) == revoked
    held = found(registry, key)
    assert held is not None
    assert held.in_use_for == 0
    assert tenants.tenant("acme").keys == 0


def test_rotation_leaves_the_old_key_some_time(registry: Registry) -> None:
    tenants = registry.tenants
    tenants.create("acme")
    old, old_key = tenants.create_key("acme", ["adapt"], note="shop", lifetime=timedelta(days=2))
    new, new_key = tenants.rotate("acme", old.id, timedelta(minutes=10))
    assert (new.scopes, new.note) == (old.scopes, old.note)
    assert new.expires_at is not None
    assert new.expires_at - new.created_at == timedelta(days=2)
    ends, lasts = found(registry, old_key), found(registry, new_key)
    assert ends is not None
    assert ends.in_use_for is not None
    assert 500 < ends.in_use_for <= 600
    assert lasts is not None
    assert lasts.in_use_for is not None
    assert lasts.in_use_for > 600
    # A grace never makes a key last longer than it would have.
    tenants.rotate("acme", new.id, timedelta(days=9))
    assert tenants.keys("acme")[1].expires_at == new.expires_at
    tenants.revoke("acme", old.id)
    with pytest.raises(KeyNotInUse):
        tenants.rotate("acme", old.id, timedelta(0))


def test_what_is_not_there_and_what_is_another_tenants_is_unknown_alike(registry: Registry) -> None:
    tenants = registry.tenants
    for name in ("acme", "other"):
        tenants.create(name)
    record, _ = tenants.create_key("other", ["predict"])
    messages = []
    for key_id in (record.id, "f" * 16):
        with pytest.raises(UnknownKey) as caught:
            tenants.revoke("acme", key_id)
        messages.append(str(caught.value).replace(key_id, "…"))
        with pytest.raises(UnknownKey):
            tenants.rotate("acme", key_id, timedelta(0))
    assert messages[0] == messages[1]
    for key_id in ("", "\0", "é" * 16, "x" * 10_000):
        with pytest.raises(UnknownKey):
            tenants.revoke("acme", key_id)
    for call in (tenants.tenant, tenants.keys):
        with pytest.raises(UnknownTenant):
            call("nobody")
    with pytest.raises(UnknownTenant):
        tenants.create_key("nobody", ["predict"])
    with pytest.raises(TenantExists):
        tenants.create("acme")


def test_tenants_are_listed_with_what_they_have(registry: Registry) -> None:
    create(registry, "pets", tenant="b")
    create(registry, "cars", tenant="b")
    for name in ("c", "a"):
        registry.tenants.create(name)
    registry.tenants.create_key("c", ["admin"])
    found = registry.tenants.tenants()
    assert [(one.name, one.adapters, one.examples, one.keys) for one in found] == [
        ("a", 0, 0, 0),
        ("b", 2, 4, 0),
        ("c", 0, 0, 1),
    ]
    assert [one.name for one in registry.tenants.tenants("a", 1)] == ["b"]


def test_no_more_keys_than_allowed_however_many_ask_at_once(registry: Registry) -> None:
    tenants = registry.tenants
    tenants.create("acme")
    for _ in range(MAX_KEYS - 2):
        tenants.create_key("acme", ["predict"])

    def ask(number: int) -> bool:
        try:
            tenants.create_key("acme", ["predict"])
        except TooManyKeys:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(ask, range(6))) == 2
    first = tenants.keys("acme")[0]
    tenants.revoke("acme", first.id)
    tenants.create_key("acme", ["predict"])


def test_keys_that_ended_long_ago_are_forgotten(registry: Registry) -> None:
    tenants = registry.tenants
    tenants.create("acme")
    revoked, _ = tenants.create_key("acme", ["predict"])
    expired, _ = tenants.create_key("acme", ["predict"])
    recent, _ = tenants.create_key("acme", ["predict"])
    set_key(registry, revoked.id, revoked_at=PAST)
    set_key(registry, expired.id, expires_at=PAST)
    tenants.revoke("acme", recent.id)
    last, _ = tenants.create_key("acme", ["predict"])
    assert {one.id for one in tenants.keys("acme")} == {recent.id, last.id}


def test_quotas_are_kept_and_come_with_the_keys(registry: Registry) -> None:
    tenants = registry.tenants
    assert tenants.create("acme").quotas == Quotas()
    _, key = tenants.create_key("acme", ["predict"])
    quotas = Quotas(items_per_second=2.5, max_examples=10**9)
    assert tenants.set_quotas("acme", quotas).quotas == quotas
    held = found(registry, key)
    assert held is not None
    assert held.quotas == quotas
    assert tenants.set_quotas("acme", Quotas()).quotas == Quotas()
    with pytest.raises(UnknownTenant):
        tenants.set_quotas("nobody", quotas)


def test_no_more_adapters_than_the_quota(registry: Registry) -> None:
    create(registry, "first")
    registry.tenants.set_quotas("acme", Quotas(max_adapters=3))

    def ask(number: int) -> bool:
        try:
            create(registry, f"other-{number}")
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(ask, range(6))) == 2
    assert registry.tenants.tenant("acme").adapters == 3
    create(registry, "first", tenant="somebody-else")
    registry.delete_adapter("acme", "first")
    create(registry, "first")


def test_no_more_examples_than_the_quota_over_all_adapters(registry: Registry) -> None:
    create(registry, "first")
    other = create(registry, "other")
    registry.tenants.set_quotas("acme", Quotas(max_examples=5))
    segment = other.adapter
    new = replace(
        change(segment), upserts=tuple(example(name, ARTIFACT, row) for row, name in enumerate("cde"))
    )
    with pytest.raises(QuotaExceeded):
        registry.commit(new)
    assert registry.adapter("acme", "other") == other.adapter
    one = replace(new, upserts=new.upserts[:1])
    assert registry.commit(one).adapter.examples == 3
    # A tenant over its quota may still replace and remove examples.
    registry.tenants.set_quotas("acme", Quotas(max_examples=1))
    now = registry.adapter("acme", "other")
    again = registry.commit(replace(change(now), upserts=new.upserts[:1]))
    assert again.replaced == 1
    assert registry.commit(replace(change(again.adapter), removals=("c",))).adapter.examples == 2


def test_a_tenants_quota_of_running_jobs_goes_before_the_settings(registry: Registry) -> None:
    for tenant in ("acme", "other"):
        create(registry, tenant=tenant)
        for _ in range(3):
            submit(registry, tenant=tenant)
    registry.tenants.set_quotas("acme", Quotas(max_running_jobs=2))
    registry.tenants.set_quotas("other", Quotas(max_running_jobs=0))
    begun = [claim(registry, max_running=1) for _ in range(5)]
    assert [one.job.tenant for one in begun if one is not None] == ["acme", "acme"]
