"""Callbacks: allowed URLs, the message, and its signature."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import stamina
from pydantic import TypeAdapter

from adapters.jobs.callback_sender import send_callback
from adapters.jobs.callbacks import CallbackNotAllowed, check_callback, secret_key, signature_headers
from adapters.registry.records import JobRecord
from service.payloads.responses.jobs import JobOutcome
from tests.support.adapters.listener import Listener, listening

ALLOWED = ("https://hooks.example.com/topwork/", "http://10.0.0.5:8080/done")


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/topwork/",
        "https://hooks.example.com/topwork/a?b=c",
        "https://HOOKS.example.com/topwork/a",
        "http://10.0.0.5:8080/done",
    ],
)
def test_what_lies_below_an_allowed_url_may_be_called(url: str) -> None:
    check_callback(url, ALLOWED)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/",
        "https://hooks.example.com/topwork",
        "https://hooks.example.com/topwork/../admin",
        "https://hooks.example.com/topwork/%2e%2e/admin",
        "http://hooks.example.com/topwork/a",
        "https://hooks.example.com:444/topwork/a",
        "https://hooks.example.com.evil.org/topwork/a",
        "https://hooks.example.com@evil.org/topwork/a",
        "https://evil.org\\@hooks.example.com/topwork/a",
        "https://user:word@hooks.example.com/topwork/a",
        "http://10.0.0.5:8080/done/more",
        "http://10.0.0.5:8080/done\r\nHost: evil.org",
        "http://10.0.0.5:port/done",
        "file:///etc/passwd",
        "",
    ],
)
def test_nothing_else_may(url: str) -> None:
    with pytest.raises(CallbackNotAllowed):
        check_callback(url, ALLOWED)


def job(url: str) -> JobRecord:
    now = datetime.now(UTC)
    return JobRecord(
        id="1",
        tenant="acme",
        adapter_uid="f" * 32,
        adapter="pets",
        kind="fine_tune",
        state="failed",
        request={"callback": url},
        progress=None,
        attempt=1,
        lease_until=None,
        cancel_requested=False,
        deadline_at=None,
        version=None,
        error_code="diverged",
        error_detail="The loss became nan.",
        created_at=now,
        started_at=now,
        finished_at=now,
    )


def send(url: str, listener: Listener, times: int, secrets: tuple[str, ...] = ()) -> None:
    """Send the callback of a job without pauses, and wait until the listener was called `times` times."""
    with stamina.set_testing(True, attempts=3):
        send_callback(job(url), secrets)
        end = time.monotonic() + 20
        while len(listener.told) < times and time.monotonic() < end:
            time.sleep(0.02)
    assert len(listener.told) == times


def test_the_end_is_told_again_until_it_is_heard_and_no_redirect_followed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with listening([302, 500]) as listener:
        send(f"http://127.0.0.1:{listener.server_port}/done?key=1", listener, 3)
    assert [path for path, _ in listener.told] == ["/done?key=1"] * 3
    assert listener.told[-1][1] == {
        "id": "1",
        "adapter": "pets",
        "kind": "fine_tune",
        "state": "failed",
        "version": None,
        "error": {"code": "diverged", "detail": "The loss became nan."},
    }
    # The OpenAPI document describes it so.
    assert TypeAdapter(JobOutcome).validate_python(listener.told[-1][1]) == listener.told[-1][1]
    assert not [name for name in listener.received[-1][0] if name.startswith("webhook-")]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the callback of the job 1 failed: status 302",
        "the callback of the job 1 failed: status 500",
    ]


OLD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NEW = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD6TvHbKw3jzo="


def documented() -> Any:
    """The function of the documentation that verifies a signature."""
    for page in (Path(__file__).parents[3] / "docs").rglob("*.md"):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            if "def is_genuine" in block:
                names: dict[str, Any] = {}
                exec(block, names)
                return names["is_genuine"]
    raise AssertionError("no page shows how a signature is verified")


def test_a_receiver_verifies_each_attempt_with_the_code_of_the_documentation() -> None:
    is_genuine = documented()
    with listening([500]) as listener:
        send(f"http://127.0.0.1:{listener.server_port}/", listener, 2, (NEW, OLD))
    for headers, body in listener.received:
        assert headers["webhook-id"] == "1"
        assert is_genuine(headers, body, OLD)
        assert is_genuine(headers, body, NEW)
        assert not is_genuine(headers, body + b" ", OLD)
        assert not is_genuine(headers, body, "whsec_" + "A" * 32)
        assert not is_genuine(headers, body, OLD, tolerance=-1)


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # The message and its signature in the tests of the reference libraries.
    headers = signature_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', [OLD])
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "secret", ["", "whsec_", OLD.removeprefix("whsec_"), "whsec_c2hvcnQ=", "whsec_" + "A" * 88, "whsec_é" * 8]
)
def test_other_secrets_are_refused(secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_"):
        secret_key(secret)
