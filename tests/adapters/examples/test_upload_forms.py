"""Bulk uploads record by record: what is read, what is an error in its place, what ends the reading."""

from __future__ import annotations

import base64
import csv
import gc
import io
import json
import struct
import time
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest

from adapters.examples.target import ExampleError
from adapters.examples.upload import BadUpload, Found, Record, UploadLimits
from adapters.examples.upload_forms import Form, look_at, records
from adapters.examples.validation import PostedExample
from models.preprocess.limits import InputError, InputLimits

LIMITS = UploadLimits(5, InputLimits(max_image_bytes=1_000, max_text_chars=50))
WIDE = UploadLimits(10**6, LIMITS.inputs)


def read(form: Form, data: bytes, limits: UploadLimits = LIMITS) -> list[tuple[str, PostedExample]]:
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


def code(posted: PostedExample) -> str | None:
    for part in (posted.input, posted.target):
        if isinstance(part, InputError | ExampleError):
            return part.code
    return None


def test_lines_are_read_with_their_numbers_and_blank_ones_skipped() -> None:
    picture = base64.b64encode(b"\x89PNG").decode()
    data = lines({"text": "a", "label": "x", "id": "7"}, b"", {"image": picture, "labels": ["x", "y"]})
    data += b'{"text": "b", "target": 1.5}'
    assert read("ndjson", data) == [
        ("line 1", PostedExample("a", "x", "7")),
        ("line 3", PostedExample(b"\x89PNG", ["x", "y"])),
        ("line 4", PostedExample("b", 1.5)),
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
    assert good == PostedExample("a", "x")


def test_a_table_has_its_columns_by_name() -> None:
    data = '\ufeffLabel, text,id\r\nx,"a, ""b""\nc",1\r\ny,d,\r\n'.encode()
    assert read("csv", data) == [
        ("line 2", PostedExample('a, "b"\nc', "x", "1")),
        ("line 4", PostedExample("d", "y")),
    ]
    assert read("csv", b"text,target\na,2.5\nb,much\n")[0][1] == PostedExample("a", 2.5)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (b"a", "invalid_line"),
        (b"a,b,c", "invalid_line"),
        (b'"a\nb",c,d', "invalid_line"),
        (b"\xe4\xff,x", "invalid_text"),
        (b"a\0,x", "invalid_text"),
        (b'"a,x', "stray_quote"),
        (b'"a" b,x', "stray_quote"),
        (b'"say "hi" to all",x', "stray_quote"),
        (b"b" * 100_000 + b",x", "line_too_long"),
        (b'"b' + b"b" * 70_000 + b",x", "line_too_long"),
        (b"b" * 60 + b",x", "text_too_long"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_in_its_place(row: bytes, wanted: str) -> None:
    data = "text,label\nä,x\n".encode() + row + b'\r\n\r\n,\n5" a,"x"\n"b\n""c""",x'
    first, (place, bad), *others = read("csv", data)
    assert first == ("line 2", PostedExample("ä", "x"))
    assert (place, code(bad)) == ("line 3", wanted)
    assert [posted for _, posted in others] == [PostedExample('5" a', "x"), PostedExample('b\n"c"', "x")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_a_program_writes_is_read_as_it_was(delimiter: str) -> None:
    """Any field content is read, in every encoding that can hold it."""
    random = Random(1)
    for round_ in range(200):
        texts = [
            "".join(random.choices([*'ab ",;\t\n"', "é "], k=random.randint(1, 12))) + "." for _ in range(8)
        ]
        file = io.StringIO(newline="")
        writer = csv.writer(file, delimiter=delimiter, lineterminator=random.choice(["\n", "\r\n"]))
        if round_ % 2:
            writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([["label", "text"], *(["x", text] for text in texts)])
        for encoding in ("utf-8", "utf-16", "cp1252"):
            data = file.getvalue().encode(encoding)
            assert [posted.input for _, posted in read("csv", data, WIDE)] == texts, data


def test_no_table_ends_in_anything_but_examples_and_errors() -> None:
    random = Random(2)
    for _ in range(2_000):
        rows = "".join(random.choices(['"', ",", "\n", "a", '""', ";", "\r", "\0", "é", "\t"], k=40))
        data = ("text,label\n" + rows).encode(random.choice(["utf-8", "utf-16", "cp1252"]))
        data = data[: len(data) - random.randint(0, 2)]
        with suppress(BadUpload):
            for place, posted in read("csv", data, WIDE):
                assert place.startswith("line ")
                assert isinstance(posted.input, str | InputError)


def test_an_open_quote_is_an_error_of_its_row_alone() -> None:
    """The rows after it are read, with quotes, with lines, and with another open quote."""
    table = 'text,label\n"one,x\ntwo,y\n"three, 3",x\n"four\nlines",y\n"five,x\nsix,"y"\n'
    found = [(place, code(posted) or posted.input) for place, posted in read("csv", table.encode(), WIDE)]
    assert found == [
        ("line 2", "stray_quote"),
        ("line 3", "two"),
        ("line 4", "three, 3"),
        ("line 5", "four\nlines"),
        ("line 7", "stray_quote"),
        ("line 8", "six"),
    ]


def test_a_quote_that_never_ends_is_looked_for_in_the_length_of_a_row() -> None:
    longest = (1 << 16) + 12 * 50
    file = io.BytesIO(b'text,label\n"a,x\n' + b"a,x\n" * 200_000)
    found = records("csv", file, WIDE)
    assert code(next(found).posted) == "stray_quote"
    assert file.tell() < 2 * longest
    assert next(found) == Record("line 3", PostedExample("a", "x"))


@pytest.mark.parametrize("row", [b"x" * 5_000_000, b'"x\n",' * 50_000])
def test_a_row_that_is_too_long_is_not_held(row: bytes) -> None:
    file = io.BytesIO(b"text,label\na,x\n" + row + b"\nb,x\n")
    tracemalloc.start()
    try:
        codes = Counter(code(one.posted) for one in records("csv", file, WIDE))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert codes.pop(None) == 2
    assert codes.keys() <= {"line_too_long", "stray_quote", "invalid_line"}


def test_rows_are_not_read_again_and_again() -> None:
    """Lines that keep a quote open, whether or not one is: each would be read for each before it."""
    data = b"text,label\n" + b'a",b,"\n' * 60_000
    begun = time.process_time()
    with pytest.raises(BadUpload, match="stray quotes"):
        read("csv", data, UploadLimits(10**6))
    assert time.process_time() - begun < 30.0


@pytest.mark.filterwarnings("error")
def test_a_table_may_be_left_in_the_middle() -> None:
    file = io.BytesIO(b"text,label\na,x\nb,x\n")
    found = records("csv", file, LIMITS)
    next(found)
    file.close()
    del found
    gc.collect()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\n \n",
        b"a,b\n",
        b"text\n",
        b"text,label,target\n",
        b"text,label,labels\n",
        b"text,Text,label\n",
        b"text,label\0\n",
        b"text,label,\x81\n",
        b"x" * 100_000,
    ],
)
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
        ("set/cat/1.png", PostedExample(b"one", "cat")),
        ("dog/2.txt", PostedExample("two", "dog")),
        ("3.png", PostedExample(b"three")),
    ]


