"""What happens to the parts of a cluster: each is killed or frozen, and comes back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from tests.scale.on_ray.parts import Part
from tests.scale.on_ray.ray_cluster import ATTEMPT
from tests.scale.on_ray.site import FULL, LEASE, RESUMED, Site

DATABASE_SECONDS = 3.0
# The bucket's clients wait 5 s for a piece of an answer.
BUCKET_SECONDS = 12.0 if FULL else 7.0

Harm = Callable[[Site, Part], None]
"""Harms a site; the part is a node of its cluster. What ended or stopped comes back later."""


def _kill_head(site: Site, node: Part) -> None:
    """A new head knows nothing of the nodes and workers of the old one. They end, and join it again."""
    site.cluster.head.kill()


def _kill_node(site: Site, node: Part) -> None:
    node.kill()


def _kill_raylet(site: Site, node: Part) -> None:
    """The other processes of the node find out by themselves."""
    _kill_one(node, b"/raylet/raylet")


def _kill_attempt(site: Site, node: Part) -> None:
    _kill_one(node, ATTEMPT)


def _freeze_node(site: Site, node: Part) -> None:
    """For longer than its lease lasts, so that another attempt begins before it goes on."""
    node.freeze()
    site.later(LEASE + RESUMED, node.thaw)


def _kill_worker(site: Site, node: Part) -> None:
    site.workers[0].kill()


def _crash_database(site: Site, node: Part) -> None:
    site.database.crash()
    # Not later: it would end with the thread that started it.
    time.sleep(DATABASE_SECONDS)
    site.database.start()


def _hang_bucket(site: Site, node: Part) -> None:
    """It takes connections and answers nothing. A killed one would lose its content: it has no disk."""
    site.bucket.hang()
    site.later(BUCKET_SECONDS, site.bucket.resume)


def _kill_replica(site: Site, node: Part) -> None:
    site.service.kill()


def _kill_one(node: Part, command: bytes) -> None:
    for pid, line in node.commands.items():
        if command in line.split(b"\0")[0]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


HARMS: Mapping[str, Harm] = {
    "replica": _kill_replica,
    "attempt": _kill_attempt,
    "bucket": _hang_bucket,
    "worker": _kill_worker,
    "raylet": _kill_raylet,
    "database": _crash_database,
    "node": _kill_node,
    "freeze": _freeze_node,
    "head": _kill_head,
}
