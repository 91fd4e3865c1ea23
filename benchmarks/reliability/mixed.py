"""A load of all that clients do, which notes what it was told, and asks later whether that still holds."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from adapters.examples.target import input_digest
from adapters.registry.errors import KEPT_VERSIONS

TENANT = "default"
ADAPTERS = tuple(f"a{number}" for number in range(6))
UPLOADED = ("u0", "u1")
CURATED = "curated"
WORDS = ("invoice", "holiday", "weather", "football")
# Asked again and again, so that answers can be compared.
ASKED = tuple(f"about the {word} of yesterday" for word in WORDS)
UPLOAD_EXAMPLES = 12
# Largest difference between two answers of one version to one text, in different batches.
TOLERANCE = 1e-4
# Refused for now. Anything else that is no success is a failure.
BUSY = (409, 429, 503)
# Weights of a caller's next operation.
OPERATIONS = {"adapt": 8, "predict": 8, "tell": 2, "remove": 2, "upload": 1, "come and go": 1}

Json = dict[str, Any]


class Asked:
    """How many requests are about to be answered. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answering = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request, meanwhile."""
        with self.lock:
            self.answering += 1
        try:
            yield
        finally:
            with self.lock:
                self.answering -= 1


class Said(Asked):
    """The service's answers. Guarded by the lock, except when read between loads.

    versions: acknowledged, by adapter. examples and removed: ids that must and must not be there. gone:
    adapters that were deleted. jobs: the adapter and the examples' ids of uploads. answers: probabilities by
    label, of an adapter's version, for a text. wrong: answers that may not be. done: operations acknowledged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[str, list[int]] = defaultdict(list)
        self.examples: dict[str, set[str]] = defaultdict(set)
        self.removed: dict[str, set[str]] = defaultdict(set)
        self.gone: set[str] = set()
        self.jobs: dict[str, tuple[str, set[str]]] = {}
        self.answers: dict[tuple[str, int, str], dict[str, float]] = {}
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()

    def add(self, adapter: str, version: int | None, examples: Sequence[str]) -> None:
        """An adapt or a correction was acknowledged."""
        with self.lock:
            if version is not None:
                self.versions[adapter].append(version)
            self.examples[adapter].update(examples)

    def newest(self, adapter: str) -> list[int]:
        """Versions that must be there, oldest first; others may be added meanwhile."""
        with self.lock:
            # Asking after an adapter must not note it as one that was acknowledged.
            return sorted(self.versions.get(adapter, ()))[-KEPT_VERSIONS // 2 :]

    def compare(self, adapter: str, version: int | None, text: str, answer: Json) -> None:
        """Is it an answer of this adapter and version, and the one that was given before?"""
        (found,) = answer["predictions"]
        probabilities = {one["label"]: one["probability"] for one in found["probabilities"]}
        named = f"{adapter} version {version}: {answer}"
        with self.lock:
            if version is not None and answer["version"] != version:
                self.wrong.append(named)
                return
            if not probabilities or not all(label.startswith(f"{adapter} ") for label in probabilities):
                self.wrong.append(named)
            before = self.answers.setdefault((adapter, answer["version"], text), probabilities)
            if before.keys() != probabilities.keys() or any(
                abs(before[label] - value) > TOLERANCE for label, value in probabilities.items()
            ):
                self.wrong.append(f"{named}, before {before}")


class Caller:
    """Call one operation after the other until the service is gone. prefix: of this caller's own ids."""

    def __init__(self, url: str, seed: int, prefix: str, said: Said, stop: threading.Event) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)
        self._rng = random.Random(seed)
        self._prefix = prefix
        self._said = said
        self._stop = stop
        self._number = 0

    def run(self) -> None:
        """Returns when the service does not answer any more."""
        operations = {
            "adapt": self._adapt,
            "predict": self._predict,
            "tell": self._tell,
            "remove": self._remove,
            "upload": self._upload,
            "come and go": self._come_and_go,
        }
        with self._http:
            while not self._stop.is_set():
                self._number += 1
                (name,) = self._rng.choices(list(OPERATIONS), list(OPERATIONS.values()))
                try:
                    if operations[name]():
                        with self._said.lock:
                            self._said.done[name] += 1
                except httpx.TransportError:
                    return

    def _ask(self, method: str, path: str, **request: Any) -> Json | None:
        """The answer, None where it was refused for now."""
        with self._said.one():
            answer = self._http.request(method, path, **request)
        if answer.status_code in BUSY:
            return None
        if answer.status_code not in (200, 202):
            with self._said.lock:
                self._said.wrong.append(f"{method} {path}: {answer.status_code} {answer.text}")
            return None
        found: Json = answer.json()
        return found

    def _examples(self, adapter: str, count: int) -> list[Json]:
        words = self._rng.sample(WORDS, 2)
        return [
            {
                "id": f"{self._prefix}-{self._number}-{place}",
                "text": f"{words[place % 2]} {self._rng.random()}",
                "label": f"{adapter} {words[place % 2]}",
            }
            for place in range(count)
        ]

    def _adapt(self) -> bool:
        return self._learn(self._rng.choice(ADAPTERS))

    def _learn(self, adapter: str) -> bool:
        examples = self._examples(adapter, 2)
        body = {"adapter": adapter, "promote": "always", "examples": examples}
        made = self._ask("POST", "/adapt", json=body)
        if made is None:
            return False
        ids = [example["id"] for example in examples]
        self._said.add(adapter, made["version"], ids)
        return True

    def _predict(self) -> bool:
        adapter, text = self._rng.choice(ADAPTERS), self._rng.choice(ASKED)
        newest = self._said.newest(adapter)
        if not newest:
            return False
        version = self._rng.choice((None, newest[-1]))
        answer = self._ask("POST", "/predict", json=query(adapter, version, text))
        if answer is not None:
            self._said.compare(adapter, version, text, answer)
        return answer is not None

    def _tell(self) -> bool:
        adapter = self._rng.choice(ADAPTERS)
        if not self._said.newest(adapter):
            return False
        word = self._rng.choice(WORDS)
        text = f"{word} {self._prefix} {self._number}"
        body = {"text": text, "label": f"{adapter} {word}", "fit": False}
        if self._ask("POST", f"/adapters/{adapter}/feedback", json=body) is None:
            return False
        # Feedback without an id gets the id of its input.
        self._said.add(adapter, None, [input_digest(text)])
        return True

    def _remove(self) -> bool:
        """Add some examples and erase one. Versions that learned from it go too, and are not expected."""
        adapter, examples = CURATED, self._examples(CURATED, 4)
        if self._ask("POST", "/adapt", json={"adapter": adapter, "examples": examples}) is None:
            return False
        removed, *kept = [example["id"] for example in examples]
        self._said.add(adapter, None, kept)
        # Without an answer, the example may be there or not.
        if self._ask("DELETE", f"/adapters/{adapter}/examples/{removed}") is None:
            return False
        with self._said.lock:
            self._said.removed[adapter].add(removed)
        return True

    def _upload(self) -> bool:
        adapter = self._rng.choice(UPLOADED)
        examples = self._examples(adapter, UPLOAD_EXAMPLES)
        job = self._ask(
            "POST",
            f"/adapt?adapter={adapter}&promote=always",
            content="\n".join(map(json.dumps, examples)),
            headers={"Content-Type": "application/x-ndjson"},
        )
        if job is not None:
            with self._said.lock:
                self._said.jobs[job["id"]] = (adapter, {example["id"] for example in examples})
        return job is not None

    def _come_and_go(self) -> bool:
        """A new adapter, and its end."""
        adapter = f"gone-{self._prefix}-{self._number}"
        if not self._learn(adapter):
            return False
        with self._said.lock:
            del self._said.versions[adapter], self._said.examples[adapter]
        if self._ask("DELETE", f"/adapters/{adapter}") is None:
            return False
        with self._said.lock:
            self._said.gone.add(adapter)
        return True


def query(adapter: str, version: int | None, text: str) -> Json:
    """The body of a request for a prediction; without a version, of the live one."""
    asked: Json = {"adapter": adapter, "top_k": len(WORDS), "inputs": [{"text": text}]}
    return asked if version is None else asked | {"version": version}
