from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from adapters.registry.erasures import TenantErased
from adapters.registry.errors import RegistryUnavailable
from adapters.registry.quotas import Quotas
from adapters.registry.tenants import HeldKey
from service.edge.audit import REFUSALS_AT_ONCE, Audit
from service.edge.auth import Authenticator, KeyMissing, is_loopback, listening_addresses
from service.settings import Settings
from tests.support.service.edge_app import Shell

KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def settings(tmp_path: Path, key: str | None = None) -> Settings:
    return Settings(home=tmp_path, admin_key=SecretStr(key) if key else None, access_log=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_no_key_is_needed_on_a_loopback_address(address: str) -> None:
    Authenticator(None, [address])


@pytest.mark.parametrize("addresses", [["0.0.0.0"], ["::"], ["192.0.2.1"], ["127.0.0.1", "192.0.2.1"], []])
def test_without_a_key_no_other_address_is_served(addresses: list[str]) -> None:
    with pytest.raises(KeyMissing, match="TOPWORK_ADMIN_KEY"):
        Authenticator(None, addresses)
    Authenticator(SecretStr(KEY), addresses)


@pytest.mark.parametrize("name", ["localhost.example.org", "127.0.0.1.example.org", "example.org", ""])
def test_a_name_that_only_looks_local_is_not(name: str) -> None:
    assert not is_loopback(name)


def test_the_process_finds_the_sockets_it_listens_on() -> None:
    with socket.create_server(("127.0.0.7", 0)), socket.socket() as idle:
        idle.bind(("127.0.0.8", 0))
        assert "127.0.0.7" in listening_addresses()
        assert "127.0.0.8" not in listening_addresses()
    assert "127.0.0.7" not in listening_addresses()


@pytest.mark.parametrize("key", ["short", "ключ-ключ-ключ-ключ"])
def test_a_key_that_is_easy_to_guess_or_cannot_be_sent_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValidationError, match="openssl"):
        settings(tmp_path, key)


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["localhost:3000", "127.0.0.1", "127.9.8.7:1", "[::1]:80", "LOCALHOST"])
async def test_without_a_key_local_names_are_answered(tmp_path: Path, host: str) -> None:
    async with Shell(settings(tmp_path)).client(host=host) as client:
        assert (await client.get("/things/1")).status_code == 200
        for origin in (host, host.lower(), host.removesuffix(":80")):
            own = {"origin": f"http://{origin}", "sec-fetch-site": "same-origin"}
            assert (await client.post("/streamed", headers=own)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "host",
    [
        "example.org",
        "rebound.example.org:3000",
        "192.0.2.1",
        "localhost@example.org",
        "evil@localhost",
        "localhost/.evil.example",
        "localhost?.evil.example",
        "localhost#.evil.example",
        "localhost:evil",
        "localhost:",
        "localhost.",
        "127.0.0.1.evil.example",
        "127.0.0.256",
        "127.1",
        "2130706433",
        "[::ffff:127.0.0.1]",
        "::1",
        "local\u017fhost",
        "[",
        "",
    ],
)
async def test_without_a_key_foreign_names_are_refused(tmp_path: Path, host: str) -> None:
    async with Shell(settings(tmp_path)).client() as client:
        answer = await client.get("/things/1", headers=[(b"host", host.encode())])
        assert (answer.status_code, answer.json()["code"]) == (403, "host_refused")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "origin",
    [
        "https://example.org",
        "null",
        "http://localhost.example.org",
        "http://[",
        "http://localhost:8888",
        "http://127.9.9.9:3000",
        "http://localhost:3000",
        "http://127.0.0.1",
        "https://127.0.0.1:3000",
        "http://127.0.0.1:3000/",
        "127.0.0.1:3000",
        "",
    ],
)
async def test_without_a_key_pages_of_other_sites_are_refused(tmp_path: Path, origin: str) -> None:
    """The name, the port and the scheme are those of the Host, 127.0.0.1:3000 here."""
    async with Shell(settings(tmp_path)).client(origin=origin) as client:
        answer = await client.post("/validated", json={"items": [1]})
        assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused")


