"""Idempotency-Key over HTTP: what is sent again is answered as before, byte for byte, and done once."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Request

from benchmarks.harness.service_process import Serving
from service.api.idempotency import _Digest
from service.payloads.responses.replies import REJECTED_KEPT
from tests.support.service.client import BLAME, PRAISE, Caller, Json, reviews

ENVIRONMENT = {"TOPWORK_BACKBONES": "minilm-l6-v2", "TOPWORK_WORKERS": "0"}
NDJSON = {"Content-Type": "application/x-ndjson"}
REPLAYED = "idempotency-replayed"


class Restarting:
    """A service whose home outlives it. url: where it answers since it was last started."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.serving = Serving(home, environment=ENVIRONMENT)

    @property
    def url(self) -> str:
        return self.serving.url

    def restart(self) -> None:
        """kill -9, and a new start."""
        self.serving.kill()
        self.serving = Serving(self._home, environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Restarting]:
    found = Restarting(home)
    yield found
    found.serving.stop()


@pytest.fixture
def teacher(service: Restarting) -> Iterator[Caller]:
    found = Caller(service.url)
    with found.http:
        yield found


def keyed(key: str, **headers: str) -> dict[str, str]:
    return {"Idempotency-Key": key, **headers}


def post(caller: Caller, key: str, body: Any, path: str = "/adapt") -> httpx.Response:
    return caller.http.post(path, json=body, headers=keyed(key))


def films(examples: list[Json] | None = None, **more: Any) -> Json:
    return {"adapter": "films", "examples": reviews() if examples is None else examples, **more}


def is_again(first: httpx.Response, again: httpx.Response) -> bool:
    """True if the second answer repeats the first one, and says so."""
    assert first.status_code in (200, 202), first.text
    assert REPLAYED not in first.headers
    assert again.headers[REPLAYED] == "true"
    same = ("content-type", "content-length", "location", "retry-after")
    assert [again.headers.get(name) for name in same] == [first.headers.get(name) for name in same]
    return (again.status_code, again.content) == (first.status_code, first.content)


def versions(caller: Caller, adapter: str = "films") -> list[int]:
    return [one["version"] for one in caller.call("GET", f"/adapters/{adapter}/versions")["versions"]]


def code(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["code"])


def test_the_same_request_is_answered_alike_and_done_once(teacher: Caller) -> None:
    first = post(teacher, "k1", films([*reviews(), {"text": "no label"}]))
    assert first.json()["version"] == 1
    assert [one["code"] for one in first.json()["examples"]["rejected"]] == ["label_missing"]
    assert first.json()["timing_ms"]["fit"] > 0
    assert is_again(first, post(teacher, "k1", films([*reviews(), {"text": "no label"}])))
    assert teacher.adapt("films", [])["version"] == 2
    assert is_again(first, post(teacher, "k1", films([*reviews(), {"text": "no label"}])))
    assert versions(teacher) == [2, 1]
    second = post(teacher, "k2", films([*reviews(), {"text": "no label"}]))
    assert (second.json()["version"], REPLAYED in second.headers) == (3, False)


def test_another_request_with_the_key_is_refused(teacher: Caller) -> None:
    first = post(teacher, "k", films())
    body, same = json.dumps(films()), {"Content-Type": "application/json"}
    others = [
        teacher.http.post("/adapt", content=body + " ", headers=keyed("k", **same)),
        teacher.http.post("/adapters/films/feedback", content=body, headers=keyed("k", **same)),
        teacher.http.post("/adapt?adapter=films", content=body, headers=keyed("k", **NDJSON)),
    ]
    for other in others:
        assert code(other, 422) == "idempotency_key_reused"
    assert is_again(first, post(teacher, "k", films()))
    assert versions(teacher) == [1]


