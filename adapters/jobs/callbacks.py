"""Tells a URL that a job has ended, one that the operator allowed: no tenant chooses where we connect."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from adapters.registry.records import JobRecord

logger = logging.getLogger("topwork")

_SECONDS = 10.0
# Before each attempt.
_PAUSES = (0.0, 2.0, 10.0)
_MOST_CHARACTERS = 2_048


class CallbackNotAllowed(ValueError):
    """The URL is not among those that may be called back."""

    code = "callback_not_allowed"


def check_callback(url: str, allowed: Sequence[str]) -> None:
    """Raises CallbackNotAllowed unless the URL begins with an allowed one: same scheme, host and port.

    allowed: URLs that end with a slash allow what lies below them, others only themselves.
    """
    if not any(_is_below(url, one) for one in allowed):
        raise CallbackNotAllowed(
            "The callback is not below a URL that this service may call; its operator sets them "
            "(TOPWORK_CALLBACK_URLS). Poll the job instead."
        )


def _is_below(url: str, allowed: str) -> bool:
    if len(url) > _MOST_CHARACTERS or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        asked, known = urlsplit(url), urlsplit(allowed)
        same = (asked.scheme, asked.hostname, asked.port) == (known.scheme, known.hostname, known.port)
    except ValueError:
        return False
    if not same or asked.scheme not in ("http", "https") or "@" in asked.netloc or "\\" in url:
        return False
    # Dots would lead out again, plain or encoded.
    if ".." in asked.path or "%" in asked.path:
        return False
    return asked.path == known.path or (known.path.endswith("/") and asked.path.startswith(known.path))


def send_callback(job: JobRecord) -> None:
    """Posts how the job ended to the URL that its request names, in a thread of its own, a few times at most.

    Best effort: a process that is killed meanwhile does not try again.
    """
    url = job.request.get("callback")
    if url is not None:
        threading.Thread(target=_post, args=(str(url), job), name="callback", daemon=True).start()


def _post(url: str, job: JobRecord) -> None:
    content = json.dumps(_told(job)).encode()
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            status = _request(url, content)
        except (OSError, http.client.HTTPException) as error:
            why = type(error).__name__
        else:
            if 200 <= status < 300:
                return
            why = f"status {status}"
        logger.warning("the callback of the job %s failed: %s", job.id, why)


def _request(url: str, content: bytes) -> int:
    """The status of the answer. Redirects are not followed: they could lead anywhere."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_SECONDS)
    try:
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        headers = {"Content-Type": "application/json", "User-Agent": "topwork"}
        connection.request("POST", path, content, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def _told(job: JobRecord) -> dict[str, Any]:
    """As GET /jobs/{id} names them."""
    error = None if job.error_code is None else {"code": job.error_code, "detail": job.error_detail}
    return {
        "id": job.id,
        "adapter": job.adapter,
        "kind": job.kind,
        "state": job.state,
        "version": job.version,
        "error": error,
    }
