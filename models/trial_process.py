"""`python -m models.trial_process`: tries one execution plan. See models/runtime/trial.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.backbone import Backbone
from models.runtime.autotune import ExecutionPlan, Trial, rate
from models.runtime.cuda import lowest_cosine
from models.runtime.session import Device
from models.runtime.usage import Usage

_ROUNDS = 5
_ROUND_SECONDS = 0.05


def main() -> int:
    """Read the request from standard input and write the trial to standard output, both as JSON."""
    asked: dict[str, Any] = json.load(sys.stdin)
    trial = measured(Path(asked["export"]), ExecutionPlan(**asked["plan"]), asked["batches"], asked["device"])
    print(json.dumps(asdict(trial)))
    return 0


def measured(export: Path, plan: ExecutionPlan, batches: Sequence[int], device: Device) -> Trial:
    """Measure the plan in this process."""
    reference = Backbone.open(export)
    probes = reference.probes()
    usage, begun = Usage(), time.perf_counter()
    backbone = Backbone.open(export, device=device, plan=plan)
    opening = time.perf_counter() - begun
    cosine = lowest_cosine(backbone.run(probes), reference.run(probes))
    rounds: dict[int, list[float]] = {}
    for count in batches:
        # All rows have the same length, so that batches differ only in size.
        rows = [probes[0]] * count
        backbone.run(rows)
        rounds[count] = [rate(backbone.run, rows, count, 1, _ROUND_SECONDS) for _ in range(_ROUNDS)]
    backbone.close()
    return Trial(cosine, opening, usage.others(), rounds)


if __name__ == "__main__":
    sys.exit(main())
