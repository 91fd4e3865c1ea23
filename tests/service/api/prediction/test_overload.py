"""More than the service can do: what cannot be answered in time is refused before it is read."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.harness.service_process import Serving
from tests.support.service.calls import get, post, texts
from tests.support.service.client import Caller

pytestmark = pytest.mark.alone

BODY = b"a holiday"
PATH = "/predict?adapter=mail"
HEADERS = {"Content-Type": "text/plain", "Content-Length": str(len(BODY))}


def test_a_prediction_that_would_wait_too_long_is_refused_before_its_body_comes(tmp_path: Path) -> None:
    settings = {"TOPWORK_MAX_WAIT": "0.001", "TOPWORK_BACKBONES": "minilm-l6-v2"}
    with Serving(tmp_path, environment=settings) as service:
        post(f"{service.url}/adapt", {"adapter": "mail", "examples": texts(10)})
        # Light ones: heavy ones would keep none of these waiting.
        many = {"adapter": "mail", "inputs": [{"text": f"{number} " * 60} for number in range(128)]}
        busy = threading.Thread(target=post, args=(f"{service.url}/predict", many))
        busy.start()
        while b'topwork_queue_depth{backbone="minilm-l6-v2"} 0.0' in get(f"{service.url}/metrics")[1]:
            assert busy.is_alive(), "everything was answered at once"
        with closing(HTTPConnection(urlsplit(service.url).netloc, timeout=30)) as connection:
            connection.putrequest("POST", PATH)
            for name, value in HEADERS.items():
                connection.putheader(name, value)
            connection.endheaders()
            refused = connection.getresponse()
            assert refused.status == 429
            assert refused.headers["Retry-After"]
            assert b"/docs/errors#overloaded" in refused.read()
            # The connection stays open behind the unread body.
            busy.join()
            connection.send(BODY)
            connection.request("POST", PATH, BODY, HEADERS)
            assert connection.getresponse().status == 200


def test_long_fits_of_one_tenant_do_not_hold_the_adapts_of_another(tmp_path: Path) -> None:
    """Six connections with a thousand examples of four hundred labels each: seconds for a fit."""
    many = [
        {"text": f"note {row} on matter {row % 400}", "label": f"matter {row % 400}"} for row in range(1_000)
    ]
    few = [{"text": f"{word} and more {row}", "label": word} for row in range(3) for word in ("sun", "rain")]
    answers: set[int] = set()
    over = threading.Event()

    def attack(url: str, number: int) -> None:
        tenant = Caller(url, "many")
        # It may be under way when the service ends.
        with tenant.http, suppress(httpx.HTTPError):
            while not over.is_set():
                body = {"adapter": f"a{number}", "examples": many}
                status = tenant.http.post("/adapt", json=body).status_code
                if not over.is_set():
                    answers.add(status)

    with Serving(tmp_path, environment={"TOPWORK_BACKBONES": "minilm-l6-v2"}) as service:
        caller, seed = Caller(service.url, "few"), Caller(service.url, "many")

        def median(count: int) -> float:
            seconds = []
            for number in range(count):
                begun = time.monotonic()
                caller.adapt(f"b{number}", few)
                seconds.append(time.monotonic() - begun)
            return statistics.median(seconds)

        with caller.http, seed.http:
            seed.adapt("a0", many, fit=False)
            median(1)
            alone = median(5)
            threads = [threading.Thread(target=attack, args=(service.url, number)) for number in range(6)]
            for thread in threads:
                thread.start()
            try:
                while b"topwork_fits_queued 0.0" in get(f"{service.url}/metrics")[1]:
                    time.sleep(0.01)
                beside = median(9)
                assert get(f"{service.url}/readyz")[0] == 200
            finally:
                over.set()
                service.kill()
    for thread in threads:
        thread.join()
    print(f"an adapt takes {alone:.3f} s alone, and {beside:.3f} s beside the long fits")
    assert answers <= {200, 429}
    assert beside < 8 * alone + 0.2
