"""Requests with an Idempotency-Key: each is executed once, and repetitions get the same answer.

See https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/, section 2.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from fastapi import Request
from pydantic_core import to_json
from python_multipart.multipart import parse_options_header
from starlette.responses import Response
from starlette.types import Message

from adapters.registry.idempotency import AlreadyAnswered, PendingReply, Replies, StoredReply
from adapters.threads import DATABASE
from service.errors import Problem
from service.payloads.reader import media_type
from service.payloads.responses.replies import render_reply, shorten

T = TypeVar("T")

HEADER = "Idempotency-Key"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class Replying(Protocol):
    """Builds the reply that is recorded with an outcome; None for a request without a key."""

    def __call__(self, answer: Callable[[T], Response]) -> PendingReply[T] | None:
        """Return the reply to record. `answer` is called in a thread, before the response is sent."""
        ...


Work = Callable[[Request, Replying], Awaitable[Response]]
"""The work of a route. It must make all its changes in the transaction that records the reply."""


class IdempotencyGuard:
    """Answers the requests of one process. For one event loop. Recorded answers keep the start of `rejected`.

    Requests in flight are known only to their own process; between processes the first commit wins.
    """

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._in_flight: set[tuple[str, str]] = set()

    async def answer(self, request: Request, tenant: str, work: Work) -> Response:
        """Return the work's answer, or the recorded answer to the same request.

        Errors are not recorded, because they have changed nothing. Raises a Problem if the key is malformed
        (400), was sent with another request (422) or is in flight (409), and whatever the work raises.
        """
        key = _key_of(request)
        if key is None:
            return await work(request, _unkept)
        with self._alone(tenant, key):
            keyed = _Keyed(request, key)
            found = await DATABASE.run(self._replies.find, tenant, key)
            if found is None:
                try:
                    return await keyed.do(work)
                except AlreadyAnswered as error:
                    # Another process committed first, or a request whose caller hung up during the commit.
                    found = error.answered
            return await keyed.repeat(found)

    @contextmanager
    def _alone(self, tenant: str, key: str) -> Iterator[None]:
        if (tenant, key) in self._in_flight:
            detail = f"The first request with this {HEADER} is still in progress. Send this one again later."
            raise Problem(409, "idempotency_in_flight", detail, headers={"Retry-After": "1"})
        self._in_flight.add((tenant, key))
        try:
            yield
        finally:
            self._in_flight.discard((tenant, key))


class _Keyed:
    """One request with a key: its digest and its answer."""

    def __init__(self, request: Request, key: str) -> None:
        self._key = key
        self._scope = request.scope
        self._receive = request.receive
        self._digest = _Digest(request)
        self._read_whole = False
        self._rendered: Response | None = None

    async def do(self, work: Work) -> Response:
        """Do the work and return its answer as recorded."""
        answer = await work(Request(self._scope, self._read), self._reply)
        return self._rendered or answer

    async def repeat(self, found: StoredReply) -> Response:
        """Return the recorded answer. Raises a 422 Problem if it was given to another request."""
        if not self._read_whole:
            async for _ in Request(self._scope, self._read).stream():
                pass
        if found.request_sha256 != self._digest.hexdigest():
            detail = f"Another request was sent with this {HEADER}. Use a new key for each request."
            raise Problem(422, "idempotency_key_reused", detail)
        return render_reply(found)

    def _reply(self, answer: Callable[[T], Response]) -> PendingReply[T]:
        def render(outcome: T) -> StoredReply:
            self._rendered = response = answer(outcome)
            kept = shorten(bytes(response.body))
            return StoredReply(self._digest.hexdigest(), response.status_code, kept.decode())

        return PendingReply(self._key, render)

    async def _read(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._digest.update(message.get("body", b""))
            self._read_whole = not message.get("more_body", False)
        return message


class _Digest:
    """The SHA-256 of a request: method, path, query, media type and body.

    Multipart boundaries are masked, because clients generate a new one for each request.
    """

    def __init__(self, request: Request) -> None:
        media, scope = media_type(request), request.scope
        parts = [scope["method"], scope["path"], scope["query_string"].decode("latin-1"), media]
        self._sha256 = hashlib.sha256(to_json(parts) + b"\n")
        self._boundary = b""
        if media == "multipart/form-data":
            _, options = parse_options_header(request.headers["content-type"])
            self._boundary = options.get(b"boundary", b"")
        self._held = b""

    def update(self, data: bytes) -> None:
        """Add a piece of the body, of any size."""
        if self._boundary:
            data = (self._held + data).replace(self._boundary, b"\0")
            # The last bytes are held back: a boundary may continue in the next piece.
            whole = max(0, len(data) - len(self._boundary) + 1)
            data, self._held = data[:whole], data[whole:]
        self._sha256.update(data)

    def hexdigest(self) -> str:
        """Return the digest of the request so far."""
        found = self._sha256.copy()
        found.update(self._held)
        return found.hexdigest()


def _unkept(answer: Callable[[T], Response]) -> None:
    """`Replying` for a request without a key: nothing is recorded."""


def _key_of(request: Request) -> str | None:
    """Return the SHA-256 of the request's key, if it has one. Raises a 400 Problem if it is malformed."""
    given = request.headers.getlist(HEADER)
    if not given:
        return None
    key = ", ".join(given)
    if _KEY.fullmatch(key) is None:
        detail = f"{HEADER} must be sent once, with 1 to 255 visible ASCII characters."
        raise Problem(400, "invalid_idempotency_key", detail)
    return hashlib.sha256(key.encode()).hexdigest()
