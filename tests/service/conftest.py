"""A tenant of its own for every test, and a network of its own for some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError

import pytest

from service.environment import serving_environment
from tests.support.service.client import Caller
from tests.support.service.seclusion import Seclusion
from tests.support.storage import unavailable


@pytest.fixture
def caller(server: str) -> Iterator[Caller]:
    """A caller of the running service with its own tenant."""
    found = Caller(server)
    with found.http:
        yield found


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of a user who has turned off no telemetry."""
    for name in (*serving_environment(), "HF_HUB_OFFLINE", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def seclusion() -> Iterator[Seclusion]:
    """A network of its own."""
    try:
        own = Seclusion()
    except (OSError, CalledProcessError) as error:
        unavailable("namespaces", str(error))
    yield own
    own.close()