@pytest.mark.anyio
@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "anything"])
async def test_without_a_key_what_a_browser_sends_for_another_site_is_refused(
    tmp_path: Path, site: str
) -> None:
    """The check holds with and without an Origin; a GET never sends one."""
    async with Shell(settings(tmp_path)).client(**{"sec-fetch-site": site}) as client:
        for method, path in (
            ("POST", "/validated"),
            ("GET", "/things/1"),
            ("GET", "/docs"),
            ("GET", "/nowhere"),
        ):
            for headers in ({}, {"origin": "http://127.0.0.1:3000"}):
                answer = await client.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused")
    async with Shell(settings(tmp_path, KEY), ["0.0.0.0"]).client(**{"sec-fetch-site": site}) as client:
        assert (await client.get("/things/1", headers={"authorization": f"Bearer {KEY}"})).status_code == 200


@pytest.mark.anyio
async def test_without_a_key_a_link_leads_to_the_documentation_and_nowhere_else(tmp_path: Path) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    async with Shell(settings(tmp_path)).client(**link) as client:
        assert (await client.get("/")).status_code == 307
        assert (await client.get("/docs")).status_code == 200
        frame = {"sec-fetch-dest": "iframe"}
        for method, path, headers in (
            ("GET", "/things/1", {}),
            ("POST", "/docs", {}),
            ("GET", "/docs", frame),
            ("GET", "/docs", {"sec-fetch-mode": "no-cors"}),
            ("GET", "/docs", {"origin": "http://evil.example"}),
        ):
            answer = await client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, "origin_refused"), path
    # Requests of the page itself, and those typed into the address bar.
    for site in ("same-origin", "none"):
        async with Shell(settings(tmp_path)).client(**{"sec-fetch-site": site}) as client:
            for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json", "/things/1"):
                assert (await client.get(path)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY]
)
@pytest.mark.parametrize("path", ["/things/1", "/nowhere", "/docs/"])
async def test_with_a_key_every_path_asks_for_it(tmp_path: Path, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with Shell(settings(tmp_path, KEY), ["0.0.0.0"]).client(**headers) as client:
        answer = await client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert KEY not in answer.text


@pytest.mark.anyio
async def test_with_the_key_any_name_and_origin_is_answered(tmp_path: Path) -> None:
    shell = Shell(settings(tmp_path, KEY), ["0.0.0.0"])
    async with shell.client(
        authorization=f"bearer {KEY}", host="example.org", origin="https://example.org"
    ) as client:
        assert (await client.get("/things/1")).status_code == 200
        assert (await client.get("/nowhere")).status_code == 404


@pytest.mark.anyio
async def test_what_is_the_same_for_everybody_needs_no_key(tmp_path: Path) -> None:
    async with Shell(settings(tmp_path, KEY), ["0.0.0.0"]).client() as client:
        assert (await client.get("/")).headers["location"] == "docs"
        assert (await client.get("/docs")).status_code == 200
        assert (await client.get("/docs/swagger-ui.css")).status_code == 200
        assert (await client.get("/openapi.json")).json()["security"] == [{"key": []}, {}]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "..", "a" * 64, "ä"])
async def test_an_impossible_tenant_is_refused(tmp_path: Path, name: str) -> None:
    async with Shell(settings(tmp_path)).client() as client:
        answer = await client.get("/tenant", headers=[(b"x-tenant", name.encode())])
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_tenant")


@pytest.mark.anyio
async def test_the_tenant_is_the_header_s_or_the_default(tmp_path: Path) -> None:
    async with Shell(settings(tmp_path)).client() as client:
        assert (await client.get("/tenant")).json() == {"tenant": "default"}
        assert (await client.get("/tenant", headers={"x-tenant": "a.b-c_9"})).json() == {"tenant": "a.b-c_9"}


@pytest.mark.anyio
async def test_what_cannot_be_asked_of_the_database_is_a_problem_too(tmp_path: Path) -> None:
    async def find(key_id: str) -> HeldKey | None:
        raise errors[key_id]

    errors = {"0" * 16: RegistryUnavailable("away"), "1" * 16: ZeroDivisionError("a secret of the inside")}
    shell = Shell(settings(tmp_path, KEY), ["0.0.0.0"], find)
    for key_id, status in (("0" * 16, 503), ("1" * 16, 500)):
        async with shell.client(authorization=f"Bearer tw_{key_id}_x") as client:
            answer = await client.get("/things/1")
            assert answer.status_code == status
            assert "secret" not in answer.text


