"""Records, limits and errors that all forms of upload share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.defaults import UPLOAD_EXAMPLES
from adapters.examples.validation import PostedExample
from models.errors import CodedError, Invalid
from models.preprocess.limits import InputError, InputLimits

_MOST_CHARACTERS = 200  # longest place or name in a report
_MOST_IGNORED = 100  # most ignored columns in a report


class BadUpload(CodedError, Invalid):
    """The upload cannot be read, or not to its end; `code` says why, the message where."""


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Limits of one upload; the limits of its inputs are the usual ones."""

    max_examples: int = UPLOAD_EXAMPLES
    inputs: InputLimits = field(default_factory=InputLimits)
    # Decompressed bytes that any zip may have; above that, the compression ratio is bounded (zip bombs).
    zip_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One example of an upload and its place: "line 17", or the name of its file."""

    place: str
    posted: PostedExample


@dataclass(slots=True)
class Found:
    """The format of an upload, filled in while its examples are read."""

    encoding: str | None = None  # tables and JSON lines only
    delimiter: str | None = None  # tables only
    columns: Mapping[str, str] = field(default_factory=dict)  # column name by field; tables only
    ignored: Sequence[str] = ()  # names of the other columns; tables only
    encodings: Counter[str] = field(default_factory=Counter)  # text files by encoding; zips only
    skipped: int = 0  # files that an operating system added; zips only

    def format(self) -> dict[str, Any]:
        """How the upload was read, as JSON-able entries; those that its form lacks are left out."""
        found: dict[str, Any] = {}
        if self.encoding is not None:
            found["encoding"] = self.encoding
        if self.encodings:
            found["encodings"] = dict(self.encodings)
        if self.delimiter is not None:
            found["delimiter"] = self.delimiter
            found["columns"] = {name: cut(column) for name, column in self.columns.items()}
            found["ignored_columns"] = [cut(name) for name in self.ignored[:_MOST_IGNORED]]
        return found


def cut(text: str) -> str:
    """Shorten a place or a name to at most 200 characters, for reports."""
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def bounded(value: str, limits: InputLimits) -> str | InputError:
    """The text, or an error if it is too long."""
    return too_long(limits) if len(value) > limits.max_text_chars else value


def too_long(limits: InputLimits) -> InputError:
    """The error for a text that is longer than allowed."""
    return InputError("text_too_long", f"A text has at most {limits.max_text_chars:,} characters.")
