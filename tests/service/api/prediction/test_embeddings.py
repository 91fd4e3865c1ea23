"""Many texts in one request of OpenAI's clients, beside others who wait for the same backbone."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import numpy as np
import pytest

from models.batching.request import QueuedRequest, QueueFull
from service.api.predict import PART, openai_embeddings
from service.errors import Problem
from service.payloads.requests import OpenAIRequest
from tests.support.adapters.adapter_stack import says, world

anyio = pytest.mark.anyio


def asked(count: int) -> OpenAIRequest:
    texts = [says("one", number) for number in range(count)]
    return OpenAIRequest(model="tiny-text", input=texts, encoding_format="base64")


@anyio
async def test_no_more_than_a_part_waits_for_the_backbone(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        batcher = here.batchers["tiny-text"]
        request = asked(10 * PART + 1)
        work = asyncio.create_task(openai_embeddings("acme", here.predictor, request))
        deepest = 0
        while not work.done():
            deepest = max(deepest, batcher.depth)
            await asyncio.sleep(0)
        assert 0 < deepest <= PART
        found = json.loads(bytes((await work).body))["data"]
        assert [one["index"] for one in found] == list(range(10 * PART + 1))
        alone = await here.predictor.embed("acme", "tiny-text", [request.input[-1]])
        last = np.frombuffer(base64.b64decode(found[-1]["embedding"]), "<f4")
        assert np.allclose(last, alone.embeddings[0], atol=1e-5)


@anyio
async def test_texts_that_cannot_be_embedded_are_named_wherever_they_are(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        request = asked(3 * PART)
        blank = (0, PART, 3 * PART - 1)
        texts = [" " if place in blank else text for place, text in enumerate(request.input)]
        with pytest.raises(Problem) as caught:
            await openai_embeddings("acme", here.predictor, request.model_copy(update={"input": texts}))
        places = [one["pointer"] for one in caught.value.errors]
        assert places == [f"/input/{place}" for place in blank]
        with pytest.raises(Problem) as caught:
            await openai_embeddings("acme", here.predictor, request.model_copy(update={"input": " "}))
        assert [one["pointer"] for one in caught.value.errors] == ["/input"]


@anyio
async def test_later_parts_wait_for_room_and_the_first_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        queue = here.batchers["tiny-text"]._queue
        admit, seen = queue.admit, []

        def full_at_times(request: QueuedRequest) -> None:
            seen.append(request)
            if len(seen) in refused:
                raise QueueFull(0.0)
            admit(request)

        monkeypatch.setattr(queue, "admit", full_at_times)
        refused = {2, 3}
        response = await openai_embeddings("acme", here.predictor, asked(3 * PART))
        assert len(json.loads(bytes(response.body))["data"]) == 3 * PART
        assert len(seen) == 5
        seen.clear()
        refused = {1}
        with pytest.raises(QueueFull):
            await openai_embeddings("acme", here.predictor, asked(3 * PART))
        assert len(seen) == 1
