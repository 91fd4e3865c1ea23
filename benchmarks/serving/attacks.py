"""An attacker's cost to other tenants: their latency alone and beside each attack, in turn.

python -m benchmarks.serving.attacks [part ...]

Tenants without quotas send what costs most. Others ask for single texts and pictures meanwhile, adapt a
little, upload ten lines, and look at /readyz.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import h11
import httpx
import numpy as np
from PIL import Image

from benchmarks.harness import client
from benchmarks.harness.caller import Process, Request
from benchmarks.harness.load import Load, NoAnswer, Order, Round
from benchmarks.harness.options import asked
from benchmarks.harness.payloads import Scene, image_scene, text_scene
from benchmarks.harness.report import Report, table
from benchmarks.serving.bombs import BOMBS, scans

SECONDS = 20.0
ROUNDS = 2
# Requests a second of the others.
TEXTS, PICTURES, ADAPTS, UPLOADS, LOOKS = 10.0, 5.0, 1.0, 1.0, 2.0
SLOWER = 3.0
# Less is what one turn of the scheduler takes on a machine that is busy.
FLOOR = 0.02
_NICEST = 19
Attack = Callable[[httpx.Client, threading.Event], None]


def _image(data: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(data).decode()}


def _again(*bodies: dict[str, object], path: str = "/embed") -> Attack:
    """The bodies in turn, until told to stop."""
    encoded = [json.dumps(body).encode() for body in bodies]

    def attack(http: httpx.Client, stop: threading.Event) -> None:
        while not stop.is_set():
            for body in encoded:
                http.post(path, content=body, headers={"Content-Type": "application/json"})

    return attack


def _scans() -> Attack:
    bomb = scans(9_000)
    inputs = [_image(bomb), _image(bomb), _image(_photo(3_000, 2_000))]
    return _again({"backbone": "efficientnet-lite0", "inputs": inputs})


def _segments() -> Attack:
    inputs = [_image(BOMBS[name](8_000_000)) for name in ("JPEG of EXIF segments", "PNG of profiles")]
    return _again({"backbone": "efficientnet-lite0", "inputs": inputs})


def _words(start: str, rest: str) -> Callable[[], Attack]:
    """As many texts as a request may have, as long as they may be."""
    text = (start + rest * 100_000)[:100_000]
    return lambda: _again({"backbone": "minilm-l6-v2", "inputs": [{"text": text}] * 128})


def _giants() -> Attack:
    buffer = io.BytesIO()
    Image.new("RGB", (7_000, 7_000), "white").save(buffer, "PNG")
    return _again({"backbone": "efficientnet-lite0", "inputs": [_image(buffer.getvalue())] * 128})


def _uploads() -> Attack:
    """One slow upload of declared 1 GB."""

    def slow(stop: threading.Event) -> Iterator[bytes]:
        line = json.dumps({"text": "x" * 6_900, "label": "a"}).encode() + b"\n"
        while not stop.wait(0.1):
            yield line

    def attack(http: httpx.Client, stop: threading.Event) -> None:
        while not stop.is_set():
            headers = {"Content-Type": "application/x-ndjson", "Content-Length": str(1 << 30)}
            # Cut off, refused, or ended by this side before all was sent.
            with contextlib.suppress(httpx.HTTPError, h11.LocalProtocolError, RuntimeError):
                http.post("/adapt?adapter=slow", content=slow(stop), headers=headers)
            time.sleep(0.05)

    return attack


def _fits() -> Attack:
    """A thousand examples of 400 labels, each time as a new adapter."""
    numbers = np.random.default_rng(0).permutation(1_000)
    examples = [{"text": f"thing number {number}", "label": f"label {number % 400}"} for number in numbers]

    def attack(http: httpx.Client, stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"many-{threading.get_ident() % 1_000}-{number}"
            http.post("/adapt", json={"adapter": name, "examples": examples})

    return attack


# An attack with how many connections and tenants make it.
ATTACKS: dict[str, tuple[Callable[[], Attack], int, int]] = {
    "scans": (_scans, 2, 1),
    "segments": (_segments, 2, 1),
    "words": (_words("a" * 5_000, "\u4e2d"), 2, 2),
    "hangul": (_words("", "\ud55c"), 2, 2),
    "long-texts": (_words("", "A word, and another one. "), 2, 2),
    "giants": (_giants, 2, 2),
    "uploads": (_uploads, 4, 2),
    "fits": (_fits, 24, 1),
}


def _photo(width: int, height: int) -> bytes:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


class Attackers(Process):
    """Attackers in their own process; a context manager.

    It is niced as far as can be: they would be on machines of their own, and what their clients compute is
    not to be taken from the service.
    """

    def __init__(self, url: str) -> None:
        super().__init__(_attack, url)

    def __enter__(self) -> Attackers:
        return self

    @contextlib.contextmanager
    def attacking(self, name: str) -> Iterator[None]:
        """The attack goes on for as long as the block."""
        self._pipe.send(name)
        self._pipe.recv()
        try:
            yield
        finally:
            self._pipe.send(None)
            self._pipe.recv()


def _call(url: str, tenant: str, attack: Attack, stop: threading.Event) -> None:
    with httpx.Client(base_url=url, headers={"X-Tenant": tenant}, timeout=300) as http:
        while not stop.is_set():
            # Refused, cut off or waited for too long: it tries again.
            with contextlib.suppress(httpx.HTTPError):
                attack(http, stop)


def _attack(pipe: Connection, url: str) -> None:
    os.nice(_NICEST)
    while (name := pipe.recv()) is not None:
        make, connections, tenants = ATTACKS[name]
        attack, stop = make(), threading.Event()
        callers = [
            (url, f"attacker-{name}-{number % tenants}", attack, stop) for number in range(connections)
        ]
        threads = [threading.Thread(target=_call, args=caller, daemon=True) for caller in callers]
        for thread in threads:
            thread.start()
        pipe.send("begun")
        pipe.recv()
        stop.set()
        for thread in threads:
            thread.join(310)
        pipe.send("ended")


@dataclass
class Others:
    """The other tenants' requests of four kinds, each from its own process."""

    loads: dict[str, Load]
    orders: dict[str, Order]

    def run(self) -> dict[str, Round | None]:
        """All at once; None for a kind of which a connection was cut off."""
        for name, load in self.loads.items():
            load.begin(self.orders[name])
        found: dict[str, Round | None] = {}
        for name, load in self.loads.items():
            try:
                found[name] = load.end()
            except NoAnswer:
                found[name] = None
        return found


