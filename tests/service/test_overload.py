"""More than the service can do: what cannot be answered in time is refused before it is read."""

from __future__ import annotations

import threading
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.serving import Serving
from tests.service.test_startup import get, post, texts

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
            assert b"urn:topwork:overloaded" in refused.read()
            # The connection goes on, behind the body that nobody waited for.
            busy.join()
            connection.send(BODY)
            connection.request("POST", PATH, BODY, HEADERS)
            assert connection.getresponse().status == 200
