"""A whole service whose database is behind PgBouncer in transaction mode."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg

from benchmarks.harness.service_process import Serving
from tests.support.models import tiny_backbones
from tests.support.service.client import BLAME, PRAISE, Caller
from tests.support.service.uploads import NDJSON, upload

EXAMPLES = [
    {"id": f"{label}-{number}", "text": text, "label": label}
    for label, texts in (("praise", PRAISE), ("blame", BLAME))
    for number, text in enumerate(texts)
]


def test_a_service_behind_a_pooler_adapts_predicts_uploads_and_erases(
    pooled_url: str, tmp_path: Path
) -> None:
    _, text = tiny_backbones.install(tmp_path / "bentoml", measured=True)
    environment = {
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "TOPWORK_BACKBONES": text,
        "TOPWORK_DATABASE_URL": pooled_url,
    }
    with Serving(tmp_path / "home", environment=environment) as serving:
        caller = Caller(serving.url)
        with caller.http:
            for version in range(1, 8):
                made = caller.adapt("reviews", EXAMPLES)
                assert made["version"] == version
                assert caller.predict("reviews", [{"text": PRAISE[0]}])["version"] == version
            lines = "\n".join(json.dumps(example) for example in EXAMPLES).encode()
            assert upload(caller, "adapter=many", lines, NDJSON)["version"] == 1
            assert caller.predict("many", [{"text": BLAME[0]}])["version"] == 1
            assert caller.call("DELETE", f"/tenants/{caller.tenant}")["adapters"] == 2
            caller.predict("reviews", [{"text": PRAISE[0]}], 404)
    with psycopg.connect(pooled_url.replace("+psycopg", ""), prepare_threshold=None) as connection:
        assert connection.execute("SELECT name FROM adapters").fetchall() == []
