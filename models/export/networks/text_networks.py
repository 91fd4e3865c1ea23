"""Text networks of sentence-transformers and of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.arrays import Floats
from models.digests import folder_sha256
from models.export.network import Network
from models.export.networks.hub import weights_folder
from models.sources.content import card_licence
from models.sources.source import ExportRefused, Source
from models.spec import FLOAT32, SENTENCE_TRANSFORMERS, TIMM, TOKENIZER_FILE, BackboneSpec, TextTransform

# Architectures in which every token attends to every other one, so that they accept an additive mask. Others,
# such as those with windowed attention, may derive several masks from one.
_PLAIN_MASKS = (
    "BertModel",
    "DistilBertModel",
    "ElectraModel",
    "MPNetModel",
    "RobertaModel",
    "XLMRobertaModel",
)
_TOKENIZERS = (TOKENIZER_FILE, "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def load_sentence_transformers(source: Source) -> Network:
    """Load a model of sentence-transformers from a folder or its hub. Raises ExportRefused."""
    folder = weights_folder(source)
    _check_texts(folder, SENTENCE_TRANSFORMERS)
    return sentence_transformers_network(source.name, source.text, folder)


def load_transformers(source: Source) -> Network:
    """Load a model of transformers, with mean pooling and normalisation. Raises ExportRefused."""
    folder = weights_folder(source)
    if (folder / "modules.json").is_file():
        raise ExportRefused(
            f"{folder} has a modules.json, which says how its tokens are pooled. "
            f"Use {SENTENCE_TRANSFORMERS}:{source.place}."
        )
    _check_texts(folder, source.library)
    return sentence_transformers_network(source.name, source.text, folder, normalised=True)


def sentence_transformers_network(
    name: str, source: str, folder: Path, *, normalised: bool = False
) -> Network:
    """Load a folder with all modules: transformer, pooling, dense, normalisation. Raises ExportRefused.

    A folder without modules has the pooling by mean. `normalised`: append a normalisation.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            # The dtype is float32 whatever the stored weights have. Eager attention exports to plain matrix
            # products.
            model_kwargs={"use_safetensors": True, "dtype": torch.float32, "attn_implementation": "eager"},
        ).eval()
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportRefused(f"sentence-transformers cannot load {folder}: {reason}") from error
    if normalised:
        model.append(_normalisation())
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False) or tokenizer.padding_side != "right":
        raise ExportRefused(f"{folder} has no fast tokenizer that pads on the right, which is required")
    serialised = folder / TOKENIZER_FILE
    as_bytes = (
        serialised.read_bytes() if serialised.is_file() else tokenizer.backend_tokenizer.to_str().encode()
    )
    spec = BackboneSpec(
        name=name,
        kind="text",
        source=source,
        architecture=type(model[0].auto_model).__name__,
        dim=model.encode(["a"]).shape[1],
        transform=TextTransform(
            max_tokens=int(model.max_seq_length or tokenizer.model_max_length),
            tokenizer_sha256=hashlib.sha256(as_bytes).hexdigest(),
            pad_id=int(tokenizer.pad_token_id),
            prompt=model.prompts.get(model.default_prompt_name or "") or "",
        ),
        pooling=", ".join(type(module).__name__.lower() for module in list(model)[1:]),
        licence=card_licence(folder),
        precision=FLOAT32,
        weights_sha256=folder_sha256(folder),
    )

    class Pooled(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.model = model
            self.plain = plain

        def forward(self, ids: Any, mask: Any) -> Any:
            first, *others = self.model
            # This is the mask that is added to the attention scores. Otherwise the graph would build it from
            # indices in a dozen steps, which keep a runtime from recognising the attention.
            wide = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
            features = first({"input_ids": ids, "attention_mask": wide if self.plain else mask})
            features["attention_mask"] = mask
            for module in others:
                features = module(features)
            return features["sentence_embedding"]

    def reference(texts: Sequence[str]) -> Floats:
        return np.asarray(model.encode(list(texts), show_progress_bar=False), np.float32)

    pooled = Pooled(type(model[0].auto_model).__name__ in _PLAIN_MASKS).eval()
    return Network(spec, pooled, reference, as_bytes, model[0].auto_model.get_input_embeddings())


def _normalisation() -> Any:
    import importlib

    # Named as text: where the modules live has moved between releases.
    return importlib.import_module("sentence_transformers.sentence_transformer.modules").Normalize()


def _check_texts(folder: Path, library: str) -> None:
    """Raise ExportRefused unless the folder has a configuration and a tokenizer."""
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ExportRefused(f"{folder} has no config.json. `save_pretrained` of {library} writes it.")
    if any(any(folder.rglob(name)) for name in _TOKENIZERS):
        return
    if (folder / "preprocessor_config.json").is_file():
        raise ExportRefused(
            f"{folder} has no tokenizer: it is a network for images. Convert it for timm and use {TIMM}:…, "
            "or export it to ONNX and use onnx:…"
        )
    raise ExportRefused(f"{folder} has no {TOKENIZER_FILE}. Save the tokenizer into the same folder.")
