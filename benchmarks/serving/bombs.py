"""Images that are small as files, or as pictures, and dear to decode for who trusts them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping

from PIL import Image

_AC_SCAN = bytes.fromhex("ffda0008010100013f00")


def _saved(fmt: str, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, fmt)
    return buffer.getvalue()


def scans(count: int, side: int = 7_000) -> bytes:
    """A grey progressive JPEG with many scans of all its blocks, each a few bytes."""
    blocks = (-(-side // 8)) ** 2
    head = b"\xff\xd8\xff\xdb\0\x43\0" + bytes([1]) * 64
    head += b"\xff\xc2" + struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 0x11, 0)
    # One code of one bit in each table: no difference, and a run of 2^14 to 2^15 - 1 empty blocks.
    head += b"\xff\xc4\0\x14\0" + bytes([1]) + bytes(15) + b"\0"
    head += b"\xff\xc4\0\x14\x10" + bytes([1]) + bytes(15) + b"\xe0"
    bits = ("0" + "1" * 14) * -(-blocks // 32_767)
    packed = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big")
    first = bytes.fromhex("ffda0008010100000000") + bytes(-(-blocks // 8))
    again = _AC_SCAN + packed.replace(b"\xff", b"\xff\0")
    return head + first + again * count + b"\xff\xd9"


def _jpeg_with(segment: bytes, size: int) -> bytes:
    data = _saved("JPEG")
    return data[:2] + segment * (size // len(segment)) + data[2:]


def _png_with(name: bytes, content: bytes, size: int, place: int = 33) -> bytes:
    data = _saved("PNG")
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:place] + chunk * (size // len(chunk)) + data[place:]


def _gif_with(block: bytes, size: int) -> bytes:
    data = _saved("GIF")
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    return data[:place] + block * max(1, size // len(block)) + data[place:]


def _tiff_with(entries: int) -> bytes:
    """A TIFF directory with this number of tags."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    written = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    written += [
        struct.pack("<HHII", 33_000 + tag % 32_000, 4, 1, tag) for tag in range(entries - len(written))
    ]
    directory = struct.pack("<H", entries) + b"".join(written) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory


def _tiff_of_strips(count: int) -> bytes:
    """A row for each strip, all of them the same bytes."""
    places = struct.pack("<I", 8) * count
    lengths = struct.pack("<I", 1) * count
    tags = [(256, 1, 1), (257, 1, count), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, count, 16)]
    tags += [(277, 1, 1), (278, 1, 1), (279, count, 16 + len(places))]
    entries = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in tags)
    body = bytes(8) + places + lengths
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def _runs(size: int) -> bytes:
    """A BMP of run lengths that never end: each says to go nowhere."""
    palette = bytes(1024)
    offset = 54 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", offset + size, 0, 0, offset)
    head += struct.pack("<IiiHHIIiiII", 40, 1_000, 1_000, 1, 8, 1, size, 0, 0, 256, 0)
    return head + palette + b"\0\2\0\0" * (size // 4)


def _webp_with(chunk: bytes, size: int) -> bytes:
    data = _saved("WEBP")
    body = data[12:] + chunk * (size // len(chunk))
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _tables(size: int) -> bytes:
    return _jpeg_with(b"\xff\xc4\0\x14\x10" + bytes([1]) + bytes(15) + b"\xe0", size)


def _profiles(size: int) -> bytes:
    return _png_with(b"iCCP", b"a\0\0" + zlib.compress(bytes(900_000), 9), size)


BOMBS: Mapping[str, Callable[[int], bytes]] = {
    "JPEG of EXIF segments": lambda size: _jpeg_with(b"\xff\xe1\0\x08Exif\0\0", size),
    "JPEG of fill bytes": lambda size: _jpeg_with(b"\xff", size),
    "JPEG of comments": lambda size: _jpeg_with(b"\xff\xfe\0\x02", size),
    "JPEG of tables": _tables,
    "JPEG of starts": lambda size: _jpeg_with(b"\xff\xd8", size),
    "JPEG of profiles": lambda size: _jpeg_with(b"\xff\xe2\0\x12ICC_PROFILE\0\1\1ab", size),
    "PNG of profiles": _profiles,
    "PNG of empty chunks": lambda size: _png_with(b"abCd", b"", size),
    "PNG of empty pixels": lambda size: _png_with(b"IDAT", b"", size),
    "PNG of texts": lambda size: _png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000), 9), size),
    "GIF of comments": lambda size: _gif_with(b"!\xfe\1a\0", size),
    "GIF of applications": lambda size: _gif_with(b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0", size),
    "GIF of one comment": lambda size: _gif_with(b"!\xfe" + b"\1a" * (size // 2) + b"\0", size),
    "TIFF of tags": lambda size: _tiff_with(min(size // 12, 65_000)),
    "TIFF of strips": lambda size: _tiff_of_strips(size // 8),
    "BMP of runs": _runs,
    "WebP of chunks": lambda size: _webp_with(b"abcd\0\0\0\0", size),
    "AVIF of boxes": lambda size: _saved("AVIF") + b"\0\0\0\x08free" * (size // 8),
    "AVIF of sizes": lambda size: (
        _saved("AVIF")[:32] + b"\0\0\0\x14ispe" + b"\0\0\0\x08ispe1234" * (size // 12)
    ),
    "scans": lambda size: scans(min(size // 90, 9_000)),
}
"""Of about so many bytes each."""
