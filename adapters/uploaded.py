"""What an upload is read as, whatever its form."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.admission import Posted
from models.preprocess import InputError, InputLimits


class BadUpload(ValueError):
    """The upload cannot be read, or not any further; `code` says why, the message where."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Of one upload: examples, and its inputs as anywhere else."""

    max_examples: int = 100_000
    inputs: InputLimits = field(default_factory=InputLimits)


@dataclass(frozen=True, slots=True)
class Record:
    """One example of an upload, and where it stands: "line 17", or the name of its file."""

    place: str
    posted: Posted


def bounded(value: str, limits: InputLimits) -> str | InputError:
    """A text, or why it is too long to be looked at."""
    if len(value) > limits.max_text_chars:
        return InputError("text_too_long", f"A text has at most {limits.max_text_chars:,} characters.")
    return value
