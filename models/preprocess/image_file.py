"""Reading an image's header without decoding, and removing its metadata.

Decoders trust the structure of a file: they decode a thousand scans one by one and unpack every colour
profile. So the markers and chunks are scanned here first, in time linear in the bytes. Parts that no decoder
needs are dropped, and structures that no camera or program writes are refused.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from models.preprocess.limits import InputError

READABLE = "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF and, with `topwork[heic]` installed, HEIC"
"""The readable formats, for use in messages."""
NOT_AN_IMAGE = f"This is not a readable image; {READABLE} are read."

# Images above these sizes are decoded in another process; see models/preprocess/decoder.py.
LARGE_PIXELS = 4_000_000
_LARGE_BYTES = 4 << 20

_LEAST_BYTES = 26  # size of the smallest image; shorter data only begins like one
_MOST_SCANS = 50  # maximum scans of a JPEG; encoders write at most 18
_MOST_SCANNED = 1_500_000_000  # maximum pixels times scans of a JPEG
_USUAL_SCANS = 10  # scans above which a JPEG counts as more work
_MOST_SEGMENTS = 4_000  # maximum segments of a JPEG; a profile has up to 255, extended XMP some hundred
_MOST_CHUNKS = 20_000  # maximum chunks of a PNG or WebP; encoders split 16 MB into at most 4,000
_MOST_BLOCKS = 100_000  # maximum blocks, of at most 255 bytes each, before the first frame of a GIF
# Limits for BMPs with run lengths, which Pillow unpacks in Python, a run and a pixel at a time.
_MOST_RUN_BYTES = 2 << 20
_MOST_RUN_PIXELS = 4_000_000
_MOST_TAGS = 4_096  # maximum tags of a TIFF directory
_MOST_STRIPS = 100_000  # maximum values of a TIFF tag, e.g. strips
_USUAL_STRIPS = 256  # strips above which a TIFF is doubtful, because Pillow starts anew for each
_MOST_BOXES = 1_000  # maximum image sizes in a HEIF file
_MOST_XMP = 1 << 20  # maximum bytes of XMP, unpacked
_MOST_EXIF = 1 << 18  # maximum bytes of EXIF, unpacked

# Errors raised by reading beyond the end of the data.
_DAMAGED = (struct.error, IndexError, OverflowError)

_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

# A marker within a scan's data; stuffed bytes, fill bytes and restart markers do not count.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TABLES = frozenset((0xC4, 0xCC, 0xDB, 0xDC, 0xDD))
_SOI, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")
_PNG_KEPT = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256}
_PNG_XMP = b"XML:com.adobe.xmp\0"
_PNG_RAW_EXIF = b"Raw profile type exif\0"

_WEBP_KEPT = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"))
_WEBP_ALPHA, _WEBP_ANIMATED = 0x10, 0x02

# TIFF tags that describe the pixels: sizes, samples, strips and tiles, tables, orientation, XMP.
_TIFF_KEPT = frozenset(
    (*range(254, 260), 262, 266, 273, 274, *range(277, 282), 284, 292, 293, 301, 317, 320, *range(322, 326),
     332, 338, 339, 347, *range(512, 522), *range(529, 533), 700)
)  # fmt: skip
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_COMPRESSION, _TIFF_TILE = 256, 257, 259, (322, 323)
_TIFF_OFFSETS = frozenset((273, 324))
_UNCOMPRESSED = 1
_SHORT, _LONG, _LONG8 = 3, 4, 16

_AVIF = frozenset((b"avif", b"avis"))
_HEIC = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
_ISPE = re.compile(rb"ispe.{4}(.{4})(.{4})", re.DOTALL)

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


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that has not been decoded yet."""

    format: str  # Pillow's name
    width: int  # largest declared in the file, in pixels
    height: int  # largest declared in the file, in pixels
    data: bytes  # the file without its metadata
    orientation: int = 1  # 1 to 8, from EXIF or XMP; always 1 if the decoder applies it
    significant_bits: int | None = None  # bits used per sample of a PNG, from sBIT; None without
    work: int = 0  # pixels that the decoder processes
    doubtful: bool = False  # the cost cannot be predicted from the size

    @property
    def large(self) -> bool:
        """Whether the image must be decoded in another process."""
        return self.doubtful or self.work > LARGE_PIXELS or len(self.data) > _LARGE_BYTES


