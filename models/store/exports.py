"""Lookup of exported backbones in the BentoML model store, without torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from models.sources.content import content_sha256
from models.sources.source import ExportRefused, parse_source
from models.spec import MANIFEST_FILE, PACKAGED, BackboneSpec, ImageTransform
from models.store.manifest import CorruptExport, is_current, read_manifest


def find(entry: str) -> Path | None:
    """Return the folder of a backbone's complete export, None if there is none. `entry`: of the settings.

    A packaged backbone is matched by its fingerprint and must be in the current format. One from a path is
    matched by the content that is there now, if any, and the current preprocessing. One from a hub is the
    latest export, even if the model on the hub has changed since. Raises UnknownBackbone.
    """
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        folder = Path(bentoml.models.get(f"{model_name(entry)}:{_version(entry)}").path)
        spec = read_manifest(folder, verify=False)
    except (BentoMLException, CorruptExport):
        return None
    if entry in PACKAGED and not is_current(folder):
        # The network is in an installed package, so it is exported again: older formats need more memory.
        return None
    try:
        content = content_sha256(parse_source(entry))
    except ExportRefused:
        # The export will say what is wrong with the files.
        return None
    if content is not None and (content != spec.weights_sha256 or _is_cropped(spec)):
        return None
    return folder


def stored_exports() -> list[Path]:
    """The folders of all exports in the BentoML model store, including incomplete ones."""
    import bentoml

    return [
        Path(model.path) for model in bentoml.models.list() if (Path(model.path) / MANIFEST_FILE).exists()
    ]


def find_tag(entry: str) -> str | None:
    """The tag (name:version) of the export that `find` returns, None if there is none."""
    folder = find(entry)
    return None if folder is None else tag(entry, read_manifest(folder, verify=False))


def tag(entry: str, spec: BackboneSpec) -> str:
    """The tag in the BentoML model store: the model name and the first 16 digits of the fingerprint."""
    return f"{model_name(entry)}:{spec.fingerprint[:16]}"


def model_name(entry: str) -> str:
    """The name in the BentoML model store: valid characters only, and unique for each entry.

    It depends on the short name and on the place, so a short name never finds the export of another place.
    """
    if entry in PACKAGED:
        return entry
    source = parse_source(entry)
    place = f"{source.architecture}@" if source.architecture else ""
    identity = f"{source.library}:{place}{source.path or source.place}"
    if source.has_short_name:
        identity, readable = f"{source.name}={identity}", source.name
    else:
        last = re.sub(r"[^a-z0-9]+", "-", Path(source.place).name.lower()).strip("-")[:24].strip("-")
        readable = f"{source.library}-{last}".strip("-")
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _is_cropped(spec: BackboneSpec) -> bool:
    """Whether only the centre of long images is used, as in exports of earlier releases."""
    return isinstance(spec.transform, ImageTransform) and spec.transform.crop_mode == "center"


def _version(entry: str) -> str:
    return PACKAGED[entry].fingerprint[:16] if entry in PACKAGED else "latest"
