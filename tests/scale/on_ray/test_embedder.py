"""Large uploads whose inputs several nodes embed."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from typing import Any

import pytest

from tests.scale.on_ray.site import FULL, Site
from tests.scale.on_ray.tenant import EXAMPLES, Tenant
from tests.support.conditions import until
from tests.support.service.client import BLAME, PRAISE, Json

pytestmark = pytest.mark.alone


def embedding(site: Site) -> list[int]:
    """The process ids of the actors that embed for an attempt."""
    return [
        pid
        for node in site.cluster.nodes
        for pid, command in node.commands.items()
        if command.startswith(b"ray::MapWorker(MapBatches(_Embed)")
    ]


def embedded_elsewhere(site: Site, job: Json) -> int:
    """How many inputs other nodes embedded, as the job's attempt says in its node's folder."""
    said = "".join(path.read_text() for path in site.home.rglob("logs/worker-*.err"))
    return sum(int(number) for number in re.findall(rf"{job['id']}: other nodes embedded (\d+)", said))


def answers(tenant: Tenant) -> list[tuple[str, Any]]:
    """Labels and confidences for texts that it knows."""
    inputs = [{"text": text} for text in (*PRAISE, *BLAME)]
    answer = tenant.ask("POST", "/predict", json={"adapter": "reviews", "inputs": inputs}).json()
    return [(one["label"], pytest.approx(one["confidence"], abs=1e-4)) for one in answer["predictions"]]


@pytest.mark.skipif(not FULL, reason="the other test does a part of it: make test-scale")
def test_other_nodes_embed_a_large_upload_and_the_answers_are_the_same(site: Site) -> None:
    alone, spread = site.tenant(), site.tenant()
    with site.worker(TOPWORK_RAY_SPREAD=str(EXAMPLES + 1)):
        one = alone.until_ended(alone.upload())
    with site.worker(TOPWORK_RAY_SPREAD=str(EXAMPLES)):
        other = spread.until_ended(spread.upload())
        until(lambda: not embedding(site))
    for tenant, job, elsewhere in ((alone, one, 0), (spread, other, EXAMPLES)):
        tenant.check(job)
        assert embedded_elsewhere(site, job) == elsewhere
    assert answers(spread) == answers(alone)


def test_an_upload_goes_on_when_the_processes_that_embed_it_are_killed(site: Site) -> None:
    tenant = site.tenant()
    with site.worker(TOPWORK_RAY_SPREAD=str(EXAMPLES)):
        job = tenant.upload()
        until(lambda: embedding(site) and tenant.stored(job) >= 1_000)
        for pid in embedding(site):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended = tenant.until_ended(job)
    tenant.check(ended)
    assert ended["attempt"] == 1
    assert embedded_elsewhere(site, job) >= 1_000
