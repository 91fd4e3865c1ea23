"""Requests with the standard library alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

KEY = "0123456789abcdef0123456789abcdef"


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of the answer."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def post(url: str, body: object) -> dict[str, object]:
    """The answer to a request with a JSON body. Raises HTTPError for a status of 400 and above."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        result: dict[str, object] = json.load(answer)
        return result


def texts(number: int) -> list[dict[str, str]]:
    """Examples of two labels."""
    return [
        {"id": f"e{index}", "text": f"{word} number {index}", "label": word}
        for index in range(number)
        for word in [("invoice", "holiday")[index % 2]]
    ]
