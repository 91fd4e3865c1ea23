"""A caller of the running service, and small real inputs to call it with."""

from __future__ import annotations

import base64
import json
import math
import uuid
from pathlib import Path
from typing import Any

import httpx

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
Json = dict[str, Any]
CLOSE = 1e-5

PICTURES: list[tuple[str, bytes]] = [
    (path.parent.name, path.read_bytes()) for path in sorted((EXAMPLES / "images").glob("*/*.png"))
]
UNSEEN: dict[str, bytes] = {
    path.stem: path.read_bytes() for path in sorted((EXAMPLES / "unseen").glob("*.png"))
}
PRAISE = [
    "What a wonderful film, I loved every minute",
    "Brilliant acting and a beautiful story",
    "Delightful, funny and warm from start to end",
    "A masterpiece, the best I have seen this year",
    "Superb music and a very moving finish",
    "I enjoyed it enormously and will watch it again",
]
BLAME = [
    "A dull and painful waste of two hours",
    "Terrible acting, the plot makes no sense",
    "Boring, loud and far too long",
    "The worst film of the year, avoid it",
    "I hated the ending and everything before it",
    "Poorly written and badly directed rubbish",
]


class Caller:
    """One tenant of a running service. Its maker closes it."""

    def __init__(self, url: str, tenant: str | None = None) -> None:
        self.tenant = tenant or f"t-{uuid.uuid4().hex[:12]}"
        self.http = httpx.Client(base_url=url, headers={"X-Tenant": self.tenant}, timeout=120)

    def call(self, method: str, path: str, status: int = 200, **request: Any) -> Json:
        """The JSON of an answer that has this status, and this status only."""
        response = self.http.request(method, path, **request)
        assert response.status_code == status, f"{response.status_code}: {response.text[:2000]}"
        if status == 204:
            return {}
        found: Json = response.json()
        if status >= 400 and path.startswith("/v1/"):
            assert response.headers["content-type"] == "application/json"
            assert found["error"].keys() == {"message", "type", "param", "code"}
            assert found["error"]["message"]
        elif status >= 400:
            assert response.headers["content-type"] == "application/problem+json"
            assert found["status"] == status
            assert found["request_id"] == response.headers["x-request-id"]
            assert found["detail"]
        return found

    def adapt(self, adapter: str, examples: list[Json], status: int = 200, **more: Any) -> Json:
        """POST /adapt as JSON; NaN is written as Python writes it."""
        body = json.dumps({"adapter": adapter, "examples": examples, **more})
        return self.call("POST", "/adapt", status, content=body, headers=JSON)

    def predict(self, adapter: str, inputs: list[Json], status: int = 200, **more: Any) -> Json:
        """POST /predict as JSON."""
        return self.call("POST", "/predict", status, json={"adapter": adapter, "inputs": inputs, **more})

    def code(self, method: str, path: str, status: int, **request: Any) -> str:
        """The code of the problem that is answered with this status."""
        problem = self.call(method, path, status, **request)
        return str(problem.get("error", problem)["code"])


JSON = {"Content-Type": "application/json"}


def image(data: bytes) -> Json:
    """An image as an element of `inputs`."""
    return {"image": base64.b64encode(data).decode()}


def pictures(count: int | None = None, salt: bytes = b"") -> list[Json]:
    """The small pictures as examples, one of each class after the other. salt: behind each, to be another."""
    by_label: dict[str, list[bytes]] = {}
    for label, data in PICTURES:
        by_label.setdefault(label, []).append(data)
    dealt = [
        (label, data)
        for row in zip(*by_label.values(), strict=True)
        for label, data in zip(by_label, row, strict=True)
    ]
    return [
        {"id": f"p{index}", **image(data + salt), "label": label}
        for index, (label, data) in enumerate(dealt[:count])
    ]


def reviews(count: int = 6) -> list[Json]:
    """Film reviews as examples, praise and blame in turn; `count` of each."""
    return [
        {"id": f"{label}{index}", "text": text, "label": label}
        for index in range(count)
        for label, text in (("good", PRAISE[index]), ("bad", BLAME[index]))
    ]


def same(one: Any, other: Any) -> bool:
    """True if two answers are equal except for the last digits of numbers."""
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, abs_tol=CLOSE * max(1.0, abs(one)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)
