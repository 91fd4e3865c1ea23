"""What files of each image format say of themselves, walked through without decoding."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from importlib.util import find_spec

from models.preprocess.image_file.facts import NOT_AN_IMAGE, ImageFile, odd
from models.preprocess.image_file.tags import exif_orientation, xmp_orientation
from models.preprocess.limits import InputError

_MOST_SCANS = 50  # maximum scans of a JPEG; encoders write at most 18
_MOST_SCANNED = 1_500_000_000  # maximum pixels times scans of a JPEG
_USUAL_SCANS = 10  # scans above which a JPEG counts as more work
_MOST_SEGMENTS = 4_000  # maximum segments of a JPEG; a profile has up to 255, extended XMP some hundred
_MOST_CHUNKS = 20_000  # maximum chunks of a PNG or WebP; encoders split 16 MB into at most 4,000
_MOST_BLOCKS = 100_000  # maximum blocks, of at most 255 bytes each, before the first frame of a GIF
# Limits for BMPs with run lengths, which Pillow unpacks in Python, a run and a pixel at a time.
_MOST_RUN_BYTES = 2 << 20
_MOST_RUN_PIXELS = 4_000_000
_MOST_BOXES = 1_000  # maximum image sizes in a HEIF file
_MOST_XMP = 1 << 20  # maximum bytes of XMP, unpacked
_MOST_EXIF = 1 << 18  # maximum bytes of EXIF, unpacked
# A marker within a scan's data; stuffed bytes, fill bytes and restart markers do not count.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TABLES = frozenset((0xC4, 0xCC, 0xDB, 0xDC, 0xDD))
_SOI, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")
_PNG_KEPT = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256}
_PNG_XMP = b"XML:com.adobe.xmp\0"
_PNG_RAW_EXIF = b"Raw profile type exif\0"
_WEBP_KEPT = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"))
_WEBP_ALPHA, _WEBP_ANIMATED = 0x10, 0x02
_AVIF = frozenset((b"avif", b"avis"))
_HEIC = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
_ISPE = re.compile(rb"ispe.{4}(.{4})(.{4})", re.DOTALL)


def read_jpeg(data: bytes) -> ImageFile:
    """What a JPEG file says of its image. Raises InputError, DAMAGED errors."""
    view = memoryview(data)
    kept: list[bytes | memoryview] = [view[:2]]
    width = height = scans = 0
    turned = told = 0
    applications: set[int] = set()
    segments = _jpeg_segments(data)
    for marker, start, end in segments:
        if marker in _JPEG_FRAMES:
            found = _jpeg_frame_size(data, start)
            width, height = max(width, found[0]), max(height, found[1])
        elif marker == _SOS:
            scans += 1
        elif marker == _APP1 and not turned and data.startswith(b"Exif\0\0", start + 4):
            turned = exif_orientation(data[start + 10 : end])
        elif marker == _APP1 and not told and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 4):
            told = xmp_orientation(data[start:end])
        # The first APP0 and the first APP14 segment define the interpretation of the colours.
        meant = marker in (_APP0, _APP14) and marker not in applications
        applications.add(marker)
        if meant or marker in _JPEG_FRAMES or marker in _TABLES or marker in (_SOS, _EOI):
            kept.append(view[start:end])
    if not scans:
        raise InputError("truncated_image" if width else "undecodable_image", NOT_AN_IMAGE)
    pixels = width * height
    if scans > _MOST_SCANS or scans * pixels > _MOST_SCANNED:
        raise odd(f"{scans} scans")
    return ImageFile(
        "JPEG",
        width,
        height,
        b"".join(kept),
        turned or told or 1,
        work=pixels * max(_USUAL_SCANS, scans) // _USUAL_SCANS,
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
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
            raise odd(f"more than {_MOST_SEGMENTS:,} segments")


def _jpeg_frame_size(data: bytes, start: int) -> tuple[int, int]:
    """Width and height from the frame header of a JPEG."""
    height, width = struct.unpack_from(">HH", data, start + 5)
    return width, height


def read_png(data: bytes) -> ImageFile:
    """What a PNG file says of its image. Raises InputError, DAMAGED errors."""
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
            turned = turned or exif_orientation(data[start : start + min(length, _MOST_EXIF)])
        elif kind in (b"iTXt", b"zTXt", b"tEXt") and not told:
            told = _png_text_orientation(kind, data[start : start + min(length, _MOST_XMP)])
        elif kind == b"IEND":
            break
        ended = ended or (bool(picture) and kind != b"IDAT")
        count += 1
        if count > _MOST_CHUNKS:
            raise odd(f"more than {_MOST_CHUNKS:,} chunks")
    if b"IHDR" not in kept:
        raise InputError("undecodable_image", NOT_AN_IMAGE)
    width, height = struct.unpack_from(">II", kept[b"IHDR"], 8)
    if not picture and width and height:
        raise InputError("truncated_image", "The image ends before its first pixel. Send the whole file.")
    head = _PNG_CHUNK.pack(sum(map(len, picture)), b"IDAT")
    # Pillow does not verify the checksum of pixel data, which contains zlib's own, so it is left zero.
    parts: list[bytes | memoryview] = [PNG_SIGNATURE, *(kept[kind] for kind in _PNG_KEPT if kind in kept)]
    pared = b"".join([*parts, head, *picture, bytes(4), b"\0\0\0\0IEND\xaeB`\x82"])
    return ImageFile("PNG", width, height, pared, turned or told or 1, bits, work=width * height)


def _png_text_orientation(kind: bytes, chunk: bytes) -> int:
    if kind == b"iTXt" and chunk.startswith(_PNG_XMP):
        rest = chunk[len(_PNG_XMP) :]
        # A flag, a method, a language and a translated keyword precede the text.
        text = rest[2:].split(b"\0", 2)[-1]
        return xmp_orientation(_inflated(text, _MOST_XMP) if rest[:1] == b"\1" else text)
    if kind in (b"zTXt", b"tEXt") and chunk.startswith(_PNG_RAW_EXIF):
        text = chunk[len(_PNG_RAW_EXIF) :]
        text = _inflated(text[1:], _MOST_EXIF) if kind == b"zTXt" else text[:_MOST_EXIF]
        digits = b"".join(text.split(b"\n")[3:])
        try:
            return exif_orientation(bytes.fromhex(digits.decode("ascii")))
        except ValueError:
            return 0
    return 0


def _inflated(data: bytes, most: int) -> bytes:
    """Decompress at most `most` bytes; empty if the data is damaged."""
    try:
        return zlib.decompressobj().decompress(data, most)
    except zlib.error:
        return b""


def read_gif(data: bytes) -> ImageFile:
    """What a GIF file says of its image. Raises InputError, DAMAGED errors."""
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
            raise odd(f"more than {_MOST_BLOCKS:,} blocks before its first frame")
    left, top, wide, high = struct.unpack_from("<HHHH", data, place + 1)
    width, height = max(width, left + wide), max(height, top + high)
    if not wide or not high:
        width = 0
    return ImageFile("GIF", width, height, head + control + data[place:], work=width * height)


def read_webp(data: bytes) -> ImageFile:
    """What a WebP file says of its image. Raises InputError, DAMAGED errors."""
    kept: list[bytes] = []
    width = height = turned = told = count = 0
    frames = 0
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        start, place = place + 8, place + 8 + length + (length & 1)
        content = data[start : start + length] if kind in _WEBP_KEPT else b""
        if kind == b"EXIF":
            turned = turned or exif_orientation(data[start : start + min(length, _MOST_EXIF)])
        elif kind == b"XMP ":
            told = told or xmp_orientation(data[start : start + min(length, _MOST_XMP)])
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
            raise odd(f"more than {_MOST_CHUNKS:,} chunks")
        if kind in (b"VP8X", b"VP8L") and not content:
            raise InputError("undecodable_image", NOT_AN_IMAGE)
    body = b"WEBP" + b"".join(kept)
    pared = b"RIFF" + struct.pack("<I", len(body)) + body
    # Lossless WebP images take several times as long per pixel as other formats.
    return ImageFile("WEBP", width, height, pared, turned or told or 1, work=3 * width * height)


def read_bmp(data: bytes) -> ImageFile:
    """What a BMP file says of its image. Raises InputError, DAMAGED errors."""
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return ImageFile("BMP", width, height, data, work=width * height)
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    width, height = abs(width), abs(height)
    runs = compression in (1, 2)
    if runs and (len(data) > _MOST_RUN_BYTES or width * height > _MOST_RUN_PIXELS):
        raise odd(f"more than {_MOST_RUN_BYTES:,} bytes or {_MOST_RUN_PIXELS:,} pixels of run lengths")
    return ImageFile("BMP", width, height, data, work=width * height, doubtful=runs)


def read_heif(data: bytes) -> ImageFile:
    """What a HEIF file says of its image. Raises InputError, DAMAGED errors."""
    (length,) = struct.unpack_from(">I", data)
    brands = {data[place : place + 4] for place in (8, *range(16, min(length, 512), 4))}
    if brands & _AVIF and data[8:12] not in _HEIC:
        name = "AVIF"
    elif brands & _HEIC:
        name = "HEIF"
        if not heic_is_read():
            detail = "HEIC is not supported here. Send JPEG, or let the operator install `topwork[heic]`."
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
            raise odd(f"more than {_MOST_BOXES:,} images")
    return found


def heic_is_read() -> bool:
    """Whether the library for HEIC is installed."""
    return find_spec("pillow_heif") is not None
