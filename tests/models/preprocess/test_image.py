"""Images and texts to arrays: every format, every way to be unusable, equality with the reference."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from models.preprocess.image import ImagePreprocessor
from models.preprocess.limits import InputError, InputLimits
from models.preprocess.pixels import normalised
from models.preprocess.square import to_square
from models.preprocess.text import TextPreprocessor
from models.spec import ImageTransform, TextTransform
from tests.support.models import tiny_backbones
from tests.support.models.drawings import PLAIN, drawing, encoded, levels, refusal

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("fmt", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 25),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}, 12),
        ("GIF", {}, 25),
    ],
)
def test_every_format_gives_the_picture(fmt: str, options: dict[str, object], tolerance: float) -> None:
    expected = np.asarray(drawing()).transpose(2, 0, 1)
    pixels = levels(encoded(drawing(), fmt, **options))
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 16, 16)
    np.testing.assert_allclose(pixels, expected, atol=tolerance + 1e-3)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_of_several_frames_the_first_is_taken(fmt: str) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    pixels = levels(encoded(first, fmt, save_all=True, append_images=[second]))
    np.testing.assert_allclose(pixels.mean((1, 2)), (255, 0, 0), atol=3)


_UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", sorted(_UNDO))
@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation_is_applied(fmt: str, orientation: int) -> None:
    upright = drawing((24, 16))
    undo = _UNDO[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    options = lossless.get(fmt, {})
    tilted, straight = encoded(stored, fmt, exif=exif, **options), encoded(upright, fmt, **options)
    np.testing.assert_allclose(levels(tilted), levels(straight), atol=6 if fmt == "JPEG" else 1e-3)


def test_an_orientation_that_only_xmp_names_is_applied() -> None:
    upright = drawing((24, 16))
    options: dict[str, Any] = {"quality": 100, "subsampling": 0}
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    tilted = encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", xmp=xmp, **options)
    np.testing.assert_allclose(levels(tilted), levels(encoded(upright, "JPEG", **options)), atol=6)


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(drawing(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12\x01" * 20)
    np.testing.assert_allclose(levels(data), levels(encoded(drawing(), "PNG")), atol=1e-3)


def _half_transparent(mode: str) -> bytes:
    alpha = Image.new("L", (16, 16), 0)
    alpha.paste(255, (0, 0, 8, 16))
    colour = Image.new("RGB", (16, 16), (200, 0, 0)) if mode == "RGBA" else Image.new("L", (16, 16), 60)
    colour.putalpha(alpha)
    return encoded(colour, "PNG")


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (200, 0, 0)), ("LA", (60, 60, 60))])
def test_transparency_is_composited_on_white(mode: str, colour: tuple[int, ...]) -> None:
    pixels = levels(_half_transparent(mode))
    np.testing.assert_allclose(pixels[:, :, :8].mean((1, 2)), colour, atol=1e-3)
    np.testing.assert_allclose(pixels[:, :, 8:], 255, atol=1e-3)


@pytest.mark.parametrize("fmt", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(fmt: str) -> None:
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30] + [0] * 750)
    palette.paste(0, (0, 0, 8, 16))
    pixels = levels(encoded(palette, fmt, transparency=0))
    np.testing.assert_allclose(pixels[:, :, :8], 255, atol=1e-3)
    np.testing.assert_allclose(pixels[:, :, 8:].mean((1, 2)), (10, 20, 30), atol=1e-3)


def test_a_transparent_colour_without_alpha_channel_is_white() -> None:
    rgb = Image.new("RGB", (16, 16), (1, 2, 3))
    rgb.paste((9, 9, 9), (8, 0, 16, 16))
    pixels = levels(encoded(rgb, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_allclose(pixels[:, :, :8], 255, atol=1e-3)
    np.testing.assert_allclose(pixels[:, :, 8:], 9, atol=1e-3)


@pytest.mark.parametrize("fmt", ["JPEG", "TIFF"])
def test_cmyk(fmt: str) -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    cmyk.paste((0, 255, 255, 0), (0, 0, 8, 16))
    options = {"quality": 100, "subsampling": 0} if fmt == "JPEG" else {}
    pixels = levels(encoded(cmyk, fmt, **options))
    np.testing.assert_allclose(pixels[:, :, :8].mean((1, 2)), (255, 0, 0), atol=3)
    np.testing.assert_allclose(pixels[:, :, 8:], 255, atol=3)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(fmt: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = levels(encoded(Image.fromarray(ramp), fmt))
    np.testing.assert_allclose(pixels, np.broadcast_to(ramp / 257, (3, 16, 16)), atol=0.51)


def test_16_bit_grey_of_the_other_byte_order() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    little = encoded(Image.fromarray(ramp), "TIFF")
    # The same file with big-endian header, tags and samples.
    big = io.BytesIO()
    Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes()).save(big, "TIFF")
    np.testing.assert_allclose(levels(big.getvalue()), levels(little), atol=1e-3)


def test_16_bit_grey_with_a_transparent_level() -> None:
    wide = np.full((16, 16), 32896, np.uint16)
    wide[:, :8] = 1000
    data = encoded(Image.fromarray(wide), "PNG")
    # Pillow does not write tRNS for 16 bits, so put the chunk behind the header.
    chunk = b"tRNS" + struct.pack(">H", 1000)
    transparent = data[:33] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    pixels = levels(transparent)
    np.testing.assert_allclose(pixels[:, :, :8], 255, atol=1e-3)
    np.testing.assert_allclose(pixels[:, :, 8:], 128, atol=0.51)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_bilevel_become_rgb(mode: str) -> None:
    image = Image.new("L", (16, 16), 0)
    image.paste(255, (8, 0, 16, 16))
    pixels = levels(encoded(image.convert(mode), "PNG"))
    np.testing.assert_allclose(pixels[:, :, :8], 0, atol=1e-3)
    np.testing.assert_allclose(pixels[:, :, 8:], 255, atol=1e-3)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_modes_without_an_agreed_meaning_are_refused(mode: str) -> None:
    assert refusal(encoded(Image.new(mode, (16, 16)), "TIFF")) == "unsupported_image"


def test_limit_on_bytes() -> None:
    data = encoded(drawing(), "PNG")
    assert refusal(data, InputLimits(max_image_bytes=len(data) - 1)) == "image_too_large"
    ImagePreprocessor(PLAIN, InputLimits(max_image_bytes=len(data)))(data)


def test_limit_on_pixels() -> None:
    data = encoded(drawing((20, 10)), "PNG")
    assert refusal(data, InputLimits(max_pixels=199)) == "image_too_large"
    ImagePreprocessor(PLAIN, InputLimits(max_pixels=200))(data)


def _png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = (header, data, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 20_000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    assert refusal(_png_claiming(*size)) == "image_too_large"


def test_a_tile_larger_than_the_picture_counts() -> None:
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32_768, 323: 32_768, 324: 200, 325: 16}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    assert refusal(tiff.ljust(200, b"\0") + zlib.compress(b"\0" * 64)) == "image_too_large"


@pytest.mark.parametrize(
    "data",
    [
        _png_claiming(0, 5),
        b"GIF89a" + struct.pack("<HHBBB", 0, 3, 0, 0, 0) + b";",
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 0, 4, 1, 24, 0, 0, 0, 0, 0, 0),
        b"",
    ],
    ids=["PNG", "GIF", "BMP", "no bytes"],
)
def test_no_pixels(data: bytes) -> None:
    assert refusal(data) == "empty_image"


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.97])
def test_a_truncated_image_is_refused(fmt: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), fmt)
    assert refusal(data[: int(len(data) * share)]) in ("truncated_image", "undecodable_image")


@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_a_truncated_image_is_called_truncated(fmt: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), fmt)
    assert refusal(data[: len(data) // 2]) == "truncated_image"


@pytest.mark.parametrize("fmt", ["PPM", "TGA", "PCX"])
def test_other_formats_are_not_opened(fmt: str) -> None:
    assert refusal(encoded(drawing(), fmt)) == "undecodable_image"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded(drawing(), "ICO"), "ICO"),
        (encoded(drawing(), "JPEG2000"), "JPEG 2000"),
        (encoded(drawing(), "DDS"), "DDS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"<svg xmlns='x'/>", "SVG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats_that_are_known_and_not_read_are_refused_by_name(data: bytes, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is not supported. Send JPEG, PNG, "):
        ImagePreprocessor(PLAIN)(data)


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\0" * 100,
        b"\xff\xd8\xff",
    ],
)
def test_not_an_image(data: bytes) -> None:
    assert refusal(data) == "undecodable_image"


@settings(max_examples=150, deadline=None)
@given(
    fmt=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20
    ),
)
def test_a_damaged_image_is_refused_or_read_and_nothing_else(
    fmt: str, edits: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(drawing((40, 30)), fmt))
    for place, value in edits:
        data[int(place * len(data))] = value
    try:
        pixels = ImagePreprocessor(PLAIN, InputLimits(max_pixels=10_000_000))(bytes(data))
    except InputError:
        return
    assert pixels.shape == (16, 16, 3)


def _reference(
    image: Image.Image, transform: ImageTransform
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """timm's transform written out: Resize as torchvision computes sizes, CenterCrop, scale, normalise."""
    scaled = int(transform.size / transform.crop)
    width, height = image.size
    if transform.crop_mode == "squash":
        new = (scaled, scaled)
    elif width <= height:
        new = (scaled, int(scaled * height / width))
    else:
        new = (int(scaled * width / height), scaled)
    resampling = Image.Resampling[transform.interpolation.upper()]
    left, top = (round((length - transform.size) / 2) for length in new)
    whole = image.resize(new, resampling)
    square = (
        np.asarray(whole.crop((left, top, left + transform.size, top + transform.size)), np.float64) / 255
    )
    return ((square - transform.mean) / transform.std).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("interpolation", "share"), [("bicubic", 0.01), ("lanczos", 0.01), ("bilinear", 0.13)]
)
@pytest.mark.parametrize(
    ("crop", "crop_mode"), [(0.875, "center"), (0.882, "center"), (1.0, "center"), (0.9, "squash")]
)
def test_equals_resizing_all_and_cropping(
    interpolation: str, share: float, crop: float, crop_mode: str
) -> None:
    transform = ImageTransform(56, crop, interpolation, (0.485, 0.456, 0.406), (0.229,) * 3, crop_mode)
    preprocessor = ImagePreprocessor(transform)
    rng = np.random.default_rng(1)
    for size in (
        (64, 64),
        (56, 56),
        (640, 480),
        (480, 640),
        (97, 333),
        (333, 97),
        (20, 20),
        (501, 64),
        (1, 1),
    ):
        image = Image.fromarray(rng.integers(0, 256, (*reversed(size), 3), dtype=np.uint8))
        found = normalised(preprocessor(encoded(image, "PNG"))[None], transform)[0]
        off = np.abs(found - _reference(image, transform)) * 255 * 0.229
        # Pillow takes the box in float32, so a sum that is half way between two levels may round to the other
        # one. Bilinear weights of noise are often half way.
        assert off.max() < 2.001, size
        assert (off > 0.01).mean() < share, size


