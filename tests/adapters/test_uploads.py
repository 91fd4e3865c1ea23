"""Bulk uploads record by record: what is read, what is an error in its place, what ends the reading."""

from __future__ import annotations

import base64
import gc
import io
import json
import struct
import tracemalloc
import zipfile

import pytest

from adapters.admission import Posted
from adapters.example import ExampleError
from adapters.uploaded import BadUpload, UploadLimits
from adapters.uploads import Form, kind_of_upload, records
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
        (b'{"text": "a", "label": "x", "group": 3}', "group_invalid"),
        (b'{"text": "a", "label": "x", "sampled": 1}', "sampled_invalid"),
        (b'{"text": "a", "label": "x", "sampled": "false"}', "sampled_invalid"),
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


@pytest.mark.parametrize("row", [b"x" * 2_000_000, b'"x\n",' * 400_000])
def test_a_row_that_is_too_long_is_not_read_whole(row: bytes) -> None:
    file = io.BytesIO(b"text,label\na,x\n" + row + b"\n")
    found = records("csv", file, LIMITS)
    assert next(found).posted == Posted("a", "x")
    with pytest.raises(BadUpload) as caught:
        next(found)
    assert caught.value.code == "line_too_long"
    assert file.tell() < 100_000


@pytest.mark.filterwarnings("error")
def test_a_table_may_be_left_in_the_middle() -> None:
    file = io.BytesIO(b"text,label\na,x\nb,x\n")
    found = records("csv", file, LIMITS)
    next(found)
    file.close()
    del found
    gc.collect()


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


def test_a_file_packed_by_another_method_is_an_error_in_its_place() -> None:
    """A few bytes of LZMA or bzip2 may be gigabytes; deflated ones are inflated as far as they are wanted."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", b"one", zipfile.ZIP_LZMA)
        archive.writestr("a/2.png", b"two")
    data = buffer.getvalue()
    assert [code(posted) for _, posted in read("zip", data)] == ["invalid_zip", None]
    place = data.index(b"a/1.png") + len(b"a/1.png")
    # Properties that LZMA does not have: not met with, for the file is not even begun.
    broken = data[: place + 4] + b"\xff" * 5 + data[place + 9 :]
    assert [code(posted) for _, posted in read("zip", broken)] == ["invalid_zip", None]


@pytest.mark.parametrize("size", [1_000, 1_000_000], ids=["used", "refused"])
def test_a_zip_that_swells_is_left(size: int) -> None:
    data = zipped({f"a/{number}.png": bytes(size) for number in range(3)})
    assert len(data) < 3_700
    limits = UploadLimits(5, InputLimits(max_image_bytes=len(data) * 4 // 3))
    with pytest.raises(BadUpload, match="times its bytes"):
        read("zip", data, LIMITS if size == 1_000 else limits)


def of_another_version(data: bytes) -> bytes:
    place = data.rindex(b"PK\x01\x02") + 6
    return data[:place] + b"\x63\x00" + data[place + 2 :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 and nothing else",
        zipped({"a/1.png": b"one"})[:-10],
        of_another_version(zipped({"a/1.png": b"one"})),
    ],
)
def test_what_is_no_zip_is_refused(data: bytes) -> None:
    with pytest.raises(BadUpload) as caught:
        read("zip", data)
    assert caught.value.code == "invalid_zip"


FOLDERS = zipped({**{f"{number}/": b"" for number in range(1_100)}, "a/1.png": b"one"})
END = struct.Struct("<4sHHHHLLH")


def with_its_mark_inside(data: bytes) -> bytes:
    """With the signature of the directory's end where the numbers of entries belong."""
    return data[:-14] + b"PK\x05\x06" + data[-10:]


def with_another_end(data: bytes) -> bytes:
    """With a 64-bit end of the directory, which counts, and an ordinary one that says that there is none."""
    *_, entries, size, offset, _ = END.unpack(data[-22:])
    wide = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(data) - 22, 1)
    return data[:-22] + wide + locator + END.pack(b"PK\x05\x06", 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        FOLDERS,
        FOLDERS[:-2] + b"\x03\x00end",
        with_its_mark_inside(FOLDERS),
        with_another_end(FOLDERS),
        zipped({f"{number}" * 60_000: b"" for number in range(6)}),
    ],
    ids=["plain", "comment", "mark", "zip64", "bytes"],
)
def test_a_directory_of_too_many_files_is_not_even_read(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.infolist()) in (6, 1_101)
    with pytest.raises(BadUpload) as caught:
        read("zip", data)
    assert caught.value.code == "too_many_examples"


