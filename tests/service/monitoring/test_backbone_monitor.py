"""A service whose parts hang or die: what becomes of it, of its callers, and how soon."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from benchmarks.serving import bombs
from service.server.process import STUCK
from tests.faults import times
from tests.support.models import tiny_backbones
from tests.support.service.calls import get
from tests.support.service.client import Caller, image
from tests.support.service.faulty_service import KINDS, Breaking

# Noticed in five seconds, with a look and an answer; there again in fifteen.
NOTICED, REPLACED = 5.6, 15.0


@pytest.fixture(scope="module")
def breaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breaking]:
    running = Breaking(tmp_path_factory.mktemp("breaking"))
    with running:
        yield running


@pytest.fixture
def caller(breaking: Breaking) -> Iterator[Caller]:
    found = Caller(breaking.url)
    with found.http:
        yield found


def seconds_until(true: Callable[[], bool], most: float = 40.0) -> float:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < most
        time.sleep(0.05)
    return time.monotonic() - begun


def ready(service: Breaking) -> bool:
    return get(f"{service.url}/readyz")[0] == 200


def replaced(service: Breaking, part: str) -> float:
    text = get(f"{service.url}/metrics")[1].decode()
    (line,) = [line for line in text.splitlines() if f'topwork_replaced_total{{part="{part}"}}' in line]
    return float(line.split()[-1])


def embed(caller: Caller, kind: str, status: int = 200) -> object:
    item = image(tiny_backbones.picture(1)) if kind == "image" else {"text": tiny_backbones.sentence(1)}
    body = {"backbone": KINDS[kind], "inputs": [item]}
    return caller.call("POST", "/embed", status, json=body)["embeddings"]


def test_what_hangs_or_dies_is_replaced_beside_what_goes_on(breaking: Breaking, caller: Caller) -> None:
    """All at once: a run that never returns, a fitting process and a worker that are stopped."""
    right = embed(caller, "text")
    before = {part: replaced(breaking, part) for part in ("backbone", "fitter", "worker")}
    fitter, worker = (
        breaking.child("adapters.processes.fit_server"),
        breaking.child("adapters.workers.worker"),
    )
    # The worker's silence counts from its first sign of life.
    time.sleep(3.0)
    for pid in (fitter, worker):
        os.kill(pid, signal.SIGSTOP)
    # After an answer no canary comes, which would meet the fault first.
    embed(caller, "text")
    breaking.ask("hang", "text")
    begun = time.monotonic()
    # Waiting callers are answered as soon as it is noticed.
    problem = caller.http.post("/embed", json={"backbone": KINDS["text"], "inputs": [{"text": "a"}]})
    assert time.monotonic() - begun < NOTICED + 1.0
    assert (problem.status_code, problem.json()["code"]) == (503, "backbone_unavailable")
    assert "retry-after" in problem.headers
    embed(caller, "image")
    seconds_until(lambda: ready(breaking), REPLACED)
    assert embed(caller, "text") == right
    seconds_until(lambda: all(replaced(breaking, part) == count + 1 for part, count in before.items()))
    assert time.monotonic() - begun < REPLACED
    adapted = caller.adapt(
        "pets", [{"text": tiny_backbones.sentence(n), "label": "ab"[n % 2]} for n in range(8)]
    )
    assert adapted["version"] == 1
    seconds_until(lambda: breaking.child("adapters.workers.worker") != worker, REPLACED)
    assert breaking.child("adapters.processes.fit_server") != fitter
    log = breaking.log.read_text()
    assert "is replaced: a run has not returned for" in log
    assert "the fitting process was silent for" in log
    assert "the worker was silent for" in log


def codes(answer: httpx.Response) -> list[str | None]:
    """The reason why each input is refused."""
    assert answer.status_code == 200, answer.text[:500]
    return [one["error"]["code"] if "error" in one else None for one in answer.json()["embeddings"]]


def photo(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_bomb_of_scans_costs_its_sender_alone(breaking: Breaking, caller: Caller) -> None:
    """It took a minute of a core, after which the next large photo of anybody ended the service."""
    before = replaced(breaking, "backbone")
    bomb, plain = image(bombs.scans(9_000)), image(tiny_backbones.picture(1))
    body = {"backbone": KINDS["image"], "inputs": [bomb, plain, bomb, image(photo(2_500))]}
    assert codes(caller.http.post("/embed", json=body)) == [
        "input_too_costly",
        None,
        "input_too_costly",
        None,
    ]
    raw = caller.http.post(
        f"/embed?backbone={KINDS['image']}",
        content=bombs.scans(9_000),
        headers={"Content-Type": "image/jpeg"},
    )
    assert (raw.status_code, raw.json()["code"]) == (422, "input_too_costly")
    assert ready(breaking)
    assert replaced(breaking, "backbone") == before


def test_beside_pictures_that_are_dear_all_others_are_answered(breaking: Breaking, caller: Caller) -> None:
    """Each is decoded for most of a second, by processes that give way."""
    before = replaced(breaking, "backbone")
    dear = {"backbone": KINDS["image"], "inputs": [image(bombs.BOMBS["BMP of runs"](2_000_000))] * 3}

    def attack() -> httpx.Response:
        with Caller(breaking.url).http as attacker:
            return attacker.post("/embed", json=dear)

    answered = 0
    with ThreadPoolExecutor(3) as threads:
        attacks = [threads.submit(attack) for _ in range(3)]
        while not all(one.done() for one in attacks):
            for kind in KINDS:
                embed(caller, kind)
            assert ready(breaking)
            answered += 1
        found = [one.result() for one in attacks]
    assert answered
    for answer in found:
        # A queue that is too long for them is told as well.
        assert answer.status_code == 429 or set(codes(answer)) == {"undecodable_image"}
    assert replaced(breaking, "backbone") == before
    assert replaced(breaking, "decoder") == 0


def test_an_image_whose_preparation_hangs_is_refused_and_the_network_stays(
    breaking: Breaking, caller: Caller
) -> None:
    right = embed(caller, "image")
    before = replaced(breaking, "backbone")
    breaking.ask("prepare", "image")
    body = {
        "backbone": KINDS["image"],
        "inputs": [image(tiny_backbones.picture(1)), image(tiny_backbones.picture(2))],
    }
    begun = time.monotonic()
    found = codes(caller.http.post("/embed", json=body))
    assert time.monotonic() - begun < NOTICED + 1.0
    # One of them, or a canary, was the first to be prepared.
    assert sorted(map(str, found)) in (["None", "input_too_costly"], ["None", "None"])
    assert seconds_until(lambda: breaking.taken("prepare", "image") and ready(breaking)) < NOTICED
    assert embed(caller, "image") == right
    assert replaced(breaking, "backbone") == before
    assert "preparing it does not end" in breaking.log.read_text()


def test_a_thread_that_dies_is_noticed_at_once(breaking: Breaking, caller: Caller) -> None:
    right = embed(caller, "image")
    breaking.ask("die", "image")
    # Without requests the canary finds it.
    seconds_until(lambda: breaking.taken("die", "image"), NOTICED)
    assert seconds_until(lambda: ready(breaking) and embed_status(caller, "image") == 200) < REPLACED
    assert embed(caller, "image") == right
    assert "is replaced: one of its threads died" in breaking.log.read_text()


def test_an_upload_whose_backbone_hangs_is_taken_up_again(breaking: Breaking, caller: Caller) -> None:
    """In the worker, where no request waits and no canary comes."""
    lines = [json.dumps({"text": tiny_backbones.sentence(n), "label": "ab"[n % 2]}) for n in range(40)]
    query = f"/adapt?adapter=films&backbone={KINDS['text']}"
    worker = breaking.child("adapters.workers.worker")
    breaking.ask("hang", "bulk")
    headers = {"Content-Type": "application/x-ndjson"}
    job = caller.call("POST", query, 202, content="\n".join(lines), headers=headers)["id"]
    seconds_until(lambda: breaking.taken("hang", "bulk"))
    # Given up in five, its threads waited for for five more, and taken up after two.
    assert seconds_until(lambda: caller.call("GET", f"/jobs/{job}")["state"] == "succeeded") < REPLACED
    assert caller.call("GET", "/adapters/films")["examples"] == 40
    assert breaking.child("adapters.workers.worker") == worker
    assert "is abandoned: a run has not returned for" in breaking.log.read_text()


def embed_status(caller: Caller, kind: str) -> int:
    item = image(tiny_backbones.picture(1)) if kind == "image" else {"text": tiny_backbones.sentence(1)}
    return caller.http.post("/embed", json={"backbone": KINDS[kind], "inputs": [item]}).status_code


def test_canaries_are_counted_nowhere_and_only_where_nobody_asks(breaking: Breaking) -> None:
    def counted() -> list[str]:
        text = get(f"{breaking.url}/metrics")[1].decode().splitlines()
        return [line for line in text if line.startswith(("topwork_batch_items", "topwork_stage_seconds"))]

    before = counted()
    time.sleep(2.5)
    assert counted() == before


def test_a_service_that_was_stopped_wakes_up_whole(breaking: Breaking) -> None:
    """As a container that is frozen, with everything in it."""
    before = {part: replaced(breaking, part) for part in ("backbone", "fitter", "worker")}
    group = sorted(breaking.group())
    for pid in group:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(times(20, 6))
    for pid in group:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)
    assert ready(breaking)
    assert {part: replaced(breaking, part) for part in before} == before
    assert sorted(breaking.group()) == group


def test_wrong_canaries_take_it_out_and_what_hangs_again_ends_the_process(tmp_path: Path) -> None:
    service = Breaking(tmp_path)
    try:
        service.ask("wrong", "text")
        assert seconds_until(lambda: not ready(service)) < NOTICED
        seconds_until(lambda: replaced(service, "backbone") == 1)
        service.relieve("wrong", "text")
        assert seconds_until(lambda: ready(service)) < REPLACED
        service.ask("hang", "text")
        assert service.process.wait(REPLACED) == STUCK
        last = [line for line in service.log.read_text().splitlines() if '"critical"' in line]
        assert len(last) == 1
        assert f"status {STUCK}: the backbone {KINDS['text']} was replaced less than 60 s ago" in last[0]
        seconds_until(lambda: not service.group())
    finally:
        service.kill()
