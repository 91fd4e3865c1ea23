"""Bulk uploads, read record by record: lines of JSON, a CSV table, or a zip of folders of files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, Literal

from adapters.admission import Posted
from adapters.encoded import decode_base64
from adapters.example import ExampleError
from adapters.records import Kind
from adapters.uploaded import BadUpload, Record, UploadLimits, bounded
from adapters.zips import files, kind_of_files
from models.preprocess import InputError, InputLimits

Form = Literal["ndjson", "csv", "zip"]

_FIELDS = frozenset({"id", "image", "text", "label", "labels", "target", "group", "sampled"})
_COLUMNS = frozenset({"id", "text", "label", "target", "group", "sampled"})
_TRUTHS = {"": True, "true": True, "1": True, "false": False, "0": False}
_KINDS: tuple[Kind, ...] = ("image", "text")
_TARGETS = ("label", "labels", "target")
# Of a line besides its input: id, label and punctuation.
_REST = 1 << 16
# What says of which kind an upload is.
_BEGINNING = 1 << 16
_INPUT_NAME = re.compile(rb'"(image|text)"\s*:')


def kind_of_upload(form: Form, beginning: bytes) -> Kind:
    """Whether an upload is of images or texts, by its first 64 KiB. Raises BadUpload."""
    beginning = beginning[:_BEGINNING]
    if form == "csv":
        _columns(_header(beginning))
        return "text"
    return _kind_of_lines(beginning) if form == "ndjson" else kind_of_files(beginning)


def _kind_of_lines(beginning: bytes) -> Kind:
    """By the first line that has an input. Of one that is cut off, the name of a field has to do."""
    lines = beginning.split(b"\n")
    for line in lines:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for kind in _KINDS:
            if isinstance(fields, dict) and fields.get(kind) is not None:
                return kind
    found = _INPUT_NAME.search(lines[-1])
    if found is None:
        raise BadUpload("no_examples", "No line at the beginning of the upload has an image or a text.")
    return "image" if found[1] == b"image" else "text"


def records(form: Form, file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    """The examples of an upload, in its order, each with its input or why it has none.

    file: seekable for a zip. Raises BadUpload where the rest cannot be read, and for too many.
    """
    read = {"ndjson": _lines, "csv": _table, "zip": files}[form]
    for number, record in enumerate(read(file, limits)):
        if number == limits.max_examples:
            raise BadUpload("too_many_examples", f"An upload has at most {limits.max_examples:,} examples.")
        yield record


def _longest_text(limits: InputLimits) -> int:
    """Of a line with a text, of which JSON may write a character as two escapes of six bytes."""
    return _REST + limits.max_text_chars * 12


def _lines(file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    longest = max(_longest_text(limits.inputs), _REST + limits.inputs.max_image_bytes * 4 // 3)
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        place = f"line {number}"
        if len(line) > longest:
            while line and not line.endswith(b"\n"):
                line = file.readline(longest)
            error = InputError("line_too_long", f"A line has at most {longest:,} bytes.")
            yield Record(place, Posted(error))
        elif line.strip():
            yield Record(place, _of_line(line, limits.inputs))


def _of_line(line: bytes, limits: InputLimits) -> Posted:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return Posted(InputError("invalid_json", "The line is not JSON in UTF-8."))
    if not isinstance(fields, dict) or not fields.keys() <= _FIELDS:
        known = ", ".join(sorted(_FIELDS))
        return Posted(InputError("invalid_line", f"A line is an object with some of the fields {known}."))
    example_id = fields.get("id")
    if example_id is not None and not isinstance(example_id, str):
        return Posted(InputError("id_invalid", "An id is text."))
    group = fields.get("group")
    if group is not None and not isinstance(group, str):
        return Posted(InputError("group_invalid", "A group is text."), id=example_id)
    sampled = True if fields.get("sampled") is None else fields["sampled"]
    if not isinstance(sampled, bool):
        return Posted(InputError("sampled_invalid", "`sampled` is true or false."), id=example_id)
    given = [name for name in _TARGETS if fields.get(name) is not None]
    target: object = fields[given[0]] if given else None
    if len(given) > 1:
        target = ExampleError("label_invalid", "Give only one of label, labels and target.")
    return Posted(_input_of(fields, limits), target, example_id, group, sampled)


def _input_of(fields: Mapping[str, Any], limits: InputLimits) -> bytes | str | InputError:
    image, text = fields.get("image"), fields.get("text")
    if (image is None) == (text is None):
        return InputError("input_missing", "Give exactly one of image and text.")
    value = text if image is None else image
    if not isinstance(value, str):
        return InputError("input_missing", "An image is base64, a text is text.")
    if image is None:
        return bounded(value, limits)
    try:
        return decode_base64(value.encode("utf-8", "surrogatepass"))
    except InputError as error:
        return error


def _header(beginning: bytes) -> list[str]:
    try:
        return next(csv.reader([re.split(rb"[\r\n]", beginning, maxsplit=1)[0].decode("utf-8-sig")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadUpload("invalid_csv", f"The first line is no header of a CSV table: {error}.") from error


def _columns(header: list[str]) -> dict[str, int]:
    """Where each column is. Raises BadUpload unless texts and their targets are there."""
    columns = {name.strip().lower(): place for place, name in enumerate(header)}
    target = len(columns.keys() & {"label", "target"})
    if "text" not in columns or target != 1 or columns.keys() - _COLUMNS:
        raise BadUpload(
            "invalid_csv",
            "The first line names the columns: text, label (or target), and maybe id, group and sampled.",
        )
    return columns


class _Rows:
    """The lines of a table for csv.reader, which would hold a row of any length. Raises BadUpload."""

    def __init__(self, text: io.TextIOWrapper, longest: int) -> None:
        self._text = text
        self._longest = self._left = longest

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                raise BadUpload("line_too_long", f"A row has at most {self._longest:,} characters.")
            yield line

    def next_row(self) -> None:
        """The lines that follow are of another row."""
        self._left = self._longest


def _table(file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    # What is no UTF-8 is found row by row.
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    longest = _longest_text(limits.inputs)
    csv.field_size_limit(longest)
    lines = _Rows(text, longest)
    rows = csv.reader(lines)
    try:
        columns = _columns(next(rows, []))
        lines.next_row()
        for row in rows:
            lines.next_row()
            if row:
                yield Record(f"line {rows.line_num}", _of_row(row, columns, limits.inputs))
    except csv.Error as error:
        raise BadUpload(
            "invalid_csv", f"The table cannot be read behind line {rows.line_num}: {error}."
        ) from error
    finally:
        # Who stops in the middle may have closed the file.
        with suppress(ValueError):
            text.detach()


def _of_row(row: list[str], columns: Mapping[str, int], limits: InputLimits) -> Posted:
    if len(row) != len(columns):
        return Posted(InputError("invalid_line", f"The row has {len(row)} columns, not {len(columns)}."))
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return Posted(InputError("invalid_text", "The row is not UTF-8."))
    example_id = row[columns["id"]] if "id" in columns else ""
    group = row[columns["group"]] if "group" in columns else ""
    sampled = _TRUTHS.get(row[columns["sampled"]].strip().lower() if "sampled" in columns else "")
    if sampled is None:
        text = "`sampled` is true, false, 1, 0, or empty for true."
        return Posted(InputError("sampled_invalid", text), id=example_id or None)
    target: object
    if "label" in columns:
        target = row[columns["label"]]
    else:
        try:
            target = float(row[columns["target"]])
        except ValueError:
            target = ExampleError("target_invalid", "The target of a regression example is a number.")
    return Posted(bounded(row[columns["text"]], limits), target, example_id or None, group or None, sampled)
