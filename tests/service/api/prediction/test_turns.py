"""Giant pictures and long texts cost their sender the time, and the others little."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tests.support.service.client import UNSEEN, Caller, Json, image

pytestmark = pytest.mark.alone

# Factor of what another tenant waits alone, and seconds for noise of a shared machine.
SLOWER, BESIDES = 3.0, 0.25


def giants() -> Json:
    """Pictures of 49 megapixels in 24 KB each."""
    buffer = io.BytesIO()
    Image.new("L", (7_000, 7_000), "white").save(buffer, "PNG")
    return {"backbone": "efficientnet-lite0", "inputs": [image(buffer.getvalue())] * 12}


def words() -> Json:
    """Texts that begin with one word of 5,000 letters, and go on with 95,000 signs."""
    return {"backbone": "minilm-l6-v2", "inputs": [{"text": "a" * 5_000 + "中" * 94_990}] * 96}


@pytest.mark.parametrize("attack", [giants, words])
def test_costly_inputs_of_one_tenant_keep_no_other_waiting(
    server: str, caller: Caller, attack: Callable[[], Json]
) -> None:
    body = attack()
    small = {"image": base64.b64encode(UNSEEN["cow"]).decode()} if attack is giants else {"text": "Hello."}
    question = {"backbone": body["backbone"], "inputs": [small]}

    def ask() -> float:
        begun = time.perf_counter()
        found = caller.call("POST", "/embed", json=question)
        assert "embedding" in found["embeddings"][0]
        return time.perf_counter() - begun

    alone = [ask() for _ in range(60)]
    other = Caller(server)
    answers: list[Json] = []
    sending = threading.Thread(target=lambda: answers.append(other.call("POST", "/embed", json=body)))
    sending.start()
    time.sleep(0.5)
    beside = []
    while sending.is_alive():
        beside.append(ask())
    sending.join()
    other.http.close()
    assert all("embedding" in one for one in answers[0]["embeddings"])
    assert len(beside) >= 10
    assert np.quantile(beside, 0.9) <= SLOWER * np.quantile(alone, 0.9) + BESIDES
