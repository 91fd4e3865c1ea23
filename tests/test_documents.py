"""The reference pages say what the code does."""

from __future__ import annotations

import json
import math
import re
import urllib.request

from adapters.adaptation.revision import writer
from adapters.examples import meanings, target, upload, upload_zip, validation
from adapters.jobs import bulk_attempt, callback_sender, callbacks, submission
from adapters.registry import errors, idempotency, tenants
from adapters.registry.statements import job_rows
from benchmarks.harness.service_process import ROOT
from models.preprocess import decoder
from models.preprocess.image_file import formats
from service.api import idempotency as keys_of_requests
from service.api import jobs
from service.edge import channel, concurrency, key_cache, layers, rate_limits
from service.payloads import content, schema
from service.server import connections, protocol
from tests import house, recorded

REFERENCE = ROOT / "docs" / "reference"
# Reported on a machine with a GPU only.
GPU_METRICS = {"topwork_gpu_seconds_total"}
# Labels that Prometheus's text format adds to a histogram.
FORMAT_LABELS = {"le"}
KIB, MIB = 1 << 10, 1 << 20


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


def size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"


def longest(pattern: str) -> int:
    """Return the upper bound of the last repetition in a regular expression."""
    return int(re.findall(r",(\d+)\}", pattern)[-1])


def request_limits() -> dict[str, str]:
    return {
        "request line with headers": size(protocol.MAX_HEAD_BYTES),
        "time for the headers": f"{protocol.HEAD_SECONDS:g} s",
        "time without a byte of a body": f"{protocol.SILENT_SECONDS:g} s",
        "rate of a body, after that time": f"{size(protocol.SLOWEST_BYTES_PER_SECOND)}/s",
        "time in which no byte of the response is read": f"{protocol.UNREAD_SECONDS:g} s",
        "open connections": f"{connections.MOST:,}, or {connections._ROOM} fewer than the allowed open files",
        "body of a request without inputs or examples": size(layers.SMALL_BODY),
        "commas in one JSON body": f"{content._MOST_COMMAS:,}",
        "opening brackets in one JSON body": f"{content._MOST_BRACKETS:,}",
        "fields of a form, besides its files": f"{content._FIELDS}",
        "characters of an Idempotency-Key": f"{longest(keys_of_requests._KEY.pattern)}",
        "time for which an answer is kept under an Idempotency-Key": (
            f"{idempotency.REPLIES_KEPT / 3_600:g} hours"
        ),
        "kept answers of one tenant": f"{size(idempotency.MOST_BYTES)}, compressed",
        "changes of one tenant's adapters that are worked on at once": f"{writer._CHANGES_AT_ONCE}",
        "event streams": f"{jobs._STREAMS_OF_A_TENANT} of a tenant, {jobs._STREAMS} in all",
    }


def example_limits() -> dict[str, str]:
    assert target.MAX_LABEL_CHARACTERS == validation.MAX_NAME_CHARACTERS
    all_labels, each = submission.FEWEST_EXAMPLES, submission.FEWEST_OF_A_LABEL
    return {
        # The pattern counts the characters after the first one.
        "characters of the name of an adapter or a tenant": f"{1 + longest(schema.NAME_PATTERN)}",
        "characters of a label, an id or a group": f"{target.MAX_LABEL_CHARACTERS}",
        "characters of a description in `labels`": f"{meanings.DESCRIPTION_CHARACTERS:,}",
        "characters of all `labels` with their descriptions": f"{meanings.MEANINGS_CHARACTERS:,}",
        "characters of all labels in `weights`": f"{meanings.COST_CHARACTERS:,}",
        "cost of a label": f"{meanings.SMALLEST_COST:g} to {meanings.LARGEST_COST:,.0f}",
        "examples for a fine-tune": f"at least {all_labels}, at least {each} of each label",
        "versions of an adapter that are kept": f"the newest {errors.KEPT_VERSIONS}, and the live one",
    }


def upload_limits() -> dict[str, str]:
    zip_bytes = size(upload.UploadLimits().zip_bytes)
    return {
        "uploads in progress": f"{concurrency.UPLOADS_OF_A_TENANT} of a tenant, {concurrency.UPLOADS} in all",
        "time without a byte of an upload": f"{channel._SILENT:.0%} of `TOPWORK_REQUEST_TIMEOUT`".replace(
            "%", " %"
        ),
        "rate of an upload, after `TOPWORK_REQUEST_TIMEOUT`": f"{size(channel._SLOWEST_BYTES_PER_SECOND)}/s",
        "contents of a zip": f"{zip_bytes}, or {upload_zip._INFLATION} times its size if that is more",
        "errors listed in `progress.errors`": f"{bulk_attempt._MOST_ERRORS:,}",
        "attempts of a job": f"{job_rows.MAX_ATTEMPTS}",
        "attempts of a callback": f"{callback_sender._ATTEMPTS}",
        "characters of a callback URL": f"{callbacks._MOST_CHARACTERS:,}",
    }


def image_limits() -> dict[str, str]:
    per_pixel = decoder._SECONDS_PER_PIXEL * 1e6
    return {
        "scans of a JPEG": f"{formats._MOST_SCANS}, together {formats._MOST_SCANNED / 1e9:g} billion pixels",
        "segments of a JPEG": f"{formats._MOST_SEGMENTS:,}",
        "chunks of a PNG or WebP": f"{formats._MOST_CHUNKS:,}",
        "CPU time to decode a large image": f"{decoder._BASE_SECONDS:g} s and {per_pixel:g} µs a pixel",
        "memory to decode a large image": size(decoder.MEMORY_BYTES),
    }


def key_limits() -> dict[str, str]:
    revocation = math.ceil(key_cache._DEAF.stale + key_cache._PATIENCE_SECONDS)
    return {
        "keys of one tenant in use": f"{tenants.MAX_KEYS}",
        "time until a revoked key stops working": f"{revocation} s",
        "burst of a rate quota": f"{rate_limits._SAVED_SECONDS:g} s of the rate",
    }


def test_the_limits_are_the_documents() -> None:
    page = (REFERENCE / "limits.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .*\|$", page, re.MULTILINE)
    written = {name: value for name, value in rows if name != "limit"}
    assert written == (request_limits() | example_limits() | upload_limits() | image_limits() | key_limits())


def test_the_codes_of_the_limits_are_those_of_the_errors() -> None:
    """The status of each code is in its entry, or it is a code of one item or of a job."""
    entries = dict(
        re.findall(r"^### (\w+)\n\n\*\*(.*?)\.\*\*", (REFERENCE / "errors.md").read_text(), re.MULTILINE)
    )
    found = re.findall(
        r"(?:(\d{3}) )?`([a-z]+(?:_[a-z]+)+)` \|$", (REFERENCE / "limits.md").read_text(), re.MULTILINE
    )
    assert len(found) > 20
    wrong = [
        (status, code)
        for status, code in found
        if (status or "tem") not in entries[code].replace("Job", "Item")
    ]
    assert wrong == []


def test_the_folders_are_the_documents() -> None:
    """`make house ARGS=--write` writes them."""
    written = house.DOCUMENT.read_text().partition(house.BEGIN)[2].partition(house.END)[0].strip()
    assert house.without_lines(written) == house.without_lines(house.table())
