"""Damaged and odd images and texts: from a seed, out of real ones."""

from __future__ import annotations

import io
import json
import random
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from tests.support.service.client import (
    BLAME,
    PICTURES,
    PRAISE,
)

FORMATS: Mapping[str, str] = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "HSV", "LAB")
_SIZES = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def saved(image: Image.Image, fmt: str, **options: Any) -> bytes:
    """The image as a file; as PNG where the format does not take its mode."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The damage is intended.
        warnings.simplefilter("ignore")
        try:
            image.save(buffer, fmt, **options)
        except Exception:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def picture(rng: random.Random) -> Image.Image:
    """One of the small pictures, smaller."""
    with Image.open(io.BytesIO(rng.choice(PICTURES)[1])) as image:
        return image.convert("RGB").resize((rng.randrange(16, 80), rng.randrange(16, 80)))


def _file(rng: random.Random) -> bytes:
    return saved(picture(rng), rng.choice(list(FORMATS)))


def _flips(rng: random.Random) -> bytes:
    data = bytearray(_file(rng))
    for _ in range(rng.choice((1, 4, 30))):
        # More of them where formats say what follows.
        place = rng.randrange(min(len(data), rng.choice((64, len(data)))))
        data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def _truncated(rng: random.Random) -> bytes:
    data = _file(rng)
    return data[: rng.randrange(len(data))]


def _spliced(rng: random.Random) -> bytes:
    one, other = _file(rng), _file(rng)
    return one[: rng.randrange(4, 200)] + other[rng.randrange(len(other)) :]


def _sized(rng: random.Random) -> bytes:
    """A header that says another size."""
    width, height = rng.choice(_SIZES), rng.choice((*_SIZES, 40))
    fmt = rng.choice(("PNG", "GIF", "BMP", "JPEG", "TIFF", "WEBP"))
    data = bytearray(saved(picture(rng), fmt))
    if fmt == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif fmt == "GIF":
        data[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif fmt == "BMP":
        data[18:26] = struct.pack("<II", width, height)
    elif fmt == "JPEG":
        frame = data.find(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    elif fmt == "TIFF":
        for tag in (256, 257, 278, 279):
            place = data.find(struct.pack("<H", tag))
            data[place + 8 : place + 12] = struct.pack("<I", rng.choice(_SIZES))
    else:
        data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
    return bytes(data)


def _bomb(rng: random.Random) -> bytes:
    """A few kilobytes that are many million pixels, which is said at the beginning or not."""
    return _empty(rng.choice((8_000, 12_000)), rng.choice(("PNG", "GIF", "TIFF")))


@cache
def _empty(side: int, fmt: str) -> bytes:
    options = {"compression": "tiff_adobe_deflate"} if fmt == "TIFF" else {}
    return saved(Image.new("1", (side, side)), fmt, **options)


@cache
def _flood() -> bytes:
    return zlib.compress(bytes(20 << 20), 1)


def _chunky(rng: random.Random) -> bytes:
    """A PNG with a compressed text or profile of megabytes, or more pixels than it says."""
    data = saved(picture(rng), "PNG")
    flood = _flood()
    name, content = rng.choice(
        ((b"zTXt", b"a\0\0" + flood), (b"iCCP", b"a\0\0" + flood), (b"IDAT", flood), (b"acTL", b"\xff" * 8),
         (b"eXIf", b"\xff" * 60), (b"tRNS", b"\0" * 300), (b"PLTE", b"\0" * 10))
    )  # fmt: skip
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


def _moded(rng: random.Random) -> bytes:
    """Every mode that some format can keep."""
    image, mode = picture(rng), rng.choice(_MODES)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("LAB", "HSV"):
        image = Image.new(mode, image.size)
    else:
        image = image.convert(mode)
    options: dict[str, Any] = {}
    if mode == "P":
        options["transparency"] = rng.choice((0, 3, b"\0\x80\xff"))
    return saved(image, rng.choice(("PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP")), **options)


def _tagged(rng: random.Random) -> bytes:
    """EXIF that turns it, or is damaged; a colour profile that is none."""
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65_535))
    written = bytearray(exif.tobytes())
    if rng.random() < 0.5:
        for _ in range(3):
            written[rng.randrange(len(written))] = rng.randrange(256)
    profile = rng.choice((None, b"", b"\0" * 127, rng.randbytes(3_000), b"acsp" * 40))
    return saved(
        picture(rng), rng.choice(("JPEG", "PNG", "WEBP", "TIFF")), exif=bytes(written), icc_profile=profile
    )


def _animated(rng: random.Random) -> bytes:
    first, *more = [picture(rng).resize((32, 32)) for _ in range(4)]
    data = saved(
        first,
        rng.choice(("GIF", "PNG", "WEBP", "TIFF")),
        save_all=True,
        append_images=more,
        duration=rng.choice((0, 40)),
    )
    return data if rng.random() < 0.5 else data[: rng.randrange(len(data) // 2, len(data))]


def _polyglot(rng: random.Random) -> bytes:
    """Two files in one."""
    data = _file(rng)
    other = rng.choice(
        (
            b"PK\3\4" + b"\0" * 26,
            b"<script>alert(1)</script>",
            b"%PDF-1.7\n",
            b"#!/bin/sh\n",
            b"\xca\xfe\xba\xbe",
        )
    )
    return rng.choice((data + other * 20, other + data, data[:20] + other + data[20:]))


def _other(rng: random.Random) -> bytes:
    """No image that is read here."""
    return rng.choice(
        (b"", b"\0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM",
         b"RIFF\0\0\0\0WEBP",
         b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
         b"P6 9 9 255\n",
         b"\0\0\1\0\1\0", b"8BPS\0\1", b"\0\0\0\x0cjP  \r\n\x87\n", b"SIMPLE  =", b"FWS\x05",
         rng.randbytes(500), b"II*\0\x08\0\0\0\xff\xff")
    )  # fmt: skip


_IMAGES: Sequence[Callable[[random.Random], bytes]] = (
    _flips, _truncated, _spliced, _sized, _moded, _tagged, _flips, _animated, _polyglot, _other, _chunky,
    _bomb, _file,
)  # fmt: skip


def image(seed: int) -> bytes:
    """The image of that number."""
    return _IMAGES[seed % len(_IMAGES)](random.Random(seed))


def _odd_characters(rng: random.Random) -> str:
    ranges = ((0, 32), (0x7F, 0xA0), (0x300, 0x370), (0x200B, 0x2070), (0xD800, 0xE000), (0xE000, 0xF900),
              (0xFDD0, 0xFDF0), (0xFFF0, 0x10000), (0x1F300, 0x1FAFF), (0xE0000, 0xE0080), (0x10FFF0,
              0x110000),
              (0x0378, 0x037A), (0x2FE0, 0x2FF0), (0x590, 0x700), (0x3400, 0x9FFF), (0x20, 0x7F))  # fmt: skip
    low, high = rng.choice(ranges)
    return "".join(chr(rng.randrange(low, high)) for _ in range(rng.choice((1, 5, 40))))


def _texts(rng: random.Random) -> str:
    plain = rng.choice((*PRAISE, *BLAME))
    odd = _odd_characters(rng)
    place = rng.randrange(len(plain))
    long = (100_000, 99_999, 100_001, 30_000)
    return rng.choice(
        (
            plain[:place] + odd + plain[place:],
            odd,
            odd + plain,
            "a" + "\u0301" * rng.choice((10, 3_000)),
            "\U0001f468\u200d\U0001f469\u200d\U0001f467" * rng.choice((1, 500)) + "\ufe0f" * 9,
            unicodedata.normalize(
                rng.choice(("NFD", "NFKD", "NFKC")), plain + "\u00e9\u2126\ufb01\uac00\u1e9b"
            ),
            "\u202e" + plain + "\u202c\u2066",
            rng.choice(("a", "a ", "\u0301", "\u4e00", "\U0001f600", ". ", "\ufdfa", " a", "1", "-"))
            * 100_001,
            (plain + " ") * (rng.choice(long) // (len(plain) + 1)),
            ("ab" * rng.choice(long))[: rng.choice(long)],
            rng.choice(
                ("", " ", "\u3000", "\u200b", "\ufeff", "\u2028", "\0", "\x85", "[CLS]", "[MASK] [PAD]")
            ),
            "<script>'\"; DROP TABLE examples; --{{7*7}}${x}%s%n\\",
        )
    )


def text(seed: int) -> str:
    """The text of that number; it may hold what has no UTF-8."""
    return _texts(random.Random(seed))


def json_string(value: str, seed: int) -> bytes:
    """The text as a string in JSON, in escapes or as it is; or bytes that are no UTF-8."""
    rng = random.Random(seed)
    written = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        return (
            written[:-1]
            + rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3"))
            + b'"'
        )
    return written


CODES = {
    "no_known_tokens",
    "undecodable_image",
    "truncated_image",
    "image_too_large",
    "empty_image",
    "unsupported_image",
    "input_too_costly",
    "empty_text",
    "text_too_long",
    "invalid_text",
    "wrong_kind",
}
