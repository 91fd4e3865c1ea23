"""Damaged and odd images and texts: each is answered or refused in its place, at no cost to others."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.harness.service_process import Serving, resident
from tests.faults import times
from tests.faults.inputs import input_mutations
from tests.faults.inputs.input_mutations import CODES
from tests.support.service.client import JSON, PRAISE, UNSEEN, Caller, pictures, reviews, same

# Codes that refuse a whole request.
WHOLE = {"invalid_json", "unsupported_media_type", "body_too_large", "examples_rejected", "no_inputs"}
MOST_MORE = 512 << 20
# Bytes that a decoding process takes before the first image.
LOADED = 64 << 20
WAYS = [(path, form) for path in ("predict", "embed", "adapt") for form in ("raw", "multipart", "json")]
BACKBONES = {"image": "efficientnet-lite0", "text": "minilm-l6-v2"}
Item = bytes | str
Json = dict[str, Any]


@contextmanager
def watched(serving: Serving) -> Iterator[list[int]]:
    """Resident bytes of the serving process: before, and then 20 times a second."""
    found = [resident(serving.process.pid)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            found.append(resident(serving.process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


class Asking:
    """One tenant with an adapter of a kind, and two good inputs with what is answered for them alone."""

    def __init__(self, server: str, kind: str) -> None:
        self.caller = Caller(server)
        self.http = self.caller.http
        self.kind = kind
        self.caller.adapt("taught", pictures() if kind == "image" else reviews())
        texts: list[Item] = [PRAISE[0], "So dull"]
        images: list[Item] = []
        images += [*UNSEEN.values()][:2]
        self.good = images if kind == "image" else texts
        self.alone: dict[str, list[Any]] = {"adapt": []}
        for path in ("predict", "embed"):
            self.alone[path] = [self._items(path, self.ask(path, "json", [one]))[0] for one in self.good]

    def ask(self, path: str, form: str, items: Sequence[Item], media: str | None = None) -> httpx.Response:
        """Asks for the items: one by itself as the raw body, or all together."""
        fields: Json = {"backbone": BACKBONES[self.kind]}
        if path == "predict":
            fields = {"adapter": "taught"}
        elif path == "adapt":
            fields |= {"adapter": "more", "fit": "false", "update": "replace"}
        if form == "raw":
            headers = {"Content-Type": media or ("text/plain" if self.kind == "text" else "image/png")}
            return self.http.post(f"/{path}", params=fields, content=as_bytes(items[0]), headers=headers)
        if form == "multipart":
            ending, media = ("txt", "text/plain") if self.kind == "text" else ("png", "image/png")
            files = [
                ("f", (f"{'ab'[place % 2]}/{place}.{ending}", as_bytes(one), media))
                for place, one in enumerate(items)
            ]
            return self.http.post(f"/{path}", data=fields, files=files)
        if path == "adapt":
            fields["fit"] = False
        return self.http.post(f"/{path}", content=self._json(path, fields, items), headers=JSON)

    def _json(self, path: str, fields: Json, items: Sequence[Item]) -> bytes:
        written = []
        for place, one in enumerate(items):
            label = b', "label": "%s"' % b"ab"[place % 2 : place % 2 + 1] if path == "adapt" else b""
            if isinstance(one, bytes):
                value = b'"%s"' % base64.b64encode(one)
            else:
                value = input_mutations.json_string(one, len(one)) if place == 1 else json.dumps(one).encode()
            written.append(b'{"%s": %s%s}' % (self.kind.encode(), value, label))
        name = b"examples" if path == "adapt" else b"inputs"
        return json.dumps(fields).encode()[:-1] + b', "%s": [%s]}' % (name, b", ".join(written))

    def wrong(self, path: str, form: str, item: Item, media: str | None = None) -> str | None:
        """The faults of the answer to the item, sent beside good ones where possible."""
        items = [item] if form == "raw" else [self.good[0], item, self.good[1]]
        response = self.ask(path, form, items, media)
        if response.status_code != 200:
            return self._wrong_refusal(response, form, media)
        if path == "adapt":
            found = response.json()["examples"]
            rejected = found["rejected"]
            as_it_should = all(one["index"] == 1 and one["code"] in CODES for one in rejected)
            # The item may be one of the good ones, or the same as another before it.
            complete = found["total"] + len(rejected) in (2, 3) and len(rejected) <= 1
            return None if as_it_should and complete else response.text[:500]
        answers = self._items(path, response)
        if form == "raw":
            return None if len(answers) == 1 and "error" not in answers[0] else response.text[:500]
        error = answers[1].get("error")
        if error is not None and error["code"] not in CODES:
            return f"another code: {error}"
        if not same([answers[0], answers[2]], self.alone[path]):
            return "its neighbours are answered otherwise than alone"
        return None

    def _wrong_refusal(self, response: httpx.Response, form: str, media: str | None) -> str | None:
        if response.status_code >= 500 or response.headers["content-type"] != "application/problem+json":
            return f"{response.status_code}: {response.text[:500]}"
        code = response.json()["code"]
        # A raw input that cannot be used is the request's own error; a text's string may end the JSON.
        may = CODES | WHOLE if form == "raw" else {"invalid_json"} if self.kind == "text" else set()
        return None if code in may else f"{response.status_code} {code}: {response.text[:500]}"

    @staticmethod
    def _items(path: str, response: httpx.Response) -> list[Json]:
        found: list[Json] = response.json()["predictions" if path == "predict" else "embeddings"]
        return found


def as_bytes(item: Item) -> bytes:
    return item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass")


@pytest.fixture(params=["image", "text"])
def asking(server: str, request: pytest.FixtureRequest) -> Iterator[Asking]:
    found = Asking(server, request.param)
    with closing(found.http):
        yield found


def test_each_is_answered_or_refused_in_its_place(serving: Serving, asking: Asking) -> None:
    count = times(2_000, 120) if asking.kind == "image" else times(1_000, 100)
    medias = (
        None,
        None,
        "text/plain",
        "image/jpeg",
        "application/octet-stream",
        "application/pdf",
        "image/svg+xml",
    )
    failures = []
    with watched(serving) as bytes_held:
        for number in range(count):
            item = input_mutations.image(number) if asking.kind == "image" else input_mutations.text(number)
            path, form = WAYS[number % len(WAYS)]
            found = asking.wrong(path, form, item, medias[number // len(WAYS) % len(medias)])
            if found:
                failures.append(f"{number} {path} {form}: {found}")
    assert not failures, f"{len(failures)} of {count}\n" + "\n".join(failures[:20])
    assert max(bytes_held) - bytes_held[0] <= MOST_MORE
    assert serving.process.poll() is None
    # Python remembers each text of a warning that it has written, and Pillow's hold what an image says.
    assert "PIL/" not in serving.log.read_text(errors="replace")


SIDE = 7_000  # 49 million pixels, of the 50 million that are taken


def largest() -> Iterator[tuple[str, bytes]]:
    """Images as large as they may be, in the forms that take the most memory to decode."""
    wide = np.full((SIDE, SIDE), 500, np.uint16)
    yield "transparent", input_mutations.saved(Image.new("RGBA", (SIDE, SIDE)), "PNG")
    yield "animation", input_mutations.saved(Image.new("RGB", (SIDE, SIDE)), "WEBP")
    yield (
        "progressive",
        input_mutations.saved(Image.new("RGB", (SIDE, SIDE)), "JPEG", progressive=True, subsampling=0),
    )
    yield (
        "half an animation",
        input_mutations.saved(Image.new("RGBA", (SIDE, SIDE // 2)), "WEBP", lossless=True, method=0),
    )
    yield "16 bits", input_mutations.saved(Image.fromarray(wide), "PNG", transparency=500)
    yield "grey and transparent", input_mutations.saved(Image.new("LA", (SIDE, SIDE)), "PNG")
    yield "inks", input_mutations.saved(Image.new("CMYK", (SIDE, SIDE)), "JPEG", progressive=True)
    yield (
        "strips",
        input_mutations.saved(Image.new("RGBA", (SIDE, SIDE)), "TIFF", compression="tiff_adobe_deflate"),
    )


def decoders(serving: Serving) -> list[int]:
    """Processes of the service that decode, by the most memory that they have had, in bytes."""
    name = b"\0models.preprocess.decoder_process\0"
    pids = [pid for pid in serving.group() if name in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return [resident(pid, "VmHWM") for pid in pids]


def test_the_largest_images_take_half_a_gigabyte_each_and_two_at_a_time(
    serving: Serving, server: str
) -> None:
    """All at the same time, by processes of their own; the service itself takes nothing."""
    asking = Asking(server, "image")
    count = times(8, 2)
    chosen = [data for (_, data), _ in zip(largest(), range(count), strict=False)]
    with closing(asking.http), ThreadPoolExecutor(count) as pool, watched(serving) as bytes_held:
        found = [pool.submit(asking.wrong, "predict", "multipart", data) for data in chosen]
        assert [one.result() for one in found] == [None] * count
    more = max(bytes_held) - bytes_held[0]
    assert more <= MOST_MORE // 4, f"{more:,} bytes more"
    taken = decoders(serving)
    assert 1 <= len(taken) <= 3
    assert max(taken) <= LOADED + MOST_MORE
    # They were looked at: half a gigabyte is not what nothing takes.
    assert max(taken) >= 100 << 20
