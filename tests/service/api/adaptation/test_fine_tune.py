"""Fine-tunes over HTTP: submitted, watched, served, rolled back, exported, refused, cancelled."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from adapters.registry.records import Change, NewVersion
from adapters.registry.registry import Registry
from adapters.storage.open import open_store
from benchmarks.harness.service_process import Serving
from models.spec import GRAPH_FILE
from models.store.exports import find
from service.payloads.responses.adapters import VersionOut
from service.payloads.responses.jobs import JobOut, SubmittedOut
from service.settings import Settings
from tests.support.models.random_models import image_model
from tests.support.models.shades import picture
from tests.support.service.client import Caller, Json, image, pictures, reviews, same
from tests.support.service.document import exactly
from tests.support.service.fine_tunes import LONG, QUICK, shades, until_finished

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Settings with a small random network, whose fine-tunes take seconds."""
    return {
        "TOPWORK_BACKBONES": f"timm:{image_model()},minilm-l6-v2",
        "TOPWORK_REQUEST_TIMEOUT": "60",
    }


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("home"), environment=environment) as running:
        yield running


@pytest.fixture
def tuner(serving: Serving) -> Iterator[Caller]:
    found = Caller(serving.url)
    with found.http:
        yield found


def test_a_fine_tune_is_a_job_that_makes_a_version_like_any_other(tuner: Caller, tmp_path: Path) -> None:
    tuner.adapt("shades", shades())
    waited_before = waited(tuner)
    submitted = tuner.http.post(
        "/adapt",
        json={
            "adapter": "shades",
            "method": "fine_tune",
            "fine_tune": QUICK,
            "promote": "always",
            "examples": [],
        },
    )
    assert submitted.status_code == 202
    job = submitted.json()
    assert submitted.headers["location"] == f"/jobs/{job['id']}"
    assert int(submitted.headers["retry-after"]) > 0
    assert (job["state"], job["attempt"], job["version"], job["error"]) == ("queued", 0, None, None)

    with tuner.http.stream("GET", f"/jobs/{job['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    told = [json.loads(line.removeprefix("data: ")) for line in lines]
    done = told[-1]
    assert (done["state"], done["version"], done["error"]) == ("succeeded", 2, None)
    assert {"queued", "running", "succeeded"} >= {one["state"] for one in told}
    assert same(done, tuner.call("GET", f"/jobs/{job['id']}"))
    exactly(JobOut, done)
    assert [one["id"] for one in tuner.call("GET", "/jobs?adapter=shades")["jobs"]] == [job["id"]]

    version = tuner.call("GET", "/adapters/shades/versions/2")
    exactly(VersionOut, version)
    assert version["method"] == "fine_tune"
    assert version["report"]["export"]["probes"] == 512
    assert version["report"]["promotion"]["compared"] == 12

    asked = [image(picture(row % 3, np.random.default_rng(9))) for row in range(6)]
    tuned = wait_for_version(tuner, "shades", 2, asked)
    probed = tuner.predict("shades", asked, version=1)
    assert (probed["version"], tuned["version"]) == (1, 2)
    assert not same(tuned["predictions"], probed["predictions"])
    assert waited(tuner) == waited_before
    explained = tuner.predict("shades", asked[:1], explain=2)["predictions"][0]["nearest"]
    probe_explained = tuner.predict("shades", asked[:1], explain=2, version=1)["predictions"][0]["nearest"]
    assert [one["id"] for one in explained] == [one["id"] for one in probe_explained]
    mixed = tuner.predict("shades", [asked[0], {"image": "bm90IGFuIGltYWdl"}, asked[1]])["predictions"]
    assert mixed[1]["error"]["code"] == "undecodable_image"
    assert same([mixed[0], mixed[2]], tuned["predictions"][:2])

    exported = tuner.http.get("/adapters/shades/versions/2/export").content
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    prepared = prepare(session, asked[0])
    (chances,) = session.run(["probabilities"], {"rgb": prepared})
    answered = {one["label"]: one["probability"] for one in tuned["predictions"][0]["probabilities"]}
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    assert max(abs(answered[label] - chance) for label, chance in zip(labels, chances[0], strict=True)) < 1e-4

    tuner.call("PUT", "/adapters/shades/aliases/live", json={"version": 1})
    assert same(tuner.predict("shades", asked)["predictions"], probed["predictions"])
    tuner.call("DELETE", "/adapters/shades")
    assert tuner.code("GET", f"/jobs/{job['id']}", 404) == "unknown_job"


def test_predictions_go_on_while_a_network_loads_and_the_first_of_its_own_need_not_wait(
    tuner: Caller, serving: Serving, environment: dict[str, str]
) -> None:
    tuner.adapt("held", shades(12))
    asked = [image(picture(row, np.random.default_rng(9))) for row in range(3)]
    waited_before = waited(tuner)
    export = find(environment["TOPWORK_BACKBONES"].partition(",")[0])
    assert export is not None
    # The file holds the backbone's network, whose answers are known, in bytes that were never loaded.
    model = onnx.load(export / GRAPH_FILE)
    model.doc_string = tuner.tenant
    graph = model.SerializeToString()
    settings = Settings(home=serving.home)
    registry = Registry(settings.database)
    adapter = registry.adapter(tuner.tenant, "held")
    first = registry.version(adapter.uid, 1)
    network = open_store(settings.store).publish(tuner.tenant, adapter.uid, graph)
    # A reader of the pipe waits for the bytes that are written below.
    (path,) = serving.home.rglob(network.name)
    path.unlink()
    os.mkfifo(path)
    # As a worker commits.
    version = NewVersion("fine_tune", first.artifact, first.evidence, first.report, first.labels, network)
    change = Change(tuner.tenant, "held", adapter.uid, adapter.revision, version=version, promote=True)
    registry.commit(change)
    registry.close()
    with os.fdopen(read_by_another(path), "wb") as pipe:
        try:
            meanwhile = tuner.predict("held", asked)
        finally:
            pipe.write(graph)
    assert meanwhile["version"] == 1
    after = wait_for_version(tuner, "held", 2, asked)
    assert same(after["predictions"], meanwhile["predictions"])
    assert waited(tuner) == waited_before


def read_by_another(path: Path) -> int:
    """A descriptor to write what another process waits to read."""
    end = time.monotonic() + 10.0
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            # The pipe has no reader yet.
            assert time.monotonic() < end
            time.sleep(0.01)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


def wait_for_version(tuner: Caller, adapter: str, version: int, asked: list[Json]) -> Json:
    """The worker commits in another process, so the service may be a second behind."""
    end = time.monotonic() + 5.0
    while (found := tuner.predict(adapter, asked))["version"] != version:
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def waited(tuner: Caller) -> float:
    """How many predictions have waited for the load of their network."""
    lines = tuner.http.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("topwork_network_cache_misses_total ")]
    return float(line.split()[1])


