"""The failpoints of a service: places in its code that fail when a test arms them."""

from __future__ import annotations

import os
from pathlib import Path

_FAILING = Path(__file__).with_name("failing")
PLACES_FILE = _FAILING / "places.json"


class Failpoint:
    """The failpoint of one service, which hears of it by files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the service."""
        root = Path(__file__).resolve().parents[3]
        return {
            # The folder with `sitecustomize` first, then the project itself.
            "PYTHONPATH": os.pathsep.join((str(_FAILING), str(root))),
            "TOPWORK_FAILING": str(self._folder),
        }

    def arm(self, place: str, action: str) -> None:
        """Let the next call that passes the place fail."""
        (self._folder / "fired").unlink(missing_ok=True)
        (self._folder / "armed.new").write_text(f"{place} {action}")
        (self._folder / "armed.new").rename(self._folder / "armed")

    @property
    def fired(self) -> bool:
        """True once the armed place was passed."""
        return (self._folder / "fired").exists()
