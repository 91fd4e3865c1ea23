"""Bulk uploads record by record: what is read, what is an error in its place, what ends the reading."""

from __future__ import annotations

import base64
import io
import json
import zipfile

import pytest

from adapters.admission import Posted
from adapters.example import ExampleError
from adapters.uploads import BadUpload, Form, UploadLimits, kind_of_upload, records
from models.preprocess import InputError, InputLimits

LIMITS = UploadLimits(5, InputLimits(max_image_bytes=1_000, max_text_chars=50))


def read(form: Form, data: bytes, limits: UploadLimits = LIMITS) -> list[tuple[str, Posted]]:
    return [(record.place, record.posted) for record in records(form, io.BytesIO(data), limits)]


def lines(*objects: object) -> bytes:
    return b"".join(
        one + b"\n" if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in objects
    )


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def code(posted: Posted) -> str | None:
    for part in (posted.input, posted.target):
        if isinstance(part, InputError | ExampleError):
            return part.code
    return None


def test_lines_are_read_with_their_numbers_and_blank_ones_skipped() -> None:
    picture = base64.b64encode(b"\x89PNG").decode()
    data = lines({"text": "a", "label": "x", "id": "7"}, b"", {"image": picture, "labels": ["x", "y"]})
    data += b'{"text": "b", "target": 1.5}'
    assert read("ndjson", data) == [
        ("line 1", Posted("a", "x", "7")),
        ("line 3", Posted(b"\x89PNG", ["x", "y"])),
        ("line 4", Posted("b", 1.5)),
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b"{", "invalid_json"),
        (b"\xff", "invalid_json"),
        (b"[" * 100_000, "line_too_long"),
        (b"[" * 50_000, "invalid_json"),
        (b"[1]", "invalid_line"),
        (b'{"txt": "a"}', "invalid_line"),
        (b'{"text": "a", "id": 3}', "id_invalid"),
        (b'{"text": "a", "image": "b"}', "input_missing"),
        (b'{"label": "a"}', "input_missing"),
        (b'{"text": 3}', "input_missing"),
        (b'{"image": "%%%"}', "invalid_base64"),
        (b'{"text": "a", "label": "x", "target": 1}', "label_invalid"),
        (json.dumps({"text": "a" * 51}).encode(), "text_too_long"),
    ],
)
def test_a_line_that_cannot_be_used_is_an_error_in_its_place(line: bytes, wanted: str) -> None:
    (place, bad), (_, good) = read("ndjson", lines(line, {"text": "a", "label": "x"}))
    assert (place, code(bad)) == ("line 1", wanted)
    assert good == Posted("a", "x")


def test_a_table_has_its_columns_by_name() -> None:
    data = '\ufeffLabel, text,id\r\nx,"a, ""b""\nc",1\r\ny,d,\r\n'.encode()
    assert read("csv", data) == [("line 3", Posted('a, "b"\nc', "x", "1")), ("line 4", Posted("d", "y"))]
    assert read("csv", b"text,target\na,2.5\nb,much\n")[0][1] == Posted("a", 2.5)


@pytest.mark.parametrize(
    ("row", "wanted"), [(b"a", "invalid_line"), (b"a,b,c", "invalid_line"), (b"\xff,x", "invalid_text")]
)
def test_a_row_that_cannot_be_used_is_an_error_in_its_place(row: bytes, wanted: str) -> None:
    (place, bad), (_, good) = read("csv", b"text,label\n" + row + b"\na,x\n")
    assert (place, code(bad)) == ("line 2", wanted)
    assert good == Posted("a", "x")


@pytest.mark.parametrize("header", [b"", b"a,b\n", b"text\n", b"text,label,target\n", b"text,label,more\n"])
def test_a_table_without_its_columns_is_refused(header: bytes) -> None:
    with pytest.raises(BadUpload) as caught:
        read("csv", header + b"a,x\n")
    assert caught.value.code == "invalid_csv"


def test_a_zip_has_labels_by_folder() -> None:
    data = zipped(
        {
            "set/cat/1.png": b"one",
            "set/cat/": b"",
            "dog/2.txt": b"two",
            "3.png": b"three",
            "__MACOSX/cat/1.png": b"x",
            "cat/.DS_Store": b"x",
        }
    )
    assert read("zip", data) == [
        ("set/cat/1.png", Posted(b"one", "cat")),
        ("dog/2.txt", Posted("two", "dog")),
        ("3.png", Posted(b"three")),
    ]


def test_a_file_of_a_zip_that_cannot_be_used_is_an_error_in_its_place() -> None:
    data = bytearray(zipped({"a/1.png": b"one" * 50, "a/2.png": b"two", "b/3.png": b"3" * 1_001}, 0))
    place = data.index(b"one")
    data[place] ^= 1
    found = read("zip", bytes(data), UploadLimits(5, InputLimits(max_image_bytes=1_000)))
    assert [code(posted) for _, posted in found] == ["invalid_zip", None, "image_too_large"]
    assert [place for place, _ in found] == ["a/1.png", "a/2.png", "b/3.png"]


def test_a_zip_that_swells_is_left() -> None:
    data = zipped({f"a/{number}.png": bytes(1_000) for number in range(5)})
    assert len(data) < 1_000
    with pytest.raises(BadUpload, match="times its bytes"):
        read("zip", data)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and nothing else", zipped({"a/1.png": b"one"})[:-10]])
def test_what_is_no_zip_is_refused(data: bytes) -> None:
    with pytest.raises(BadUpload) as caught:
        read("zip", data)
    assert caught.value.code == "invalid_zip"


def test_a_directory_of_too_many_files_is_not_even_read() -> None:
    data = bytearray(zipped({"a/1.png": b"one"}))
    place = data.rindex(b"PK\x05\x06") + 12
    data[place : place + 4] = (5 * 1_024 + 1).to_bytes(4, "little")
    with pytest.raises(BadUpload) as caught:
        read("zip", bytes(data))
    assert caught.value.code == "too_many_examples"


@pytest.mark.parametrize("form", ["ndjson", "csv", "zip"])
def test_more_examples_than_allowed_end_the_reading(form: Form) -> None:
    data = {
        "ndjson": lines(*[{"text": "a", "label": "x"}] * 6),
        "csv": b"text,label\n" + b"a,x\n" * 6,
        "zip": zipped({f"x/{number}.png": b"12" for number in range(6)}),
    }[form]
    found = records(form, io.BytesIO(data), LIMITS)
    assert len([next(found) for _ in range(5)]) == 5
    with pytest.raises(BadUpload) as caught:
        next(found)
    assert caught.value.code == "too_many_examples"


def test_the_beginning_says_what_kind_of_inputs_come() -> None:
    assert kind_of_upload("ndjson", b'\n{"text": "a", "label": "x"}\n') == "text"
    assert kind_of_upload("ndjson", b'{"label": "x", "image": "iVBORw0') == "image"
    assert kind_of_upload("csv", b"text,label\n") == "text"
    assert kind_of_upload("zip", zipped({"cat/1.png": b"one"})) == "image"
    assert kind_of_upload("zip", zipped({"cat/1.txt": b"one"})) == "text"


@pytest.mark.parametrize(("form", "data"), [("ndjson", b"\n \n"), ("csv", b"one,two\n"), ("zip", b"Rar!")])
def test_a_beginning_of_something_else_is_refused(form: Form, data: bytes) -> None:
    with pytest.raises(BadUpload):
        kind_of_upload(form, data)
