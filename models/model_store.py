"""Lookup of exported backbones in the BentoML model store, without torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from models.manifest import CorruptExport, folder_sha256, is_current, read_manifest
from models.spec import MANIFEST_FILE, PACKAGED, BackboneSpec, ImageTransform, split_source


def find(name: str) -> Path | None:
    """Return the folder of a backbone's complete export, None if there is none. `name`: as in the settings.

    A packaged backbone is matched by its fingerprint and must be in the current format. One from a folder is
    matched by the folder's weights and the current preprocessing. One from a hub is the latest export, even
    if the model on the hub has changed since. Raises UnknownBackbone.
    """
    import bentoml
    from bentoml.exceptions import BentoMLException

    try:
        folder = Path(bentoml.models.get(f"{model_name(name)}:{_version(name)}").path)
        spec = read_manifest(folder, verify=False)
    except (BentoMLException, CorruptExport):
        return None
    if name in PACKAGED and not is_current(folder):
        # The network is in an installed package, so it is exported again: older formats need more memory.
        return None
    local = local_folder(name)
    if local is not None and (folder_sha256(local) != spec.weights_sha256 or _is_cropped(spec)):
        return None
    return folder


def stored_exports() -> list[Path]:
    """The folders of all exports in the BentoML model store, including incomplete ones."""
    import bentoml

    return [
        Path(model.path) for model in bentoml.models.list() if (Path(model.path) / MANIFEST_FILE).exists()
    ]


def find_tag(name: str) -> str | None:
    """The tag (name:version) of the export that `find` returns, None if there is none."""
    folder = find(name)
    return None if folder is None else tag(read_manifest(folder, verify=False))


def tag(spec: BackboneSpec) -> str:
    """The tag in the BentoML model store: the model name and the first 16 digits of the fingerprint."""
    return f"{model_name(spec.name)}:{spec.fingerprint[:16]}"


def model_name(name: str) -> str:
    """The name in the BentoML model store: valid characters only, and unique for each setting."""
    if name in PACKAGED:
        return name
    library, place = split_source(name)
    local = local_folder(name)
    readable = re.sub(r"[^a-z0-9]+", "-", Path(place).name.lower()).strip("-")[:24].strip("-")
    digest = hashlib.sha256(f"{library}:{local or place}".encode()).hexdigest()[:12]
    return "-".join(part for part in (library, readable, digest) if part)


def local_folder(name: str) -> Path | None:
    """The folder named by a setting such as timm:/models/mine; None for a package or a model on a hub."""
    if name in PACKAGED:
        return None
    folder = Path(split_source(name)[1]).expanduser()
    return folder.resolve() if folder.is_dir() else None


def _is_cropped(spec: BackboneSpec) -> bool:
    """Whether only the centre of long images is used, as in exports of earlier releases."""
    return isinstance(spec.transform, ImageTransform) and spec.transform.crop_mode == "center"


def _version(name: str) -> str:
    return PACKAGED[name].fingerprint[:16] if name in PACKAGED else "latest"
