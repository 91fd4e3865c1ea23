"""Bulk uploads over HTTP: NDJSON, CSV and zip become jobs that store, tell of what is unusable, and fit."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.service_process import Serving
from tests.support.adapters.listener import Listener, listening
from tests.support.service.client import BLAME, PICTURES, PRAISE, UNSEEN, Caller, Json, image
from tests.support.service.uploads import CSV, NDJSON, ZIP, upload

MAX_BODY = 200_000
MAX_UPLOAD = 400_000


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with listening([]) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def serving(home: Path, listener: Listener) -> Iterator[Serving]:
    environment = {
        "TOPWORK_MAX_BODY_BYTES": str(MAX_BODY),
        "TOPWORK_MAX_UPLOAD_BYTES": str(MAX_UPLOAD),
        "TOPWORK_MAX_UPLOAD_EXAMPLES": "40",
        "TOPWORK_CALLBACK_URLS": f"http://127.0.0.1:{listener.server_port}/hooks/",
    }
    with Serving(home, environment=environment) as running:
        yield running


@pytest.fixture
def teacher(serving: Serving) -> Iterator[Caller]:
    found = Caller(serving.url)
    with found.http:
        yield found


def lines(examples: list[Json]) -> bytes:
    return b"".join(json.dumps(example).encode() + b"\n" for example in examples)


def reviews() -> list[Json]:
    told = [{"text": text, "label": "good"} for text in PRAISE] + [
        {"text": text, "label": "bad"} for text in BLAME
    ]
    return [{"id": f"r{number}", **one} for number, one in enumerate(told)]


def table(rows: list[Json]) -> bytes:
    return ("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)).encode()


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return buffer.getvalue()


def test_a_table_teaches_a_new_adapter(teacher: Caller, home: Path) -> None:
    long = [{"text": "A wonderful story. " * 300, "label": "good"}]
    content = table(reviews()) + b"only one column\n" + b" ,good\n" + table(long).partition(b"\n")[2]
    job = upload(teacher, "adapter=films", content, CSV)
    assert (job["state"], job["version"], job["error"]) == ("succeeded", 1, None)
    progress = job["progress"]
    assert (progress["stored"], progress["rejected"], progress["truncated"]) == (13, 2, 1)
    assert [(one["place"], one["code"]) for one in progress["errors"]] == [
        ("line 14", "invalid_line"),
        ("line 15", "empty_text"),
    ]
    version = teacher.call("GET", "/adapters/films/versions/1")
    assert (version["method"], version["report"]["accuracy"]) == ("linear_probe", pytest.approx(1, abs=0.3))
    found = teacher.predict("films", [{"text": "A wonderful story, I loved it"}])
    assert (found["version"], found["predictions"][0]["label"]) == (1, "good")
    # Files of the job are gone: each file left belongs to the adapter.
    assert left_over(home, teacher) == 4


def left_over(home: Path, teacher: Caller) -> int:
    """Files of the tenant in the store, once deletions are through."""
    count, end = -1, time.monotonic() + 10
    while count != 4 and time.monotonic() < end:
        count = sum(1 for path in (home / "artifacts" / teacher.tenant).rglob("*") if path.is_file())
        time.sleep(0.1)
    return count


def test_a_zip_of_folders_teaches_pictures(teacher: Caller) -> None:
    files = {f"set/{label}/{place}.png": data for place, (label, data) in enumerate(PICTURES)}
    files["set/food/broken.png"] = b"no picture"
    job = upload(teacher, "adapter=things", archive(files), ZIP)
    assert (job["state"], job["version"]) == ("succeeded", 1)
    assert job["progress"]["stored"] == len(PICTURES)
    assert [one["place"] for one in job["progress"]["errors"]] == ["set/food/broken.png"]
    found = teacher.predict("things", [image(UNSEEN["ambulance"])])
    assert found["predictions"][0]["label"] == "vehicle"


def test_a_zip_as_systems_make_it_teaches_texts(teacher: Caller) -> None:
    files = {"good/": b"", "__MACOSX/good/._0.txt": b"x", "good/.DS_Store": b"x"}
    files |= {f"{one['label']}/{one['id']}.txt": one["text"].encode() for one in reviews()}
    job = upload(teacher, "adapter=films", archive(files), ZIP)
    assert (job["state"], job["progress"]["stored"], job["progress"]["rejected"]) == ("succeeded", 12, 0)
    assert teacher.predict("films", [{"text": PRAISE[0]}])["predictions"][0]["label"] == "good"


def test_lines_add_to_what_is_known_and_may_correct_it(teacher: Caller) -> None:
    teacher.adapt("films", reviews()[:10])
    added = [*reviews()[10:], {**reviews()[0], "label": "bad"}]
    job = upload(teacher, "adapter=films&promote=always", lines(added), NDJSON)
    assert (job["state"], job["version"], job["progress"]["stored"]) == ("succeeded", 2, 3)
    adapter = teacher.call("GET", "/adapters/films")
    assert (adapter["examples"], adapter["live"]) == (12, 2)
    assert teacher.call("GET", "/adapters/films/examples/r0")["label"] == "bad"


def test_a_replacement_forgets_all_others_and_can_be_rolled_back(teacher: Caller) -> None:
    teacher.adapt("films", reviews())
    kept = [*reviews()[:3], *reviews()[9:], {"id": "new", "text": "Great fun for everyone", "label": "good"}]
    job = upload(teacher, "adapter=films&update=replace&promote=always", lines(kept), NDJSON)
    assert (job["state"], job["version"]) == ("succeeded", 2)
    page = teacher.call("GET", "/adapters/films/examples")
    assert {one["id"] for one in page["examples"]} == {one["id"] for one in kept}
    assert teacher.predict("films", [{"text": PRAISE[0]}], version=1)["predictions"][0]["label"] == "good"
    assert teacher.predict("films", [{"text": PRAISE[0]}])["version"] == 2


def test_without_a_fit_it_only_stores(teacher: Caller) -> None:
    job = upload(teacher, "adapter=films&fit=false", lines(reviews()), NDJSON)
    assert (job["state"], job["version"], job["progress"]["stored"]) == ("succeeded", None, 12)
    assert teacher.call("GET", "/adapters/films")["live"] is None
    assert teacher.adapt("films", [])["version"] == 1


def test_several_labels_and_numbers_are_taught_by_lines(teacher: Caller) -> None:
    many = [{"text": one["text"], "labels": [one["label"], "film"]} for one in reviews()]
    assert upload(teacher, "adapter=many&task=multilabel", lines(many), NDJSON)["state"] == "succeeded"
    rated = [{"text": one["text"], "target": 5 if one["label"] == "good" else 1} for one in reviews()]
    assert upload(teacher, "adapter=rated&task=regression", lines(rated), NDJSON)["state"] == "succeeded"
    assert teacher.predict("rated", [{"text": PRAISE[0]}])["predictions"][0]["value"] > 2.5


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"text": "a"}\n{"text": "b", "labels": 3}\n', "no_examples"),
        (lines([{"text": f"text {row}", "label": "x"} for row in range(3)]), "one_label"),
        (lines([{"text": f"text {row}", "label": f"{row}"} for row in range(41)]), "too_many_examples"),
        (
            lines([{"text": f"text {row}", "label": f"{row}", "id": "same"} for row in range(3)]),
            "no_examples",
        ),
    ],
)
def test_what_cannot_be_learned_from_fails_with_its_reason(
    teacher: Caller, content: bytes, code: str
) -> None:
    job = upload(teacher, "adapter=odd", content, NDJSON)
    assert (job["state"], job["error"]["code"], job["version"]) == ("failed", code, None)
    assert teacher.call("GET", "/adapters/odd")["live"] is None


@pytest.mark.parametrize(
    ("query", "content", "headers", "code"),
    [
        ("adapter=a", b"", CSV, "no_examples"),
        ("adapter=a", b"one,two\n1,2\n", CSV, "invalid_csv"),
        ("adapter=a", b"no zip", ZIP, "invalid_zip"),
        ("adapter=a", b"\n", NDJSON, "no_examples"),
        ("adapter=a", b'{"label": "text"}\n', NDJSON, "no_examples"),
        ("adapter=a", archive({"good/": b""}), ZIP, "no_examples"),
        ("", b"text,label\n", CSV, "invalid_request"),
        ("adapter=a&method=fine_tune", b"text,label\n", CSV, "invalid_request"),
        ("adapter=a&strict=true", b"text,label\n", CSV, "invalid_request"),
        ("adapter=a&text_column=body", b"text,label\n", CSV, "invalid_csv"),
        ("adapter=a&text_column=", b"text,label\n", CSV, "invalid_request"),
        ("adapter=a&text_column=body", b'{"text": "a"}\n', NDJSON, "invalid_request"),
        ("adapter=a&task=multilabel", b"text,label\n", CSV, "invalid_csv"),
        ("adapter=a&task=regression&label_column=text", b"text,target\n", CSV, "invalid_csv"),
        ("adapter=a", b"text,target\n", CSV, "invalid_csv"),
        ("adapter=a&backbone=none", b"text,label\n", CSV, "unknown_backbone"),
        ("adapter=a&callback=http://127.0.0.1:1/", b"text,label\n", CSV, "callback_not_allowed"),
    ],
)
def test_what_is_no_upload_is_refused_at_once(
    teacher: Caller, query: str, content: bytes, headers: dict[str, str], code: str
) -> None:
    assert teacher.code("POST", f"/adapt?{query}", 422, content=content, headers=headers) == code
    assert teacher.call("GET", "/adapters")["adapters"] == []
    assert teacher.call("GET", "/jobs")["jobs"] == []


def test_an_upload_may_be_larger_than_a_body_but_not_than_its_own_limit(teacher: Caller) -> None:
    text = "word " * 6_000
    fits = [{"text": f"{text}{row}", "label": f"{row % 2}"} for row in range(MAX_BODY // 30_000 + 1)]
    assert upload(teacher, "adapter=a", lines(fits), NDJSON)["state"] == "succeeded"
    assert teacher.code("POST", "/predict", 413, content=lines(fits), headers=NDJSON) == "body_too_large"
    large = lines(fits * 3)
    assert teacher.code("POST", "/adapt?adapter=b", 413, content=large, headers=NDJSON) == "body_too_large"
    # The limit also holds without a Content-Length.
    pieces = iter([large[begin : begin + 50_000] for begin in range(0, len(large), 50_000)])
    try:
        refused = teacher.http.post("/adapt?adapter=b", content=pieces, headers=NDJSON)
    except httpx.WriteError:
        refused = None
    assert refused is None or refused.status_code == 413
    assert teacher.call("GET", "/jobs?adapter=b")["jobs"] == []


def test_a_url_is_told_of_the_end(teacher: Caller, listener: Listener) -> None:
    url = f"http://127.0.0.1:{listener.server_port}/hooks/done"
    job = upload(teacher, f"adapter=films&callback={url}", lines(reviews()), NDJSON)
    end = time.monotonic() + 20
    while not listener.told and time.monotonic() < end:
        time.sleep(0.05)
    assert [path for path, _ in listener.told] == ["/hooks/done"]
    told = listener.told[0][1]
    assert {key: job[key] for key in told} == told
    body = {"adapter": "films", "examples": [], "callback": url}
    assert teacher.code("POST", "/adapt", 422, json=body) == "invalid_request"


def test_a_queued_upload_is_cancelled_with_its_file(teacher: Caller, home: Path) -> None:
    slow = [{"text": f"{word} " * 5_000 + str(row), "label": word} for row in range(3) for word in ("a", "b")]
    first = teacher.http.post("/adapt?adapter=one", content=lines(slow), headers=NDJSON).json()
    second = teacher.http.post("/adapt?adapter=two", content=lines(slow), headers=NDJSON).json()
    cancelled = teacher.call("POST", f"/jobs/{second['id']}/cancel")
    assert cancelled["state"] == "cancelled"
    uid = [path.name for path in (home / "artifacts" / teacher.tenant).iterdir() if not any(path.iterdir())]
    assert len(uid) == 1
    teacher.http.post(f"/jobs/{first['id']}/cancel")


def test_columns_and_the_query_say_what_belongs_together_and_what_is_wanted(teacher: Caller) -> None:
    rows = [
        f'"{one["text"]}",{one["label"]},critic {row // 3},{row % 2}' for row, one in enumerate(reviews())
    ]
    content = "\n".join(["text,label,group,sampled", *rows, "สวัสดี,good,,", "Fine,good,,maybe"]).encode()
    job = upload(teacher, "adapter=films&answer_accuracy=0.9&weights=balanced", content, CSV)
    assert (job["state"], job["progress"]["stored"]) == ("succeeded", 12)
    assert [(one["place"], one["code"]) for one in job["progress"]["errors"]] == [
        ("line 14", "no_known_tokens"),
        ("line 15", "sampled_invalid"),
    ]
    page = teacher.call("GET", "/adapters/films/examples")["examples"]
    assert sorted((one["group"], one["sampled"]) for one in page) == sorted(
        (f"critic {row // 3}", bool(row % 2)) for row in range(12)
    )
    upload(teacher, "adapter=films&answer_accuracy=0.8", lines(reviews()), NDJSON)
    adapter = teacher.call("GET", "/adapters/films")
    assert (adapter["answer_accuracy"], adapter["weights"]) == (0.8, "balanced")


def test_weights_are_refused_before_an_upload_is_kept(teacher: Caller) -> None:
    query = "/adapt?adapter=a&task=multilabel&weights=balanced"
    assert (
        teacher.code("POST", query, 422, content=lines(reviews()), headers=NDJSON) == "weights_not_for_task"
    )
    assert teacher.call("GET", "/adapters")["adapters"] == []


def test_a_table_of_a_spreadsheet_teaches_and_tells_how_it_was_read(teacher: Caller) -> None:
    rows = [f"{number};{one['text']} – schön;{one['label']}\r\n" for number, one in enumerate(reviews())]
    content = ("Nr;Text;Süß\r\n" + "".join(rows) + '12;"offen;good\r\n;;\r\n').encode("cp1252")
    job = upload(teacher, "adapter=films&label_column=süß", content, CSV)
    progress = job["progress"]
    assert (job["state"], progress["stored"], progress["rejected"]) == ("succeeded", 12, 1)
    assert progress["format"] == {
        "encoding": "windows-1252",
        "delimiter": ";",
        "columns": {"text": "Text", "label": "Süß"},
        "ignored_columns": ["Nr"],
    }
    assert progress["errors"][0]["place"] == "line 14"
    assert progress["errors"][0]["code"] == "stray_quote"
    page = teacher.call("GET", "/adapters/films/examples")["examples"]
    assert teacher.call("GET", f"/adapters/films/examples/{page[0]['id']}")["text"].endswith(" – schön")


def test_tables_teach_every_task(teacher: Caller) -> None:
    many = "text;labels\n" + "".join(f"{one['text']};{one['label']}|film\n" for one in reviews())
    job = upload(teacher, "adapter=many&task=multilabel", many.encode("utf-16"), CSV)
    assert (job["state"], job["progress"]["format"]["encoding"]) == ("succeeded", "utf-16-le")
    version = teacher.call("GET", "/adapters/many/versions/1")
    assert set(version["report"]["per_label"]) == {"bad", "film", "good"}
    stars = {"good": "4,5", "bad": "0,5"}
    rated = "text\tStars\n" + "".join(f"{one['text']}\t{stars[one['label']]}\n" for one in reviews())
    rated += "What is it worth?\t1,234\n"
    job = upload(teacher, "adapter=rated&task=regression&target_column=stars", rated.encode(), CSV)
    assert (job["state"], job["progress"]["format"]["delimiter"]) == ("succeeded", "\t")
    assert "1.234 or 1234" in job["progress"]["errors"][0]["detail"]
    assert 2.5 < teacher.predict("rated", [{"text": PRAISE[0]}])["predictions"][0]["value"] < 5.0


def test_a_zip_counts_what_it_skips_and_names_what_it_refuses(teacher: Caller) -> None:
    files = {f"{one['label']}/{one['id']}.txt": one["text"].encode() for one in reviews()}
    files |= {"good/Thumbs.db": b"x", "good/xxxx.txt": b"never read"}
    content = archive(files).replace(b"xxxx", b"\xe4\xf6\xfc\xdf")
    progress = upload(teacher, "adapter=films", content, ZIP)["progress"]
    assert (progress["stored"], progress["rejected"], progress["skipped"]) == (12, 1, 1)
    assert progress["format"] == {"encodings": {"utf-8": 12}}
    assert progress["errors"][0]["code"] == "invalid_name"
    assert progress["errors"][0]["place"] == "good/\\xe4\\xf6\\xfc\\xdf.txt"


@pytest.mark.parametrize(
    ("content", "code", "places"),
    [
        (b"text,label\na b,x\nc d,x\n e,\nf g\n", "one_label", ["line 4", "line 5"]),
        (b"text,label\na b\nc d\n", "no_examples", ["line 2", "line 3"]),
        (b"text,label\na b\n" + b"a b,x\n" * 41, "too_many_examples", ["line 2"]),
    ],
)
def test_what_was_rejected_is_listed_when_the_job_fails(
    teacher: Caller, content: bytes, code: str, places: list[str]
) -> None:
    job = upload(teacher, "adapter=odd", content, CSV)
    assert (job["state"], job["error"]["code"]) == ("failed", code)
    assert [one["place"] for one in job["progress"]["errors"]] == places
    assert job["progress"]["rejected"] == len(places)
    assert job["progress"]["format"]["delimiter"] == ","
    assert code == "too_many_examples" or "progress.errors" in job["error"]["detail"]
