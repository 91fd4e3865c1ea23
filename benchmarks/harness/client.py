"""A running service, started here or found at TOPWORK_URL, and what the benchmarks ask of it over HTTP."""

from __future__ import annotations

import base64
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks.data.datasets import Sample
from benchmarks.harness.service_process import Serving

# The service's own limits, less some room for the JSON around the inputs.
_EXAMPLES = 1_000
_INPUTS = 128
_BODY_BYTES = 40 << 20


@dataclass(frozen=True, slots=True)
class Server:
    """A service that answers at `url`; `pid` if it was started here."""

    url: str
    pid: int | None = None


@contextlib.contextmanager
def running(settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """The service at TOPWORK_URL, else one of our own with an empty home and these settings."""
    url = os.environ.get("TOPWORK_URL")
    if url:
        yield Server(url.rstrip("/"))
        return
    with (
        tempfile.TemporaryDirectory(prefix="topwork-bench-") as home,
        Serving(Path(home), environment=settings) as own,
    ):
        yield Server(own.url, own.process.pid)


def as_input(sample: Sample) -> dict[str, str]:
    """The sample as an element of `inputs`."""
    if isinstance(sample.input, str):
        return {"text": sample.input}
    return {"image": base64.b64encode(sample.input).decode()}


def as_example(sample: Sample) -> dict[str, str]:
    """The sample as an element of `examples`."""
    return {"id": sample.digest, **as_input(sample), "label": sample.label}


def _parts(samples: Sequence[Sample], most: int) -> Iterator[Sequence[Sample]]:
    first = size = 0
    for index, sample in enumerate(samples):
        length = len(sample.input) * 4 // 3
        if index > first and (index - first == most or size + length > _BODY_BYTES):
            yield samples[first:index]
            first, size = index, 0
        size += length
    yield samples[first:]


class Client:
    """Speaks to one service as one tenant. Raises httpx.HTTPStatusError with the problem in its message."""

    def __init__(self, server: Server, tenant: str = "default") -> None:
        self._http = httpx.Client(base_url=server.url, headers={"X-Tenant": tenant}, timeout=600)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request; its answer, if it is a success."""
        answer = self._http.request(method, path, **options)
        if answer.is_error:
            problem = f"{method} {path} answered {answer.status_code}: {answer.text[:500]}"
            raise httpx.HTTPStatusError(problem, request=answer.request, response=answer)
        return answer

    def backbones(self) -> list[dict[str, Any]]:
        """The backbones that GET /backbones lists."""
        listed: dict[str, list[dict[str, Any]]] = self.request("GET", "/backbones").json()
        return listed["backbones"]

    def adapt(self, adapter: str, samples: Sequence[Sample], backbone: str | None = None) -> dict[str, Any]:
        """Adapts on the samples, sent in as many parts as needed and fitted once; the last answer."""
        answer: dict[str, Any] = {}
        parts = list(_parts(samples, _EXAMPLES))
        for index, part in enumerate(parts, 1):
            body = {
                "adapter": adapter,
                "backbone": backbone,
                "promote": "always",
                "fit": index == len(parts),
                "strict": True,
                "examples": [as_example(sample) for sample in part],
            }
            answer = self.request("POST", "/adapt", json=body).json()
        return answer

    def predict(self, adapter: str, samples: Sequence[Sample], top_k: int = 1) -> list[dict[str, Any]]:
        """A prediction for every sample, in order."""
        predictions: list[dict[str, Any]] = []
        for part in _parts(samples, _INPUTS):
            body = {"adapter": adapter, "top_k": top_k, "inputs": [as_input(sample) for sample in part]}
            predictions += self.request("POST", "/predict", json=body).json()["predictions"]
        return predictions

    def embed(self, backbone: str, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """The samples' embeddings, float32 (n, dim)."""
        rows: list[list[float]] = []
        for part in _parts(samples, _INPUTS):
            body = {"backbone": backbone, "inputs": [as_input(sample) for sample in part]}
            rows += [
                item["embedding"] for item in self.request("POST", "/embed", json=body).json()["embeddings"]
            ]
        return np.asarray(rows, np.float32)

    def delete(self, adapter: str) -> None:
        """Removes the adapter."""
        self.request("DELETE", f"/adapters/{adapter}")
