"""Large strings taken out of a JSON body before it is parsed.

The parser holds the GIL from the first byte to the last: 40 MB of base64 images would block every other
request for up to 0.1 s. So the values of "image" and "text" are located by their closing quotes and decoded
one by one, and only the rest is parsed. Each step takes about a millisecond at most.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from adapters.examples.base64_images import BASE64, SLICE, decode_base64
from models.preprocess.limits import InputError

# The byte order mark that Excel, PowerShell and Notepad write before UTF-8.
_MARK = b"\xef\xbb\xbf"
_KEYS = (b'"image"', b'"text"')
_COLON = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*"')
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_LARGE = 1024  # bytes; shorter strings are left to the parser
_WINDOW = 4096  # bytes searched for a key at once
_ESCAPES_SLICE = 1 << 15  # bytes of a string with escapes that are matched at once
# The parser makes an object of every item, which takes tens of milliseconds for this many.
_MOST_ITEMS = 500_000
_MOST_KEYS = 50_000  # occurrences of "image" and "text", in quotes
_MOST_SPACE = 64  # bytes between a key and its value; a value further away is left to the parser
_TOO_MUCH = "There is too much in the body besides images and texts. Send less at once."
_LONGEST_ESCAPE = 12  # bytes; a character outside the basic plane takes two escapes of six bytes


class NotJson(ValueError):
    """The body is not JSON."""

    code = "invalid_json"


class TooIntricate(ValueError):
    """The body has too much besides images and texts to parse it at once."""

    code = "body_too_large"


@dataclass(frozen=True, slots=True)
class Lifted:
    """A parsed body in which placeholders stand for the large strings."""

    value: Any  # the parsed JSON
    _mark: str  # prefix of a placeholder; the index into _spans follows it
    _body: bytes | bytearray
    _spans: Sequence[tuple[int, int]]  # start and end of each large string in the body, without its quotes

    def text(self, value: str, max_characters: int) -> str:
        """Return the text of a parsed value.

        Raises NotJson for a string that is not JSON, and InputError (text_too_long) for one that is too long
        even if every character is escaped.
        """
        raw = self._raw(value)
        if raw is None:
            return value
        if len(raw) > _LONGEST_ESCAPE * max_characters:
            raise InputError("text_too_long", f"A text has at most {max_characters:,} characters.")
        return _unescaped(raw)

    def image(self, value: str) -> bytes:
        """Return the bytes of a parsed value in base64. Raises InputError (invalid_base64) and NotJson."""
        raw = self._raw(value)
        if raw is None:
            return decode_base64(value.encode("utf-8", "surrogatepass"))
        start, end = self._spans[int(value[len(self._mark) :])]
        if len(raw) <= SLICE:
            try:
                return BASE64.validate_json(bytes(raw))
            except ValidationError:
                # White space or the head of a data: URI may be the cause; the lines below remove them.
                pass
        if self._body.find(b"\\", start, end) >= 0:
            return decode_base64(_unescaped(raw).encode("utf-8", "surrogatepass"))
        return decode_base64(raw[1:-1])

    def _raw(self, value: str) -> memoryview | None:
        """Return the large string that a placeholder stands for, with its quotes; None for another value."""
        if not value.startswith(self._mark):
            return None
        start, end = self._spans[int(value[len(self._mark) :])]
        return memoryview(self._body)[start - 1 : end + 1]


def parse(body: bytes | bytearray, *, max_rest: int) -> Lifted:
    """Parse a body, without its byte order mark if it has one.

    Raises NotJson, and TooIntricate if more than `max_rest` bytes, or too many items, are left to the parser.
    """
    mark = f"lifted-{secrets.token_hex(16)}:"
    view = memoryview(body)
    spans: list[tuple[int, int]] = []
    rest: list[bytes] = []
    size = keys = 0
    done = position = len(_MARK) if body.startswith(_MARK) else 0
    while (key := _next_key(body, position, done + max_rest - size)) is not None:
        keys += 1
        if keys > _MOST_KEYS:
            raise TooIntricate(_TOO_MUCH)
        start = _value(body, key)
        if start is None:
            position = key + 1
            continue
        position = _closing_quote(body, start)
        if position - start >= _LARGE:
            rest += [bytes(view[done:start]), f"{mark}{len(spans)}".encode()]
            size += start - done
            spans.append((start, position))
            done = position
    if size + len(body) - done > max_rest:
        raise TooIntricate(_TOO_MUCH)
    rest.append(bytes(view[done:]))
    text = b"".join(rest)
    if text.count(b",") > _MOST_ITEMS:
        raise TooIntricate(_TOO_MUCH)
    try:
        return Lifted(from_json(text, cache_strings="keys"), mark, body, spans)
    except ValueError as error:
        raise NotJson(f"The body is not JSON: {error}.") from error


def _next_key(body: bytes | bytearray, position: int, end: int) -> int | None:
    """Return the position of the next key before `end`, or None.

    The search goes by small windows: a search for an absent key would scan to the end each time.
    """
    for window in range(position, min(end, len(body)), _WINDOW):
        found = [body.find(key, window, window + _WINDOW + len(key) - 1) for key in _KEYS]
        if max(found) >= 0:
            return min(place for place in found if place >= 0)
    return None


def _value(body: bytes | bytearray, key: int) -> int | None:
    """Return the position of the string under the key; None if the value is no string or `key` is no key.

    In valid JSON the result always begins a string: the quote after the key's last letter is not escaped, so
    it closes a string; nor is the quote before its first letter, so that string is the key.
    """
    position = body.index(b'"', key + 1) + 1
    colon = _COLON.match(body, position, position + _MOST_SPACE)
    return None if colon is None or body[key - 1 : key] == b"\\" else colon.end()


def _closing_quote(body: bytes | bytearray, start: int) -> int:
    """Return the position of the quote that closes the string. Raises NotJson if there is none."""
    position = body.find(b'"', start)
    if position >= 0 and body[position - 1 : position] != b"\\":
        return position
    position = start
    while position < len(body):
        match = _INSIDE.match(body, position, position + _ESCAPES_SLICE)
        assert match is not None
        position = match.end()
        if body[position : position + 1] == b'"':
            return position
        if position == match.start():
            break
    raise NotJson("The body is not JSON: a string does not end.")


def _unescaped(raw: memoryview) -> str:
    try:
        text = from_json(bytes(raw))
    except ValueError as error:
        raise NotJson(f"The body is not JSON: in a string, {error}.") from error
    assert isinstance(text, str)
    return text