@pytest.mark.parametrize("crop_mode", ["center", "fold"])
@pytest.mark.parametrize("size", [(200_000, 2), (2, 200_000), (30, 200_000), (20_000, 2), (4_000_000, 1)])
def test_a_very_long_picture_costs_no_more_than_its_pixels(size: tuple[int, int], crop_mode: str) -> None:
    data = encoded(Image.new("RGB", size, "green"), "PNG")
    before = time.process_time()
    pixels = ImagePreprocessor(replace(PLAIN, crop_mode=crop_mode))(data)
    assert time.process_time() - before < 2.0
    np.testing.assert_allclose(pixels.mean((0, 1)), (0, 128, 0), atol=1e-3)


FOLDED = replace(PLAIN, size=28, crop_mode="fold")


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("ratio", [2, 3, 4, 7, 30])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_thing_anywhere_in_a_long_picture_is_seen(ratio: int, place: float, turned: bool) -> None:
    empty = Image.new("RGB", (64 * ratio, 64), "green")
    picture = empty.copy()
    left = round(place * 64 * (ratio - 1))
    picture.paste((250, 10, 10), (left + 8, 8, left + 56, 56))
    if turned:
        picture, empty = (one.transpose(Image.Transpose.TRANSPOSE) for one in (picture, empty))
    red, green = (to_square(one, FOLDED) for one in (picture, empty))
    share = float((np.asarray(red)[:, :, 0] > 125).mean())
    assert share == pytest.approx(0.75**2 / ratio, rel=0.35), "as much of the square as of the picture"
    assert not (np.asarray(green)[:, :, 0] > 125).any()


