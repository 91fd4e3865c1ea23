"""Calls back a URL when a job has ended.

Only URLs that the operator allows are called, so that no tenant chooses where the service connects.
"""

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

_SECONDS = 10.0  # socket timeout of a callback, in seconds
_PAUSES = (0.0, 2.0, 10.0)  # seconds before each attempt
_MOST_CHARACTERS = 2_048  # longest callback URL


class CallbackNotAllowed(ValueError):
    """The operator does not allow callbacks to this URL."""

    code = "callback_not_allowed"


def check_callback(url: str, allowed: Sequence[str]) -> None:
    """Raise CallbackNotAllowed unless an allowed URL covers `url`: same scheme, host and port, and the path.

    `allowed`: a URL that ends with a slash allows every path below it, any other URL only its own path.
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
    # Plain or encoded dots could lead out of the allowed path.
    if ".." in asked.path or "%" in asked.path:
        return False
    return asked.path == known.path or (known.path.endswith("/") and asked.path.startswith(known.path))


def send_callback(job: JobRecord) -> None:
    """POST the job's outcome to the callback URL of its request, if it has one, from a background thread.

    Best effort: three attempts at most, and none after the process is killed.
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
    """POST and return the response status. Redirects are not followed, since they could lead anywhere."""
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
