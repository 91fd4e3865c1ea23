"""Sends the callback of an ended job. Imports httpx, which an idle worker does not need."""

from __future__ import annotations

import contextlib
import json
import logging
import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import stamina

from adapters.jobs.callbacks import signature_headers
from adapters.registry.records import JobRecord

logger = logging.getLogger("topwork")

_TIMEOUT = httpx.Timeout(10.0)  # seconds to connect, and between two bytes
_ATTEMPTS = 3  # with pauses of about 2 and 10 seconds


class _NotAccepted(Exception):
    """The receiver answered with a status other than 2xx."""


_ERRORS = (httpx.HTTPError, httpx.InvalidURL, _NotAccepted)


def send_callback(job: JobRecord, secrets: Sequence[str] = ()) -> None:
    """POST the job's outcome to the callback URL of its request, from a background thread.

    Best effort: three attempts at most, and none after the process is killed. Each of the secrets signs.
    """
    threading.Thread(target=_send, args=(job, secrets), name="callback", daemon=True).start()


def _send(job: JobRecord, secrets: Sequence[str]) -> None:
    # stamina's own line of a retry does not say which job it is about.
    stamina.instrumentation.set_on_retry_hooks(())
    url, body = job.request["callback"], json.dumps(_told(job)).encode()
    with contextlib.suppress(*_ERRORS):
        for attempt in stamina.retry_context(
            on=_ERRORS, attempts=_ATTEMPTS, timeout=None, wait_initial=2.0, wait_exp_base=5.0, wait_max=10.0
        ):
            with attempt:
                try:
                    _post(url, body, signature_headers(job.id, int(time.time()), body, secrets))
                except _ERRORS as error:
                    # httpx's own message may hold the URL, and the URL a password.
                    why = str(error) if isinstance(error, _NotAccepted) else type(error).__name__
                    logger.warning("the callback of the job %s failed: %s", job.id, why)
                    raise


def _post(url: str, body: bytes, headers: dict[str, str]) -> None:
    """Send one request. Redirects are not followed, since they could lead anywhere."""
    client = httpx.Client(
        timeout=_TIMEOUT,
        follow_redirects=False,
        # Neither a proxy nor a password is taken from the environment.
        trust_env=False,
        # The system's authorities, to which an operator may have added one, in place of httpx's own list.
        verify=ssl.create_default_context(),
    )
    headers = {"Content-Type": "application/json", "User-Agent": "topwork", **headers}
    # The response's body could be of any length, so it is not read.
    with client, client.stream("POST", _target(url), content=body, headers=headers) as response:
        if not response.is_success:
            raise _NotAccepted(f"status {response.status_code}")


def _target(url: str) -> httpx.URL:
    """Return the URL made of the parts that check_callback compared: no second parser decides the host."""
    parts = urlsplit(url)
    return httpx.URL(
        scheme=parts.scheme,
        host=parts.hostname or "",
        port=parts.port,
        path=parts.path or "/",
        query=parts.query.encode() if parts.query else None,
    )


def _told(job: JobRecord) -> dict[str, Any]:
    """The callback's body, with field names as in GET /jobs/{id}."""
    error = None if job.error_code is None else {"code": job.error_code, "detail": job.error_detail}
    return {
        "id": job.id,
        "adapter": job.adapter,
        "kind": job.kind,
        "state": job.state,
        "version": job.version,
        "error": error,
    }