def test_a_file_of_a_zip_that_cannot_be_used_is_an_error_in_its_place() -> None:
    data = bytearray(zipped({"a/1.png": b"one" * 50, "a/2.png": b"two", "b/3.png": b"3" * 1_001}, 0))
    place = data.index(b"one")
    data[place] ^= 1
    found = read("zip", bytes(data), UploadLimits(5, InputLimits(max_image_bytes=1_000)))
    assert [code(posted) for _, posted in found] == ["invalid_zip", None, "image_too_large"]
    assert [place for place, _ in found] == ["a/1.png", "a/2.png", "b/3.png"]


def test_a_file_packed_by_another_method_is_an_error_in_its_place() -> None:
    """LZMA and bzip2 can unpack to gigabytes; deflate is unpacked only as far as needed."""
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


@pytest.mark.parametrize("size", [5_000, 1_000_000], ids=["used", "refused"])
def test_a_zip_that_swells_is_left(size: int) -> None:
    data = zipped({f"a/{number}.png": bytes(size) for number in range(3)})
    assert len(data) < 3_300
    limits = UploadLimits(5, InputLimits(max_image_bytes=20_000), zip_bytes=14_999)
    with pytest.raises(BadUpload, match="times its own"):
        read("zip", data, limits)
    # A ratio says nothing of what is small.
    codes = [code(posted) for _, posted in read("zip", data, replace(limits, zip_bytes=70_000))]
    assert codes == [None if size == 5_000 else "image_too_large"] * 3


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    """A few hundred kilobytes of which each file is as large as one may be."""
    data = zipped({f"a/{number}.txt": bytes(400_000) for number in range(1_000)})
    assert len(data) < 600_000
    tracemalloc.start()
    try:
        found = records("zip", io.BytesIO(data), UploadLimits())
        count = UploadLimits().zip_bytes // 400_000
        for _ in range(count):
            next(found)
        with pytest.raises(BadUpload, match="times its own"):
            next(found)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def plain(name: str, encoding: str) -> bytes:
    """A zip whose only file has a name in another encoding and no word of that, as `zip -r` leaves it."""
    raw = name.encode(encoding)
    data = bytearray(zipped({"x" * len(raw): b"one"}))
    for _ in range(2):
        place = data.index(b"x" * len(raw))
        data[place : place + len(raw)] = raw
    return bytes(data)


