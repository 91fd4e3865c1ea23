"""The environment of child processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_ROOT: Final = str(Path(__file__).resolve().parent.parent)
# Variables that Python, its libraries and CUDA read. None of them holds a secret.
_NAMES: Final = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
)


def plain_environment() -> dict[str, str]:
    """Environment variables without secrets, with which a child finds our packages from any folder."""
    kept = {name: value for name, value in os.environ.items() if name in _NAMES}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))}
