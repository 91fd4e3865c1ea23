"""Bulk uploads, read record by record: lines of JSON, a CSV table, or a zip of folders of files."""

from __future__ import annotations

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from adapters.admission import Posted
from adapters.encoded import decode_base64
from adapters.example import ExampleError
from adapters.records import Kind
from models.preprocess import InputError, InputLimits

Form = Literal["ndjson", "csv", "zip"]

_FIELDS = frozenset({"id", "image", "text", "label", "labels", "target"})
_TARGETS = ("label", "labels", "target")
# Of a line besides its input: id, label and punctuation.
_REST = 1 << 16
# How much more than its own bytes a zip may hold.
_INFLATION = 4
# What a zip's directory may take for each file: a header, and a long name.
_DIRECTORY_ENTRY = 1 << 10
_DIRECTORY_END = b"PK\x05\x06"
_LONGEST_COMMENT = 1 << 16


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


def kind_of_upload(form: Form, beginning: bytes) -> Kind:
    """Whether an upload is of images or texts, by its first megabytes. Raises BadUpload."""
    if form == "csv":
        _columns(_header(beginning))
        return "text"
    if form == "zip":
        if not beginning.startswith(b"PK\x03\x04"):
            raise BadUpload("invalid_zip", "This is no zip file with anything in it.")
        name_length = int.from_bytes(beginning[26:28], "little")
        return "text" if beginning[30 : 30 + name_length].lower().endswith(b".txt") else "image"
    first = next((line for line in beginning.split(b"\n") if line.strip()), b"")
    if not first:
        raise BadUpload("no_examples", "There is no line in the upload.")
    # Of a line that is longer than the beginning, the names of its fields have to do.
    return "text" if b'"text"' in first and b'"image"' not in first else "image"


def records(form: Form, file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    """The examples of an upload, in its order, each with its input or why it has none.

    file: seekable for a zip. Raises BadUpload where the rest cannot be read, and for too many.
    """
    read = {"ndjson": _lines, "csv": _table, "zip": _files}[form]
    for number, record in enumerate(read(file, limits)):
        if number == limits.max_examples:
            raise BadUpload("too_many_examples", f"An upload has at most {limits.max_examples:,} examples.")
        yield record


def _lines(file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    longest = _REST + max(limits.inputs.max_image_bytes * 4 // 3, limits.inputs.max_text_chars * 12)
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
    given = [name for name in _TARGETS if fields.get(name) is not None]
    target: object = fields[given[0]] if given else None
    if len(given) > 1:
        target = ExampleError("label_invalid", "Give only one of label, labels and target.")
    return Posted(_input_of(fields, limits), target, example_id)


def _input_of(fields: Mapping[str, Any], limits: InputLimits) -> bytes | str | InputError:
    image, text = fields.get("image"), fields.get("text")
    if (image is None) == (text is None):
        return InputError("input_missing", "Give exactly one of image and text.")
    value = text if image is None else image
    if not isinstance(value, str):
        return InputError("input_missing", "An image is base64, a text is text.")
    if image is None:
        return _text(value, limits)
    try:
        return decode_base64(value.encode("utf-8", "surrogatepass"))
    except InputError as error:
        return error


def _text(value: str, limits: InputLimits) -> str | InputError:
    if len(value) > limits.max_text_chars:
        return InputError("text_too_long", f"A text has at most {limits.max_text_chars:,} characters.")
    return value


def _header(beginning: bytes) -> list[str]:
    try:
        line = beginning.split(b"\n", 1)[0].decode("utf-8-sig")
        return next(csv.reader([line.rstrip("\r")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadUpload("invalid_csv", f"The first line is no header of a CSV table: {error}.") from error


def _columns(header: list[str]) -> dict[str, int]:
    """Where each column is. Raises BadUpload unless texts and their targets are there."""
    columns = {name.strip().lower(): place for place, name in enumerate(header)}
    target = len(columns.keys() & {"label", "target"})
    if "text" not in columns or target != 1 or columns.keys() - {"id", "text", "label", "target"}:
        raise BadUpload(
            "invalid_csv",
            "The first line names the columns: text, label (or target), and id if there are.",
        )
    return columns


def _table(file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    # What is no UTF-8 is found row by row.
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    csv.field_size_limit(_REST + limits.inputs.max_text_chars * 12)
    rows = csv.reader(text)
    try:
        columns = _columns(next(rows, []))
        for row in rows:
            if row:
                yield Record(f"line {rows.line_num}", _of_row(row, columns, limits.inputs))
    except csv.Error as error:
        raise BadUpload(
            "invalid_csv", f"The table cannot be read behind line {rows.line_num}: {error}."
        ) from error
    finally:
        text.detach()


def _of_row(row: list[str], columns: Mapping[str, int], limits: InputLimits) -> Posted:
    if len(row) != len(columns):
        return Posted(InputError("invalid_line", f"The row has {len(row)} columns, not {len(columns)}."))
    if any("\udc80" <= character <= "\udcff" for value in row for character in value):
        return Posted(InputError("invalid_text", "The row is not UTF-8."))
    example_id = row[columns["id"]] if "id" in columns else None
    target: object
    if "label" in columns:
        target = row[columns["label"]]
    else:
        try:
            target = float(row[columns["target"]])
        except ValueError:
            target = ExampleError("target_invalid", "The target of a regression example is a number.")
    return Posted(_text(row[columns["text"]], limits), target, example_id or None)


def _files(file: BinaryIO, limits: UploadLimits) -> Iterator[Record]:
    size = file.seek(0, io.SEEK_END)
    _check_directory(file, size, limits)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise BadUpload("invalid_zip", f"The zip file cannot be read: {error}.") from error
    room = _INFLATION * size
    with archive:
        for info in archive.infolist():
            folders = info.filename.replace("\\", "/").split("/")
            if info.is_dir() or folders[0] == "__MACOSX" or folders[-1].startswith("."):
                continue
            content = _content(archive, info, limits.inputs)
            room -= 0 if isinstance(content, InputError) else len(content)
            if room < 0:
                raise BadUpload("invalid_zip", f"The zip file holds more than {_INFLATION} times its bytes.")
            label = folders[-2] if len(folders) > 1 else None
            yield Record(info.filename, Posted(content, label))


def _check_directory(file: BinaryIO, size: int, limits: UploadLimits) -> None:
    """Raises BadUpload for a directory of millions of files, before it is read."""
    file.seek(max(0, size - _LONGEST_COMMENT - 22))
    tail = file.read()
    place = tail.rfind(_DIRECTORY_END)
    length = int.from_bytes(tail[place + 12 : place + 16], "little") if place >= 0 else 0
    if length > limits.max_examples * _DIRECTORY_ENTRY:
        raise BadUpload("too_many_examples", f"An upload has at most {limits.max_examples:,} examples.")
    file.seek(0)


def _content(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, limits: InputLimits
) -> bytes | str | InputError:
    is_text = info.filename.lower().endswith(".txt")
    most = 4 * limits.max_text_chars if is_text else limits.max_image_bytes
    try:
        with archive.open(info) as member:
            # What a header says of the size need not be true.
            content = member.read(most + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        return InputError("invalid_zip", f"The file cannot be read: {error}.")
    if not is_text:
        if len(content) > most:
            return InputError("image_too_large", f"An image has at most {most:,} bytes.")
        return content
    try:
        return _text(content.decode("utf-8-sig"), limits)
    except UnicodeDecodeError as error:
        return InputError("invalid_text", f"The text is not UTF-8: {error.reason} at byte {error.start}.")