@pytest.mark.parametrize(("ratio", "parts"), [(2, 1), (2.2, 1), (2.5, 2), (4, 2), (6, 2), (7, 3), (100, 10)])
def test_parts_of_a_long_picture_lie_one_below_the_other(ratio: float, parts: int) -> None:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (30, round(30 * ratio), 3), dtype=np.uint8)
    square = np.asarray(to_square(Image.fromarray(pixels), FOLDED))
    rows = -(-28 // parts)
    strip = np.asarray(Image.fromarray(pixels).resize((28 * parts, rows), Image.Resampling.BILINEAR))
    for part in range(parts):
        first, last = 28 * part // parts, 28 * (part + 1) // parts
        np.testing.assert_array_equal(square[first:last], strip[: last - first, 28 * part : 28 * (part + 1)])
    tall = np.asarray(to_square(Image.fromarray(pixels.transpose(1, 0, 2).copy()), FOLDED))
    # Pillow rounds between its two passes, whose order is another one here.
    assert np.abs(tall.transpose(1, 0, 2).astype(int) - square).max() <= 2


def test_near_squares_are_seen_as_they_were() -> None:
    rng = np.random.default_rng(4)
    for size in ((40, 40), (60, 40), (40, 60), (64, 36), (36, 64), (199, 100), (100, 199)):
        image = Image.fromarray(rng.integers(0, 256, (*reversed(size), 3), dtype=np.uint8))
        centre = to_square(image, replace(FOLDED, crop_mode="center"))
        np.testing.assert_array_equal(to_square(image, FOLDED), centre)


def test_unknown_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="preprocessing"):
        ImagePreprocessor(ImageTransform(16, 1.0, "random", HALF, HALF))
    with pytest.raises(ValueError, match="preprocessing"):
        ImagePreprocessor(ImageTransform(16, 1.0, "bicubic", HALF, HALF, crop_mode="border"))


