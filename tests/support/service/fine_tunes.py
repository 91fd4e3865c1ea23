"""Fine-tunes that take seconds."""

from __future__ import annotations

import time

import numpy as np

from tests.support.models.shades import NAMES, picture
from tests.support.service.client import Caller, Json, image

QUICK = {"epochs": 3, "full_size_epochs": 3, "pixels": 32, "batch": 16, "refit": False}
LONG = {"epochs": 100, "full_size_epochs": 0, "pixels": 32, "batch": 16, "patience": 100}


def shades(count: int = 60, seed: int = 1) -> list[Json]:
    """Examples of three faint colours, in turn."""
    rng = np.random.default_rng(seed)
    return [
        {"id": f"s{row}", **image(picture(row % 3, rng)), "label": NAMES[row % 3]} for row in range(count)
    ]


def until_finished(caller: Caller, job: Json, seconds: float = 150.0) -> Json:
    """The job once it has ended."""
    end = time.monotonic() + seconds
    while job["finished_at"] is None:
        assert time.monotonic() < end, job
        time.sleep(0.2)
        job = caller.call("GET", f"/jobs/{job['id']}")
    return job
