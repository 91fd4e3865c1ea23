"""A tenant who sends each request again until it is answered, and looks at what became of its jobs."""

from __future__ import annotations

import time
import uuid
from typing import Any

import httpx
import numpy as np

from tests.support.conditions import until
from tests.support.models.shades import picture
from tests.support.service.client import BLAME, PRAISE, Json, image
from tests.support.service.fine_tunes import shades
from tests.support.service.uploads import CSV

EXAMPLES = 3_000
_PATIENCE = 120.0  # seconds


class Tenant:
    """A tenant of its own. Its maker closes `http`."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"X-Tenant": f"t-{uuid.uuid4().hex[:12]}"}, timeout=60)

    def upload(self, adapter: str = "reviews") -> Json:
        """A job that learns from EXAMPLES texts, for a new adapter."""
        kinds = (("up", PRAISE), ("down", BLAME))
        rows = [
            f'e{number},"{texts[number // 2 % len(texts)]} {number}",{label}'
            for number in range(EXAMPLES)
            for label, texts in (kinds[number % 2],)
        ]
        content = "\n".join(["id,text,label", *rows])
        return self._submit(CSV, params={"adapter": adapter}, content=content)

    def fine_tune(self, config: Json, adapter: str = "shades") -> Json:
        """A job that tunes a network on pictures, for a new adapter."""
        body = {"adapter": adapter, "examples": shades(), "method": "fine_tune", "fine_tune": config}
        return self._submit({}, json=body)

    def job(self, job: Json) -> Json:
        """The job as it is now."""
        return self.get(f"/jobs/{job['id']}")

    def stored(self, job: Json) -> int:
        """How many examples the job has stored."""
        progress = self.job(job)["progress"] or {}
        return int(progress.get("stored", 0))

    def until_ended(self, job: Json, seconds: float = 300.0) -> Json:
        """The job once it has ended."""
        until(lambda: self.job(job)["finished_at"], seconds, pause=0.5)
        return self.job(job)

    def versions(self, adapter: str) -> list[int]:
        """The numbers of the adapter's versions."""
        return [one["version"] for one in self.get(f"/adapters/{adapter}/versions")["versions"]]

    def check(self, job: Json) -> None:
        """See that the job has made one version of all examples, which answers, and that no other job ran."""
        assert job["state"] == "succeeded", job
        adapter, is_upload = job["adapter"], job["kind"] == "bulk_adapt"
        assert self.versions(adapter) == [job["version"]] == [1]
        assert [one["id"] for one in self.get("/jobs", adapter=adapter)["jobs"]] == [job["id"]]
        assert self.get(f"/adapters/{adapter}")["examples"] == (EXAMPLES if is_upload else len(shades()))
        asked = {"text": PRAISE[0]} if is_upload else image(picture(0, np.random.default_rng(9)))
        answer = self.ask("POST", "/predict", json={"adapter": adapter, "inputs": [asked]})
        assert answer.json()["version"] == 1

    def get(self, path: str, **params: str) -> Json:
        """The JSON of an answer."""
        response = self.ask("GET", path, params=params)
        assert response.status_code == 200, response.text
        found: Json = response.json()
        return found

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer, once the service and what it needs are there, and the request is not in flight."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                response = self.http.request(method, path, **request)
                if response.status_code not in (409, 503):
                    return response
                why = response.text
            except httpx.TransportError as error:
                why = repr(error)
            assert time.monotonic() < end, why
            time.sleep(0.2)

    def _submit(self, headers: dict[str, str], **request: Any) -> Json:
        key = {"Idempotency-Key": uuid.uuid4().hex}
        response = self.ask("POST", "/adapt", headers={**headers, **key}, **request)
        assert response.status_code == 202, response.text
        job: Json = response.json()
        return job