@pytest.fixture
def audited(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The lines of the audit log, each without the id of its request."""

    def line(record: logging.LogRecord) -> str:
        facts = vars(record)
        who = f" tenant={facts['tenant'] or '-'} key={facts['key']}" if "tenant" in facts else ""
        return record.getMessage() + who

    with caplog.at_level(logging.INFO, "topwork.audit"):
        yield lambda: [line(record) for record in caplog.records if record.name == "topwork.audit"]


def one_key(key: HeldKey) -> Callable[[str], Awaitable[HeldKey | None]]:
    async def find(key_id: str) -> HeldKey | None:
        return key if key_id == key.id else None

    return find


@pytest.mark.anyio
async def test_writes_are_in_the_audit_log_with_who_did_them(
    tmp_path: Path, audited: Callable[[], list[str]]
) -> None:
    key = HeldKey("0" * 16, "acme", frozenset({"adapt"}), hashlib.sha256(b"x").hexdigest(), None)
    shell = Shell(settings(tmp_path, KEY), ["0.0.0.0"], one_key(key))
    async with shell.client(authorization=f"Bearer tw_{key.id}_x") as client:
        await client.post("/validated", json={"items": [1]})
        await client.post("/validated", json={})
        await client.get("/things/1")
        await client.delete("/adapters/ab")
    async with shell.client(authorization=f"Bearer {KEY}") as client:
        await client.post("/asked")
        await client.post("/validated", json={"items": [1]}, headers={"x-tenant": "other"})
        await client.post("/validated", json={"items": [1]}, headers={"x-tenant": "\n no"[1:]})
    assert audited() == [
        f"POST /validated 200 tenant=acme key={key.id}",
        f"POST /validated 422 tenant=acme key={key.id}",
        f"DELETE /adapters/ab 404 tenant=acme key={key.id}",
        "POST /validated 200 tenant=other key=operator",
        "POST /validated 200 tenant=- key=operator",
    ]


@pytest.mark.anyio
async def test_refused_writes_are_in_the_audit_log_with_who_tried(
    tmp_path: Path, audited: Callable[[], list[str]]
) -> None:
    quotas = Quotas(requests_per_second=0.1)
    key = HeldKey("0" * 16, "acme", frozenset({"predict"}), hashlib.sha256(b"x").hexdigest(), None, quotas)
    shell = Shell(
        settings(tmp_path, KEY).model_copy(update={"max_body_bytes": 10}), ["0.0.0.0"], one_key(key)
    )
    wrong = {"x-tenant": "other"}
    async with shell.client(authorization=f"Bearer tw_{key.id}_x") as client:
        assert (await client.post("/validated", json={"items": [1]})).status_code == 403
        assert (await client.post("/streamed", headers=wrong)).status_code == 403
        assert (await client.delete("/adapters/a%0Ab")).status_code == 400
        assert (await client.post("/streamed", content=b"x" * 11)).status_code == 413
        # The saved-up quota is used by now.
        assert (await client.post("/streamed")).status_code == 429
        assert (await client.post("/asked")).status_code == 429
        twice = [("host", "x"), ("x-tenant", "acme"), ("x-tenant", "acme")]
        assert (await client.put("/streamed", headers=twice)).status_code == 400
    async with shell.client(**wrong) as client:
        assert (await client.post("/validated")).status_code == 401
        assert (
            await client.patch("/nowhere", headers={"authorization": f"Bearer tw_{key.id}_y"})
        ).status_code == 401
    assert audited() == [
        f"POST /validated 403 tenant=acme key={key.id}",
        f"POST /streamed 403 tenant=acme key={key.id}",
        f"DELETE /adapters/a%0Ab 400 tenant=acme key={key.id}",
        f"POST /streamed 413 tenant=acme key={key.id}",
        f"POST /streamed 429 tenant=acme key={key.id}",
        "PUT /streamed 400 tenant=- key=unknown",
        "POST /validated 401 tenant=- key=unknown",
        "PATCH /nowhere 401 tenant=- key=unknown",
    ]


@pytest.mark.anyio
async def test_a_flood_of_refusals_is_counted_and_not_listed(
    tmp_path: Path, audited: Callable[[], list[str]]
) -> None:
    key = HeldKey("0" * 16, "acme", frozenset({"adapt"}), hashlib.sha256(b"x").hexdigest(), None)
    shell = Shell(settings(tmp_path, KEY), ["0.0.0.0"], one_key(key))
    async with shell.client() as client:
        for number in range(1, 1 + 3 * REFUSALS_AT_ONCE):
            made_up = {"authorization": f"Bearer tw_{number:016x}_x"}
            assert (await client.post("/validated", headers=made_up)).status_code == 401
        # Those who have a key are still heard.
        valid = {"authorization": f"Bearer tw_{key.id}_x"}
        assert (await client.post("/failing", headers=valid | {"x-tenant": "other"})).status_code == 403
        assert (await client.post("/validated", json={"items": [1]}, headers=valid)).status_code == 200
    shell.edge.close()
    lines = audited()
    listed = lines.count("POST /validated 401 tenant=- key=unknown")
    # One more for each second that it took.
    assert REFUSALS_AT_ONCE <= listed < 1.5 * REFUSALS_AT_ONCE
    assert lines[listed:] == [
        f"POST /failing 403 tenant=acme key={key.id}",
        f"POST /validated 200 tenant=acme key={key.id}",
        f"{3 * REFUSALS_AT_ONCE - listed} more refused requests are not listed",
    ]


@pytest.mark.anyio
async def test_what_is_not_listed_is_counted_a_minute_later(
    audited: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.edge.audit._TOLD_AFTER", 0.2)
    audit = Audit(clock=lambda: 0.0)
    for number in range(REFUSALS_AT_ONCE + 7):
        audit.add("PUT", "/x", 401, tenant="", key="unknown", request_id=str(number), refused=True)
    assert len(audited()) == REFUSALS_AT_ONCE
    await asyncio.sleep(0.5)
    assert audited()[REFUSALS_AT_ONCE:] == ["7 more refused requests are not listed"]


@pytest.mark.anyio
async def test_what_goes_on_under_a_revoked_key_is_broken_off(tmp_path: Path) -> None:
    known = {
        name * 16: HeldKey(name * 16, tenant, frozenset({"adapt"}), hashlib.sha256(b"x").hexdigest(), None)
        for name, tenant in (("0", "acme"), ("1", "other"))
    }

    async def find(key_id: str) -> HeldKey | None:
        return known.get(key_id)

    shell = Shell(settings(tmp_path, KEY), ["0.0.0.0"], find)
    monitor = asyncio.create_task(shell.edge.watch())
    async with (
        shell.client(authorization=f"Bearer tw_{'0' * 16}_x") as acme,
        shell.client(authorization=f"Bearer tw_{'1' * 16}_x") as other,
    ):
        asked = asyncio.create_task(acme.post("/slow", content=b"x"))
        going_on = asyncio.create_task(other.post("/slow", content=b"x"))
        await asyncio.sleep(0.1)
        del known["0" * 16]
        async with asyncio.timeout(5):
            answer = await asked
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        await asyncio.wait_for(shell.cancelled.wait(), 5)
        assert not going_on.done()
        shell.edge.end("other", TenantErased("other"))
        answer = await going_on
        assert (answer.status_code, answer.json()["code"]) == (409, "tenant_erased")
        assert answer.headers["Retry-After"] == "5"
    monitor.cancel()


@pytest.mark.anyio
async def test_no_example_is_named_in_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shell = Shell(settings(tmp_path).model_copy(update={"access_log": True}))
    with caplog.at_level(logging.INFO):
        async with shell.client() as client:
            for path in ("/adapters/pets/examples/mine/1", "/adapters/pets/%65xamples/mine?id=mine"):
                await client.get(path)
                await client.delete(path)
            shell.edge.close()
    ours = [record for record in caplog.records if record.name.startswith("topwork")]
    messages = [record.getMessage() for record in ours]
    assert len(messages) == 6
    assert not any("mine" in str(vars(record)) for record in ours)
    assert all("/adapters/pets/examples/ 404" in message for message in messages)