def test_a_refusal_is_not_kept(teacher: Caller) -> None:
    assert code(post(teacher, "k", films(reviews()[:1])), 422) == "one_label"
    assert code(post(teacher, "k", films([{"text": "no label"}])), 422) == "examples_rejected"
    first = post(teacher, "k", films())
    assert first.json()["version"] == 1
    assert is_again(first, post(teacher, "k", films()))


def test_another_tenant_s_key_is_another_key(teacher: Caller, service: Restarting) -> None:
    first = post(teacher, "k", films())
    other = Caller(service.url)
    with other.http:
        own = post(other, "k", films(reviews(3)))
        assert (own.json()["examples"]["total"], REPLAYED in own.headers) == (6, False)
        assert is_again(own, post(other, "k", films(reviews(3))))
    assert is_again(first, post(teacher, "k", films()))


@pytest.mark.parametrize("key", [b"", b"a b", b"x" * 256, b"k\xc3\xbc", b"a\tb"])
def test_what_is_no_key_is_refused(teacher: Caller, key: bytes) -> None:
    found = teacher.http.post("/adapt", json=films(), headers={b"Idempotency-Key": key})
    assert code(found, 400) == "invalid_idempotency_key"
    assert teacher.call("GET", "/adapters")["adapters"] == []


def test_two_keys_are_refused_and_long_ones_are_not(teacher: Caller) -> None:
    two = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert code(teacher.http.post("/adapt", json=films(), headers=two), 400) == "invalid_idempotency_key"
    first = post(teacher, "~" * 255, films())
    assert is_again(first, post(teacher, "~" * 255, films()))


@contextmanager
def half_sent(teacher: Caller, key: str, body: bytes) -> Iterator[socket.socket]:
    """A request that is being read, and of which the last byte is still to come."""
    url = urlsplit(str(teacher.http.base_url))
    head = (
        f"POST /adapt HTTP/1.1\r\nHost: {url.netloc}\r\nX-Tenant: {teacher.tenant}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nIdempotency-Key: {key}\r\n"
        "Expect: 100-continue\r\n\r\n"
    )
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(head.encode())
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += connection.recv(100)
        assert received.startswith(b"HTTP/1.1 100 ")
        connection.sendall(body[:-1])
        yield connection


def test_while_it_is_worked_on_it_is_refused_with_a_time_to_wait(teacher: Caller) -> None:
    content = json.dumps(films()).encode()
    with half_sent(teacher, "k", content) as connection:
        refused = post(teacher, "k", films())
        assert code(refused, 409) == "idempotency_in_flight"
        assert int(refused.headers["retry-after"]) >= 1
        assert post(teacher, "another", films()).json()["version"] == 1
        connection.sendall(content[-1:])
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, received = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(received)["version"] == 2
    again = teacher.http.post(
        "/adapt", content=content, headers=keyed("k", **{"Content-Type": "application/json"})
    )
    assert (again.status_code, again.content, again.headers[REPLAYED]) == (200, received, "true")


def test_who_hangs_up_sets_the_key_free(teacher: Caller) -> None:
    with half_sent(teacher, "k", json.dumps(films()).encode()):
        assert post(teacher, "k", films()).status_code == 409
    end = time.monotonic() + 20
    while (found := post(teacher, "k", films())).status_code == 409:
        assert time.monotonic() < end, found.text
        time.sleep(0.02)
    assert (found.json()["version"], REPLAYED in found.headers) == (1, False)


def test_a_form_is_the_same_whatever_its_boundary(teacher: Caller) -> None:
    def send(last: str, boundary: str) -> httpx.Response:
        texts = [
            *zip(["good"] * 3, PRAISE, strict=False),
            *zip(["bad"] * 3, [*BLAME[:2], last], strict=False),
        ]
        files = [
            ("f", (f"{label}/{place}.txt", text.encode(), "text/plain"))
            for place, (label, text) in enumerate(texts)
        ]
        media = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return teacher.http.post(
            "/adapt", data={"adapter": "films"}, files=files, headers=keyed("k", **media)
        )

    first = send(BLAME[2], "one")
    assert first.json()["examples"]["total"] == 6
    assert is_again(first, send(BLAME[2], "another-boundary"))
    assert code(send("Something else", "one"), 422) == "idempotency_key_reused"
    assert versions(teacher) == [1]