@pytest.mark.parametrize("name", ["Käse/1.txt", "Ka\u0308se/1.txt", "Größe \u20ac/2.txt", "食べ物/3.txt"])
def test_names_without_the_flag_are_utf8(name: str) -> None:
    normal = unicodedata.normalize("NFC", name)
    assert read("zip", plain(name, "utf-8")) == [(normal, PostedExample("one", normal.split("/")[0]))]
    assert read("zip", zipped({name: b"one"})) == [(normal, PostedExample("one", normal.split("/")[0]))]


@pytest.mark.parametrize("encoding", ["cp437", "cp850", "latin-1"])
def test_a_name_that_is_not_utf8_is_refused_with_it(encoding: str) -> None:
    ((place, posted),) = read("zip", plain("Käse/1.txt", encoding))
    assert code(posted) == "invalid_name"
    assert place == {"latin-1": "K\\xe4se/1.txt"}.get(encoding, "K\\x84se/1.txt")


def test_a_name_may_stand_beside_as_utf8() -> None:
    """As Info-ZIP writes it where the system has another code page, with a checksum of the other name."""
    raw, meant = "Käse/1.txt".encode("cp850"), "Käse/1.txt".encode()
    for checksum, wanted in ((zlib.crc32(raw), None), (1, "invalid_name")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            info = zipfile.ZipInfo("x" * len(raw))
            info.extra = struct.pack("<HHBL", 0x7075, 5 + len(meant), 1, checksum) + meant
            archive.writestr(info, b"one")
        ((place, posted),) = read("zip", buffer.getvalue().replace(b"x" * len(raw), raw))
        assert code(posted) == wanted
        assert wanted or (place, posted.target) == ("Käse/1.txt", "Käse")


def test_a_name_with_a_wrong_flag_is_named() -> None:
    data = zipped({"ä/1.png": b"one"}).replace("ä".encode(), b"\xe4\xe4")
    with pytest.raises(BadUpload, match=r"\\xe4\\xe4/1.png"):
        read("zip", data)


def test_what_systems_leave_behind_is_skipped_and_counted() -> None:
    left = [
        "__MACOSX/cat/._1.png",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "DESKTOP.INI",
        ".git/config",
        "a/.b/1.png",
    ]
    found = Found()
    data = zipped({"cat/": b"", ".x/": b"", **dict.fromkeys(left, b"x"), "cat/1.png": b"one"})
    assert [one.place for one in records("zip", io.BytesIO(data), LIMITS, found=found)] == ["cat/1.png"]
    assert found.skipped == len(left)


def test_texts_of_a_zip_are_in_any_of_the_encodings() -> None:
    text = "Über die Größe"
    files = {f"a/{name}.txt": text.encode(name) for name in ("utf-8", "utf-8-sig", "utf-16", "cp1252")}
    found = Found()
    data = zipped({**files, "a/shift.txt": "食べ物".encode("shift-jis"), "a/1.png": b"one"})
    posted = [one.posted for one in records("zip", io.BytesIO(data), WIDE, found=found)]
    assert posted[:4] == [PostedExample(text, "a")] * 4
    assert code(posted[4]) == "invalid_text"
    assert found.format() == {"encodings": {"utf-8": 2, "utf-16-le": 1, "windows-1252": 1}}


@pytest.mark.parametrize(
    ("place", "value", "detail"),
    [(8, 1, "password"), (10, 9, "deflate64"), (10, 12, "bzip2"), (10, 14, "lzma"), (10, 93, "method 93")],
)
def test_a_file_that_cannot_be_opened_says_what_to_do(place: int, value: int, detail: str) -> None:
    data = bytearray(zipped({"a/1.png": b"one", "a/2.png": b"two"}))
    for header, begin in ((b"PK\x01\x02", place), (b"PK\x03\x04", place - 2)):
        at = data.index(header) + begin
        data[at : at + 2] = struct.pack("<H", value)
    (_, bad), (_, good) = read("zip", bytes(data))
    assert isinstance(bad.input, InputError)
    assert (bad.input.code, detail in bad.input.detail) == ("invalid_zip", True)
    assert good == PostedExample(b"two", "a")


def test_a_link_is_not_what_it_leads_to() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("a/1.txt")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, b"../../etc/passwd")
    assert [code(posted) for _, posted in read("zip", buffer.getvalue())] == ["invalid_zip"]