def read_image_file(data: bytes) -> ImageFile:
    """Scan the file once, without decoding it. Raises InputError."""
    reader = _reader(data)
    if reader is None:
        raise _unread(data)
    try:
        file = reader(data)
    except _DAMAGED:
        if len(data) < _LEAST_BYTES:
            raise InputError("undecodable_image", NOT_AN_IMAGE) from None
        raise InputError("truncated_image", "The image ends before its last pixel; send all of it.") from None
    if not file.width or not file.height:
        raise InputError("empty_image", "The image is zero pixels wide or high.")
    return file


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels from the header, None if there is no readable header.

    Takes microseconds at most for a camera's files, to estimate costs before decoding. Checks nothing and
    raises nothing.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            frame = next((at for marker, at, _ in _segments(data) if marker in _FRAMES), None)
            return None if frame is None else _frame_size(data, frame)
        if data.startswith(_PNG_SIGNATURE):
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
        reader = _reader(data)
        file = None if reader is None else reader(data)
    except (*_DAMAGED, InputError):
        return None
    return None if file is None or not file.work else (file.width, file.height)


def _reader(data: bytes) -> Callable[[bytes], ImageFile] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg
    if data.startswith(_PNG_SIGNATURE):
        return _png
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp
    if data.startswith(b"BM"):
        return _bmp
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _tiff
    if data[4:8] == b"ftyp":
        return _heif
    return None


def _unread(data: bytes) -> InputError:
    start = data[:64].lstrip()
    for magic, name in _UNREAD:
        if start.startswith(magic):
            return InputError("unsupported_image", f"{name} is not read; {READABLE} are.")
    return InputError("undecodable_image", NOT_AN_IMAGE)


def _odd(what: str) -> InputError:
    return InputError(
        "input_too_costly", f"The image has {what}, which no camera or program writes; save it anew."
    )


def _jpeg(data: bytes) -> ImageFile:
    view = memoryview(data)
    kept: list[bytes | memoryview] = [view[:2]]
    width = height = scans = 0
    turned = told = 0
    applications: set[int] = set()
    segments = _segments(data)
    for marker, start, end in segments:
        if marker in _FRAMES:
            found = _frame_size(data, start)
            width, height = max(width, found[0]), max(height, found[1])
        elif marker == _SOS:
            scans += 1
        elif marker == _APP1 and not turned and data.startswith(b"Exif\0\0", start + 4):
            turned = _exif_orientation(data[start + 10 : end])
        elif marker == _APP1 and not told and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 4):
            told = _xmp_orientation(data[start:end])
        # The first APP0 and the first APP14 segment define the interpretation of the colours.
        meant = marker in (_APP0, _APP14) and marker not in applications
        applications.add(marker)
        if meant or marker in _FRAMES or marker in _TABLES or marker in (_SOS, _EOI):
            kept.append(view[start:end])
    if not scans:
        raise InputError("truncated_image" if width else "undecodable_image", NOT_AN_IMAGE)
    pixels = width * height
    if scans > _MOST_SCANS or scans * pixels > _MOST_SCANNED:
        raise _odd(f"{scans} scans")
    return ImageFile(
        "JPEG",
        width,
        height,
        b"".join(kept),
        turned or told or 1,
        work=pixels * max(_USUAL_SCANS, scans) // _USUAL_SCANS,
    )


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each JPEG segment; a scan's segment includes its data."""
    place, count = 2, 0
    while (found := _MARKER.search(data, place)) is not None:
        start, marker = found.start(), data[found.start() + 1]
        if marker == _EOI:
            yield marker, start, start + 2
            return
        if marker == _SOI or marker == 1:
            place = start + 2
        else:
            place = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
            if marker == _SOS:
                after = _MARKER.search(data, place)
                place = len(data) if after is None else after.start()
            yield marker, start, place
        count += 1
        if count > _MOST_SEGMENTS:
            raise _odd(f"more than {_MOST_SEGMENTS:,} segments")


def _frame_size(data: bytes, start: int) -> tuple[int, int]:
    height, width = struct.unpack_from(">HH", data, start + 5)
    return width, height


