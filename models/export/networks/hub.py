"""Download of models from the hubs of timm and sentence-transformers."""

from __future__ import annotations

from pathlib import Path

from models.sources.source import ExportRefused, Source
from models.spec import SENTENCE_TRANSFORMERS, TIMM

_FILES = ("*.safetensors", "*.json", "*.txt", "README.md")


def weights_folder(source: Source) -> Path:
    """The folder of a source with safetensors weights, downloaded if it is on a hub. Raises ExportRefused."""
    folder = source.folder() or _download(source)
    if not any(folder.rglob("*.safetensors")):
        raise ExportRefused(
            f"{folder} has no safetensors weights. Other formats can run code: convert it first."
        )
    return folder


def _download(source: Source) -> Path:
    """Download a hub's model and return its folder: safetensors and their descriptions, no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = _repository(source)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ExportRefused(
            f"{repository} could not be fetched ({error}). Without a network, give the path of a folder."
        ) from error


def _repository(source: Source) -> str:
    """The hub's repository of the model that a library knows by a short name."""
    short = source.place
    if source.library == SENTENCE_TRANSFORMERS and "/" not in short:
        return f"sentence-transformers/{short}"
    if source.library != TIMM or "/" in short:
        return short
    import timm

    try:
        known = timm.models.get_pretrained_cfg(short, allow_unregistered=False)
    except RuntimeError:
        known = None
    if known is None or not known.hf_hub_id:
        raise ExportRefused(f"timm knows no pretrained model {short!r}; `timm.list_pretrained()` lists them")
    named = f"{known.architecture}.{known.tag}" if known.tag else known.architecture
    # A registered hub id that ends in a slash is an organisation's and needs the name appended.
    return str(known.hf_hub_id + named if known.hf_hub_id.endswith("/") else known.hf_hub_id)