@dataclass
class Found:
    """Latencies in seconds, by kind; how many requests failed."""

    alone: dict[str, list[float]] = field(default_factory=dict)
    beside: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def note(self, rounds: dict[str, Round | None], beside: bool) -> None:
        """Adds what a run found."""
        for kind, one in rounds.items():
            kept = (self.beside if beside else self.alone).setdefault(kind, [])
            if one is not None:
                kept.extend(one.latencies)
            if beside:
                lost = 1 if one is None else len(one.refused) + one.late
                self.failed[kind] = self.failed.get(kind, 0) + lost


def _orders(texts: Scene, pictures: Scene) -> dict[str, Order]:
    adapt = [
        Request(
            "POST",
            "/adapt",
            json.dumps(
                {"adapter": "small", "examples": [client.as_example(sample) for sample in texts.taught[:20]]}
            ).encode(),
            {"Content-Type": "application/json", "X-Tenant": "other"},
        )
    ]
    lines = b"".join(
        json.dumps({"text": str(sample.input), "label": sample.label}).encode() + b"\n"
        for sample in texts.taught[:10]
    )
    upload = Request(
        "POST",
        "/adapt?adapter=lines&fit=false",
        lines,
        {"Content-Type": "application/x-ndjson", "X-Tenant": "uploader"},
    )
    return {
        "texts": Order(texts.forms()["raw"], 16, SECONDS, rate=TEXTS),
        "pictures": Order(pictures.forms()["raw"], 16, SECONDS, rate=PICTURES),
        "adapts": Order(adapt, 8, SECONDS, rate=ADAPTS),
        "uploads": Order([upload], 4, SECONDS, rate=UPLOADS),
        "/readyz": Order([Request("GET", "/readyz")], 8, SECONDS, rate=LOOKS),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/attacks.md and .json; 1 if a target is missed."""
    options = asked(__doc__, tuple(ATTACKS), arguments)
    report = Report("attacks", "What attackers cost the other tenants")
    texts, pictures = text_scene(16, options.data), image_scene((400, 300), options.data)
    with client.running({"TOPWORK_MAX_JOBS": "1000"}) as server, contextlib.ExitStack() as stack:
        victims = client.Client(server, "bench")
        for scene in (texts, pictures):
            victims.adapt(scene.adapter, scene.taught, scene.backbone)
        victims.close()
        orders = _orders(texts, pictures)
        others = Others({name: stack.enter_context(Load(server.url)) for name in orders}, orders)
        others.run()
        attackers = stack.enter_context(Attackers(server.url))
        for name in options.parts:
            found = Found()
            for _ in range(ROUNDS):
                found.note(others.run(), beside=False)
                with attackers.attacking(name):
                    time.sleep(1.0)
                    found.note(others.run(), beside=True)
            _tell(report, name, found)
    return report.finish()


def _tell(report: Report, name: str, found: Found) -> None:
    rows = []
    for kind, beside in found.beside.items():
        alone = found.alone[kind]
        before, after = (float(np.quantile(one, 0.99)) if one else float("inf") for one in (alone, beside))
        ratio = after / max(before, FLOOR)
        report.expect(f"{name}: {kind}, p99 beside over alone", ratio, "<=", SLOWER)
        report.expect(f"{name}: {kind} that failed", found.failed[kind], "<=", 0)
        worst = max(beside, default=float("inf"))
        rows.append(
            [
                kind,
                f"{1e3 * before:.1f} ms",
                f"{1e3 * after:.1f} ms",
                f"{ratio:.2f}",
                f"{1e3 * worst:.0f} ms",
                str(found.failed[kind]),
            ]
        )
        report.data.setdefault(name, {})[kind] = {"alone_s": before, "beside_s": after, "worst_s": worst}
    head = ["others ask", "p99 alone", "p99 beside", "ratio", "worst", "failed"]
    report.add(f"Beside {name}", table(head, rows))


if __name__ == "__main__":
    raise SystemExit(main())
