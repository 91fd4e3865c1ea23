"""TIFF files, and the tags of EXIF and XMP that other formats carry."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from models.preprocess.image_file.facts import DAMAGED, NOT_AN_IMAGE, ImageFile, odd
from models.preprocess.limits import InputError

_MOST_TAGS = 4_096  # maximum tags of a TIFF directory
_MOST_STRIPS = 100_000  # maximum values of a TIFF tag, e.g. strips
_USUAL_STRIPS = 256  # strips above which a TIFF is doubtful, because Pillow starts anew for each
_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# TIFF tags that describe the pixels: sizes, samples, strips and tiles, tables, orientation, XMP.
_TIFF_KEPT = frozenset(
    (*range(254, 260), 262, 266, 273, 274, *range(277, 282), 284, 292, 293, 301, 317, 320, *range(322, 326),
     332, 338, 339, 347, *range(512, 522), *range(529, 533), 700)
)  # fmt: skip
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_COMPRESSION, _TIFF_TILE = 256, 257, 259, (322, 323)
_TIFF_OFFSETS = frozenset((273, 324))
_UNCOMPRESSED = 1
_SHORT, _LONG, _LONG8 = 3, 4, 16


def read_tiff(data: bytes) -> ImageFile:
    """What a TIFF file says of its image. Raises InputError, DAMAGED errors."""
    order = "<" if data.startswith(b"II") else ">"
    big = 43 in data[2:4]
    (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    entries = dict(_entries(data, start, order, big))
    form = f"{order}HH{'QQ' if big else 'II'}"
    if _TIFF_WIDTH not in entries or _TIFF_HEIGHT not in entries:
        raise InputError("undecodable_image", NOT_AN_IMAGE)
    kept: list[bytes] = []
    strips = 0
    for tag in sorted(_TIFF_KEPT & entries.keys()):
        entry = entries[tag]
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", entry, 4)
        if count > _MOST_STRIPS and tag != 700:
            raise odd(f"more than {_MOST_STRIPS:,} values of the tag {tag}")
        strips = max(strips, count if tag in _TIFF_OFFSETS else 0)
        kept.append(entry)

    def value(tag: int, default: int = 0) -> int:
        if tag not in entries:
            return default
        _, kind, _, _ = struct.unpack(form, entries[tag])
        code = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}.get(kind, "B")
        found: int = struct.unpack_from(order + code, entries[tag], 12 if big else 8)[0]
        return found

    width, height = value(_TIFF_WIDTH), value(_TIFF_HEIGHT)
    # A tile may be larger than the image, and decoders unpack whole tiles.
    wide, high = (value(tag) for tag in _TIFF_TILE)
    if wide * high > width * height and width and height:
        width, height = wide, high
    body = data if len(data) % 2 == 0 else data + b"\0"
    head = struct.pack(f"{order}{'Q' if big else 'I'}", len(body))
    after = 8 if big else 4
    body = body[:after] + head + body[after + len(head) :]
    tail = struct.pack(f"{order}{'Q' if big else 'H'}", len(kept)) + b"".join(kept) + bytes(after)
    doubtful = strips > _USUAL_STRIPS or value(_TIFF_COMPRESSION, _UNCOMPRESSED) != _UNCOMPRESSED
    return ImageFile("TIFF", width, height, body + tail, work=width * height, doubtful=doubtful)


def _entries(data: bytes, start: int, order: str, big: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the raw bytes of each entry of a TIFF directory."""
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
    if count > _MOST_TAGS:
        raise odd(f"more than {_MOST_TAGS:,} tags")
    first, size = start + (8 if big else 2), 20 if big else 12
    for place in range(first, first + count * size, size):
        entry = data[place : place + size]
        if len(entry) < size:
            return
        yield struct.unpack_from(f"{order}H", entry)[0], entry


def exif_orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 0 if missing or damaged, when the image most likely was never turned."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 0
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        found = dict(_entries(exif, start, order)).get(_ORIENTATION)
        value: int = 0 if found is None else struct.unpack_from(f"{order}H", found, 8)[0]
    except (*DAMAGED, InputError):
        return 0
    return value if 1 <= value <= 8 else 0


def xmp_orientation(xmp: bytes) -> int:
    """The orientation that XMP names, 1 to 8; 0 if it names none."""
    found = _XMP_ORIENTATION.search(xmp)
    return 0 if found is None else int(found[1])
