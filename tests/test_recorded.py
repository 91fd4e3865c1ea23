"""The contract with users and operators is the recorded one."""

from __future__ import annotations

import json

import pytest

from tests import recorded

SECTIONS = ("openapi", "metrics", "settings", "commands", "tables", "codes")


@pytest.mark.parametrize("section", SECTIONS)
def test_the_contract_is_as_recorded(server: str, section: str) -> None:
    """`python -m tests.recorded` records an intended change; look at the difference."""
    wanted = json.loads(recorded.FILE.read_text())
    assert set(wanted) == set(SECTIONS)
    assert json.loads(json.dumps(recorded.contract(server)[section])) == wanted[section]
