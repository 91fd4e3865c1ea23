"""Conflicts within an upload: the same id with two targets, inputs or groups."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from adapters.examples.target import ExampleError, input_digest
from adapters.examples.upload import Record
from adapters.examples.validation import PostedExample, ValidExample
from models.preprocess.limits import InputError

_CONFLICTING_LABELS = ExampleError(
    "conflicting_labels", "The upload gives this id more than one label; send the right one only."
)
_CONFLICTING_INPUTS = ExampleError(
    "conflicting_inputs", "The upload gives this id more than one input; give each example its own id."
)
_CONFLICTING_GROUPS = ExampleError(
    "conflicting_groups",
    "The upload gives this id more than one `group` or `sampled`; send the right one only.",
)


class UploadConflicts:
    """The conflicts among an upload's examples, of which only digests are kept."""

    def __init__(self) -> None:
        self._seen: dict[str, bytes] = {}
        self._errors: dict[str, ExampleError] = {}

    def add(self, example: ValidExample) -> None:
        """Compare the example with the first one of its id."""
        target, source = _digest(example.target), bytes.fromhex(example.digest)[:16]
        whole = target + source + _digest((example.group, example.sampled))
        before = self._seen.setdefault(example.id, whole)
        if before[:16] != target:
            self._errors[example.id] = _CONFLICTING_LABELS
        elif before[16:32] != source:
            self._errors.setdefault(example.id, _CONFLICTING_INPUTS)
        elif before != whole:
            self._errors.setdefault(example.id, _CONFLICTING_GROUPS)

    def mark(self, record: Record) -> Record:
        """Return the record, with the error in place of the target if its id has a conflict."""
        posted = record.posted
        if not self._errors or isinstance(posted.input, InputError):
            return record
        error = self._errors.get(id_of(posted))
        return record if error is None else Record(record.place, replace(posted, target=error))


def id_of(posted: PostedExample) -> str:
    """Return the id that `admit` gives the example."""
    assert not isinstance(posted.input, InputError)
    return input_digest(posted.input) if posted.id is None else posted.id


def _digest(value: object) -> bytes:
    """Return a 16-byte digest of the value's repr."""
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).digest()[:16]
