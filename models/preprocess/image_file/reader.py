"""Reading an image's header without decoding, and removing its metadata.

Decoders trust the structure of a file: they decode a thousand scans one by one and unpack every colour
profile. So the markers and chunks are scanned here first, in time linear in the bytes. Parts that no decoder
needs are dropped, and structures that no camera or program writes are refused.
"""

from __future__ import annotations

from collections.abc import Callable

from models.preprocess.image_file.facts import DAMAGED, NOT_AN_IMAGE, READABLE, ImageFile
from models.preprocess.image_file.formats import (
    PNG_SIGNATURE,
    read_bmp,
    read_gif,
    read_heif,
    read_jpeg,
    read_png,
    read_webp,
)
from models.preprocess.image_file.tags import read_tiff
from models.preprocess.limits import InputError

_LEAST_BYTES = 26  # size of the smallest image; shorter data only begins like one
_UNREAD = (
    (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"<svg", "SVG"),
    (b"DDS ", "DDS"),
)


def read_image_file(data: bytes) -> ImageFile:
    """Scan the file once, without decoding it. Raises InputError."""
    reader = _reader(data)
    if reader is None:
        raise _unread(data)
    try:
        file = reader(data)
    except DAMAGED:
        if len(data) < _LEAST_BYTES:
            raise InputError("undecodable_image", NOT_AN_IMAGE) from None
        raise InputError(
            "truncated_image", "The image ends before its last pixel. Send the whole file."
        ) from None
    if not file.width or not file.height:
        raise InputError("empty_image", "The image has no pixels: its width or height is 0.")
    return file


def _reader(data: bytes) -> Callable[[bytes], ImageFile] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return read_jpeg
    if data.startswith(PNG_SIGNATURE):
        return read_png
    if data.startswith((b"GIF87a", b"GIF89a")):
        return read_gif
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return read_webp
    if data.startswith(b"BM"):
        return read_bmp
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return read_tiff
    if data[4:8] == b"ftyp":
        return read_heif
    return None


def _unread(data: bytes) -> InputError:
    start = data[:64].lstrip()
    for magic, name in _UNREAD:
        if start.startswith(magic):
            return InputError("unsupported_image", f"{name} is not supported. Send {READABLE}.")
    return InputError("undecodable_image", NOT_AN_IMAGE)
