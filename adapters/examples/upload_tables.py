"""Bulk uploads as CSV tables: finding the columns, and reading the rows one by one."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapters.examples.charset import Lines, is_text
from adapters.examples.target import ExampleError
from adapters.examples.upload import BadUpload, Record, bounded, cut
from adapters.examples.validation import PostedExample
from models.preprocess.limits import InputError, InputLimits

TARGETS = ("label", "labels", "target")
"""Fields for the target of a text; a table has a column for exactly one of them."""
COLUMNS = ("text", *TARGETS, "id", "group", "sampled")
"""All fields of an example for which a table may have a column."""

_DELIMITERS = (",", ";", "\t")
_TRUTHS = {"": True, "true": True, "1": True, "false": False, "0": False}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
# Three digits after a comma may be thousands in another locale; in 0,125 they cannot be.
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
# Characters that may be read again after unterminated quotes, beyond the number read so far.
_READ_AGAIN = 16 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a table."""

    delimiter: str
    places: Mapping[str, int]  # column index by field
    names: Mapping[str, str]  # column name by field
    ignored: Sequence[str]  # names of the other columns
    width: int  # number of columns in each row

    @property
    def target(self) -> str:
        """The field of the target: label, labels or target."""
        return next(field for field in TARGETS if field in self.places)


def layout_of(lines: Iterator[str | InputError], asked: Mapping[str, str]) -> Layout:
    """Read the layout from the header: the first line that is not blank, or the next one after `sep=;`.

    `asked`: column names by field, for fields whose column has another name. Case and surrounding spaces are
    ignored. Raises BadUpload.
    """
    delimiters: tuple[str, ...] = _DELIMITERS
    header = _next_filled(lines)
    if header[:4].lower() == "sep=" and len(header.strip("\r\n")) == 5:
        delimiters = (header[4],)
        header = _next_filled(lines)
    rows = {delimiter: _header(header, delimiter) for delimiter in delimiters}
    # The right delimiter yields the known names; if none does, the one that yields most columns is taken.
    delimiter = max(rows, key=lambda one: (_is_table(rows[one], asked), len(rows[one])))
    return _layout(rows[delimiter], delimiter, asked)


def _next_filled(lines: Iterator[str | InputError]) -> str:
    for line in lines:
        if isinstance(line, InputError):
            raise BadUpload("invalid_csv", f"The first line is not the header of a table. {line.detail}")
        if line.strip():
            return line
    return ""


def _header(line: str, delimiter: str) -> list[str]:
    try:
        names = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error as error:
        raise BadUpload(
            "invalid_csv", f"The first line is not the header of a CSV table: {error}."
        ) from error
    if not is_text("".join(names)):
        raise BadUpload("invalid_csv", "The first line is not UTF-8. Save the table as UTF-8.")
    return [name.strip() for name in names]


def _is_table(names: Sequence[str], asked: Mapping[str, str]) -> bool:
    known = set(map(_plain, names))
    targets = [_plain(asked.get(field, field)) for field in TARGETS]
    return _plain(asked.get("text", "text")) in known and any(name in known for name in targets)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _layout(names: Sequence[str], delimiter: str, asked: Mapping[str, str]) -> Layout:
    there = [_plain(name) for name in names]
    targets = [field for field in TARGETS if field in asked] or [field for field in TARGETS if field in there]
    wanted = {field: asked.get(field, field) for field in COLUMNS if field not in TARGETS}
    wanted |= {field: asked.get(field, field) for field in targets}
    has = f"It has: {cut(', '.join(names)) or 'nothing'}."
    places = {}
    for field, name in wanted.items():
        count = there.count(_plain(name))
        if count > 1:
            raise BadUpload("invalid_csv", f"The header has the column {name!r} more than once.")
        if count:
            places[field] = there.index(_plain(name))
        elif field in asked or field == "text":
            text = f"The header has no column {name!r}. {has}"
            hint = "" if field in asked else " Say which column has the texts: text_column=…"
            raise BadUpload("invalid_csv", text + hint)
    if len(targets) != 1:
        text = "The header must have exactly one of the columns label, labels and target."
        raise BadUpload("invalid_csv", f"{text} {has} Name the column: label_column=…")
    if len(set(places.values())) < len(places):
        raise BadUpload("invalid_csv", "One column cannot have two roles. Name another one.")
    return Layout(
        delimiter=delimiter,
        places=places,
        names={field: names[place] for field, place in places.items()},
        ignored=[name for place, name in enumerate(names) if place not in places.values()],
        width=len(names),
    )


