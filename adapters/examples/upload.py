"""What an upload is read as, whatever its form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.examples.validation import PostedExample
from models.preprocess.preprocessor import InputError, InputLimits

_MOST_CHARACTERS = 200
_MOST_IGNORED = 100


class BadUpload(ValueError):
    """The upload cannot be read, or not any further; `code` says why, the message where."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Of one upload: examples, and its inputs as anywhere else.

    zip_bytes: what a zip may hold however small it is; beyond that, it is taken for one that only swells.
    """

    max_examples: int = 100_000
    inputs: InputLimits = field(default_factory=InputLimits)
    zip_bytes: int = 256 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One example of an upload, and where it stands: "line 17", or the name of its file."""

    place: str
    posted: PostedExample


@dataclass(slots=True)
class Found:
    """What reading an upload has found out so far, besides its examples.

    encoding: of a table, or of lines. delimiter, columns (by field), ignored (other columns): of a table.
    encodings: how many text files of a zip are in which. skipped: files of a zip that no person put there.
    """

    encoding: str | None = None
    delimiter: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    encodings: Counter[str] = field(default_factory=Counter)
    skipped: int = 0

    def format(self) -> dict[str, Any]:
        """How the upload was read, for JSON; without what its form does not have."""
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
    """The text, or its beginning: what is told of a place or a name is short."""
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def bounded(value: str, limits: InputLimits) -> str | InputError:
    """A text, or why it is too long to be looked at."""
    return too_long(limits) if len(value) > limits.max_text_chars else value


def too_long(limits: InputLimits) -> InputError:
    """The error of a text that is longer than allowed."""
    return InputError("text_too_long", f"A text has at most {limits.max_text_chars:,} characters.")
