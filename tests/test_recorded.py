"""The contract with users and operators is the recorded one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import recorded

SECTIONS = ("openapi", "metrics", "settings", "commands", "tables", "codes")


@pytest.fixture(scope="module")
def found(server: str) -> Any:
    """The contract of the running service, as JSON has it."""
    return json.loads(json.dumps(recorded.contract(server)))


@pytest.mark.parametrize("section", SECTIONS)
def test_the_contract_is_as_recorded(found: Any, section: str) -> None:
    """`python -m tests.recorded` records an intended change; look at the difference."""
    wanted = json.loads(recorded.FILE.read_text())
    assert set(wanted) == set(SECTIONS)
    assert found[section] == wanted[section]