def _png(data: bytes) -> ImageFile:
    view = memoryview(data)
    kept: dict[bytes, memoryview] = {}
    picture: list[memoryview] = []
    turned = told = count = 0
    bits: int | None = None
    place, ended = 8, False
    while place + 8 <= len(data):
        length, kind = _PNG_CHUNK.unpack_from(data, place)
        start, place = place + 8, place + 12 + length
        if kind == b"IDAT":
            if not ended:
                picture.append(view[start : start + length])
        elif kind in _PNG_KEPT:
            if length > _PNG_KEPT[kind]:
                raise InputError("undecodable_image", NOT_AN_IMAGE)
            if not picture:
                kept.setdefault(kind, view[start - 8 : place])
        elif kind == b"sBIT":
            bits = max(data[start : start + length], default=None)
        elif kind == b"eXIf":
            turned = turned or _exif_orientation(data[start : start + min(length, _MOST_EXIF)])
        elif kind in (b"iTXt", b"zTXt", b"tEXt") and not told:
            told = _png_text_orientation(kind, data[start : start + min(length, _MOST_XMP)])
        elif kind == b"IEND":
            break
        ended = ended or (bool(picture) and kind != b"IDAT")
        count += 1
        if count > _MOST_CHUNKS:
            raise _odd(f"more than {_MOST_CHUNKS:,} chunks")
    if b"IHDR" not in kept:
        raise InputError("undecodable_image", NOT_AN_IMAGE)
    width, height = struct.unpack_from(">II", kept[b"IHDR"], 8)
    if not picture and width and height:
        raise InputError("truncated_image", "The image ends before its first pixel; send all of it.")
    head = _PNG_CHUNK.pack(sum(map(len, picture)), b"IDAT")
    # Pillow does not verify the checksum of pixel data, which contains zlib's own, so it is left zero.
    parts: list[bytes | memoryview] = [_PNG_SIGNATURE, *(kept[kind] for kind in _PNG_KEPT if kind in kept)]
    pared = b"".join([*parts, head, *picture, bytes(4), b"\0\0\0\0IEND\xaeB`\x82"])
    return ImageFile("PNG", width, height, pared, turned or told or 1, bits, work=width * height)


def _png_text_orientation(kind: bytes, chunk: bytes) -> int:
    if kind == b"iTXt" and chunk.startswith(_PNG_XMP):
        rest = chunk[len(_PNG_XMP) :]
        # A flag, a method, a language and a translated keyword precede the text.
        text = rest[2:].split(b"\0", 2)[-1]
        return _xmp_orientation(_inflated(text, _MOST_XMP) if rest[:1] == b"\1" else text)
    if kind in (b"zTXt", b"tEXt") and chunk.startswith(_PNG_RAW_EXIF):
        text = chunk[len(_PNG_RAW_EXIF) :]
        text = _inflated(text[1:], _MOST_EXIF) if kind == b"zTXt" else text[:_MOST_EXIF]
        digits = b"".join(text.split(b"\n")[3:])
        try:
            return _exif_orientation(bytes.fromhex(digits.decode("ascii")))
        except ValueError:
            return 0
    return 0


def _inflated(data: bytes, most: int) -> bytes:
    """Decompress at most `most` bytes; empty if the data is damaged."""
    try:
        return zlib.decompressobj().decompress(data, most)
    except zlib.error:
        return b""


def _gif(data: bytes) -> ImageFile:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    head = data[:place]
    control = b""
    blocks = 0
    while True:
        kind = data[place]
        if kind == 0x2C:
            break
        if kind == 0x3B:
            raise InputError("empty_image" if not width or not height else "truncated_image", NOT_AN_IMAGE)
        if kind != 0x21:
            # Decoders skip unknown bytes between blocks.
            place += 1
            blocks += 1
        else:
            start = place
            place += 2
            while size := data[place]:
                place += 1 + size
                blocks += 1
                if blocks > _MOST_BLOCKS:
                    break
            place += 1
            if data[start + 1] == 0xF9:
                control = data[start:place]
        if blocks > _MOST_BLOCKS:
            raise _odd(f"more than {_MOST_BLOCKS:,} blocks before its first frame")
    left, top, wide, high = struct.unpack_from("<HHHH", data, place + 1)
    width, height = max(width, left + wide), max(height, top + high)
    if not wide or not high:
        width = 0
    return ImageFile("GIF", width, height, head + control + data[place:], work=width * height)


