"""The documented program for exports beside the service, on raw inputs: the same decisions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import pytest

from benchmarks.harness.service_process import ROOT, Serving
from tests.faults import times
from tests.support.models.random_models import image_model
from tests.support.models.raw_inputs import UNKNOWN, WRITTEN, images, texts
from tests.support.service.client import BLAME, PICTURES, PRAISE, Caller, Json, image, pictures, reviews
from tests.support.service.fine_tunes import QUICK, shades, until_finished

PROGRAM = ROOT / "examples" / "run_export.py"
# Besides these and the standard library, the program finds no package.
PACKAGES = ("numpy", "onnxruntime", "PIL", "tokenizers")
CLOSE = 1e-4
# `make test-faults` compares all two hundred inputs of a kind; usually a fourth, with the longest text.
SLICE = slice(None) if times(1, 0) else slice(3, None, 4)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The usual backbones, and a small network whose fine-tunes take seconds."""
    environment = {"TOPWORK_BACKBONES": f"efficientnet-lite0,minilm-l6-v2,timm:{image_model()}"}
    with Serving(tmp_path_factory.mktemp("home"), environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def teacher(serving: Serving) -> Iterator[Caller]:
    found = Caller(serving.url)
    with found.http:
        yield found


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program and the packages that it may import."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(PROGRAM, folder)
    (folder / "packages").mkdir()
    for site in map(Path, sys.path):
        for package in PACKAGES:
            for name in (package, f"{package}.libs", "pillow.libs", "flatbuffers", "google"):
                if site.name == "site-packages" and (site / name).exists():
                    target = folder / "packages" / name
                    if not target.exists():
                        target.symlink_to(site / name)
    return folder


def run(elsewhere: Path, model: bytes, inputs: Sequence[str | bytes]) -> list[Json]:
    """The program's answers, from a process that cannot import Topwork."""
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    (elsewhere / "model.onnx").write_bytes(model)
    names = []
    for place, one in enumerate(inputs):
        names.append(f"{place}.input")
        (elsewhere / names[-1]).write_bytes(one.encode() if isinstance(one, str) else one)
    process = subprocess.run(
        [sys.executable, "-S", PROGRAM.name, "model.onnx", *names],
        cwd=elsewhere,
        env={"PYTHONPATH": "packages", "ORT_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "0", "LC_ALL": "C"},
        capture_output=True,
        check=False,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def ask(teacher: Caller, adapter: str, inputs: Sequence[str | bytes]) -> list[Json]:
    """The service's answers, with every label."""
    items = [{"text": one} if isinstance(one, str) else image(one) for one in inputs]
    found: list[Json] = []
    for start in range(0, len(items), 50):
        found += teacher.predict(adapter, items[start : start + 50], top_k=1000)["predictions"]
    return found


def compare(
    teacher: Caller, elsewhere: Path, adapter: str, inputs: Sequence[str | bytes], version: int = 1
) -> list[Json]:
    """Asserts that both say the same of all; the service's answers."""
    response = teacher.http.get(f"/adapters/{adapter}/versions/{version}/export")
    assert response.status_code == 200, response.text
    served, alone = ask(teacher, adapter, inputs), run(elsewhere, response.content, inputs)
    assert len(alone) == len(served) == len(inputs)
    for place, (theirs, ours) in enumerate(zip(alone, served, strict=True)):
        where = f"input {place}: {inputs[place][:40]!r}, served {ours}, alone {theirs}"
        assert theirs["abstained"] == ours["abstained"], where
        if "value" in ours:
            assert theirs["values"] == pytest.approx(ours["value"], rel=CLOSE, abs=CLOSE), where
            continue
        chances = {one["label"]: one["probability"] for one in ours["probabilities"]}
        assert theirs["probabilities"] == pytest.approx(chances, abs=CLOSE), where
        if "label" in ours:
            assert theirs["label"] == ours["label"], where
            assert theirs["probabilities"][ours["label"]] == pytest.approx(ours["confidence"], abs=CLOSE), (
                where
            )
        else:
            for name, listed in (("assigned", ours["labels"]), ("uncertain", ours["uncertain"])):
                assert theirs[name] == {label: label in listed for label in chances}, where
    return served


def both(served: list[Json]) -> bool:
    """True if there are abstentions and answers, so that agreement means something."""
    return {one["abstained"] for one in served} == {True, False}


def test_texts_get_the_same_label(teacher: Caller, elsewhere: Path) -> None:
    teacher.adapt("films", reviews())
    served = compare(teacher, elsewhere, "films", texts()[SLICE])
    assert both(served)
    assert {one["label"] for one in served} == {"good", "bad"}
    assert {one["abstention_reason"] for one in served} >= {"no_known_tokens", "far_from_examples"}


def test_texts_get_the_same_labels_of_several(teacher: Caller, elsewhere: Path) -> None:
    examples: list[Json] = [
        {"text": text, "labels": [*labels, *(["long"] if len(text) > 45 else [])]}
        for labels, several in ((["good"], PRAISE), (["bad"], BLAME), ([], WRITTEN[:30]))
        for text in several
    ]
    teacher.adapt("tags", examples, task="multilabel")
    asked = texts()[SLICE]
    served = compare(teacher, elsewhere, "tags", asked)
    assert both(served)
    assert any(one["uncertain"] and not one["abstained"] for one in served)
    unknown = [one for text, one in zip(asked, served, strict=True) if text in UNKNOWN]
    assert unknown
    assert all(set(one["uncertain"]) == {"good", "bad", "long"} for one in unknown)


def test_texts_get_the_same_value(teacher: Caller, elsewhere: Path) -> None:
    examples = [{"text": text, "target": 1e6 + len(text)} for text in [*PRAISE, *BLAME, *WRITTEN[:30]]]
    teacher.adapt("lengths", examples, task="regression")
    assert both(compare(teacher, elsewhere, "lengths", texts()[SLICE]))


def test_an_adapter_that_was_not_measured_abstains_in_its_export(teacher: Caller, elsewhere: Path) -> None:
    tasks: dict[str, list[Json]] = {
        "classification": [{"text": "yes", "label": "a"}, {"text": "no", "label": "b"}],
        "multilabel": [{"text": "yes", "labels": ["a"]}, {"text": "no", "labels": ["b"]}],
        "regression": [{"text": "yes", "target": 1.0}, {"text": "no", "target": 2.0}],
    }
    for task, examples in tasks.items():
        teacher.adapt(f"few-{task}", examples, task=task)
        served = compare(teacher, elsewhere, f"few-{task}", ["yes", "no", "🙂", "something else"])
        assert all(one["abstained"] for one in served)


def test_images_get_the_same_label(teacher: Caller, elsewhere: Path) -> None:
    teacher.adapt("things", pictures())
    assert both(compare(teacher, elsewhere, "things", images()[SLICE]))


def test_images_get_the_same_labels_of_several(teacher: Caller, elsewhere: Path) -> None:
    examples: list[Json] = [
        {**image(data), "labels": [label, *(["odd"] if place % 2 else [])]}
        for place, (label, data) in enumerate(PICTURES)
    ]
    teacher.adapt("marks", examples, task="multilabel")
    compare(teacher, elsewhere, "marks", images()[SLICE])


def test_images_get_the_same_value(teacher: Caller, elsewhere: Path) -> None:
    examples = [{**image(data), "target": float(len(data))} for _, data in PICTURES]
    teacher.adapt("sizes", examples, task="regression")
    compare(teacher, elsewhere, "sizes", images()[SLICE])


@pytest.mark.training
def test_a_fine_tuned_network_answers_images_the_same(teacher: Caller, elsewhere: Path) -> None:
    backbone: str = next(
        one["name"] for one in teacher.call("GET", "/backbones")["backbones"] if "timm:" in one["name"]
    )
    teacher.adapt("tuned", shades(), backbone=backbone)
    job = teacher.adapt("tuned", [], 202, method="fine_tune", fine_tune=QUICK, promote="always")
    done = until_finished(teacher, job, 600.0)
    assert (done["state"], done["version"]) == ("succeeded", 2), done
    compare(teacher, elsewhere, "tuned", images()[SLICE], version=2)
