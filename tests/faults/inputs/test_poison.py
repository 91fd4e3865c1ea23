"""One item that cannot be used among 32: the other 31 are answered as they are alone."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.faults import times
from tests.faults.inputs import input_mutations
from tests.support.models.png_bombs import bomb, png_header
from tests.support.service.client import CLOSE, PICTURES, UNSEEN, Caller, image

ROUNDS = times(1_000, 30)
TOGETHER = 32
Json = dict[str, Any]
Floats = NDArray[np.float64]

_WORDS = (
    "warm",
    "dull",
    "film",
    "plot",
    "music",
    "ending",
    "slow",
    "bright",
    "loud",
    "acting",
    "scene",
    "story",
)
_ANY: Sequence[Json] = ({}, {"image": "!"}, {"text": "both", "image": "AAAA"}, {"image": ""}, {"text": ""})
POISON: dict[str, Sequence[Json]] = {
    "image": (
        *_ANY,
        {"text": "of the wrong kind"},
        image(UNSEEN["cow"][:-200]),
        image(png_header(100_000, 100_000)),
        image(png_header(0, 5)),
        image(bomb()),
        image(b"no image"),
        image(b"\xff\xd8\xff\xe0" + b"\0" * 500),
    ),
    "text": (
        *_ANY,
        image(UNSEEN["cow"]),
        {"text": " \n"},
        {"text": "a\0b"},
        {"text": "a " * 60_000},
    ),
}
MEDIA = {"image": "image/png", "text": "text/plain"}
BACKBONES = {"image": "efficientnet-lite0", "text": "minilm-l6-v2"}


def goods(kind: str) -> list[Json]:
    """Inputs that can be used, long and short ones."""
    if kind == "image":
        return [image(data) for data in (*UNSEEN.values(), *(data for _, data in PICTURES))][:TOGETHER]
    rng = random.Random(1)
    return [
        {"text": " ".join(rng.choices(_WORDS, k=rng.choice((1, 3, 9, 20, 40))))} for _ in range(TOGETHER + 8)
    ]


class Asking:
    """Embeds inputs of one kind, and knows each one's embedding alone."""

    def __init__(self, server: str, kind: str) -> None:
        self.http = Caller(server).http
        self.kind = kind
        self.goods = goods(kind)
        self.alone = [self._alone(one) for one in self.goods]

    def together(self, inputs: Sequence[Json]) -> list[Floats | str]:
        """The embedding or the error code of each item, from one request."""
        response = self.http.post("/embed", json={"backbone": BACKBONES[self.kind], "inputs": inputs})
        assert response.status_code == 200, response.text
        return [
            one["error"]["code"] if "error" in one else np.array(one["embedding"])
            for one in response.json()["embeddings"]
        ]

    def _alone(self, one: Json) -> Floats:
        (found,) = self.together([one])
        assert not isinstance(found, str), found
        return found

    def raw(self, one: Json) -> Floats | str:
        """The same of one input in a request of its own, as the bytes that it is."""
        data = base64.b64decode(one["image"] + "==") if "image" in one else one.get("text", "").encode()
        media = MEDIA["image" if "image" in one else "text"]
        query = {"backbone": BACKBONES[self.kind]}
        response = self.http.post("/embed", params=query, content=data, headers={"Content-Type": media})
        if response.status_code == 200:
            return np.array(response.json()["embeddings"][0]["embedding"])
        assert response.status_code == 422, response.text
        return str(response.json()["type"])

    def draw(self, rng: random.Random) -> tuple[list[Json], list[int | None]]:
        """32 inputs, and of each its number among the good ones; of the poisoned one None."""
        places: list[int | None] = [rng.randrange(len(self.goods)) for _ in range(TOGETHER)]
        places[rng.randrange(TOGETHER)] = None
        poison = rng.choice((*POISON[self.kind], self._mutant(rng)))
        return [poison if place is None else self.goods[place] for place in places], places

    def _mutant(self, rng: random.Random) -> Json:
        if self.kind == "text":
            return {
                "text": "\0"
                + input_mutations.text(rng.randrange(1_000)).encode("utf-8", "replace").decode()[:500]
            }
        return image(input_mutations.image(rng.randrange(1_000))[:-1])

    def is_as_alone(self, found: Sequence[Floats | str], places: Sequence[int | None]) -> bool:
        """True if every good item has the embedding that it has alone."""
        return len(found) == len(places) and all(
            place is None or (not isinstance(one, str) and np.abs(one - self.alone[place]).max() <= CLOSE)
            for one, place in zip(found, places, strict=True)
        )


@pytest.fixture(params=["image", "text"])
def asking(server: str, request: pytest.FixtureRequest) -> Iterator[Asking]:
    found = Asking(server, request.param)
    with closing(found.http):
        yield found


def test_in_one_request(asking: Asking) -> None:
    for number in range(ROUNDS // 4):
        inputs, places = asking.draw(random.Random(number))
        found = asking.together(inputs)
        assert asking.is_as_alone(found, places), number


def test_in_requests_that_share_batches(asking: Asking) -> None:
    """Each input comes by itself, all at the same time; and four requests of eight do."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        for number in range(ROUNDS // 4):
            inputs, places = asking.draw(random.Random(-1 - number))
            if number % 2:
                rows = [inputs[begin : begin + 8] for begin in range(0, TOGETHER, 8)]
                found = [one for row in pool.map(asking.together, rows) for one in row]
            else:
                found = list(pool.map(asking.raw, inputs))
            assert asking.is_as_alone(found, places), number


def test_the_comparison_sees_a_difference(asking: Asking) -> None:
    right: list[Floats | str] = [asking.alone[0], "undecodable_image", asking.alone[1]]
    assert asking.is_as_alone(right, [0, None, 1])
    assert not asking.is_as_alone(right, [1, None, 0])
    assert not asking.is_as_alone([*right[:2], "undecodable_image"], [0, None, 1])
    assert not asking.is_as_alone([asking.alone[0] + 2 * CLOSE, *right[1:]], [0, None, 1])
