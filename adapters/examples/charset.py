"""Text encodings: detecting UTF-8, UTF-16 or Windows-1252 from the whole text, and reading its lines."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import BinaryIO, Literal

from models.preprocess.limits import InputError

Encoding = Literal["utf-8", "utf-16-le", "utf-16-be", "windows-1252"]

_CHUNK_BYTES = 1 << 20
_MARK = "\ufeff"
_ASCII = bytes(range(128))
# UTF-8 characters of two to four bytes.
_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# Byte patterns that Windows-1252 text does not have: most capitals and symbols within a word, three non-ASCII
# bytes in a row, one rare letter, and undefined bytes.
_NO_WORD = re.compile(
    rb"(?<=[A-Za-z])[\x80-\x84\x86-\x91\x93\x94\x98\x99\x9b\x9d\xa1-\xac\xae-\xb3\xb5\xb6\xb8-\xde](?=[a-z])"
    rb"|[\x80-\xff]{3}|[\x81\x8d\x8f\x90\x9d\x9f]"
)
# Number of such patterns, or of UTF-8 characters, that occur by chance per stray (non-ASCII, non-UTF-8) byte.
_BY_CHANCE = 0.1


def encoding_of(file: BinaryIO) -> Encoding:
    """Detect the encoding of the text from the current position to its end; the position is restored.

    Without a byte order mark, UTF-16 is recognised by the zero bytes of its first two characters. A text that
    is not valid UTF-8 is Windows-1252 if the other bytes fit into its words and hardly any form UTF-8
    characters. Any other text counts as UTF-8, and undecodable parts are errors where they occur.
    """
    begin = file.tell()
    try:
        return _marked(file.read(4)) or _measured(file, begin)
    finally:
        file.seek(begin)


def _marked(first: bytes) -> Encoding | None:
    if first.startswith(codecs.BOM_UTF8):
        return "utf-8"
    zeros = [byte == 0 for byte in first]
    if first.startswith(codecs.BOM_UTF16_LE) or zeros == [False, True, False, True]:
        return "utf-16-le"
    if first.startswith(codecs.BOM_UTF16_BE) or zeros == [True, False, True, False]:
        return "utf-16-be"
    return None


def _measured(file: BinaryIO, begin: int) -> Encoding:
    if _is_utf8(_chunks(file, begin)):
        return "utf-8"
    sequences = strays = odd = 0
    for chunk in _chunks(file, begin):
        if chunk.isascii():
            continue
        rest, count = _SEQUENCE.subn(b" ", chunk)
        sequences += count
        strays += len(rest.translate(None, _ASCII))
        odd += len(_NO_WORD.findall(rest))
    return "windows-1252" if max(sequences, odd) <= _BY_CHANCE * strays else "utf-8"


def _is_utf8(chunks: Iterator[bytes]) -> bool:
    """Whether all bytes are valid UTF-8; the last character may be truncated."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for chunk in chunks:
            decoder.decode(chunk)
    except UnicodeDecodeError:
        return False
    return True


def _chunks(file: BinaryIO, begin: int) -> Iterator[bytes]:
    file.seek(begin)
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def decoded(content: bytes, encoding: Encoding) -> str:
    """Decode a text and drop its byte order mark. Raises InputError (invalid_text)."""
    try:
        return content.decode(encoding).removeprefix(_MARK)
    except UnicodeDecodeError as error:
        name = encoding.upper() if encoding.startswith("utf") else encoding.capitalize()
        raise InputError(
            "invalid_text", f"The text is not {name}: {error.reason} at byte {error.start}."
        ) from error


class Lines:
    """Iterator over the lines of a text, endings included; an unreadable line is returned as an InputError.

    `number`: of the last line returned, from 1. Undecodable bytes become lone surrogates, so that only their
    line is rejected; see `is_text`.
    """

    def __init__(self, file: BinaryIO, encoding: Encoding, longest: int) -> None:
        self.number = 0
        self._ended = False
        self._longest = longest
        errors = "surrogatepass" if encoding.startswith("utf-16") else "surrogateescape"
        self._text = io.TextIOWrapper(file, encoding, errors, newline="")

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str | InputError:
        try:
            line = "" if self._ended else self._text.readline(self._longest + 1)
            if not line:
                raise StopIteration
            self.number += 1
            if self.number == 1:
                line = line.removeprefix(_MARK)
            if len(line) > self._longest:
                self._skip(line)
                return InputError("line_too_long", f"A line has at most {self._longest:,} characters.")
        except UnicodeDecodeError:
            # This is a truncated last character; only UTF-16 can have one.
            self._ended = True
            self.number += 1
            return InputError("invalid_text", "The text ends in the middle of a character.")
        return line

    def _skip(self, line: str) -> None:
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(self._longest)

    def close(self) -> None:
        """Detach from the file without closing it. Its owner may have closed it already."""
        if not self._text.buffer.closed:
            self._text.detach()


def is_text(value: str) -> bool:
    """Whether the string has no lone surrogates and no zero bytes."""
    if "\0" in value:
        return False
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return False
    return True
