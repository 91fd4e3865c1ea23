"""The service's footprint: time from start to ready, and memory idle and after the largest batches.

python -m benchmarks.serving.footprint
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.data import datasets
from benchmarks.data.archives import DEFAULT_FOLDER
from benchmarks.data.datasets import Sample
from benchmarks.data.pictures import photographs
from benchmarks.harness import client
from benchmarks.harness.caller import Line, Request, json_request
from benchmarks.harness.report import Report, Spread, table
from benchmarks.harness.service_process import Serving, resident
from benchmarks.training.adapt import json_adapt, multipart_adapt

STARTS = 6
READY_SECONDS = 4.0
IDLE_MEGABYTES = 400
LARGEST_MEGABYTES = 600

_TENANT = "bench-footprint"


def _megabytes(pid: int, field: str = "VmRSS") -> float:
    return resident(pid, field) / (1 << 20)


def _mapped(pid: int, word: str) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return sum(1 for line in lines if word in line.split("/", 1)[-1])


def _poster(shade: int) -> Sample:
    """The largest picture that is accepted, in few bytes."""
    file = io.BytesIO()
    Image.new("RGB", (10_000, 5_000), (shade, 128, 255 - shade)).save(file, "PNG", compress_level=1)
    return Sample(file.getvalue(), "poster", f"poster {shade}", "", "")


def _largest(folder: Path) -> list[tuple[str, Request]]:
    """The largest requests that the default limits allow, by what they are called."""
    pictures = photographs(1_000, (512, 384), folder=folder)
    large = photographs(8, (4_000, 3_000), folder=folder)
    posters = [_poster(shade) for shade in range(16)]
    articles = datasets.load("20-newsgroups", folder).part("train")
    longest = sorted(articles, key=lambda sample: -len(sample.input))[:1_000]

    def predict(adapter: str, samples: Sequence[Sample]) -> Request:
        body = {"adapter": adapter, "inputs": [client.as_input(sample) for sample in samples]}
        return json_request("/predict", body, _TENANT)

    return [
        ("/adapt of 1,000 JPEGs of 512x384", multipart_adapt("pictures", pictures, _TENANT)),
        ("/predict of 128 JPEGs of 512x384", predict("pictures", pictures[:128])),
        (f"/predict of {len(large)} JPEGs of 12 megapixels", predict("pictures", large)),
        (f"/predict of {len(posters)} PNGs of 50 megapixels", predict("pictures", posters)),
        ("/adapt of 1,000 texts of 256 tokens and more", json_adapt("articles", longest, _TENANT)),
        ("/predict of 128 texts of 256 tokens and more", predict("articles", longest[:128])),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes benchmarks/results/footprint.md and .json; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.footprint", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TOPWORK_DATA", DEFAULT_FOLDER)))
    options = parser.parse_args(arguments)
    report = Report("footprint", "Start-up and memory")
    requests = _largest(options.data)

    seconds = []
    idle = []
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as home, Serving(Path(home)) as own:
            seconds.append(own.seconds_to_ready)
            idle.append(_megabytes(own.process.pid))
    starts, resting = Spread(tuple(seconds)), Spread(tuple(idle))

    rows = [["idle, ready", resting.text(".0f", " MB"), "", ""]]
    # Memory is measured here and not speed: on a busy machine the largest batches may take their time.
    patient = {"TOPWORK_REQUEST_TIMEOUT": "900"}
    with tempfile.TemporaryDirectory() as home, Serving(Path(home), environment=patient) as own:
        pid = own.process.pid
        line = Line(own.url)
        sizes = []
        for name, request in requests:
            line.ask(request)
            sizes.append(_megabytes(pid))
            others = sum(_megabytes(other) for other in own.group() if other != pid)
            rows.append(
                [name, f"{sizes[-1]:.0f} MB", f"{_megabytes(pid, 'VmHWM'):.0f} MB", f"{others:.0f} MB"]
            )
        torch = _mapped(pid, "torch")
        peak = _megabytes(pid, "VmHWM")
    report.add("From start to ready, backbones exported, an empty home", starts.text(".2f", " s"))
    head = ["after", "serving process", "its peak so far", "the processes it started"]
    report.add("Resident memory", table(head, rows))
    report.data["ready_seconds"] = starts.values
    report.data["idle_megabytes"] = resting.values
    report.data["after_megabytes"] = sizes
    report.data["peak_megabytes"] = peak
    report.expect("start to ready", starts.median, "<=", READY_SECONDS, " s")
    report.expect("memory idle", resting.median, "<=", IDLE_MEGABYTES, " MB")
    report.expect("memory after the largest batches", max(sizes), "<=", LARGEST_MEGABYTES, " MB")
    report.expect("mappings of torch in the serving process", torch, "<=", 0)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