def prepare(session: Any, asked: Json) -> Any:
    """As the metadata says: what any program would do."""
    import base64

    from models.preprocess.image import ImagePreprocessor
    from models.spec import ImageTransform

    about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    transform = ImageTransform(**about | {"mean": tuple(about["mean"]), "std": tuple(about["std"])})
    return ImagePreprocessor(transform)(base64.b64decode(asked["image"]))[None]


def test_examples_posted_with_it_are_kept_and_learned_from(tuner: Caller) -> None:
    job = tuner.adapt("at-once", shades(54), 202, method="fine_tune", fine_tune=QUICK)
    done = until_finished(tuner, job)
    assert (done["state"], done["version"]) == ("succeeded", 1)
    adapter = tuner.call("GET", "/adapters/at-once")
    assert (adapter["examples"], adapter["live"]) == (54, 1)


def test_an_example_that_cannot_be_used_is_told_of_with_the_job(tuner: Caller) -> None:
    pixels = np.full((40, 40), np.nan, np.float32)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    nan = {"id": "nan", **image(buffer.getvalue()), "label": "red"}
    job = tuner.adapt("nan", [*shades(54), nan], 202, method="fine_tune", fine_tune=QUICK)
    exactly(SubmittedOut, job)
    assert job["examples"]["added"] == 54
    assert [(one["id"], one["code"]) for one in job["examples"]["rejected"]] == [("nan", "unsupported_image")]
    tuner.call("POST", f"/jobs/{job['id']}/cancel")
    only = tuner.adapt("nan", [{**nan, "id": "more"}], 422, method="fine_tune")
    assert only["code"] == "examples_rejected"


