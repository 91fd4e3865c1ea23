"""The payloads of the speed benchmark: inputs of a kind, in each contender's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.data import datasets
from benchmarks.data.datasets import Sample
from benchmarks.data.phrases import phrases
from benchmarks.data.pictures import photographs
from benchmarks.harness import client
from benchmarks.harness.caller import Request

TENANT = "bench"
_INPUTS = 96
_TAUGHT = 200
_MANY = 32


@dataclass(frozen=True, slots=True)
class Scene:
    """Inputs of one size for one backbone. `taught`: the examples of the head; `asked`: what is predicted."""

    name: str
    kind: datasets.Kind
    backbone: str
    taught: Sequence[Sample]
    asked: Sequence[Sample]

    @property
    def adapter(self) -> str:
        """The service's adapter for it."""
        return self.name.replace(" ", "-").lower()

    def teach(self, server: client.Server) -> None:
        """Make the adapter."""
        service = client.Client(server, TENANT)
        service.adapt(self.adapter, self.taught, self.backbone)
        service.close()

    def forms(self) -> dict[str, list[Request]]:
        """One input a request, in each form that the service reads, and many in one."""
        items = [client.as_input(sample) for sample in self.asked]
        return {
            "raw": [self._raw(sample) for sample in self.asked],
            "multipart": [_multipart("inputs", sample, {"adapter": self.adapter}) for sample in self.asked],
            "JSON": [self._json([item]) for item in items],
            f"{_MANY} in JSON": [
                self._json(items[start : start + _MANY]) for start in range(0, len(items), _MANY)
            ],
        }

    def _raw(self, sample: Sample) -> Request:
        image = isinstance(sample.input, bytes)
        headers = {
            "Content-Type": "image/jpeg" if image else "text/plain; charset=utf-8",
            "X-Tenant": TENANT,
        }
        return Request("POST", f"/predict?adapter={self.adapter}", _as_bytes(sample), headers)

    def _json(self, inputs: Sequence[dict[str, str]]) -> Request:
        return _json("/predict", {"adapter": self.adapter, "inputs": inputs})

    def to_handwritten(self) -> list[Request]:
        """As benchmarks.peers.handwritten takes them: a file, or a text in JSON."""
        if self.kind == "image":
            return [_multipart("file", sample, {}) for sample in self.asked]
        return [_json("/predict", {"text": sample.input}) for sample in self.asked]

    def to_lit(self) -> list[Request]:
        """As benchmarks.peers.lit takes them."""
        return [_json("/predict", client.as_input(sample)) for sample in self.asked]

    def to_infinity(self) -> list[Request]:
        """As OpenAI's clients would send them."""
        return [
            _json("/embeddings", {"model": self.backbone, "input": [sample.input]}) for sample in self.asked
        ]

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """The head's examples as files <label>.<number>, which the peers read."""
        with TemporaryDirectory(prefix="topwork-taught-") as name:
            for index, sample in enumerate(self.taught):
                Path(name, f"{sample.label.replace('/', '-')}.{index:05}").write_bytes(_as_bytes(sample))
            yield Path(name)


def text_scene(tokens: int, folder: Path, backbone: str = "minilm-l6-v2") -> Scene:
    """Texts of this number of tokens, including the special ones."""
    samples = phrases(_TAUGHT + _INPUTS, tokens, folder)
    name = f"texts of {tokens} tokens"
    return Scene(name, "text", backbone, samples[:_TAUGHT], samples[_TAUGHT:])


def image_scene(size: tuple[int, int], folder: Path, backbone: str = "efficientnet-lite0") -> Scene:
    """JPEGs of this size."""
    samples = photographs(_TAUGHT + _INPUTS, size, folder)
    name = f"JPEGs of {size[0]}x{size[1]}"
    return Scene(name, "image", backbone, samples[:_TAUGHT], samples[_TAUGHT:])


def _as_bytes(sample: Sample) -> bytes:
    return sample.input if isinstance(sample.input, bytes) else sample.input.encode()


def _json(path: str, body: object) -> Request:
    headers = {"Content-Type": "application/json", "X-Tenant": TENANT}
    return Request("POST", path, json.dumps(body).encode(), headers)


def _multipart(field: str, sample: Sample, fields: dict[str, str]) -> Request:
    name, media = ("one.jpg", "image/jpeg") if isinstance(sample.input, bytes) else ("one.txt", "text/plain")
    encoded = httpx.Request(
        "POST",
        "http://service/predict",
        data=fields,
        files=[(field, (name, _as_bytes(sample), media))],
    )
    headers = {"Content-Type": encoded.headers["Content-Type"], "X-Tenant": TENANT}
    return Request("POST", "/predict", encoded.read(), headers)
