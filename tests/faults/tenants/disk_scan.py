"""Looks for bytes in all that a service has on its disk."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

# As they are, in UTF-16 and in base64, at each of the three places where a text may begin in it.
_ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")


def forms(canary: str) -> list[bytes]:
    """How the canary may be written down."""
    plain = canary.encode()
    shifted = [base64.b64encode(b"x" * shift + plain) for shift in range(3)]
    # Characters that depend on neighbouring bytes are cut off at both ends.
    return [canary.encode(encoding) for encoding in _ENCODINGS] + [
        found[4:-4] if shift else found[:-4] for shift, found in enumerate(shifted)
    ]


def found_in(folder: Path, canaries: Iterable[str]) -> dict[str, set[str]]:
    """The files below the folder with a canary in their contents or names, each with those found."""
    wanted = {canary: forms(canary) for canary in canaries}
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*")):
        try:
            content = (
                str(path.relative_to(folder)).encode()
                + b"\0"
                + (path.read_bytes() if path.is_file() else b"")
            )
        except FileNotFoundError:
            continue
        hits = {canary for canary, ways in wanted.items() if any(way in content for way in ways)}
        if hits:
            found[str(path.relative_to(folder))] = hits
    return found
