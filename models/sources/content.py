"""What a source on this machine holds now, as a digest, and under which licence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.digests import file_sha256, folder_sha256
from models.sources.onnx_files import OnnxFiles
from models.sources.source import Source
from models.spec import ONNX

logger = logging.getLogger("topwork")

UNKNOWN_LICENCE = "unknown"

_CARD = "README.md"


def content_sha256(source: Source) -> str | None:
    """The digest of a local source's files that decide on embeddings, None if it is not on this machine.

    It is the same wherever the files lie. Raises ExportRefused if the files are incomplete.
    """
    path = source.path
    if path is None or not path.exists():
        return None
    if source.library == ONNX:
        return OnnxFiles.at(path).sha256()
    return folder_sha256(path) if path.is_dir() else file_sha256(path)


def card_licence(*folders: Path) -> str:
    """The licence that the first model card (README.md) in these folders names, else "unknown"."""
    from huggingface_hub import metadata_load

    for folder in folders:
        card = folder / _CARD
        if card.is_file():
            try:
                named = metadata_load(card) or {}
            except Exception as error:
                # A card is text for people, so one that cannot be read does not keep a network from serving.
                logger.warning("%s says no licence: its header cannot be read (%s)", card, error)
                named = {}
            return _licence(named)
    return UNKNOWN_LICENCE


def _licence(card: Mapping[str, Any]) -> str:
    found = card.get("license")
    if found == "other":
        found = card.get("license_name") or found
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found or UNKNOWN_LICENCE)
