"""Estimates of an input's cost from its first bytes, before any work; a small input costs 1."""

from __future__ import annotations

import struct

HEAVY = 4.0
"""Cost above which an input would delay small ones: an image of two megapixels, a text of 400 letters."""

_PIXELS = 700_000  # pixels plus bytes that take as long to decode as the network takes for the image
_UNKNOWN_PIXELS = 4_000_000  # pixels assumed if the first bytes do not tell the size
_MOST_PARTS = 64  # JPEG segments, PNG chunks or GIF blocks that are searched for the size
_BYTES = 128  # bytes of text that add as much network time as the shortest text takes
# Characters of text that take the tokenizer as long as the shortest text takes the network.
_CHARACTERS = 2_500
_BYTES_PER_TOKEN = 4  # average of ordinary text


def image_expense(data: bytes) -> float:
    """Estimate the cost of an encoded image from the pixels that its header claims and from its bytes."""
    try:
        pixels = _pixels(data)
    except (struct.error, IndexError):
        pixels = None
    return 1.0 + ((_UNKNOWN_PIXELS if pixels is None else pixels) + len(data)) / _PIXELS


def text_expense(text: str, max_tokens: int) -> float:
    """Estimate the cost of a text from its tokens, at most `max_tokens`, and from its characters."""
    most = _BYTES_PER_TOKEN * max_tokens
    seen = min(most, len(text[:most].encode("utf-8", "surrogatepass")))
    return 1.0 + seen / _BYTES + len(text) / _CHARACTERS


def _pixels(data: bytes) -> int | None:
    """Width times height from the header; None if they are not in its first parts.

    Raises struct.error or IndexError for an incomplete header.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg_pixels(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif_pixels(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_pixels(data)
    if data.startswith(b"BM"):
        width, height = struct.unpack_from("<ii", data, 18)
        return abs(int(width * height))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_pixels(data)
    return None


def _jpeg_pixels(data: bytes) -> int | None:
    place = 2
    for _ in range(_MOST_PARTS):
        mark, kind, length = struct.unpack_from(">BBH", data, place)
        if mark != 0xFF:
            return None
        # These markers start a frame. The exceptions are tables (DHT, DAC) and a reserved marker.
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 5)
            return int(width * height)
        place += 2 + length
    return None


def _png_pixels(data: bytes) -> int | None:
    """Width times height if there is exactly one header before the pixels: a decoder takes the last one."""
    pixels: int | None = None
    place = 8
    for _ in range(_MOST_PARTS):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IDAT":
            return pixels
        if kind == b"IHDR":
            if pixels is not None:
                return None
            width, height = struct.unpack_from(">II", data, place + 8)
            pixels = int(width * height)
        place += 12 + length
    return None


def _gif_pixels(data: bytes) -> int | None:
    """Width times height of the screen, extended to hold the first frame."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(_MOST_PARTS):
        if data[place] == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", data, place + 1)
            return int(max(width, left + wide) * max(height, top + high))
        if data[place] == 0x21:
            place += 2
        # An extension is a sequence of blocks with their lengths in front; a block of length 0 ends it.
        place += 1 + data[place]
        if data[place] == 0:
            place += 1
    return None


def _webp_pixels(data: bytes) -> int | None:
    if data[12:16] == b"VP8X":
        return (1 + int.from_bytes(data[24:27], "little")) * (1 + int.from_bytes(data[27:30], "little"))
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return int((1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF)))
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return int((width & 0x3FFF) * (height & 0x3FFF))
    return None