def test_a_zip_with_64_bit_sizes_is_read() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "b/2.png"):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(b"one")
    assert look_at("zip", buffer.getvalue()).kind == "image"
    assert read("zip", buffer.getvalue()) == [
        ("a/1.png", PostedExample(b"one", "a")),
        ("b/2.png", PostedExample(b"one", "b")),
    ]


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
    """An end record with its own signature in place of the numbers of entries."""
    return data[:-14] + b"PK\x05\x06" + data[-10:]


def with_another_end(data: bytes) -> bytes:
    """A 64-bit end record, which counts, and an ordinary one that denies it."""
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
    assert read("zip", data) == [("a/1.png", PostedExample(b"one", "a"))]


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
    assert look_at("ndjson", b'\n{"text": "a", "label": "x"}\n').kind == "text"
    assert look_at("ndjson", b'{"label": "x", "image": "iVBORw0').kind == "image"
    assert look_at("csv", b"text,label\n").kind == "text"
    assert look_at("zip", zipped({"cat/1.png": b"one"})).kind == "image"
    assert look_at("zip", zipped({"cat/1.txt": b"one"})).kind == "text"


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
    assert look_at("ndjson", lines(line)).kind == kind
    assert look_at("ndjson", lines(b"{", line)).kind == kind


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
    assert look_at("zip", zipped(files)).kind == "text"
    assert ("./spam/1.txt", PostedExample("one", "spam")) in read("zip", zipped(files))


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
    assert look_at("zip", pipe.data).kind == "text"


@pytest.mark.parametrize(
    ("form", "data"), [("ndjson", b"\n"), ("csv", b","), ("zip", b"PK\x03\x04" + bytes(26))]
)
def test_a_large_beginning_takes_little(form: Form, data: bytes) -> None:
    beginning = data * ((16 << 20) // len(data))
    tracemalloc.start()
    try:
        with pytest.raises(BadUpload):
            look_at(form, beginning)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("form", "data"), [("ndjson", b"\n \n"), ("csv", b"one,two\n"), ("zip", b"Rar!")])
def test_a_beginning_of_something_else_is_refused(form: Form, data: bytes) -> None:
    with pytest.raises(BadUpload):
        look_at(form, data)


def test_lines_and_rows_say_what_belongs_together_and_what_is_measured_on() -> None:
    data = lines(
        {"text": "a", "label": "x", "group": "g", "sampled": False},
        {"text": "b", "label": "x", "group": None, "sampled": None},
    )
    expected = [PostedExample("a", "x", None, "g", False), PostedExample("b", "x")]
    assert [posted for _, posted in read("ndjson", data)] == expected
    table = b"group,text,label,Sampled\ng,a,x,false\n,b,x,\n"
    assert [posted for _, posted in read("csv", table)] == expected


