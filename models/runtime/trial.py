"""Trials of execution plans on a GPU, each in a separate process.

An illegal memory access, or a capture that ends the process, then only affects that plan.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from models.child import plain_environment
from models.runtime.autotune import ExecutionPlan, Trial, TrialFailed
from models.runtime.session import Device

_MOST_SECONDS = 90.0  # time limit for opening, capturing all shapes and measuring


def try_out(export: Path, plan: ExecutionPlan, batches: Sequence[int], device: Device = "cuda") -> Trial:
    """Try a plan with these batch sizes. Raises TrialFailed."""
    asked = {"export": str(export), "plan": asdict(plan), "batches": batches, "device": device}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "models.trial_process"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            env=plain_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"it took more than {_MOST_SECONDS:g} s") from None
    try:
        told = json.loads(done.stdout.splitlines()[-1])
        rounds = {int(count): rates for count, rates in told.pop("rounds").items()}
        return Trial(**told, rounds=rounds)
    except (IndexError, KeyError, TypeError, ValueError):
        lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        raise TrialFailed(lines[-1]) from None