def digest(boundary: str, body: bytes, piece: int) -> str:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/adapt",
        "query_string": b"",
        "headers": [(b"content-type", f'multipart/form-data; boundary="{boundary}"'.encode())],
    }
    found = _Digest(Request(scope))
    for begin in range(0, len(body), piece):
        found.update(body[begin : begin + piece])
    return found.hexdigest()


@pytest.mark.parametrize("boundary", ["b", "aa", "aab", "a-boundary-of-some-length"])
def test_a_body_may_come_in_any_pieces(boundary: str) -> None:
    parts = [b"--", b"\r\n\r\naabaabaab a-boundary-of-some-", b"", b"length\r\n--", b"--a", b"aa"]
    body = boundary.encode().join(parts)
    assert len({digest(boundary, body, piece) for piece in range(1, len(body) + 1)}) == 1
    assert digest(boundary, body, 3) != digest(boundary, body + b"\n", 3)
    assert digest(boundary, body, 3) != digest("other", body, 3)
    # Text that only looks like a boundary counts byte for byte.
    other = "another"
    assert digest(other, other.encode().join([b"--", b"1"]), 2) == digest("more", b"--more1", 4)
    assert digest(other, other.encode().join([b"--", b"1"]), 2) != digest("more", b"--more2", 4)


def test_feedback_is_given_once(teacher: Caller) -> None:
    teacher.adapt("films", reviews())
    told = {"text": "Not my kind of film", "label": "bad"}
    first = post(teacher, "k", told, "/adapters/films/feedback")
    assert first.json()["version"] == 2
    assert is_again(first, post(teacher, "k", told, "/adapters/films/feedback"))
    teacher.adapt("other", reviews())
    assert code(post(teacher, "k", told, "/adapters/other/feedback"), 422) == "idempotency_key_reused"
    assert versions(teacher) == [2, 1]


def test_an_upload_makes_one_job_and_is_not_kept_again(teacher: Caller, home: Path) -> None:
    content = b"".join(json.dumps(one).encode() + b"\n" for one in reviews())

    def send(what: bytes) -> httpx.Response:
        # In pieces, as large ones come.
        pieces = (what[begin : begin + 100] for begin in range(0, len(what), 100))
        return teacher.http.post("/adapt?adapter=films", content=pieces, headers=keyed("k", **NDJSON))

    def stored() -> set[Path]:
        return {path for path in (home / "artifacts" / teacher.tenant).rglob("*") if path.is_file()}

    first = send(content)
    assert first.headers["location"] == f"/jobs/{first.json()['id']}"
    kept = stored()
    assert len(kept) == 1
    assert is_again(first, send(content))
    assert code(send(content + b"\n"), 422) == "idempotency_key_reused"
    assert stored() == kept
    assert [one["id"] for one in teacher.call("GET", "/jobs")["jobs"]] == [first.json()["id"]]


def test_a_fine_tune_is_submitted_once(teacher: Caller) -> None:
    examples = [
        {"text": f"{words[place % 6]}, {place}", "label": label}
        for label, words in (("good", PRAISE), ("bad", BLAME))
        for place in range(25)
    ]
    body = films([*examples, {"text": "no label"}], method="fine_tune")
    first = post(teacher, "k", body)
    assert (first.status_code, first.json()["state"]) == (202, "queued")
    assert (first.json()["examples"]["added"], len(first.json()["examples"]["rejected"])) == (50, 1)
    assert is_again(first, post(teacher, "k", body))
    assert [one["id"] for one in teacher.call("GET", "/jobs")["jobs"]] == [first.json()["id"]]
    assert versions(teacher) == []
    # As after a crash between the two commits: the examples are there, and the job is not.
    second = post(teacher, "k2", body)
    assert (second.json()["examples"]["added"], second.json()["examples"]["replaced"]) == (0, 50)
    assert len(teacher.call("GET", "/jobs")["jobs"]) == 2
    assert versions(teacher) == []