@pytest.mark.parametrize(
    ("word", "sampled"),
    [("true", True), ("TRUE", True), ("1", True), (" ", True), ("False", False), ("0", False)],
)
def test_a_table_says_true_and_false_in_these_words(word: str, sampled: bool) -> None:
    assert read("csv", f"text,label,sampled\na,x,{word}\n".encode())[0][1] == PostedExample(
        "a", "x", sampled=sampled
    )


@pytest.mark.parametrize("word", ["no", "yes", "2", "falsch"])
def test_another_word_is_an_error_of_its_row(word: str) -> None:
    (_, bad), (_, good) = read("csv", f"id,text,label,sampled\n7,a,x,{word}\n8,b,x,0\n".encode())
    assert (code(bad), bad.id) == ("sampled_invalid", "7")
    assert good == PostedExample("b", "x", "8", sampled=False)


TABLE = "Text;Prüfung;Bemerkung\r\nKäse ist schön;süß;–\r\n\r\nÄpfel auch; süß ;\r\n;;\r\n"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (TABLE.encode(), "utf-8"),
        (TABLE.encode("utf-8-sig"), "utf-8"),
        (TABLE.encode("cp1252"), "windows-1252"),
        (TABLE.encode("utf-16"), "utf-16-le"),
        (TABLE.encode("utf-16-le"), "utf-16-le"),
        (TABLE.encode("utf-16-be"), "utf-16-be"),
        (b"\xfe\xff" + TABLE.encode("utf-16-be"), "utf-16-be"),
    ],
)
@pytest.mark.parametrize("delimiter", [";", ",", "\t"])
def test_encoding_and_delimiter_are_found_out_and_told(data: bytes, encoding: str, delimiter: str) -> None:
    names = {";": b";", ",": b",", "\t": b"\t"}
    wide = {"utf-16-le": b";\0", "utf-16-be": b"\0;"}.get(encoding, b";")
    data = data.replace(wide, wide.replace(b";", names[delimiter]))
    asked = {"label": " prüfung"}
    assert look_at("csv", data, asked).target == "label"
    found = Found()
    posted = [(one.place, one.posted) for one in records("csv", io.BytesIO(data), LIMITS, asked, found)]
    assert posted == [
        ("line 2", PostedExample("Käse ist schön", "süß")),
        ("line 4", PostedExample("Äpfel auch", " süß ")),
    ]
    assert found.format() == {
        "encoding": encoding,
        "delimiter": delimiter,
        "columns": {"text": "Text", "label": "Prüfung"},
        "ignored_columns": ["Bemerkung"],
    }


def test_the_first_line_of_excel_names_the_delimiter() -> None:
    data = b"sep=;\r\ntext, more;label\r\na, b;x\r\n"
    assert read("csv", data.replace(b", more", b"")) == [("line 3", PostedExample("a, b", "x"))]
    found = list(records("csv", io.BytesIO(data), LIMITS, {"text": "text, more"}))
    assert found == [Record("line 3", PostedExample("a, b", "x"))]
    # A table of nothing but this is one all the same.
    assert read("csv", b"sep=|\ntext|label\na;b|x,y\n") == [("line 3", PostedExample("a;b", "x,y"))]


@pytest.mark.parametrize(
    ("header", "asked", "said"),
    [
        (b"body,label", {}, "text_column"),
        (b"text,class", {}, "label_column"),
        (b"text,label,target", {}, "label_column"),
        (b"text,label", {"text": "body"}, "'body'"),
        (b"text,label", {"label": "class"}, "'class'"),
        (b"text,label", {"label": "label", "target": "label"}, "exactly one"),
        (b"text,label", {"label": "text"}, "two roles"),
        (b"text,label", {"id": "key"}, "'key'"),
        (b"text,a,A,label", {"group": "a"}, "more than once"),
    ],
)
def test_a_column_that_is_not_there_is_named(header: bytes, asked: dict[str, str], said: str) -> None:
    with pytest.raises(BadUpload, match=said) as caught:
        look_at("csv", header + b"\na,x\n", asked)
    assert caught.value.code == "invalid_csv"


def test_columns_are_named_by_the_sender() -> None:
    data = b"Ticket,Body,text,Topic,label,Customer\n7,a,b,x,y,c\n"
    asked = {"id": "ticket", "text": "Body", "label": "topic", "group": "customer"}
    assert list(records("csv", io.BytesIO(data), LIMITS, asked)) == [
        Record("line 2", PostedExample("a", "x", "7", "c"))
    ]
    assert look_at("csv", data, {"text": "body", "target": "label"}).target == "target"