def _webp(data: bytes) -> ImageFile:
    kept: list[bytes] = []
    width = height = turned = told = count = 0
    frames = 0
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        start, place = place + 8, place + 8 + length + (length & 1)
        content = data[start : start + length] if kind in _WEBP_KEPT else b""
        if kind == b"EXIF":
            turned = turned or _exif_orientation(data[start : start + min(length, _MOST_EXIF)])
        elif kind == b"XMP ":
            told = told or _xmp_orientation(data[start : start + min(length, _MOST_XMP)])
        elif kind == b"VP8X":
            # The flags may only announce chunks that are kept.
            content = bytes([content[0] & (_WEBP_ALPHA | _WEBP_ANIMATED)]) + content[1:]
            width = max(width, 1 + int.from_bytes(content[4:7], "little"))
            height = max(height, 1 + int.from_bytes(content[7:10], "little"))
        elif kind == b"VP8 ":
            wide, high = struct.unpack_from("<HH", content, 6)
            width, height = max(width, wide & 0x3FFF), max(height, high & 0x3FFF)
        elif kind == b"VP8L":
            packed = int.from_bytes(content[1:5], "little")
            width, height = max(width, 1 + (packed & 0x3FFF)), max(height, 1 + (packed >> 14 & 0x3FFF))
        elif kind == b"ANMF":
            frames += 1
        if kind in _WEBP_KEPT and (kind != b"ANMF" or frames == 1):
            kept.append(data[start - 8 : start] + content + bytes(length & 1))
        count += 1
        if count > _MOST_CHUNKS:
            raise _odd(f"more than {_MOST_CHUNKS:,} chunks")
        if kind in (b"VP8X", b"VP8L") and not content:
            raise InputError("undecodable_image", NOT_AN_IMAGE)
    body = b"WEBP" + b"".join(kept)
    pared = b"RIFF" + struct.pack("<I", len(body)) + body
    # Lossless WebP images take several times as long per pixel as other formats.
    return ImageFile("WEBP", width, height, pared, turned or told or 1, work=3 * width * height)


def _bmp(data: bytes) -> ImageFile:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return ImageFile("BMP", width, height, data, work=width * height)
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    width, height = abs(width), abs(height)
    runs = compression in (1, 2)
    if runs and (len(data) > _MOST_RUN_BYTES or width * height > _MOST_RUN_PIXELS):
        raise _odd(f"more than {_MOST_RUN_BYTES:,} bytes or {_MOST_RUN_PIXELS:,} pixels of run lengths")
    return ImageFile("BMP", width, height, data, work=width * height, doubtful=runs)


def _tiff(data: bytes) -> ImageFile:
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
            raise _odd(f"more than {_MOST_STRIPS:,} values of the tag {tag}")
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
        raise _odd(f"more than {_MOST_TAGS:,} tags")
    first, size = start + (8 if big else 2), 20 if big else 12
    for place in range(first, first + count * size, size):
        entry = data[place : place + size]
        if len(entry) < size:
            return
        yield struct.unpack_from(f"{order}H", entry)[0], entry


def _exif_orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 0 if missing or damaged, when the image most likely was never turned."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 0
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        found = dict(_entries(exif, start, order)).get(_ORIENTATION)
        value: int = 0 if found is None else struct.unpack_from(f"{order}H", found, 8)[0]
    except (*_DAMAGED, InputError):
        return 0
    return value if 1 <= value <= 8 else 0


def _xmp_orientation(xmp: bytes) -> int:
    found = _XMP_ORIENTATION.search(xmp)
    return 0 if found is None else int(found[1])


def _heif(data: bytes) -> ImageFile:
    (length,) = struct.unpack_from(">I", data)
    brands = {data[place : place + 4] for place in (8, *range(16, min(length, 512), 4))}
    if brands & _AVIF and data[8:12] not in _HEIC:
        name = "AVIF"
    elif brands & _HEIC:
        name = "HEIF"
        if not heic_is_read():
            detail = "HEIC is not read here; install `topwork[heic]` where the service runs, or send JPEG."
            raise InputError("unsupported_image", detail)
    else:
        raise InputError("undecodable_image", NOT_AN_IMAGE)
    sizes = _sizes(data)
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    return ImageFile(name, width, height, data, work=width * height, doubtful=True)


def _sizes(data: bytes) -> list[tuple[int, int]]:
    """Width and height of each image in a HEIF file, from the properties in front of the pixels."""
    found: list[tuple[int, int]] = []
    for match in _ISPE.finditer(data, 0, 1 << 20):
        found.append((int.from_bytes(match[1], "big"), int.from_bytes(match[2], "big")))
        if len(found) > _MOST_BOXES:
            raise _odd(f"more than {_MOST_BOXES:,} images")
    return found


def heic_is_read() -> bool:
    """Whether the library for HEIC is installed."""
    return find_spec("pillow_heif") is not None