def test_a_reply_goes_with_what_it_tells_of(teacher: Caller) -> None:
    post(teacher, "k", films())
    teacher.call("DELETE", "/adapters/films/examples/good1")
    again = post(teacher, "k", films())
    assert (again.json()["examples"]["total"], REPLAYED in again.headers) == (12, False)
    teacher.call("DELETE", "/adapters/films")
    anew = post(teacher, "k", films())
    assert (anew.json()["version"], REPLAYED in anew.headers) == (1, False)


def test_the_document_tells_of_the_header(teacher: Caller) -> None:
    document = teacher.call("GET", "/openapi.json")
    named = {
        (method, path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method != "parameters"
        and any(one["name"] == "Idempotency-Key" for one in operation.get("parameters", ()))
    }
    assert named == {
        ("post", "/adapt"),
        ("post", "/adapters/{adapter}/feedback"),
        ("patch", "/adapters/{adapter}/examples/{example}"),
        ("post", "/adapters/{adapter}/versions/{version}/restore"),
    }
    for method, path in named:
        responses = document["paths"][path][method]["responses"]
        assert {"400", "409", "422"} <= responses.keys()
        assert "Idempotency-Replayed" in responses["200"]["headers"]
        assert responses["200"]["content"]
    assert "Idempotency-Replayed" in document["paths"]["/adapt"]["post"]["responses"]["202"]["headers"]


def test_a_reply_outlives_the_process(teacher: Caller, service: Restarting) -> None:
    first = post(teacher, "k", films())
    service.restart()
    found = Caller(service.url, teacher.tenant)
    with found.http:
        assert is_again(first, post(found, "k", films()))
        assert versions(found) == [1]


def test_two_processes_do_it_once(registry_url: str, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "TOPWORK_DATABASE_URL": registry_url}
    with (
        ThreadPoolExecutor(2) as pool,
        next(running := pool.map(lambda _: Serving(tmp_path, environment=environment), "ab")) as one,
        next(running) as other,
    ):
        first, second = Caller(one.url, "acme"), Caller(other.url, "acme")
        with first.http, second.http:
            for number in range(20):
                together = threading.Barrier(2)

                def send(caller: Caller, number: int = number, together: Any = together) -> httpx.Response:
                    together.wait(30)
                    return post(caller, f"k{number}", films(adapter=f"a{number % 2}", promote="always"))

                answers = sorted(pool.map(send, (first, second)), key=lambda found: REPLAYED in found.headers)
                assert is_again(*answers)
                assert answers[0].json()["version"] == number // 2 + 1
            for caller in (first, second):
                assert versions(caller, "a0") == versions(caller, "a1") == list(range(10, 0, -1))


def test_of_many_rejected_examples_the_first_are_told_again(service: Restarting, home: Path) -> None:
    """A thousand refusals in each answer would fill the database, with no example more."""
    examples = [*reviews(1), *({"id": f"bad{number}", "text": "x"} for number in range(998))]
    caller = Caller(service.url)
    with caller.http:
        first, again = (post(caller, "many", films(examples, fit=False)) for _ in range(2))
    assert first.status_code == again.status_code == 200
    assert again.headers[REPLAYED] == "true"
    told, told_again = first.json(), again.json()
    assert len(told["examples"]["rejected"]) == 998
    assert told_again["examples"].pop("rejected") == told["examples"].pop("rejected")[:REJECTED_KEPT]
    assert told_again == told
    with closing(sqlite3.connect(home / "topwork.db")) as database:
        query = "SELECT length(body) FROM replies WHERE tenant = ?"
        ((stored,),) = database.execute(query, (caller.tenant,)).fetchall()
    assert stored < 0.02 * len(first.content)