def records_of(lines: Lines, layout: Layout, limits: InputLimits, longest: int) -> Iterator[Record]:
    """Yield the rows after the header; the place of a row is the line where it begins.

    A quoted field may contain line breaks. A row is an error if a quoted field does not end, or ends before
    anything but a delimiter or a line end; reading then continues after the row's first line. Raises
    BadUpload if that happens too often.
    """
    rows = _Rows(lines, longest)
    csv.field_size_limit(longest)
    # In strict mode, only a delimiter or a line end may follow a closing quote.
    parser = csv.reader(rows, delimiter=layout.delimiter, strict=True)
    while True:
        rows.begin()
        try:
            row = next(parser)
        except StopIteration:
            return
        except InputError as error:
            yield Record(rows.place, PostedExample(error))
        except (csv.Error, _Endless):
            rows.go_back()
            yield Record(rows.place, PostedExample(_stray_quote()))
        else:
            if len(row) != layout.width and any(row):
                text = f"{rows.extent} has {len(row)} columns, not {layout.width}."
                yield Record(rows.place, PostedExample(InputError("invalid_line", text)))
            elif any(map(str.strip, row)):
                yield Record(rows.place, _posted(row, layout, limits))


def _stray_quote() -> InputError:
    return InputError(
        "stray_quote",
        "A quote is not closed, or stands inside a field. Double it, or remove it.",
    )


class _Endless(Exception):
    """The row is longer than a row may be, or runs into an unreadable line."""


class _Rows:
    """Feeds csv.reader the lines of one row at a time, and takes back lines that it read too far."""

    def __init__(self, lines: Lines, longest: int) -> None:
        self._lines = lines
        self._longest = longest
        self._first = 0
        self._taken: list[tuple[int, str]] = []
        self._back: deque[tuple[int, str | InputError]] = deque()
        self._read = 0
        self._again = 0

    @property
    def place(self) -> str:
        """The line where the row begins."""
        return f"line {self._first}"

    @property
    def extent(self) -> str:
        """The row with its first and last line, for error messages."""
        last = self._taken[-1][0]
        return "The row" if last == self._first else f"The row from line {self._first} to line {last}"

    def begin(self) -> None:
        """Start a new row."""
        self._taken = []
        self._left = self._longest

    def go_back(self) -> None:
        """Take back all lines of the row but the first. Raises BadUpload if that happens too often."""
        self._back.extendleft(reversed(self._taken[1:]))
        self._again += sum(len(line) for _, line in self._taken[1:])
        if self._again > _READ_AGAIN + self._read:
            raise BadUpload("invalid_csv", f"Too many rows have stray quotes; the last is {self.place}.")

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> str:
        """Return the next line. Raises InputError if a row begins with an unreadable one."""
        number, line = self._back.popleft() if self._back else self._new()
        if not self._taken:
            self._first = number
        if isinstance(line, InputError):
            if not self._taken:
                raise line
            self._back.appendleft((number, line))
            raise _Endless
        self._left -= len(line)
        if self._left < 0:
            self._back.appendleft((number, line))
            raise _Endless
        self._taken.append((number, line))
        return line

    def _new(self) -> tuple[int, str | InputError]:
        line = next(self._lines)
        self._read += 0 if isinstance(line, InputError) else len(line)
        return self._lines.number, line


def _posted(row: Sequence[str], layout: Layout, limits: InputLimits) -> PostedExample:
    value = {field: row[place] for field, place in layout.places.items()}
    if not is_text("".join(value.values())):
        return PostedExample(InputError("invalid_text", "The row is not UTF-8. Save the table as UTF-8."))
    example_id = value.get("id") or None
    sampled = _TRUTHS.get(value.get("sampled", "").strip().lower())
    if sampled is None:
        text = "`sampled` must be true, false, 1 or 0; empty means true."
        return PostedExample(InputError("sampled_invalid", text), id=example_id)
    target = _target(layout.target, value[layout.target])
    return PostedExample(
        bounded(value["text"], limits), target, example_id, value.get("group") or None, sampled
    )


def _target(field: str, value: str) -> object:
    """Parse a label, a list of labels or a number. An ExampleError is returned, not raised."""
    try:
        if field == "label":
            return value
        return _labels(value) if field == "labels" else _number(value)
    except ExampleError as error:
        return error


def _labels(value: str) -> Sequence[str]:
    """Parse labels from `red|round` or from a JSON list. Raises ExampleError."""
    if not value.lstrip().startswith("["):
        return value.split("|") if value.strip() else ()
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        text = 'Write labels as red|round, or as a list in JSON: ["red", "round"].'
        raise ExampleError("label_invalid", text)
    return found


def _number(value: str) -> float:
    """Parse a number. A comma that can only be a decimal one, as in 1,5, is accepted. Raises ExampleError."""
    value = value.strip()
    if _THOUSANDS.fullmatch(value):
        ways = f"{value.replace(',', '.')} or {value.replace(',', '')}"
        raise ExampleError("target_invalid", f"{value} has two readings. Write {ways}.")
    try:
        return float(value.replace(",", ".") if _DECIMAL_COMMA.fullmatch(value) else value)
    except ValueError as error:
        text = "The target of a regression must be a number with a decimal point, such as 1.5."
        raise ExampleError("target_invalid", text) from error
