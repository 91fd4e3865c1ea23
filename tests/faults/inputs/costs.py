"""The cost of mutated images: CPU time and memory of preparing each, as the service does.

`python -m tests.faults.inputs.costs 0 10000` prints as JSON how many were read and refused, the dearest,
and the most memory that this process and those that decode for it have had.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

from benchmarks.serving import bombs
from models.preprocess.decoder import Decoder
from models.preprocess.image import ImagePreprocessor
from models.preprocess.limits import InputError
from models.priority import ProcessCpuClock
from models.spec import ImageTransform
from tests.faults.inputs import input_mutations

TRANSFORM = ImageTransform(224, 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
_MOST_BYTES = 16 << 20
_DEAREST = 10
_SIZES = (1, 2, 2_000, 7_000, 16_383, 50_000, 65_535, 0xFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def _photo(side: int) -> Image.Image:
    noise = np.random.default_rng(side).integers(0, 256, (side // 8, side // 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)


def _heic(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=60)
    return buffer.getvalue()


def _interlaced(image: Image.Image) -> bytes:
    """As PNG has it, although Pillow writes none: the pixels are those of seven passes or, here, noise."""
    data = bytearray(input_mutations.saved(image, "PNG"))
    data[28] = 1
    return bytes(data)


@cache
def seeds() -> Sequence[bytes]:
    """Files of every format that is read, and of each kind of it."""
    found: list[bytes] = []
    for side in (64, 600):
        image = _photo(side)
        grey, wide = image.convert("L"), Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 9)
        clear = image.convert("RGBA")
        clear.putalpha(grey)
        frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(90)] * 3}
        kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
            (image, "JPEG", {}),
            (image, "JPEG", {"progressive": True, "subsampling": 0}),
            (image, "JPEG", {"restart_marker_blocks": 1}),
            (image.convert("CMYK"), "JPEG", {"progressive": True}),
            (image, "MPO", frames),
            (image, "PNG", {}),
            (image.convert("P"), "PNG", {"transparency": 3}),
            (wide, "PNG", {}),
            (clear, "PNG", {}),
            (image, "PNG", frames),
            (image, "GIF", {}),
            (image, "GIF", frames),
            (image, "WEBP", {}),
            (image, "WEBP", {"lossless": True}),
            (clear, "WEBP", frames),
            (image, "BMP", {}),
            (image.convert("1"), "BMP", {}),
            (image, "TIFF", {}),
            (wide, "TIFF", {"big_tiff": True}),
            (image, "AVIF", {"speed": 10}),
            (clear, "AVIF", {"speed": 10, **frames}),
        ]
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"):
            kinds.append((image, "TIFF", {"compression": compression}))
        kinds += [(image.convert("1"), "TIFF", {"compression": kind}) for kind in ("group3", "group4")]
        found += [input_mutations.saved(one, fmt, **options) for one, fmt, options in kinds]
        found += [_heic(image), _interlaced(image)]
    found += [make(20_000) for make in bombs.BOMBS.values()]
    return found


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 30, 300))):
        place = rng.randrange(min(len(data), rng.choice((64, 512, len(data)))))
        changed[place] = rng.choice((changed[place] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
    return bytes(changed)


def _numbered(data: bytes, rng: random.Random) -> bytes:
    """Lengths and counts, wherever they are, that say much or little."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 5))):
        form = rng.choice((">H", "<H", ">I", "<I", ">Q"))
        most = (1 << 8 * struct.calcsize(form)) - 1
        value = rng.choice((0, 1, most, most >> 1, rng.choice(_SIZES) & most, len(data) & most))
        place = rng.randrange(max(1, min(len(data), rng.choice((64, 400, len(data)))) - 8))
        struct.pack_into(form, changed, place, value)
    return bytes(changed)


