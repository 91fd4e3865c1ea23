"""Adapts whose callers lose the answer, or the service itself, and ask again: each is done once."""

from __future__ import annotations

import http.client
import json
import random
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from adapters.registry.errors import KEPT_VERSIONS
from adapters.registry.registry import Registry
from benchmarks.harness.service_process import Serving
from tests.faults import times

KEYS = times(10_000, 60)
KILLS = times(20, 1)
# All versions are kept, so that one too many is seen.
KEYS_OF_AN_ADAPTER = KEPT_VERSIONS // 2
CALLERS = 4
ENVIRONMENT = {"TOPWORK_BACKBONES": "minilm-l6-v2", "TOPWORK_WORKERS": "0", "TOPWORK_ACCESS_LOG": "false"}
TENANT = "default"
WORDS = ("invoice", "holiday")

Loss = Literal["half sent", "sent", "worked on", "answering", "answered"]
LOSSES: tuple[Loss, ...] = ("half sent", "sent", "worked on", "answering", "answered")


@dataclass
class Told:
    """Findings of the callers. answers: by number of the key. Thread-safe."""

    answers: dict[int, bytes] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


class Target:
    """A service that is killed and started again, and its URL."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.serving = Serving(home, environment=ENVIRONMENT)

    def restart(self) -> None:
        self.serving.kill()
        self.serving = Serving(self._home, environment=ENVIRONMENT)


def name_of(number: int) -> str:
    return f"a{number // KEYS_OF_AN_ADAPTER}"


def body_of(number: int) -> bytes:
    examples = [{"id": f"{number}-{word}", "text": f"{word} {number}", "label": word} for word in WORDS]
    body = {"adapter": name_of(number), "promote": "always", "examples": examples}
    return json.dumps(body).encode()


def attempt(
    target: Target, number: int, rng: random.Random, loss: Loss | None
) -> tuple[int, bytes, bool] | None:
    """Status, body and whether it was answered before, or None where nothing of the answer is read."""
    body = body_of(number)
    connection = http.client.HTTPConnection(urlsplit(target.serving.url).netloc, timeout=60)
    try:
        connection.putrequest("POST", "/adapt")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.putheader("Idempotency-Key", f"key-{number}")
        connection.endheaders()
        connection.send(body[: rng.randrange(len(body))] if loss == "half sent" else body)
        if loss in ("half sent", "sent"):
            return None
        if loss == "worked on":
            time.sleep(rng.uniform(0, 0.05))
            return None
        if loss == "answering":
            connection.sock.recv(1)
            return None
        response = connection.getresponse()
        return response.status, response.read(), response.getheader("Idempotency-Replayed") == "true"
    finally:
        connection.close()


def ask(target: Target, number: int, rng: random.Random, told: Told) -> None:
    """Loses one to three answers, then asks until one is there."""
    losses: list[Loss | None] = [*rng.choices(LOSSES, k=rng.randint(1, 3))]
    lost: bytes | None = None
    while True:
        loss = losses[0] if losses else None
        try:
            found = attempt(target, number, rng, loss)
        except (OSError, http.client.HTTPException):
            # It is being killed, or started.
            told.count("no service")
            time.sleep(0.05)
            continue
        if loss is not None:
            losses.pop(0)
            told.count(f"lost when {loss}")
        if found is None:
            continue
        status, body, replayed = found
        if status in (409, 429, 503):
            told.count(str(json.loads(body)["type"]))
            time.sleep(0.01)
            continue
        if status != 200 or (lost is not None and (body != lost or not replayed)):
            told.wrong.append(f"{number}: {status} {replayed} {body!r} {lost!r}")
            return
        told.count("answered again" if replayed else "answered at first")
        if loss is None:
            told.answers[number] = body
            return
        lost = body


def run(home: Path) -> Told:
    """Asks with every key, and kills the service now and then."""
    told, numbers = Told(), iter(range(KEYS))
    target = Target(home)

    def call(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with told.lock:
                number = next(numbers, None)
            if number is None:
                return
            ask(target, number, rng, told)

    callers = [threading.Thread(target=call, args=(seed,), daemon=True) for seed in range(CALLERS)]
    for caller in callers:
        caller.start()
    for kill in range(1, KILLS + 1):
        while len(told.answers) + len(told.wrong) < kill * KEYS // (KILLS + 1):
            assert any(caller.is_alive() for caller in callers)
            time.sleep(0.01)
        target.restart()
    for caller in callers:
        caller.join()
    assert target.serving.stop() == 0
    return told


def test_what_is_asked_again_is_done_once(tmp_path: Path) -> None:
    told = run(tmp_path)
    assert not told.wrong
    assert sorted(told.answers) == list(range(KEYS))
    # All that can happen has happened.
    assert {f"lost when {loss}" for loss in LOSSES} <= told.counts.keys()
    assert min(told.counts["answered at first"], told.counts["answered again"], told.counts["no service"]) > 0
    registry = Registry(f"sqlite:///{tmp_path / 'topwork.db'}")
    try:
        for first in range(0, KEYS, KEYS_OF_AN_ADAPTER):
            adapter = registry.adapter(TENANT, name_of(first))
            wanted = list(range(1, KEYS_OF_AN_ADAPTER + 1))
            of_it = [json.loads(told.answers[number]) for number in range(first, first + KEYS_OF_AN_ADAPTER)]
            assert sorted(answer["version"] for answer in of_it) == wanted
            assert sorted(version.number for version in registry.versions(adapter.uid)) == wanted
            assert (adapter.examples, adapter.revision) == (len(WORDS) * len(wanted), len(wanted))
    finally:
        registry.close()
    with closing(sqlite3.connect(tmp_path / "topwork.db")) as database:
        assert database.execute("SELECT COUNT(*) FROM replies").fetchone() == (KEYS,)
        assert database.execute("SELECT COUNT(*) FROM adapters").fetchone() == (KEYS // KEYS_OF_AN_ADAPTER,)
