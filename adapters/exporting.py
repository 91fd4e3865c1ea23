"""A version as a file that runs elsewhere: the head alone, or one ONNX network from input to prediction."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

from adapters.onnx_head import append_head
from adapters.predicting import Loaded, Predicting
from models.spec import TOKENIZER_FILE

Format = Literal["onnx", "safetensors"]


class Exporting:
    """Makes export files.

    For one event loop. One ONNX file at a time, for each is as large as its backbone.
    """

    def __init__(self, predicting: Predicting) -> None:
        self._predicting = predicting
        self._turn = asyncio.Semaphore(1)

    async def export(self, tenant: str, name: str, number: int, form: Format) -> bytes:
        """The version as a file. Raises UnknownAdapter, UnknownVersion, and what Predicting.load raises."""
        loaded = await self._predicting.load(tenant, name, number)
        if form == "safetensors":
            return loaded.head.to_bytes()
        async with self._turn:
            graph = await self._predicting.graph(loaded)
            return await asyncio.to_thread(lambda: append_head(graph, loaded.head, _metadata(loaded)))


def _metadata(loaded: Loaded) -> Mapping[str, str]:
    """What a program needs besides the network: how inputs are prepared, and what the outputs mean."""
    backbone = loaded.batcher.backbone
    metadata = {
        "adapter": loaded.alias.name,
        "version": str(loaded.version),
        "task": loaded.head.task,
        "backbone": backbone.spec.name,
        "fingerprint": loaded.head.fingerprint,
        "kind": backbone.spec.kind,
        "licence": backbone.spec.licence,
        "preprocessing": json.dumps(asdict(backbone.spec.transform)),
    }
    if backbone.spec.kind == "text":
        metadata["tokenizer"] = (backbone.path / TOKENIZER_FILE).read_text("utf-8")
    return metadata
