"""Two hundred texts and two hundred images as people send them: every length, script, format and shape."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tests.support.service.client import BLAME, PICTURES, PRAISE, UNSEEN

ROOT = Path(__file__).resolve().parents[3]

WRITTEN = (ROOT / "models" / "export" / "calibration" / "texts.txt").read_text("utf-8").splitlines()
# Far from plain English: scripts, marks, signs of no width, what tokenizers have names for.
_ODD = (
    "Ünïcödé — naïve café, Ærøskøbing “quoted” …",
    "e\u0301le\u0300ve decomposed, \ufb01ne ligature, \uff26\uff35\uff2c\uff2c width",
    "请问这个产品什么时候发货?",
    "주문한 상품이 언제 도착하나요?",
    "أين طلبي؟ لقد دفعت بالفعل",
    "कृपया मेरा पैसा वापस करें",
    "ฉันต้องการยกเลิกคำสั่งซื้อ",
    "Ребята, всё отлично работает!",
    "\u202eright to left\u202c and \u200bzero\u200dwidth\ufeff",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇳🇱 loved it 5/5 👍🏽",
    "\U0001d4d7\U0001d4ee\U0001d4f5\U0001d4f5\U0001d4f8 in mathematical letters",
    "[CLS] not a token [SEP] [MASK] [UNK] [PAD]",
    "tabs\tand\r\nline\nbreaks\u2028and\u00a0spaces\u3000",
    "\u0085control\u0001 characters\u007f",
    "\ufffd replaced \ue000 private",
    "<b>HTML</b> &amp; https://example.com/a?b=c#d user@example.com",
    "a",
    "?!",
    ".",
    "x" * 90,
    "x" * 150,
    "Ω≈ç√∫˜µ≤≥÷ ½ ™ ㎏ ①",
    "z̸̢͎a̷l̴g̵o̶ t̷e̶x̴t̵",
)
# Texts of which the backbone knows no word.
UNKNOWN = (
    "🙂",
    "🚀🚀🚀 🎉",
    "ខ្ញុំចង់បានប្រាក់របស់ខ្ញុំវិញ",
    "\U0001f9ff" * 400,
    "y" * 120,
    "ꙮ ꙮ ꙮ",
)


def texts() -> list[str]:
    """Two hundred different ones; a third have far more than 256 word pieces."""
    plain = [*PRAISE, *BLAME, *WRITTEN]
    found = [*_ODD, *UNKNOWN, *plain]
    found += [f"{one.upper()}  {other}\n" for one, other in zip(plain, reversed(plain), strict=True)][:30]
    number = 0
    while len(found) < 200:
        pieces = (*_ODD, *plain) if number % 2 else plain
        chosen = [pieces[(7 * number + 3 * step) % len(pieces)] for step in range(12 + 9 * number)]
        found.append((" " if number % 3 else "").join(chosen))
        number += 1
    found[-1] = "word " * 19_000
    found[-2] = "n" * 5_000 + "中" * 60_000
    return found[:200]


def images() -> list[bytes]:
    """Two hundred different ones: photographs and drawings, square and far from it."""
    photographs = [
        Image.open(path).convert("RGB")
        for path in sorted((ROOT / "models" / "export" / "calibration").glob("*.jpg"))
    ]
    drawn = [Image.open(io.BytesIO(data)).convert("RGBA") for _, data in PICTURES]
    found = [data for _, data in PICTURES] + list(UNSEEN.values())
    found += [
        path.read_bytes() for path in sorted((ROOT / "models" / "export" / "calibration").glob("*.jpg"))
    ]
    sizes = (
        *((640, 480), (480, 640), (224, 224), (300, 200), (197, 331), (1200, 900), (1000, 1777), (61, 47)),
        *((800, 300), (210, 900), (1500, 250), (90, 1300), (2400, 24), (5, 1800), (4000, 1), (1, 3000)),
    )
    for place, photograph in enumerate(photographs):
        for step in range(len(sizes) // 2):
            size = sizes[(place + 2 * step + place // 8) % len(sizes)]
            found.append(_encoded(ImageOps.fit(photograph, size), place + step))
    while len(found) < 200:
        place = len(found)
        # An object at one end of a canvas, as a banner has it.
        width = (150, 220, 420, 700)[place % 4] + place
        wide = Image.new("RGBA", (width, 96), (0, 90 * (place % 3), 120, 255 * (place % 2)))
        drawing = drawn[place % len(drawn)]
        wide.paste(drawing, ((wide.width - 64) * (place % 3) // 2, 16), drawing)
        found.append(_encoded(wide if place % 5 else wide.rotate(90, expand=True), place))
    return found[:200]


def _encoded(image: Image.Image, kind: int) -> bytes:
    """The image in one of many formats and modes."""
    exif = Image.Exif()
    exif[0x0112] = 1 + kind % 8
    ways: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("RGB", "JPEG", {"quality": 90, "exif": exif}),
        ("RGB", "JPEG", {"quality": 60, "progressive": True, "subsampling": 0}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("L", "JPEG", {"quality": 85, "exif": exif}),
        ("P", "PNG", {"transparency": 7}),
        ("RGB", "PNG", {"transparency": (0, 90, 120)}),
        ("1", "PNG", {}),
        ("CMYK", "JPEG", {"quality": 90}),
        ("RGB", "WEBP", {"quality": 80}),
        ("RGBA", "WEBP", {"lossless": True, "exif": exif}),
        ("P", "GIF", {"transparency": 3}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    )
    mode, form, options = ways[kind % len(ways)]
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        fading = np.linspace(0, 255, image.width, dtype=np.uint8)
        image.putalpha(Image.fromarray(np.broadcast_to(fading, (image.height, image.width)).copy()))
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
