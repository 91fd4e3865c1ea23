"""Installed packages are newer than those with known vulnerabilities."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "starlette": (1, 3, 1),
    "python-multipart": (0, 0, 30),
    "aiohttp": (3, 14, 2),
    "pillow": (12, 3),
    "onnx": (1, 22),
    "ray": (2, 56),
}
# The package is no dependency unless a user adds it.
OPTIONAL = {"ray"}


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_locked_versions_are_above_their_floors(lock: str) -> None:
    found: dict[str, list[tuple[int, ...]]] = {}
    pinned = re.compile(r"^([a-z0-9-]+)(?:\[[^]]*\])?==(\d+(?:\.\d+)*)", re.M)
    for name, version in pinned.findall((ROOT / lock).read_text()):
        found.setdefault(name, []).append(tuple(int(part) for part in version.split(".")))
    assert len(found) > 50
    for name, floor in FLOORS.items():
        assert name in found or name in OPTIONAL, f"{name} is not in {lock}"
        assert all(version >= floor for version in found.get(name, ())), (name, found[name])


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_every_locked_package_has_hashes(lock: str) -> None:
    text = (ROOT / lock).read_text()
    packages = re.split(r"^(?=[a-z0-9-]+(?:\[[^]]*\])?==)", text, flags=re.M)[1:]
    assert len(packages) > 50
    for package in packages:
        assert "--hash=sha256:" in package, package[:80]
