"""Files that say much of themselves: what is kept of them, what is refused, and what looking costs."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from benchmarks.serving import bombs
from models.preprocess.decoder import Decoder
from models.preprocess.image import ImagePreprocessor, rgb
from models.preprocess.image_file.reader import read_image_file
from models.preprocess.limits import InputError
from tests.support.models.drawings import PLAIN, drawing, encoded, levels, refusal

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MEGABYTE = 1 << 20


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(data: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return data[:33] + chunk(name, content) + data[33:]


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def cost(data: bytes) -> tuple[float, str | None]:
    """CPU seconds for an image, those of a process that decodes it with them, and how it is refused."""
    decoder, found = Decoder(), None
    begun = cpu_seconds()
    try:
        ImagePreprocessor(PLAIN, decoder=decoder)(data)
    except InputError as error:
        found = error.code
    decoder.close()
    return cpu_seconds() - begun, found


@pytest.fixture(scope="module")
def starting() -> float:
    """CPU seconds that a process for decoding takes to start."""
    return min(cost(encoded(drawing(), "AVIF"))[0] for _ in range(2))


@pytest.mark.parametrize("name", bombs.BOMBS)
@pytest.mark.parametrize("size", [MEGABYTE // 2, 8 * MEGABYTE])
def test_a_file_costs_no_more_than_its_bytes(name: str, size: int, starting: float) -> None:
    """Seconds to a minute at 8 MB before they were looked through."""
    seconds, code = cost(bombs.BOMBS[name](size))
    assert code in (None, "input_too_costly", "undecodable_image", "truncated_image", "image_too_large")
    assert seconds < starting + 1.0


def test_scans_are_counted() -> None:
    few, many = bombs.scans(8, side=64), bombs.scans(60, side=64)
    np.testing.assert_allclose(levels(few), 128, atol=2)
    assert refusal(many) == "input_too_costly"
    assert refusal(bombs.scans(48)) == "input_too_costly", "49 megapixels, 48 times"
    assert read_image_file(bombs.scans(20, side=1_000)).large is False
    assert read_image_file(bombs.scans(48, side=1_000)).large


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"iCCP", b"a\0\0" + zlib.compress(bytes(2 * MEGABYTE))),
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * MEGABYTE))),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2 * MEGABYTE))),
        (b"tEXt", b"a\0" + bytes(2 * MEGABYTE)),
        (b"iCCP", b"no profile"),
        (b"eXIf", b"II*\0\xff\xff\xff\xff"),
        (b"sBIT", b""),
    ],
    ids=lambda value: value[:4].decode("latin-1"),
)
def test_chunks_that_are_large_or_damaged_are_skipped(name: bytes, content: bytes) -> None:
    plain = encoded(drawing(), "PNG")
    np.testing.assert_array_equal(levels(with_chunk(plain, name, content)), levels(plain))


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def test_what_cameras_and_editors_write_into_a_jpeg_is_skipped() -> None:
    """Megabytes of it: profiles and XMP of many segments, resources, a second picture behind the first."""
    plain = encoded(drawing((64, 48)), "JPEG", quality=95)
    profile = b"".join(
        segment(0xE2, b"ICC_PROFILE\0" + bytes([place, 40]) + bytes(60_000)) for place in range(1, 41)
    )
    extended = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000)) * 100
    resources = segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04" + bytes(60_000)) * 5
    pictures = segment(0xE2, b"MPF\0MM\0*\0\0\0\x08" + bytes(100))
    rich = plain[:2] + profile + extended + resources + pictures + plain[2:] + plain * 3
    np.testing.assert_array_equal(levels(rich), levels(plain))
    assert len(read_image_file(rich).data) <= len(plain)


def test_the_colours_of_inks_stay_as_they_are_meant() -> None:
    """An Adobe segment says how; it is kept."""
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(inks, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in read_image_file(data).data
    np.testing.assert_allclose(levels(data).mean((1, 2)), (255, 0, 0), atol=3)


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "P", "1", "LA"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "RGBA", "P", "1"),
    "GIF": ("RGB", "L", "RGBA", "P", "1"),
    "TIFF": ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA"),
    "AVIF": ("RGB", "RGBA"),
}


@pytest.mark.parametrize(("fmt", "mode"), [(fmt, mode) for fmt, modes in MODES.items() for mode in modes])
def test_what_is_left_of_a_file_is_the_same_picture(fmt: str, mode: str) -> None:
    """As Pillow reads the whole of it."""
    image = drawing((40, 30)).convert(mode)
    options: dict[str, Any] = {"exif": b"Exif\0\0" + Image.Exif().tobytes()[6:], "icc_profile": bytes(500)}
    data = encoded(image, fmt, **options)
    with Image.open(io.BytesIO(data)) as whole, Image.open(io.BytesIO(read_image_file(data).data)) as rest:
        assert whole.mode == rest.mode
        assert whole.convert("RGBA").tobytes() == rest.convert("RGBA").tobytes()
        assert fmt == "AVIF" or "icc_profile" not in rest.info
    file = read_image_file(data)
    assert (file.width, file.height) == (40, 30)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_keeps_what_describes_its_pixels(compression: str | None, big: bool) -> None:
    expected = levels(encoded(drawing(), "PNG"))
    data = encoded(drawing(), "TIFF", compression=compression, big_tiff=big)
    np.testing.assert_allclose(levels(data), expected, atol=30 if compression == "jpeg" else 1e-3)
    assert read_image_file(data).large is (compression is not None)


def test_the_orientation_of_a_text_that_imagemagick_writes_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    digits = exif.tobytes().hex().encode()
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % (len(digits) // 2) + digits)
    upright = drawing((24, 16))
    tilted = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG")
    np.testing.assert_array_equal(levels(with_chunk(tilted, b"zTXt", text)), levels(encoded(upright, "PNG")))


def test_an_orientation_behind_the_pixels_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = drawing((24, 16))
    data = encoded(upright.transpose(Image.Transpose.ROTATE_180), "PNG")
    late = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    np.testing.assert_array_equal(levels(late), levels(encoded(upright, "PNG")))


def test_the_first_frame_of_an_animation_is_all_that_is_read() -> None:
    first, second = Image.new("RGB", (64, 64), "red"), Image.effect_noise((64, 64), 90).convert("RGB")
    for fmt in ("WEBP", "PNG"):
        data = encoded(first, fmt, save_all=True, append_images=[second] * 20)
        assert len(read_image_file(data).data) < len(data) / 4
        np.testing.assert_allclose(levels(data).mean((1, 2)), (255, 0, 0), atol=3)


def test_heic_is_read_or_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(drawing((128, 64)))
    file = read_image_file(data)
    assert (file.width, file.height) == (128, 64)
    np.testing.assert_allclose(levels(data), levels(encoded(drawing((128, 64)), "PNG")), atol=40)
    monkeypatch.setattr("models.preprocess.image_file.formats.heic_is_read", lambda: False)
    with pytest.raises(InputError, match=r"^HEIC .*topwork\[heic\]"):
        ImagePreprocessor(PLAIN)(data)


def heic(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95)
    return buffer.getvalue()


def test_training_sees_the_same_pictures() -> None:
    """Decoded whole, in the process that trains, which may be ended."""
    upright = drawing((128, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (heic(upright), encoded(upright, "AVIF", quality=95), encoded(upright, "TIFF")):
        found = np.asarray(rgb(data), np.int16)
        np.testing.assert_allclose(found, np.asarray(upright, np.int16), atol=50)
    tilted = encoded(upright.transpose(Image.Transpose.ROTATE_90), "AVIF", quality=95, exif=exif)
    np.testing.assert_allclose(np.asarray(rgb(tilted), np.int16), np.asarray(upright, np.int16), atol=50)


def test_ten_bits_in_sixteen() -> None:
    """As bright as they were, and not a sixty-fourth of it."""
    ramp = np.linspace(0, 1023, 256).astype(np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(ramp), "PNG")
    expected = np.broadcast_to(ramp / 1023 * 255, (3, 16, 16))
    np.testing.assert_allclose(levels(data), expected, atol=0.51)
    np.testing.assert_allclose(levels(with_chunk(data, b"sBIT", b"\x0a")), expected, atol=0.51)
    dark = np.broadcast_to(ramp / 257, (3, 16, 16))
    np.testing.assert_allclose(levels(with_chunk(data, b"sBIT", b"\x10")), dark, atol=0.51)


def wide_png(depth: int, colour: tuple[int, int, int]) -> bytes:
    """A PNG of 16 bits a channel."""
    row = b"\0" + struct.pack(">HHH", *colour) * 8
    header = struct.pack(">IIBBBBB", 8, 8, depth, 2, 0, 0, 0)
    pixels = zlib.compress(row * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_16_bits_of_colour() -> None:
    """Pillow keeps the upper eight bits: a picture with none there is refused, not taken for black."""
    np.testing.assert_allclose(levels(wide_png(16, (65_535, 32_896, 0))).mean((1, 2)), (255, 128, 0), atol=1)
    assert refusal(wide_png(16, (1_023, 512, 0))) == "unsupported_image"
    assert refusal(wide_png(16, (4_095, 512, 0))) == "unsupported_image"
