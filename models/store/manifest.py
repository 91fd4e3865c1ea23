"""The manifest of an export folder: the spec, and the digests that show that the folder is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from models.digests import file_sha256
from models.errors import InternalFailure
from models.spec import (
    CLASSES_FILE,
    GRAPH_FILE,
    HALF_FILE,
    MANIFEST_FILE,
    PIECES_FILE,
    TOKENIZER_FILE,
    BackboneSpec,
)

# Version of the manifest. 2 added files for large tables, 3 the graph in half precision, 4 graphs that take
# images as bytes, 5 the classifier of packaged image networks. Exports in older formats are still served.
FORMAT = 5
_READABLE = (1, 2, 3, 4, 5)
_TAKES_BYTES = 4


class CorruptExport(InternalFailure):
    """The export folder is incomplete or was changed; the message says what to do."""

    code = "corrupt_export"


def write_manifest(folder: Path, spec: BackboneSpec, tables: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a folder's graph, half precision graph, tokenizer and classifier, if any.

    `tables`: names of files in the folder that hold copies of the graph's large constants, by constant.
    """
    tables = tables or {}
    names = [GRAPH_FILE, *([TOKENIZER_FILE] if spec.kind == "text" else []), *tables.values()]
    names += [name for name in (HALF_FILE, PIECES_FILE, CLASSES_FILE) if (folder / name).exists()]
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in names
    }
    manifest = {"format": FORMAT, "spec": spec.to_json(), "files": files, "tables": dict(tables)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path, *, verify: bool) -> BackboneSpec:
    """Read the spec of a complete export folder. `verify`: compare digests, not only file sizes.

    Raises CorruptExport. BentoML copies an export into its store file by file, so a reader may find an
    incomplete one.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if manifest["format"] not in _READABLE:
            raise CorruptExport(f"{folder} has format {manifest['format']}. Export the backbone again.")
        spec = BackboneSpec.from_json(manifest["spec"])
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or (
                verify and file_sha256(path) != expected["sha256"]
            ):
                raise CorruptExport(f"{path} is not the file that was exported. Export the backbone again.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptExport(
            f"{folder} is not a complete export ({error}). Export the backbone again."
        ) from error
    return spec


def is_current(folder: Path) -> bool:
    """Whether an export is in the current format. Its manifest must have been read before."""
    return bool(json.loads((folder / MANIFEST_FILE).read_text())["format"] == FORMAT)


def takes_bytes(folder: Path) -> bool:
    """Whether an image export's graphs take bytes, not floats. Its manifest must have been read before."""
    return bool(json.loads((folder / MANIFEST_FILE).read_text())["format"] >= _TAKES_BYTES)


def read_tables(folder: Path) -> dict[str, Path]:
    """The files of an export's large constants, by name. Its manifest must have been read before."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    return {name: folder / file for name, file in manifest.get("tables", {}).items()}