def test_a_zip_with_a_64_bit_end_is_read() -> None:
    data = with_another_end(zipped({"a/1.png": b"one"}))
    assert read("zip", data) == [("a/1.png", Posted(b"one", "a"))]


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


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ({"text": "a", "label": "image"}, "text"),
        ({"label": "text", "image": "iVBORw0"}, "image"),
        ({"text": 'an "image": of sorts', "image": None, "label": "x"}, "text"),
        ({"label": "image", "text": "long " * 20_000}, "text"),
        ({"id": "text", "image": "iVBORw0" * 10_000}, "image"),
    ],
)
def test_the_kind_is_told_by_the_field_and_not_by_what_is_in_it(line: object, kind: str) -> None:
    assert kind_of_upload("ndjson", lines(line)) == kind
    assert kind_of_upload("ndjson", lines(b"{", line)) == kind


@pytest.mark.parametrize(
    "before",
    [
        {"spam/": b""},
        {"__MACOSX/": b"", "__MACOSX/spam/._1.txt": b"x" * 100},
        {".DS_Store": b"x" * 6_000},
        {"spam/.ipynb_checkpoints/1.png": b"x"},
        {"logo.png": b"x"},
    ],
)
def test_what_systems_put_in_front_does_not_tell_the_kind(before: dict[str, bytes]) -> None:
    files = {**before, "./spam/1.txt": b"one"}
    assert kind_of_upload("zip", zipped(files)) == "text"
    assert ("./spam/1.txt", Posted("one", "spam")) in read("zip", zipped(files))


def test_a_zip_that_was_streamed_tells_its_kind() -> None:
    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:
        archive.writestr(".DS_Store", b"x" * 6_000)
        archive.writestr("spam/1.txt", b"one")
    assert pipe.data[18:22] == bytes(4), "the sizes follow what they are of"
    assert kind_of_upload("zip", pipe.data) == "text"


@pytest.mark.parametrize(
    ("form", "data"), [("ndjson", b"\n"), ("csv", b","), ("zip", b"PK\x03\x04" + bytes(26))]
)
def test_a_large_beginning_takes_little(form: Form, data: bytes) -> None:
    beginning = data * ((16 << 20) // len(data))
    tracemalloc.start()
    try:
        with pytest.raises(BadUpload):
            kind_of_upload(form, beginning)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("form", "data"), [("ndjson", b"\n \n"), ("csv", b"one,two\n"), ("zip", b"Rar!")])
def test_a_beginning_of_something_else_is_refused(form: Form, data: bytes) -> None:
    with pytest.raises(BadUpload):
        kind_of_upload(form, data)


def test_lines_and_rows_say_what_belongs_together_and_what_is_measured_on() -> None:
    data = lines(
        {"text": "a", "label": "x", "group": "g", "sampled": False},
        {"text": "b", "label": "x", "group": None, "sampled": None},
    )
    expected = [Posted("a", "x", None, "g", False), Posted("b", "x")]
    assert [posted for _, posted in read("ndjson", data)] == expected
    table = b"group,text,label,Sampled\ng,a,x,false\n,b,x,\n"
    assert [posted for _, posted in read("csv", table)] == expected


@pytest.mark.parametrize(
    ("word", "sampled"),
    [("true", True), ("TRUE", True), ("1", True), (" ", True), ("False", False), ("0", False)],
)
def test_a_table_says_true_and_false_in_these_words(word: str, sampled: bool) -> None:
    assert read("csv", f"text,label,sampled\na,x,{word}\n".encode())[0][1] == Posted(
        "a", "x", sampled=sampled
    )


@pytest.mark.parametrize("word", ["no", "yes", "2", "falsch"])
def test_another_word_is_an_error_of_its_row(word: str) -> None:
    (_, bad), (_, good) = read("csv", f"id,text,label,sampled\n7,a,x,{word}\n8,b,x,0\n".encode())
    assert (code(bad), bad.id) == ("sampled_invalid", "7")
    assert good == Posted("b", "x", "8", sampled=False)
