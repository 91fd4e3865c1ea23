"""The cost of an input is estimated from its first bytes, and never below the real one."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from models.preprocess.expense import HEAVY, image_expense, text_expense

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + b"x" * 5_000}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("WEBP", {"exif": b"Exif\0\0" + b"x" * 50}),
    ("GIF", {"comment": b"made by hand " * 40}),
    ("BMP", {}),
]


def encoded(size: tuple[int, int], form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "options"), FORMATS)
def test_a_picture_costs_by_the_pixels_of_its_header(form: str, options: dict[str, Any]) -> None:
    small, large = (encoded(size, form, **options) for size in ((400, 300), (3_000, 2_000)))
    assert 1.0 < image_expense(small) < HEAVY < image_expense(large)
    pixels = 700_000 * (image_expense(large) - 1.0) - len(large)
    assert pixels == pytest.approx(6_000_000, rel=1e-6)


@pytest.mark.parametrize(
    "data", [b"", b"II*\0", b"RIFF1234WEBPVP9 ", b"no image", b"\xff\xd8" + b"\xff" * 200]
)
def test_what_does_not_say_its_size_counts_as_large(data: bytes) -> None:
    assert image_expense(data) > HEAVY
    assert image_expense(encoded((40, 30), "TIFF")) > HEAVY


def test_a_second_header_or_a_frame_beyond_the_screen_hides_nothing() -> None:
    """Decoders take the last header of a PNG, and widen a GIF to its first frame."""
    png = encoded((10, 10), "PNG")
    size = struct.pack(">II", 5_000, 5_000) + png[24:29]
    second = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    aside = struct.pack(">I", 8) + b"tEXtIDAT\0abc" + struct.pack(">I", zlib.crc32(b"tEXtIDAT\0abc"))
    for before in (b"", aside):
        assert image_expense(png[:33] + before + second + png[33:]) > HEAVY
    gif = bytearray(encoded((3_000, 3_000), "GIF"))
    gif[6:10] = struct.pack("<HH", 1, 1)
    with Image.open(io.BytesIO(gif)) as image:
        assert image.size == (3_000, 3_000)
    assert image_expense(bytes(gif)) == image_expense(encoded((3_000, 3_000), "GIF"))


def test_the_first_bytes_of_a_picture_are_never_trouble() -> None:
    for form, options in FORMATS:
        whole = encoded((400, 300), form, **options)
        for length in range(min(len(whole), 700)):
            assert image_expense(whole[:length]) >= 1.0


def test_a_text_costs_by_what_the_network_sees_and_by_its_characters() -> None:
    short, page, book = (text_expense("word " * count, 256) for count in (3, 300, 20_000))
    assert 1.0 <= short < 2.0
    assert HEAVY < page < 11.0
    assert 40.0 < book < 60.0
    # A character of Chinese is a token, and a text whose letters are cut in halves is refused later.
    assert text_expense("\u4e2d" * 256, 256) > HEAVY
    assert text_expense("\ud83d" * 10, 256) < HEAVY
