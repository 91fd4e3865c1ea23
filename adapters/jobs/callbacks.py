"""Which URLs may be called back when a job has ended, and how a callback is signed.

Only URLs that the operator allows are called, so that no tenant chooses where the service connects.
Signatures follow Standard Webhooks: https://www.standardwebhooks.com
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from models.errors import Invalid

_MOST_CHARACTERS = 2_048  # longest callback URL
_SECRET_PREFIX = "whsec_"
_SECRET_BYTES = range(24, 65)  # lengths that Standard Webhooks allows


class CallbackNotAllowed(Invalid):
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


def secret_key(secret: str) -> bytes:
    """Return the key of a signing secret: `whsec_` and 24 to 64 bytes in base64. Raises ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(_SECRET_PREFIX) or len(key) not in _SECRET_BYTES:
        raise ValueError(
            "use whsec_ and 24 to 64 random bytes in base64, e.g. of `echo whsec_$(openssl rand -base64 32)`"
        )
    return key


def signature_headers(job_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """Return the headers that prove who sent the body, and when (seconds since 1970); empty without a secret.

    Every secret signs, so that a receiver may have the old or the new one while they are rotated.
    """
    if not secrets:
        return {}
    content = f"{job_id}.{timestamp}.".encode() + body
    digests = [hmac.new(secret_key(secret), content, hashlib.sha256).digest() for secret in secrets]
    return {
        "webhook-id": job_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join("v1," + base64.b64encode(digest).decode() for digest in digests),
    }