def test_large_pictures_from_many_threads() -> None:
    data = encoded(drawing((2500, 2000)), "JPEG")
    preprocessor = ImagePreprocessor(PLAIN)
    alone = preprocessor(data)
    with ThreadPoolExecutor(4) as threads:
        for pixels in threads.map(preprocessor, [data] * 8):
            np.testing.assert_array_equal(pixels, alone)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTransform, Path]:
    backbone = tiny_backbones.text_backbone(tmp_path_factory.mktemp("text"))
    assert isinstance(backbone.spec.transform, TextTransform)
    return backbone.spec.transform, backbone.path / "tokenizer.json"


def test_a_text_becomes_its_tokens(tokenizer: tuple[TextTransform, Path]) -> None:
    ids = TextPreprocessor(*tokenizer)("ba  BAN\tunheard")
    assert ids.dtype == np.int64
    assert ids[0] == 2
    assert ids[-1] == 3
    assert ids[3] == 1, "unknown words are the tokenizer's unknown token"
    np.testing.assert_array_equal(ids, TextPreprocessor(*tokenizer)("BA ban never"))


def test_long_texts_are_truncated_and_end_as_the_model_expects(tokenizer: tuple[TextTransform, Path]) -> None:
    ids = TextPreprocessor(*tokenizer)(tiny_backbones.sentence(1, words=500))
    assert ids.shape == (tiny_backbones.TOKENS,)
    assert ids[-1] == 3


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty_text"),
        (" \n\t\u00a0\u2003", "empty_text"),
        ("a\0b", "invalid_text"),
        ("half \ud83d of one", "invalid_text"),
        ("\udc80", "invalid_text"),
        ("x" * 101, "text_too_long"),
    ],
)
def test_texts_that_are_refused(tokenizer: tuple[TextTransform, Path], text: str, code: str) -> None:
    with pytest.raises(InputError) as caught:
        TextPreprocessor(*tokenizer, InputLimits(max_text_chars=100))(text)
    assert caught.value.code == code


def test_one_tokenizer_serves_many_threads(tokenizer: tuple[TextTransform, Path]) -> None:
    preprocessor = TextPreprocessor(*tokenizer)
    texts = [tiny_backbones.sentence(seed, words=seed % 90 + 1) for seed in range(300)]
    alone = [preprocessor(text) for text in texts]
    with ThreadPoolExecutor(8) as threads:
        for ids, expected in zip(threads.map(preprocessor, texts), alone, strict=True):
            np.testing.assert_array_equal(ids, expected)


