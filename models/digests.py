"""Digests of files and of folders of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """The sha256, in hex, over the names and bytes of a model folder's safetensors and JSON files.

    Only these decide what the network computes; a changed README does not make another backbone.
    """
    digest = hashlib.sha256()
    files = (
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file()
    )
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()
