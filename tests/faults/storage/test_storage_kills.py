"""Acknowledged files and rows survive a kill of their writer at any instant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from adapters.registry.registry import Registry
from benchmarks.reliability.kill import run as kill_services
from tests.faults import times

SEED = 5
ROOT = Path(__file__).resolve().parents[3]


def test_no_commit_is_lost_when_its_process_is_killed(registry_url: str, tmp_path: Path) -> None:
    registry = Registry(registry_url)
    registry.migrate()
    registry.close()
    kills = times(2_500, 20)
    # In a program without threads, for a fork takes one thread along and the locks of all.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults.storage.crash_writer"),
            *(registry_url, str(tmp_path / "artifacts"), str(kills), str(SEED)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"seed {SEED}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    found = json.loads(done.stdout)
    assert found["kills"] == kills
    # Most kills come behind some commits and before the end of another.
    assert found["acknowledged"] > kills
    assert found["swept"] > 0


if times(100, 0):

    def test_nothing_is_lost_when_the_whole_service_is_killed_under_mixed_load(tmp_path: Path) -> None:
        """A usual run has tests/test_durability.py."""
        found = kill_services(100, seed=SEED, home=tmp_path / "home")
        assert found.sound, f"seed {SEED}: {found}"
        assert found.killed_during_a_request > 0
