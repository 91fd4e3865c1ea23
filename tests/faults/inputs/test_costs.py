"""Limits for mutated images of every format: two seconds, 512 MB, and a known error code."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.faults import times
from tests.faults.inputs.input_mutations import CODES

MUTANTS = times(10_000, 120)
PROCESSES = 2
MOST_SECONDS = 2.0
MOST_MEMORY = 512 << 20
# Bytes that the libraries take before the first image.
LOADED = 128 << 20


def measured(first: int, last: int) -> dict[str, Any]:
    """In a process of its own: a decoder that fails as a program does would end it."""
    command = [sys.executable, "-m", "tests.faults.inputs.costs", str(first), str(last)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2_000:]
    report: dict[str, Any] = json.loads(found.stdout)
    return report


def test_no_mutant_costs_more_than_it_may() -> None:
    share = MUTANTS // PROCESSES
    with ThreadPoolExecutor(PROCESSES) as threads:
        firsts = range(0, MUTANTS, share)
        reports = list(threads.map(lambda first: measured(first, first + share), firsts))
    for report in reports:
        assert not report["unforeseen"]
        assert set(report["codes"]) <= {"read", *CODES}
        # Both ways are taken: nothing is shown by images that are all refused.
        assert report["codes"]["read"] > share // 10
        assert report["codes"]["undecodable_image"] > share // 10
        assert report["dearest"][0][0] <= MOST_SECONDS, report["dearest"]
        assert report["memory"] <= MOST_MEMORY
        assert report["memory_of_decoders"] <= LOADED + MOST_MEMORY
