"""The manifest of an export folder: the spec, and the digests by which a folder is known to be whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from models.spec import GRAPH_FILE, HALF_FILE, MANIFEST_FILE, TOKENIZER_FILE, BackboneSpec

# 2: large tables lie beside the graph. 3: so does its form in half precision. 4: graphs take pictures as
# bytes. What was published in an older one is served all the same.
FORMAT = 4
_READABLE = (1, 2, 3, 4)
_TAKES_BYTES = 4


class CorruptExport(RuntimeError):
    """The export folder is not complete or was changed; the message says what to do."""

    code = "corrupt_export"


def write_manifest(folder: Path, spec: BackboneSpec, tables: Mapping[str, str] | None = None) -> None:
    """Writes the manifest of what is in folder: the graph, its half precision form, a text's tokenizer.

    tables: files in folder that hold large constants of the graph once more, by the constants' names.
    """
    tables = tables or {}
    names = [GRAPH_FILE, *([TOKENIZER_FILE] if spec.kind == "text" else []), *tables.values()]
    names += [HALF_FILE] if (folder / HALF_FILE).exists() else []
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in names
    }
    manifest = {"format": FORMAT, "spec": spec.to_json(), "files": files, "tables": dict(tables)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path, *, verify: bool) -> BackboneSpec:
    """The spec of a complete export folder. verify compares digests, without it lengths only.

    Raises CorruptExport. BentoML copies an export into its store file by file, so a reader may meet half of
    one.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if manifest["format"] not in _READABLE:
            raise CorruptExport(f"{folder} has format {manifest['format']}; export the backbone again.")
        spec = BackboneSpec.from_json(manifest["spec"])
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or (
                verify and file_sha256(path) != expected["sha256"]
            ):
                raise CorruptExport(f"{path} is not the file that was exported; export the backbone again.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptExport(
            f"{folder} is no complete export ({error}); export the backbone again."
        ) from error
    return spec


def is_current(folder: Path) -> bool:
    """Whether an export whose manifest was read before is in the format that would be written today."""
    return bool(json.loads((folder / MANIFEST_FILE).read_text())["format"] == FORMAT)


def takes_bytes(folder: Path) -> bool:
    """Whether the graphs of an image export whose manifest was read before take bytes, and not floats."""
    return bool(json.loads((folder / MANIFEST_FILE).read_text())["format"] >= _TAKES_BYTES)


def read_tables(folder: Path) -> dict[str, Path]:
    """The files of large constants, by name, of an export whose manifest was read before."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    return {name: folder / file for name, file in manifest.get("tables", {}).items()}


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """sha256, in hex, over the names and bytes of a model folder's weights and JSON files.

    Only they decide what the network computes; a changed README does not make another backbone.
    """
    digest = hashlib.sha256()
    files = (
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file()
    )
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()