def test_several_labels_stand_in_one_column() -> None:
    data = b'text,labels\na,red| round\nb,\nc,"[""red"", ""a|b""]"\nd,[red]\n'
    targets = [posted.target for _, posted in read("csv", data)]
    assert targets[:3] == [["red", " round"], (), ["red", "a|b"]]
    assert isinstance(targets[3], ExampleError)
    assert "red|round" in targets[3].detail


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1.5", 1.5),
        (" -2 ", -2.0),
        ("1,5", 1.5),
        ("-0,125", -0.125),
        ("1234,567", 1234.567),
        ("1,2345", 1.2345),
        ("1e3", 1000.0),
    ],
)
def test_a_target_may_have_a_decimal_comma(written: str, value: float) -> None:
    for data in (
        f"text;target\na;{written}\n",
        f'text,target\na,"{written}"\n',
        f"text\ttarget\na\t{written}\n",
    ):
        assert read("csv", data.encode()) == [("line 2", PostedExample("a", value))]


@pytest.mark.parametrize(
    ("written", "said"),
    [("1,234", "1.234 or 1234"), ("1.234,5", "1.5"), ("1,2,3", "1.5"), ("", "1.5"), ("much", "1.5")],
)
def test_a_target_that_is_no_clear_number_says_how_to_write_it(written: str, said: str) -> None:
    ((_, posted),) = read("csv", f"text;target\na;{written}\n".encode())
    assert isinstance(posted.target, ExampleError)
    assert posted.target.code == "target_invalid"
    assert said in posted.target.detail


@pytest.mark.parametrize("encoding", ["cp1251", "shift-jis", "gbk", "cp850", "mac-roman"])
def test_text_of_another_encoding_is_not_taken_for_windows_1252(encoding: str) -> None:
    texts = {
        "cp1251": "Привет, как дела",
        "shift-jis": "こんにちは世界",
        "gbk": "你好世界",
        "cp850": "Die schöne Größe für später",
        "mac-roman": "Die schöne Größe für später überall",
    }
    data = f'text,label\n"{texts[encoding]}",x\nplain,x\n'.encode(encoding)
    found = Found()
    (_, bad), (_, good) = [
        (one.place, one.posted) for one in records("csv", io.BytesIO(data), LIMITS, found=found)
    ]
    assert (code(bad), good, found.encoding) == ("invalid_text", PostedExample("plain", "x"), "utf-8")


def test_what_comes_late_in_a_large_table_tells_its_encoding() -> None:
    data = b"text,label\n" + b"a,x\n" * 200_000 + "schön,y\n".encode("cp1252")
    *_, last = records("csv", io.BytesIO(data), WIDE)
    assert last == Record("line 200002", PostedExample("schön", "y"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_of_json_come_in_any_of_the_encodings(encoding: str, ending: str) -> None:
    examples = [
        '{"text": "schön", "label": "gut"}',
        "",
        " ",
        '{"text": "plain", "label": 3}',
        "{",
        '{"text": "b"}',
    ]
    data = ending.join(examples).encode(encoding)
    assert look_at("ndjson", data).kind == "text"
    found = Found()
    posted = list(records("ndjson", io.BytesIO(data), LIMITS, found=found))
    assert [one.place for one in posted] == ["line 1", "line 4", "line 5", "line 6"]
    assert posted[0].posted == PostedExample("schön", "gut")
    assert code(posted[2].posted) == "invalid_json"
    names = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "cp1252": "windows-1252"}
    assert found.format() == {"encoding": names.get(encoding, encoding)}


def test_half_a_character_at_the_end_is_an_error_in_its_place() -> None:
    data = "text,label\na,x\nb,y".encode("utf-16")[:-1]
    assert [code(posted) for _, posted in read("csv", data)] == [None, "invalid_text"]
    lone = "text,label\na,x\n".encode("utf-16") + b"\x00\xd8,\0x\0\n\0" + "b,y".encode("utf-16-le")
    assert [code(posted) for _, posted in read("csv", lone)] == [None, "invalid_text", None]
