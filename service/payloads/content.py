"""What a request's body holds: its bytes, its files, and JSON parsed in one call."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser

from adapters.examples.base64_images import SLICE, decode_base64
from adapters.prediction.predictor import Input
from models.preprocess.limits import InputError
from service.payloads.requests import InputIn

# Bodies up to this size and number of commas are parsed in the event loop, in about a millisecond; starting a
# thread would take longer.
AT_ONCE = 128 << 10
# The byte order mark that Excel, PowerShell and Notepad write before UTF-8.
_MARK = b"\xef\xbb\xbf"
# The parser holds the GIL and makes an object for each item, 0.1 s for this many; strings of any length it
# copies at gigabytes a second.
_MOST_COMMAS = 2_000_000  # prose has one in fifty characters
_MOST_BRACKETS = 500_000  # opening ones; lists and objects are the dearest
_FIELDS = 64  # fields of a form, besides its files


class NotJson(ValueError):
    """The body is not JSON."""

    code = "invalid_json"


class TooIntricate(ValueError):
    """The body has too many items to parse it at once."""

    code = "body_too_large"


def parse(body: bytes | bytearray) -> Any:
    """Parse a body, without its byte order mark if it has one. Raises NotJson and TooIntricate."""
    if body.startswith(_MARK):
        body = body[len(_MARK) :]
    if _count(body, b",") > _MOST_COMMAS or _count(body, b"[") + _count(body, b"{") > _MOST_BRACKETS:
        raise TooIntricate("The JSON has too many values. Send less at once.")
    try:
        return from_json(body, cache_strings="keys")
    except ValueError as error:
        raise NotJson(f"The body is not valid JSON: {error}.") from error


def _count(body: bytes | bytearray, byte: bytes) -> int:
    # Slices keep other threads running, because a count holds the GIL. It is also ten times as slow as the
    # search that skips images in base64, where there is nothing to count.
    found, start = 0, body.find(byte)
    while start >= 0:
        found += body.count(byte, start, start + SLICE)
        start = body.find(byte, start + SLICE)
    return found


class InMemoryParser(MultiPartParser):
    """Starlette's parser without temporary files: bodies are bounded, and inputs must not touch the disk."""

    spool_max_size = 1 << 40


async def chunks_of(request: Request) -> deque[bytes]:
    """Return the body in the pieces in which it comes, so a long Content-Length alone takes no memory."""
    chunks: deque[bytes] = deque()
    async for chunk in request.stream():
        chunks.append(chunk)
    return chunks


def joined(chunks: deque[bytes]) -> bytearray:
    """Return the body, and take its pieces. Of a large one, call this in a thread."""
    body = bytearray()
    while chunks:
        body += chunks.popleft()
    return body


async def _stream_of(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield the body as it comes."""
    async for chunk in request.stream():
        yield chunk


async def form_of(request: Request, most: int) -> tuple[list[UploadFile], dict[str, str]]:
    """Return up to `most` files of a multipart body, and its other fields. Raises MultiPartException."""
    parser = InMemoryParser(
        request.headers, _stream_of(request), max_files=most, max_fields=_FIELDS, max_part_size=AT_ONCE
    )
    items = (await parser.parse()).multi_items()
    files = [value for _, value in items if isinstance(value, UploadFile)]
    return files, {key: value for key, value in items if isinstance(value, str)}


async def content_of(file: UploadFile) -> Input:
    """Return the text or the image that a file of a form holds; an error in its place if it is no text."""
    content = await file.read()
    name, media = (file.filename or "").lower(), (file.content_type or "").lower()
    if media.startswith("text/") or (not media.startswith("image/") and name.endswith(".txt")):
        return decoded_text(content)
    return content


def input_of(one: InputIn) -> Input:
    """Return the input of one item; an error in its place if it is none, or several."""
    if (one.image is None) == (one.text is None):
        return InputError("input_missing", "Give exactly one of image and text.")
    if one.text is not None:
        return one.text
    try:
        return decode_base64(one.image or "")
    except InputError as error:
        return error


def decoded_text(content: bytes) -> Input:
    """Return the text of bytes in UTF-8, or the error of what is not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return InputError("invalid_text", f"The text is not UTF-8: {error.reason} at byte {error.start}.")


def folder_of(filename: str | None) -> str | None:
    """Return the label in `label/file.jpg`: the innermost folder of a file's name, or None."""
    parts = [part for part in (filename or "").replace("\\", "/").split("/") if part]
    return parts[-2] if len(parts) > 1 else None
