"""What an input will cost, in units of a small one's, known from its first bytes and before any work."""

from __future__ import annotations

import struct

HEAVY = 4.0
"""An input above this would hold up small ones: a picture of two megapixels, a text of 400 letters."""

# Pixels, and bytes, that take as long to decode as the network takes for the picture.
_PIXELS = 700_000
# Of a picture whose format does not say how large it is in its first bytes.
_UNKNOWN_PIXELS = 4_000_000
# Segments of a JPEG, chunks of a PNG, or blocks of a GIF, that are looked at before the one with the size.
_MOST_PARTS = 64
# Bytes of text that take the network as long again as the shortest text.
_BYTES = 128
# Characters of text for which a tokenizer takes as long as the network for the shortest text.
_CHARACTERS = 2_500
# Of ordinary text, for each token.
_BYTES_PER_TOKEN = 4


def image_expense(data: bytes) -> float:
    """The cost of an encoded image: by the pixels that its header claims, and by its bytes."""
    try:
        pixels = _pixels(data)
    except (struct.error, IndexError):
        pixels = None
    return 1.0 + ((_UNKNOWN_PIXELS if pixels is None else pixels) + len(data)) / _PIXELS


def text_expense(text: str, max_tokens: int) -> float:
    """The cost of a text: by the tokens that the network sees, at most `max_tokens`, and by characters."""
    most = _BYTES_PER_TOKEN * max_tokens
    seen = min(most, len(text[:most].encode("utf-8", "surrogatepass")))
    return 1.0 + seen / _BYTES + len(text) / _CHARACTERS


def _pixels(data: bytes) -> int | None:
    """Width times height as the header has them; None where it does not say, or not in its first parts.

    Raises struct.error or IndexError for a header that is not whole.
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
        # Start of a frame: all but tables for arithmetic and Huffman coding, and the reserved one.
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 5)
            return int(width * height)
        place += 2 + length
    return None


def _png_pixels(data: bytes) -> int | None:
    """Of the header before the picture, if there is but one: a decoder takes the last."""
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
    """Of the screen, or of the first frame where that reaches beyond it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(_MOST_PARTS):
        if data[place] == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", data, place + 1)
            return int(max(width, left + wide) * max(height, top + high))
        if data[place] == 0x21:
            place += 2
        # Blocks of an extension, each with its length before it, and none of length 0 but the last.
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
