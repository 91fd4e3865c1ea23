"""Varied inputs for comparing different ways to compute the same embeddings."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

TEXTS = (
    "How do I get my money back?",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 60,
    "Größe, naïve café, Ærø — “quoted” text…",
    "请问这个产品什么时候发货?",
    "ALL CAPITALS and MiXeD CaSe\nwith\ttabs and  double  spaces",
    "emoji 🙂🚀 and symbols ≤ ∑ €5.00 50% #tag @name https://example.com/a?b=c",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
)


def pictures() -> list[bytes]:
    """Generate PNGs with smooth colours and grain.

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
