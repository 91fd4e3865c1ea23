"""A line for each request, with who asked, for what, and how it went; nothing of what was sent."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.settings import Settings
from tests.support.service.edge_app import Shell

KEY = "0123456789abcdef0123456789abcdef"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [vars(record) for record in caplog.records if record.name == "topwork.access"]


@pytest.mark.anyio
async def test_the_facts_of_a_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shell = Shell(Settings(home=tmp_path, admin_key=SecretStr(KEY)))
    with caplog.at_level(logging.INFO, "topwork.access"):
        async with shell.client(authorization=f"Bearer {KEY}") as client:
            answer = await client.post(
                "/validated",
                json={"items": [1]},
                headers={"x-tenant": "acme", "x-request-id": "one"},
            )
            await client.get("/nowhere", headers={"x-tenant": "?"})
            await client.get("/things/a?secret=1", headers={"authorization": "Bearer wrong"})
    good, lost, stranger = lines(caplog)
    facts = {
        "method": "POST",
        "route": "/validated",
        "status": 200,
        "bytes_in": len(answer.request.content),
        "bytes_out": len(answer.content),
        "tenant": "acme",
        "adapter": None,
        "request_id": "one",
    }
    assert {name: good[name] for name in facts} == facts
    seconds = good["seconds"]
    assert isinstance(seconds, float)
    assert 0 < seconds < 10
    assert (lost["route"], lost["status"], lost["tenant"]) == (None, 404, None)
    assert (stranger["status"], stranger["tenant"]) == (401, None)
    for said in (good, lost, stranger):
        assert KEY not in str(said)
        assert "secret" not in str(said)


@pytest.mark.anyio
async def test_without_an_access_log_there_is_no_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shell = Shell(Settings(home=tmp_path, access_log=False))
    with caplog.at_level(logging.INFO, "topwork.access"):
        async with shell.client() as client:
            await client.get("/things/a")
    assert not lines(caplog)