def test_another_tokenizer_is_refused(tokenizer: tuple[TextTransform, Path], tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_bytes(tokenizer[1].read_bytes() + b"\n")
    with pytest.raises(ValueError, match="not the tokenizer"):
        TextPreprocessor(tokenizer[0], other)


def test_of_a_long_text_only_the_start_is_read_and_the_tokens_are_the_same(
    tokenizer: tuple[TextTransform, Path],
) -> None:
    preprocessor = TextPreprocessor(*tokenizer)
    everything = Tokenizer.from_file(str(tokenizer[1]))
    everything.enable_truncation(tiny_backbones.TOKENS)
    words = [
        *tiny_backbones.sentence(3, words=40).split(),
        "unknown",
        "ba" * 50,
        "?!",
        "请问",
        "\u200b",
        "x" * 3000,
    ]
    rng = np.random.default_rng(4)
    for separator in (" ", "\n", "", " - "):
        for length in (60, 400, 3000):
            text = separator.join(rng.choice(words, length))
            np.testing.assert_array_equal(preprocessor(text[:90_000]), everything.encode(text[:90_000]).ids)


def test_what_is_made_in_strips_is_what_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 4), dtype=np.uint8)
    wide = (noise[:, :, 0].astype(np.uint16) << 8) | noise[:, :, 1]
    coloured = Image.fromarray(noise)
    transparent = {"transparency": int(wide[0, 0])}
    some = [
        encoded(coloured, "PNG"),
        encoded(coloured.convert("LA"), "PNG"),
        encoded(coloured.convert("P"), "PNG", transparency=3),
        encoded(Image.fromarray(wide), "PNG"),
        encoded(Image.fromarray(wide), "PNG", **transparent),
    ]
    at_once = [levels(data) for data in some]
    monkeypatch.setattr("models.preprocess.image.LARGE_PIXELS", 500)
    for data, before in zip(some, at_once, strict=True):
        np.testing.assert_array_equal(levels(data), before)


def test_what_takes_twice_the_memory_counts_twice() -> None:
    limits = InputLimits(max_pixels=400)
    within, above = Image.new("RGB", (20, 10)), Image.new("RGB", (21, 10))
    ImagePreprocessor(PLAIN, limits)(encoded(within, "WEBP"))
    assert refusal(encoded(above, "WEBP"), limits) == "image_too_large"
    inks = above.convert("CMYK")
    assert refusal(encoded(inks, "JPEG", progressive=True), limits) == "image_too_large"
    ImagePreprocessor(PLAIN, limits)(encoded(inks, "JPEG"))
    ImagePreprocessor(PLAIN, limits)(encoded(above, "JPEG", progressive=True))


def preprocessor(made: Tokenizer, folder: Path, *, prompt: str = "", max_tokens: int = 8) -> TextPreprocessor:
    """In front of a backbone with this tokenizer."""
    file = folder / "tokenizer.json"
    file.write_text(made.to_str())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return TextPreprocessor(TextTransform(max_tokens, digest, prompt=prompt), file)


def knows_nothing(prepare: TextPreprocessor, text: str) -> bool:
    return prepare.knows_nothing(text, prepare(text))


def test_a_text_of_which_no_token_is_known(tokenizer: tuple[TextTransform, Path]) -> None:
    prepare = TextPreprocessor(*tokenizer)
    unheard = ["unheard", "สวัสดี 👋", "x " * 500, "x " * 500 + "ba"]
    assert [knows_nothing(prepare, text) for text in unheard] == [True] * 4
    assert [knows_nothing(prepare, text) for text in ("ba", "unheard ba", "x " * 40 + "ba")] == [False] * 3


def sentence_pieces(folder: Path, *, prompt: str = "") -> TextPreprocessor:
    """Pieces as SentencePiece makes them: white space is a piece, and a special token stands at the end."""
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -1.0), ("\u2581query", -1.0)]
    pieces += [(":", -1.0), ("\u2581ba", -1.0), ("ba", -1.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=1))
    made.normalizer = normalizers.Replace("ban", "")
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return preprocessor(made, folder, prompt=prompt)


@pytest.mark.parametrize("prompt", ["", "query: "])
def test_neither_white_space_nor_the_prompt_is_something_known_of_a_text(tmp_path: Path, prompt: str) -> None:
    prepare = sentence_pieces(tmp_path, prompt=prompt)
    texts = ["สวัสดี", "👋 👋", "ban", "ba", "👋 ba", "query", "query: 👋"]
    assert [knows_nothing(prepare, text) for text in texts] == [True] * 3 + [False] * 4


def test_a_tokenizer_without_an_unknown_token_knows_every_text(tmp_path: Path) -> None:
    vocabulary = {piece: place for place, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    prepare = preprocessor(made, tmp_path, max_tokens=64)
    assert not any(knows_nothing(prepare, text) for text in ("a", "สวัสดี", "👋"))
