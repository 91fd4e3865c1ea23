"""What a child process needs to be one of ours."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)


def environment() -> dict[str, str]:
    """This process's, with which a child finds our packages whatever its folder."""
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
