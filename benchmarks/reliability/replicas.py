"""Two replicas behind HAProxy: what one sees of the other, what an end of one costs, and what affinity saves.

python -m benchmarks.reliability.replicas [--times 20]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import Serving
from deploy.cluster.bucket import S3Server, make_bucket, store_options
from deploy.cluster.postgres import Postgres
from deploy.cluster.proxy import FILE, HAProxy

KEY = "replicas-0123456789abcdef"
TEXTS = tuple(f"about the {word} of day {day}" for day in range(4) for word in ("invoice", "holiday"))
TENANTS = 60
ASKED = 6  # predictions for each tenant
CALLERS = 8
REQUESTS = 1_000
LONGEST_SECONDS = 30.0

Json = dict[str, object]


def settings(database: str, bucket: str, options: dict[str, str]) -> dict[str, str]:
    """The environment of a replica."""
    return {
        "TOPWORK_DATABASE_URL": database,
        "TOPWORK_STORE_URL": bucket,
        "TOPWORK_STORE_OPTIONS": json.dumps(options),
        "TOPWORK_WORKERS": "0",
        "TOPWORK_ADMIN_KEY": KEY,
    }


def client(url: str, tenant: str | None = None, key: str = KEY) -> httpx.Client:
    """A client with a key. `tenant`: whose data the operator's key is for."""
    headers = {"Authorization": f"Bearer {key}", **({"X-Tenant": tenant} if tenant else {})}
    return httpx.Client(base_url=url, headers=headers, timeout=120)


def teach(http: httpx.Client, adapter: str, texts: Sequence[str] = TEXTS) -> int:
    """Adapt to the texts under two labels in turn; the version."""
    examples = [
        {"id": f"{number}", "text": text, "label": ("even", "odd")[number % 2]}
        for number, text in enumerate(texts)
    ]
    answer = http.post("/adapt", json={"adapter": adapter, "examples": examples, "promote": "always"})
    return int(answer.raise_for_status().json()["version"])


def ask(http: httpx.Client, adapter: str, text: str) -> httpx.Response:
    """The answer to a prediction."""
    return http.post("/predict", json={"adapter": adapter, "inputs": [text]})


def delays(one: str, other: str, times: int, texts: Sequence[str] = TEXTS) -> dict[str, list[float]]:
    """Seconds from one replica's answer to a change until the other one acts on it, by kind of change."""
    tenant, adapter = "delays", "seen"
    found: dict[str, list[float]] = {}
    with client(one, tenant) as here, client(other, tenant) as there:
        here.post("/tenants", json={"tenant": tenant}).raise_for_status()

        def until_version(version: object) -> float:
            return _wait(lambda: ask(there, adapter, texts[0]).json().get("version") == version)

        for _ in range(times):
            first = teach(here, adapter, texts)
            until_version(first)
            found.setdefault("new version", []).append(until_version(teach(here, adapter, texts[::-1])))
            here.put(f"/adapters/{adapter}/aliases/live", json={"version": first}).raise_for_status()
            found.setdefault("rollback", []).append(until_version(first))
            here.delete(f"/adapters/{adapter}").raise_for_status()
            found.setdefault("deletion", []).append(
                _wait(lambda: ask(there, adapter, texts[0]).status_code == 404)
            )
            found.setdefault("revocation", []).append(_revocation(here, other, tenant))
    return found


def _revocation(here: httpx.Client, other: str, tenant: str) -> float:
    made = here.post(f"/tenants/{tenant}/keys", json={"scopes": ["adapt"]}).raise_for_status().json()
    with client(other, key=made["key"]) as holder:
        holder.get("/adapters").raise_for_status()
        here.delete(f"/tenants/{tenant}/keys/{made['id']}").raise_for_status()
        return _wait(lambda: holder.get("/adapters").status_code == 401)


def _wait(holds: Callable[[], bool]) -> float:
    begun = time.monotonic()
    while not holds():
        if time.monotonic() - begun > LONGEST_SECONDS:
            raise TimeoutError(f"it was not seen within {LONGEST_SECONDS:g} s")
        time.sleep(0.01)
    return time.monotonic() - begun


@dataclass
class Outcome:
    """What became of requests during which a replica ended.

    lost: requests that were neither answered nor asked to come again (429). open: requests that were open at
    some time between the signal and the replica's end.
    """

    answered: int = 0
    open: int = 0
    lost: int = 0


