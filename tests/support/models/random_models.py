"""Small models with random weights, saved as timm and sentence-transformers save theirs.

A program that imports torch: `python -m tests.support.models.random_models FOLDER NAME…`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def timm_folder(folder: Path) -> None:
    """timm's smallest EfficientNet with five classes."""
    import timm
    import torch

    torch.manual_seed(1)
    model = timm.create_model("test_efficientnet", num_classes=5)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)


def sentence_folder(
    folder: Path,
    *,
    pooling: str = "mean",
    prompt: str = "",
    include_prompt: bool = True,
    kind: str = "Bert",
) -> None:
    """A BERT or its like, of two layers with pooling, and with normalisation if the pooling is the mean."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    # Named as text: where the modules live has moved, and the old name stays without type stubs.
    parts = importlib.import_module("sentence_transformers.models")

    torch.manual_seed(2)
    bert = folder.with_name(folder.name + "-bert")
    bert.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (bert / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(bert / "vocab.txt"), do_lower_case=True, model_max_length=64)
    tokenizer.save_pretrained(str(bert))
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(str(bert))
    chain = [
        parts.Transformer(str(bert), max_seq_length=48),
        parts.Pooling(32, pooling_mode=pooling, include_prompt=include_prompt),
        *([parts.Normalize()] if pooling == "mean" else []),
    ]
    prompts: dict[str, Any] = {"prompts": {"query": prompt}, "default_prompt_name": "query"} if prompt else {}
    SentenceTransformer(modules=chain, device="cpu", **prompts).save(str(folder))


MODELS: dict[str, Callable[[Path], None]] = {
    "image": timm_folder,
    "mean": sentence_folder,
    "cls-prompt": partial(sentence_folder, pooling="cls", prompt="query "),
    "albert": partial(sentence_folder, kind="Albert"),
    "prompt-left-out": partial(sentence_folder, prompt="query ", include_prompt=False),
}


def make_models(root: Path, *names: str) -> None:
    """Make the models of these names, or all, in folders of `root`. A process of its own imports torch."""
    command = [sys.executable, "-m", "tests.support.models.random_models", str(root), *(names or MODELS)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def image_model() -> Path:
    """The folder of the image model, made once for all runs, so that its export is found again."""
    versions = [version("torch"), version("timm"), Path(__file__).read_text()]
    folder = ROOT / "build" / "random_models" / hashlib.sha256(repr(versions).encode()).hexdigest()[:12]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        make_models(made, "image")
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(folder)
    return folder / "image"


def main() -> None:
    root, *names = sys.argv[1:]
    for name in names:
        MODELS[name](Path(root, name))


if __name__ == "__main__":
    main()
