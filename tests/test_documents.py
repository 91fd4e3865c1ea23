"""The reference pages say what the code does."""

from __future__ import annotations

import json
import re
import urllib.request

from benchmarks.harness.service_process import ROOT
from tests import recorded

REFERENCE = ROOT / "docs" / "reference"
# Reported on a machine with a GPU only.
GPU_METRICS = {"topwork_gpu_seconds_total"}
# Labels that Prometheus's text format adds to a histogram.
FORMAT_LABELS = {"le"}


def scraped(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text: str = answer.read().decode()
        return text


def documented_metrics() -> dict[str, tuple[str, set[str], str]]:
    """Return the type, labels and meaning of each metric of the page."""
    page = (REFERENCE / "metrics.md").read_text()
    rows = re.findall(r"^\| `(topwork_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert rows
    return {name: (kind, set(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}


def test_the_metrics_are_the_documents(server: str) -> None:
    text = scraped(server)
    kinds = dict(re.findall(r"^# TYPE (topwork_\w+) (\w+)$", text, re.MULTILINE))
    meanings = dict(re.findall(r"^# HELP (topwork_\w+) (.*)$", text, re.MULTILINE))
    pages = documented_metrics()
    wanted = {name: (kinds[name], meanings[name]) for name in kinds}
    written = {name: (kind, text) for name, (kind, _, text) in pages.items() if name not in GPU_METRICS}
    assert written == wanted
    for name, labels in re.findall(r"^(topwork_\w+?)(?:_bucket|_sum|_count)?\{(.*)\} ", text, re.MULTILINE):
        assert set(re.findall(r'(\w+)="', labels)) - FORMAT_LABELS == pages[name][1], name


def test_the_commands_are_the_documents() -> None:
    page = (REFERENCE / "command-line.md").read_text()
    texts = json.loads(recorded.FILE.read_text())["commands"]
    assert [name for name, text in texts.items() if f"## {name}\n\n```text\n{text}```\n" not in page] == []
