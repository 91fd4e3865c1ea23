"""JSON bodies, parsed in one call with a bound on how much there is to parse."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

# The byte order mark that Excel, PowerShell and Notepad write before UTF-8.
_MARK = b"\xef\xbb\xbf"
# The parser holds the GIL and makes an object for each item, 0.1 s for this many; strings of any length it
# copies at gigabytes a second.
_MOST_COMMAS = 2_000_000  # prose has one in fifty characters
_MOST_BRACKETS = 500_000  # opening ones; lists and objects are the dearest


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
    if body.count(b",") > _MOST_COMMAS or body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
        raise TooIntricate("The body has too many items. Send less at once.")
    try:
        return from_json(body, cache_strings="keys")
    except ValueError as error:
        raise NotJson(f"The body is not JSON: {error}.") from error
