"""A service with backbones of its user's own, under short names: taught, asked, and refused a fine-tune."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.service_process import DidNotStart, Serving
from tests.support.models.onnx_graphs import image_folder, text_folder
from tests.support.models.tiny_backbones import picture, sentence
from tests.support.service.client import Caller, Json, image
from tests.support.service.fine_tunes import until_finished
from tests.support.service.uploads import NDJSON, upload


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("own")
    (text_folder(found / "words") / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    image_folder(found / "photos")
    return found


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    return {
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "TOPWORK_BACKBONES": f"words=onnx:{folder}/words, photos=onnx:{folder}/photos/model.onnx",
    }


@pytest.fixture(scope="module")
def serving(folder: Path, environment: dict[str, str]) -> Iterator[Serving]:
    with Serving(folder / "home", environment=environment) as running:
        yield running


@pytest.fixture
def owner(serving: Serving) -> Iterator[Caller]:
    found = Caller(serving.url)
    with found.http:
        yield found


def texts(count: int) -> list[Json]:
    return [{"id": f"t{n}", "text": sentence(n), "label": "ab"[n % 2]} for n in range(count)]


def test_short_names_sources_and_licences_are_listed(owner: Caller, folder: Path) -> None:
    words, photos = owner.call("GET", "/backbones")["backbones"]
    assert (words["name"], words["kind"], words["licence"]) == ("words", "text", "cc-by-sa-4.0")
    assert words["source"] == f"onnx:{folder}/words"
    assert (photos["name"], photos["kind"], photos["licence"]) == ("photos", "image", "unknown")
    assert 'topwork_backbone_plan_confirmed{backbone="words"}' in owner.http.get("/metrics").text


def test_both_kinds_are_taught_and_asked(owner: Caller) -> None:
    taught = owner.adapt("reviews", texts(20), backbone="words")
    assert taught["backbone"] == "words"
    assert owner.predict("reviews", [{"text": sentence(3)}])["predictions"][0]["label"] in ("a", "b")
    pictures = [{**image(picture(n)), "label": "ab"[n % 2]} for n in range(12)]
    assert owner.adapt("pets", pictures)["backbone"] == "photos"
    assert owner.predict("pets", [image(picture(3))])["predictions"][0]["label"] in ("a", "b")


def test_a_worker_knows_the_short_name(owner: Caller) -> None:
    lines = "\n".join(json.dumps(one) for one in texts(40)).encode()
    job = until_finished(owner, upload(owner, "adapter=bulk&backbone=words", lines, NDJSON))
    assert (job["state"], job["version"]) == ("succeeded", 1)


def test_a_fine_tune_of_an_onnx_backbone_is_refused(owner: Caller) -> None:
    owner.adapt("tune", texts(60))
    asked = {"adapter": "tune", "method": "fine_tune", "examples": []}
    refused = owner.call("POST", "/adapt", 409, json=asked)
    assert refused["code"] == "backbone_not_tunable"
    assert "'words' is an ONNX graph" in refused["detail"]
    assert owner.call("GET", "/jobs?adapter=tune")["jobs"] == []


def test_a_wrong_path_ends_the_start_with_what_is_missing(
    folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    wrong = environment | {"TOPWORK_BACKBONES": f"words=onnx:{folder}/none"}
    with pytest.raises(DidNotStart) as told:
        Serving(tmp_path, environment=wrong)
    assert f"There is nothing at {folder}/none. An ONNX file, or a folder with model.onnx" in str(told.value)
    assert "Traceback" not in str(told.value)