class Callers:
    """Callers that ask again as soon as they are answered, until `count` requests were sent.

    Every second request predicts, which HAProxy may send to another replica. The others set the live version,
    which it may not. `end`: ends a replica after a quarter of the requests, and waits until it has ended.
    """

    def __init__(self, url: str, adapters: Sequence[tuple[str, int]], text: str, count: int) -> None:
        self._address = urlsplit(url).netloc
        self._adapters = adapters
        self._text = text
        self._count = count
        self._sent = 0
        self._under_way = 0
        self._ending = False
        self._lock = threading.Lock()
        self._quarter = threading.Event()
        self.found = Outcome()

    def run(self, end: Callable[[], object]) -> Outcome:
        """Return what became of the requests."""
        threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        self._quarter.wait()
        with self._lock:
            self._ending, self.found.open = True, self._under_way
        end()
        with self._lock:
            self._ending = False
        for thread in threads:
            thread.join()
        return self.found

    @contextmanager
    def _next(self) -> Iterator[int]:
        with self._lock:
            self._sent += 1
            number = self._sent
            self._under_way += 1
            self.found.open += self._ending
        if number >= self._count // 4:
            self._quarter.set()
        try:
            yield number
        finally:
            with self._lock:
                self._under_way -= 1

    def _call(self) -> None:
        connection = HTTPConnection(self._address, timeout=60)
        while self._sent < self._count:
            with self._next() as number:
                method = ("POST", "PUT")[number % 2]
                tenant, version = self._adapters[number // 2 % len(self._adapters)]
                path, body = (
                    ("/predict", {"adapter": "a", "inputs": [self._text]})
                    if method == "POST"
                    else ("/adapters/a/aliases/live", {"version": version})
                )
                headers = {
                    "Authorization": f"Bearer {KEY}",
                    "X-Tenant": tenant,
                    "Content-Type": "application/json",
                }
                try:
                    connection.request(method, path, json.dumps(body), headers)
                    answer = connection.getresponse()
                    answer.read()
                    is_good = answer.status in (200, 429)
                except (HTTPException, OSError):
                    connection.close()
                    is_good = False
            with self._lock:
                self.found.answered += is_good
                self.found.lost += not is_good
        connection.close()


def adapters(url: str, prefix: str, count: int, texts: Sequence[str] = TEXTS) -> list[tuple[str, int]]:
    """Tenants with an adapter `a` each, made by the replica at `url`: their names and versions.

    Each has a text of its own, because replicas keep equal heads once.
    """
    names = [f"{prefix}{number}" for number in range(count)]
    found = []
    for name in names:
        with client(url, name) as http:
            own = " ".join(random.Random(name).choices(texts, k=7))
            found.append((name, teach(http, "a", (*texts, own))))
    return found


def misses(proxy: HAProxy, replicas: Sequence[str], tenants: Sequence[str], text: str) -> int:
    """Heads that the replicas load when each tenant asks ASKED times, in random order."""
    before = sum(map(_misses, replicas))
    order = [tenant for tenant in tenants for _ in range(ASKED)]
    random.Random(0).shuffle(order)
    with client(proxy.url) as http:
        for tenant in order:
            http.post(
                "/predict", json={"adapter": "a", "inputs": [text]}, headers={"X-Tenant": tenant}
            ).raise_for_status()
    return sum(map(_misses, replicas)) - before


def _misses(replica: str) -> int:
    lines = httpx.get(f"{replica}/metrics").text.splitlines()
    (found,) = [line for line in lines if line.startswith("topwork_head_cache_misses_total ")]
    return int(float(found.split()[1]))


def round_robin(home: Path) -> Path:
    """The shipped file, but that requests go round robin."""
    text = FILE.read_text()
    assert text.count("balance hash var(txn.affinity)") == 1
    changed = home / "round_robin.cfg"
    changed.write_text(text.replace("balance hash var(txn.affinity)", "balance roundrobin"))
    return changed


def run(times: int, report: Report) -> None:
    """Add what was measured to the report."""
    with ExitStack() as parts:
        home = Path(parts.enter_context(tempfile.TemporaryDirectory()))
        options = store_options(parts.enter_context(S3Server()).url)
        database = parts.enter_context(Postgres()).url
        environment = settings(database, make_bucket(options, "replicas"), options)
        environment["TOPWORK_BACKBONES"] = "minilm-l6-v2"

        def replica(name: str) -> Serving:
            return parts.enter_context(Serving(home / name, environment=environment))

        one, other, third = map(replica, ("one", "other", "third"))
        pair = (one.url, other.url)
        seen = delays(*pair, times)
        for change, seconds in seen.items():
            report.expect(f"{change} seen on the other replica, seconds", max(seconds), "<=", 1.0)
        rows = [[change, Spread(tuple(seconds)).text(unit=" s")] for change, seconds in seen.items()]
        report.add("Seen on the other replica after", table(["change", "seconds"], rows))
        known = adapters(third.url, "hashed", TENANTS)
        with HAProxy(pair, home) as proxy:
            hashed = misses(proxy, pair, [tenant for tenant, _ in known], TEXTS[0])
        known = adapters(third.url, "robin", TENANTS)
        with HAProxy(pair, home, file=round_robin(home)) as proxy:
            robin = misses(proxy, pair, [tenant for tenant, _ in known], TEXTS[0])
        report.expect("heads loaded with hashing, times those of round robin", hashed / robin, "<=", 0.6)
        report.data |= {"seen": seen, "misses": {"hashed": hashed, "round robin": robin}}
        rows = []
        for number in range(5):
            for name, end in (("SIGTERM", third.stop), ("SIGKILL", third.kill)):
                with HAProxy((one.url, third.url), home) as proxy:
                    found = Callers(proxy.url, known, TEXTS[0], REQUESTS).run(end)
                third = replica(f"third-{number}-{name}")
                lost = found.lost
                rows.append([name, str(REQUESTS), str(lost), str(found.open)])
                report.expect(f"lost to {name}", lost, "<=", found.open if name == "SIGKILL" else 0)
        report.add("One of two replicas ends under load", table(["signal", "requests", "lost", "open"], rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/replicas.md and .json; 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.replicas", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args(arguments)
    report = Report("replicas", "Two replicas behind HAProxy")
    run(options.times, report)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