def test_what_cannot_be_tuned_is_refused_before_a_job_begins(tuner: Caller) -> None:
    def refused(adapter: str, status: int, **more: Any) -> str:
        body = {"adapter": adapter, "method": "fine_tune", "examples": [], **more}
        return tuner.code("POST", "/adapt", status, json=body)

    assert refused("nobody", 404) == "unknown_adapter"
    tuner.adapt("few", shades(12))
    assert refused("few", 422) == "too_few_examples"
    tuner.adapt("gone", shades(60), keep_inputs=False)
    assert refused("gone", 409) == "inputs_not_kept"
    tuner.adapt("lopsided", [{**one, "label": "red" if row else "blue"} for row, one in enumerate(shades())])
    assert refused("lopsided", 422) == "too_few_examples"
    numbers = [{**image(picture(0, np.random.default_rng(row))), "target": float(row)} for row in range(60)]
    tuner.adapt("numbers", numbers, task="regression")
    assert refused("numbers", 409) == "task_not_tunable"
    assert refused("few", 422, fine_tune={"epochs": 0}) == "invalid_request"
    assert refused("few", 422, fine_tune={"speed": 3}) == "invalid_request"
    tuner.adapt("texts", reviews())
    mixed = tuner.adapt("texts", pictures(3), 422, method="fine_tune")
    assert mixed["code"] == "examples_rejected"
    wrong = {"adapter": "few", "fine_tune": QUICK, "examples": []}
    assert tuner.code("POST", "/adapt", 422, json=wrong) == "invalid_request"
    assert tuner.call("GET", "/jobs")["jobs"] == []


def test_a_job_is_cancelled_within_seconds_and_only_by_its_tenant(tuner: Caller, serving: Serving) -> None:
    job = tuner.adapt("long", shades(), 202, method="fine_tune", fine_tune=LONG)
    with Caller(serving.url).http as other:
        for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events")):
            theirs = other.request(method, f"/jobs/{job['id']}{path}")
            nobodys = other.request(method, f"/jobs/{'0' * 32}{path}")
            assert theirs.status_code == nobodys.status_code == 404
            assert theirs.json()["code"] == nobodys.json()["code"] == "unknown_job"
        assert other.get("/jobs").json()["jobs"] == []
    end = time.monotonic() + 60.0
    while tuner.call("GET", f"/jobs/{job['id']}")["progress"] is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    asked = time.monotonic()
    assert tuner.call("POST", f"/jobs/{job['id']}/cancel")["cancel_requested"]
    done = until_finished(tuner, tuner.call("GET", f"/jobs/{job['id']}"), 10.0)
    assert done["state"] == "cancelled"
    assert time.monotonic() - asked < 5.0
    assert tuner.code("POST", f"/jobs/{job['id']}/cancel", 409) == "job_finished"
    assert tuner.call("GET", "/adapters/long")["live"] is None


def test_a_killed_worker_is_replaced_and_its_job_goes_on(tuner: Caller, serving: Serving) -> None:
    job = tuner.adapt("killed", shades(), 202, method="fine_tune", fine_tune={**LONG, "epochs": 40})
    end = time.monotonic() + 60.0
    while tuner.call("GET", f"/jobs/{job['id']}")["progress"] is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    for pid in serving.group():
        if b"adapters.workers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    done = until_finished(tuner, tuner.call("GET", f"/jobs/{job['id']}"))
    assert (done["state"], done["attempt"], done["version"]) == ("succeeded", 2, 1)
    versions = tuner.call("GET", "/adapters/killed/versions")["versions"]
    assert [version["version"] for version in versions] == [1]


def test_a_worker_of_its_own_does_the_jobs_of_a_service_without(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    with Serving(tmp_path, environment={**environment, "TOPWORK_WORKERS": "0"}) as served:
        lonely = Caller(served.url)
        job = lonely.adapt("shades", shades(), 202, method="fine_tune", fine_tune=QUICK)
        time.sleep(2.0)
        assert lonely.call("GET", f"/jobs/{job['id']}")["state"] == "queued"
        command = [str(Path(sys.executable).with_name("topwork")), "worker"]
        with subprocess.Popen(
            command, env=os.environ | environment | {"TOPWORK_HOME": str(tmp_path)}
        ) as worker:
            assert until_finished(lonely, job)["state"] == "succeeded"
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(20) == 0
        lonely.http.close()


def test_jobs_are_counted(tuner: Caller) -> None:
    metrics = tuner.http.get("/metrics").text
    assert 'topwork_jobs{state="succeeded"}' in metrics
    assert 'topwork_jobs{state="queued"} 0.0' in metrics
