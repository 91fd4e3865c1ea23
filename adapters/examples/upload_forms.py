"""Bulk uploads, read record by record: JSON lines, a CSV table, or a zip of folders."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from adapters.examples.base64_images import decode_base64
from adapters.examples.charset import Lines, encoding_of, is_text
from adapters.examples.target import ExampleError
from adapters.examples.upload import BadUpload, Found, Record, UploadLimits, bounded
from adapters.examples.upload_tables import TARGETS, layout_of, records_of
from adapters.examples.upload_zip import files, kind_of_files
from adapters.examples.validation import PostedExample
from models.preprocess.limits import InputError, InputLimits
from models.spec import Kind

Form = Literal["ndjson", "csv", "zip"]
MEDIA_TYPES: Mapping[str, Form] = {
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
    "application/zip": "zip",
    "application/x-zip-compressed": "zip",
}
"""The form of a bulk upload by its media type."""

_FIELDS = frozenset({"id", "image", "text", "label", "labels", "target", "group", "sampled"})
_KINDS: tuple[Kind, ...] = ("image", "text")
_REST = 1 << 16  # characters of a line besides its input: id, label and punctuation
_BEGINNING = 1 << 16  # bytes from which the kind of an upload is determined
_INPUT_NAME = re.compile(r'"(image|text)"\s*:')


@dataclass(frozen=True, slots=True)
class Beginning:
    """What an upload holds, judging by its beginning."""

    kind: Kind
    target: str | None = None  # field of the target column; tables only


def look_at(form: Form, beginning: bytes, columns: Mapping[str, str] = {}) -> Beginning:
    """Determine what an upload holds from its first 64 KiB. `columns`: see layout_of. Raises BadUpload."""
    if form == "zip":
        return Beginning(kind_of_files(beginning[:_BEGINNING]))
    file = io.BytesIO(beginning[:_BEGINNING])
    lines = Lines(file, encoding_of(file), _BEGINNING)
    if form == "csv":
        return Beginning("text", layout_of(lines, columns).target)
    return Beginning(_kind_of_lines(lines))


def _kind_of_lines(lines: Lines) -> Kind:
    """The kind of the first input, or else of the field name in the last line, which may be truncated."""
    line = ""
    for line in (one for one in lines if isinstance(one, str)):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for kind in _KINDS:
            if isinstance(fields, dict) and fields.get(kind) is not None:
                return kind
    found = _INPUT_NAME.search(line)
    if found is None:
        raise BadUpload("no_examples", "The first lines of the upload have neither an image nor a text.")
    return "image" if found[1] == "image" else "text"


def records(
    form: Form,
    file: BinaryIO,
    limits: UploadLimits,
    columns: Mapping[str, str] = {},
    found: Found | None = None,
) -> Iterator[Record]:
    """Yield the examples of an upload in its order, each with its input or the reason why it has none.

    `file`: seekable, at its beginning. `columns`: of a table, see layout_of. `found`: filled in with the
    format. Raises BadUpload if the rest cannot be read, or if there are too many examples.
    """
    found = Found() if found is None else found
    if form == "zip":
        read = files(file, limits, found)
    else:
        read = _lines(file, limits, found) if form == "ndjson" else _table(file, limits, columns, found)
    for number, record in enumerate(read):
        if number == limits.max_examples:
            raise BadUpload("too_many_examples", f"An upload has at most {limits.max_examples:,} examples.")
        yield record


def _longest_text(limits: InputLimits) -> int:
    """Longest line with a text, in characters. JSON may write a character as two escapes of six each."""
    return _REST + limits.max_text_chars * 12


def _table(
    file: BinaryIO, limits: UploadLimits, columns: Mapping[str, str], found: Found
) -> Iterator[Record]:
    longest = _longest_text(limits.inputs)
    found.encoding = encoding_of(file)
    lines = Lines(file, found.encoding, longest)
    try:
        layout = layout_of(lines, columns)
        found.delimiter, found.columns, found.ignored = layout.delimiter, layout.names, layout.ignored
        yield from records_of(lines, layout, limits.inputs, longest)
    finally:
        lines.close()


def _lines(file: BinaryIO, limits: UploadLimits, found: Found) -> Iterator[Record]:
    longest = max(_longest_text(limits.inputs), _REST + limits.inputs.max_image_bytes * 4 // 3)
    found.encoding = encoding_of(file)
    lines = Lines(file, found.encoding, longest)
    try:
        for line in lines:
            if isinstance(line, InputError):
                yield Record(f"line {lines.number}", PostedExample(line))
            elif line.strip():
                yield Record(f"line {lines.number}", _of_line(line, limits.inputs))
    finally:
        lines.close()


def _of_line(line: str, limits: InputLimits) -> PostedExample:
    if not is_text(line):
        return PostedExample(InputError("invalid_json", "The line is not UTF-8. Send JSON in UTF-8."))
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return PostedExample(InputError("invalid_json", "The line is not valid JSON."))
    if not isinstance(fields, dict) or not fields.keys() <= _FIELDS:
        known = ", ".join(sorted(_FIELDS))
        return PostedExample(
            InputError("invalid_line", f"A line must be a JSON object with some of the fields {known}.")
        )
    example_id = fields.get("id")
    if example_id is not None and not isinstance(example_id, str):
        return PostedExample(InputError("id_invalid", "An id is text."))
    group = fields.get("group")
    if group is not None and not isinstance(group, str):
        return PostedExample(InputError("group_invalid", "A group is text."), id=example_id)
    sampled = True if fields.get("sampled") is None else fields["sampled"]
    if not isinstance(sampled, bool):
        return PostedExample(InputError("sampled_invalid", "`sampled` must be true or false."), id=example_id)
    given = [name for name in TARGETS if fields.get(name) is not None]
    target: object = fields[given[0]] if given else None
    if len(given) > 1:
        target = ExampleError("label_invalid", "Give only one of label, labels and target.")
    return PostedExample(_input_of(fields, limits), target, example_id, group, sampled)


def _input_of(fields: Mapping[str, Any], limits: InputLimits) -> bytes | str | InputError:
    image, text = fields.get("image"), fields.get("text")
    if (image is None) == (text is None):
        return InputError("input_missing", "Give exactly one of image and text.")
    value = text if image is None else image
    if not isinstance(value, str):
        return InputError("input_missing", "`image` must be a base64 string, `text` a string.")
    if image is None:
        return bounded(value, limits)
    try:
        return decode_base64(value)
    except InputError as error:
        return error