def _parts(data: bytes) -> Iterator[tuple[int, int]]:
    """The segments of a JPEG, the chunks of a PNG or a WebP, or slices of any other file."""
    if data.startswith(b"\x89PNG"):
        place, head, form = 8, 8, ">I4s"
    elif data.startswith(b"RIFF"):
        place, head, form = 12, 8, "<4sI"
    elif data.startswith(b"\xff\xd8"):
        place = 2
        while place + 4 <= len(data) and data[place] == 0xFF:
            (length,) = struct.unpack_from(">H", data, place + 2)
            yield place, min(len(data), place + 2 + length)
            place += 2 + length
        return
    else:
        step = max(1, len(data) // 40)
        yield from ((place, min(len(data), place + step)) for place in range(0, len(data), step))
        return
    while place + head <= len(data):
        first, second = struct.unpack_from(form, data, place)
        length = first + 12 if form == ">I4s" else second + (second & 1) + 8
        yield place, min(len(data), place + length)
        place += length


def _repeated(data: bytes, rng: random.Random) -> bytes:
    """One of its parts again and again, up to megabytes."""
    begin, end = rng.choice(list(_parts(data)) or [(0, len(data))])
    if rng.random() < 0.3:
        begin = rng.randrange(len(data))
        end = begin + rng.choice((1, 2, 8, 100))
    part = data[begin:end]
    size = rng.choice((10_000, 300_000, 2_000_000, 8_000_000))
    times = max(1, min(size // max(1, len(part)), 2_000_000))
    return data[:end] + part * times + data[end:]


def _truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _concatenated(data: bytes, rng: random.Random) -> bytes:
    other = rng.choice(seeds())
    place = rng.choice((0, len(data), rng.randrange(len(data))))
    whole = data[:place] + other * rng.choice((1, 1, 20)) + data[place:]
    return data * min(rng.choice((2, 50)), _MOST_BYTES // len(data)) if rng.random() < 0.2 else whole


def _resized(data: bytes, rng: random.Random) -> bytes:
    """Another width and height wherever the file says them."""
    changed = bytearray(data)
    width, height = rng.choice(_SIZES), rng.choice(_SIZES)
    if data.startswith(b"\xff\xd8"):
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            frame = data.find(marker)
            if frame > 0:
                struct.pack_into(">HH", changed, frame + 5, height & 0xFFFF, width & 0xFFFF)
    elif data.startswith(b"\x89PNG"):
        struct.pack_into(">II", changed, 16, width, height)
        struct.pack_into(">I", changed, 29, zlib.crc32(bytes(changed[12:29])))
    elif data.startswith(b"GIF"):
        struct.pack_into("<HH", changed, 6, width & 0xFFFF, height & 0xFFFF)
        frame = data.find(b",", 13)
        struct.pack_into("<HH", changed, frame + 5, width & 0xFFFF, height & 0xFFFF)
    elif data.startswith(b"BM"):
        struct.pack_into("<II", changed, 18, width, height)
    elif data.startswith(b"RIFF"):
        struct.pack_into("<HH", changed, 26, width & 0x3FFF, height & 0x3FFF)
    elif data.startswith((b"II", b"MM")):
        for tag in rng.sample((256, 257, 258, 277, 278, 279, 273), 2):
            place = data.find(struct.pack("<H", tag))
            if 0 <= place <= len(data) - 12:
                struct.pack_into("<I", changed, place + 8, rng.choice(_SIZES))
    else:
        place = data.find(b"ispe")
        if place > 0:
            struct.pack_into(">II", changed, place + 8, width, height)
    return bytes(changed)


_CHANGES: Sequence[Callable[[bytes, random.Random], bytes]] = (
    _flipped, _numbered, _repeated, _truncated, _concatenated, _resized,
)  # fmt: skip


def mutant(number: int) -> bytes:
    """The image of that number: a seed, changed once or more."""
    rng = random.Random(number)
    data = rng.choice(seeds())
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not 16 <= len(data) <= _MOST_BYTES:
            break
        data = rng.choice(_CHANGES)(data, rng)
    return data[:_MOST_BYTES]


def _peak(process: str) -> int:
    """Bytes that a process has had in memory at most."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


class Costs:
    """CPU time and memory of this process and of those that decode for it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._before = _peak("self")
        self.memory_of_decoders = 0

    @property
    def memory(self) -> int:
        """Bytes more than at first that this process has had."""
        return _peak("self") - self._before

    def seconds(self) -> float:
        """Seconds of CPU time so far, including processes that have ended."""
        ended = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        pids = [process._process.pid for process in self._decoder._idle if process.alive]
        self.memory_of_decoders = max([self.memory_of_decoders, *(_peak(str(pid)) for pid in pids)])
        return time.process_time() + ended + sum(ProcessCpuClock(pid).seconds() for pid in pids)


def measure(first: int, last: int) -> Mapping[str, Any]:
    """The cost of the images of these numbers, one after the other."""
    seeds()
    decoder = Decoder(processes=1)
    prepare = ImagePreprocessor(TRANSFORM, decoder=decoder)
    prepare(input_mutations.saved(_photo(64), "AVIF"))
    costs = Costs(decoder)
    codes: Counter[str] = Counter()
    dearest: list[tuple[float, int, str]] = []
    unforeseen: list[tuple[int, str]] = []
    for number in range(first, last):
        data, code = mutant(number), "read"
        begun = costs.seconds()
        try:
            prepare(data)
        except InputError as error:
            code = error.code
        except Exception as error:
            code = type(error).__name__
            unforeseen.append((number, repr(error)))
        codes[code] += 1
        seconds = round(costs.seconds() - begun, 3)
        dearest = sorted([*dearest, (seconds, number, code)], reverse=True)[:_DEAREST]
    decoder.close()
    return {
        "codes": codes,
        "dearest": dearest,
        "unforeseen": unforeseen,
        "memory": costs.memory,
        "memory_of_decoders": costs.memory_of_decoders,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
