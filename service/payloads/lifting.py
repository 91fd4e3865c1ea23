"""Large strings taken out of a JSON body before it is parsed.

A parser holds Python's interpreter lock from the first byte to the last: 40 MB of images in base64 would keep
every other request waiting for as long as a tenth of a second. So the values of "image" and "text" are found
by looking for their closing quotes, and decoded one by one; only what is left is parsed. All of it in slices
of at most about a millisecond.
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
from models.preprocess.preprocessor import InputError

# A byte order mark, which Excel, PowerShell and Notepad put before UTF-8.
_MARK = b"\xef\xbb\xbf"
_KEYS = (b'"image"', b'"text"')
_COLON = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*"')
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_LARGE = 1024
_WINDOW = 4096
_ESCAPES_SLICE = 1 << 15
# A parser makes an object of every item: so many take it tens of milliseconds.
_MOST_ITEMS = 500_000
_MOST_KEYS = 50_000
# Behind a key; what is further away is left to the parser.
_MOST_SPACE = 64
_TOO_MUCH = "There is too much in the body besides images and texts. Send less at once."
# A character outside of the basic plane is written as two escapes of six bytes.
_LONGEST_ESCAPE = 12


class NotJson(ValueError):
    """The body is not JSON."""

    code = "invalid_json"


class TooIntricate(ValueError):
    """There is too much in the body besides images and texts."""

    code = "body_too_large"


@dataclass(frozen=True, slots=True)
class Lifted:
    """What was parsed, and where in the body the large strings lie that it has placeholders for."""

    value: Any
    _mark: str
    _body: bytes | bytearray
    _spans: Sequence[tuple[int, int]]

    def text(self, value: str, max_characters: int) -> str:
        """The text that a parsed value stands for.

        Raises NotJson for a string that is not JSON, InputError (text_too_long) for one that need not be
        looked at.
        """
        raw = self._raw(value)
        if raw is None:
            return value
        if len(raw) > _LONGEST_ESCAPE * max_characters:
            raise InputError("text_too_long", f"A text has at most {max_characters:,} characters.")
        return _unescaped(raw)

    def image(self, value: str) -> bytes:
        """The bytes that a parsed value stands for in base64. Raises InputError (invalid_base64), NotJson."""
        raw = self._raw(value)
        if raw is None:
            return decode_base64(value.encode("utf-8", "surrogatepass"))
        start, end = self._spans[int(value[len(self._mark) :])]
        if len(raw) <= SLICE:
            try:
                return BASE64.validate_json(bytes(raw))
            except ValidationError:
                # Perhaps only white space or a data: URI's head, which the next lines remove.
                pass
        if self._body.find(b"\\", start, end) >= 0:
            return decode_base64(_unescaped(raw).encode("utf-8", "surrogatepass"))
        return decode_base64(raw[1:-1])

    def _raw(self, value: str) -> memoryview | None:
        """The string with its quotes, as it stands in the body."""
        if not value.startswith(self._mark):
            return None
        start, end = self._spans[int(value[len(self._mark) :])]
        return memoryview(self._body)[start - 1 : end + 1]


def parse(body: bytes | bytearray, *, max_rest: int) -> Lifted:
    """The body parsed; a byte order mark before it is passed by.

    Raises NotJson, and TooIntricate where more than `max_rest` bytes are left to the parser.
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
    """Where one of the keys stands next, before `end`.

    Looked for in small windows: a key that does not come would else be looked for to the end each time.
    """
    for window in range(position, min(end, len(body)), _WINDOW):
        found = [body.find(key, window, window + _WINDOW + len(key) - 1) for key in _KEYS]
        if max(found) >= 0:
            return min(place for place in found if place >= 0)
    return None


def _value(body: bytes | bytearray, key: int) -> int | None:
    """Where the string under the key begins; None if it has no string, or is not a key.

    What is found begins a string wherever the body is JSON. The quote behind the key's last letter is not
    escaped, so it closes a string; nor is the one before its first, so that string is the key.
    """
    position = body.index(b'"', key + 1) + 1
    colon = _COLON.match(body, position, position + _MOST_SPACE)
    return None if colon is None or body[key - 1 : key] == b"\\" else colon.end()


def _closing_quote(body: bytes | bytearray, start: int) -> int:
    """Where the string that begins at start ends."""
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
