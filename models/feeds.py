"""The arrays that a network is fed with, and which graph it runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.arrays import Prepared
from models.preprocess.image import ImagePreprocessor
from models.preprocess.pixels import with_byte_input
from models.preprocess.text import TextPreprocessor
from models.runtime.session import Device, DeviceUnavailable
from models.spec import GRAPH_FILE, HALF_FILE, IDS, INT4, INT8, MASK, RGB, BackboneSpec, ImageTransform, Kind
from models.store.manifest import read_manifest, takes_bytes

CALIBRATION = Path(__file__).parent / "export" / "calibration"
_TOKENS = 16  # length of the dummy text used for warm-up and measuring, in tokens
# Varied inputs, on which different ways to compute the same embeddings are compared.
PROBE_TEXTS = (
    "How do I get my money back?",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 60,
    "Größe, naïve café, Ærø — “quoted” text…",
    "请问这个产品什么时候发货?",
    "ALL CAPITALS and MiXeD CaSe\nwith\ttabs and  double  spaces",
    "emoji 🙂🚀 and symbols ≤ ∑ €5.00 50% #tag @name https://example.com/a?b=c",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
)


def probe_inputs(preprocessor: ImagePreprocessor | TextPreprocessor) -> list[Prepared]:
    """Prepared inputs of many kinds, on which ways to run are compared."""
    if isinstance(preprocessor, ImagePreprocessor):
        # Probes must pass whatever limits the settings impose, so the default limits are used.
        prepare = ImagePreprocessor(preprocessor.transform)
        return [prepare(picture) for picture in probe_images()]
    return [preprocessor.tokens(text)[0] for text in PROBE_TEXTS]


def probe_images() -> list[bytes]:
    """Generate varied PNGs with smooth colours and grain.

    They are nearly square, because the libraries' own preprocessing sees only the centre of longer ones.
    """
    rng = np.random.default_rng(0)
    images = []
    for height, width in ((480, 640), (333, 180), (48, 48), (224, 224), (257, 510)):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images


def typical_inputs(kind: Kind) -> list[bytes | str]:
    """Photographs or texts of many kinds, as people send them."""
    if kind == "image":
        return [path.read_bytes() for path in sorted(CALIBRATION.glob("*.jpg"))]
    return list((CALIBRATION / "texts.txt").read_text(encoding="utf-8").splitlines())


def graph_of(export: Path, spec: BackboneSpec, half: bool = False) -> Path | bytes:
    """The export's graph; image graphs of older releases are converted to take bytes."""
    name = HALF_FILE if half else GRAPH_FILE
    if not isinstance(spec.transform, ImageTransform) or takes_bytes(export):
        return export / name
    return with_byte_input((export / name).read_bytes(), spec.transform)


def spec_for(export: Path, device: Device, *, verify: bool) -> BackboneSpec:
    """The spec of an export that can run on the device. Raises CorruptExport, DeviceUnavailable."""
    spec = read_manifest(export, verify=verify)
    if spec.precision in (INT8, INT4) and device != "cpu":
        # ONNX Runtime would silently run the integer matrix products on the CPU.
        single = spec.name.removesuffix("-int8")
        instead = f"{single}, which is faster there" if single != spec.name else "another backbone"
        raise DeviceUnavailable(
            f"{spec.name} is for CPUs only. On a GPU serve {instead}, or serve this one with "
            "TOPWORK_DEVICE=cpu."
        )
    return spec


def feed_of(spec: BackboneSpec, prepared: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
    """The arrays of prepared inputs by the names of the graph's inputs; texts are padded to the longest."""
    if isinstance(spec.transform, ImageTransform):
        return {RGB: prepared[0][None] if len(prepared) == 1 else np.stack(prepared)}
    width = max(len(tokens) for tokens in prepared)
    ids = np.full((len(prepared), width), spec.transform.pad_id, np.int64)
    mask = np.zeros((len(prepared), width), np.int64)
    for row, tokens in enumerate(prepared):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {IDS: ids, MASK: mask}


def dummy_input(spec: BackboneSpec) -> Prepared:
    """A prepared dummy input of zeros, for warm-up and measuring."""
    if isinstance(spec.transform, ImageTransform):
        return np.zeros((spec.transform.size, spec.transform.size, 3), np.uint8)
    return np.zeros(min(_TOKENS, spec.transform.max_tokens), np.int64)
