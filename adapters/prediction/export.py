"""A version as a file that runs elsewhere: the head alone, or one ONNX network from input to prediction."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final, Literal

from adapters.heads.onnx import append_head
from adapters.prediction.predictor import Loaded, Predictor
from models.preprocess.pieces import whole_tokenizer
from models.preprocess.pixels import with_byte_input
from models.spec import ImageTransform, TextTransform

# Version of the metadata. Since 2 the graph decides on abstention, and the tokenizer truncates and pads.
# Since 3 the graph takes images as bytes and normalises them. Since 4 it says which label is answered.
FORMAT: Final = "4"

Format = Literal["onnx", "safetensors"]


class VersionExporter:
    """Exports versions to files. For one event loop.

    ONNX files are made one at a time, because each is as large as its backbone.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._turn = asyncio.Semaphore(1)

    async def export(self, tenant: str, name: str, number: int, form: Format) -> bytes:
        """Return the version as a file.

        Raises UnknownAdapter, UnknownVersion, and what Predictor.load raises.
        """
        loaded = await self._predictor.load(tenant, name, number)
        if form == "safetensors":
            return loaded.head.to_bytes()
        async with self._turn:
            graph = await self._predictor.graph(loaded)
            return await asyncio.to_thread(_with_head, graph, loaded)


def _with_head(graph: bytes, loaded: Loaded) -> bytes:
    transform = loaded.batcher.backbone.spec.transform
    if isinstance(transform, ImageTransform):
        graph = with_byte_input(graph, transform)
    return append_head(graph, loaded.head, _metadata(loaded), loaded.batcher.backbone.silence)


def _metadata(loaded: Loaded) -> Mapping[str, str]:
    """Return what a program needs besides the network: how to prepare inputs and read the outputs."""
    backbone = loaded.batcher.backbone
    transform = backbone.spec.transform
    metadata = {
        "format": FORMAT,
        "adapter": loaded.alias.name,
        "version": str(loaded.version),
        "task": loaded.head.task,
        "backbone": backbone.spec.name,
        "fingerprint": loaded.head.fingerprint,
        "kind": backbone.spec.kind,
        "licence": backbone.spec.licence,
        "preprocessing": json.dumps(asdict(transform)),
    }
    if isinstance(transform, TextTransform):
        metadata["tokenizer"] = _tokenizer(backbone.path, transform)
    return metadata


def _tokenizer(export: Path, transform: TextTransform) -> str:
    """Return the tokenizer as JSON, set to truncate and pad as the backbone does."""
    tokenizer = whole_tokenizer(export)
    tokenizer.enable_truncation(transform.max_tokens)
    padding = tokenizer.id_to_token(transform.pad_id) or ""
    tokenizer.enable_padding(pad_id=transform.pad_id, pad_token=padding)
    return str(tokenizer.to_str())
