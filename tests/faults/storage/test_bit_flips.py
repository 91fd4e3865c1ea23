"""One bit of a stored file is another: it is found before anything is answered with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from adapters.registry.registry import Registry
from adapters.storage.artifact import Artifact, CorruptArtifact, Store, object_key
from adapters.storage.open import open_store
from benchmarks.harness.service_process import Serving
from models.backbone import Backbone
from models.spec import GRAPH_FILE
from tests.faults import times
from tests.support.adapters.adapter_stack import TENANT, taught, world
from tests.support.models import tiny_backbones

SEED = 17
KINDS = ("head", "evidence", "segment", "inputs", "network")
Json = dict[str, object]


@dataclass
class Shelf:
    """Real artifacts, one of each kind. read(key) and write(key, bytes) go to the bytes beneath the store."""

    store: Store
    uid: str
    artifacts: dict[str, Artifact]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], object]

    def flip(self, rng: random.Random, kind: str) -> str | None:
        """Turns over one bit of the kind's file and reads it; what was wrong, None where it was found out."""
        artifact = self.artifacts[kind]
        key = object_key(TENANT, self.uid, artifact.name)
        whole = self.read(key)
        bit = rng.randrange(len(whole) * 8)
        self.write(key, flipped(whole, bit))
        try:
            self.store.read(TENANT, self.uid, artifact)
        except CorruptArtifact:
            return None
        finally:
            self.write(key, whole)
        return f"bit {bit} of {kind}"


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with one bit turned over."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


async def published(folder: Path, store: Store) -> tuple[str, dict[str, Artifact]]:
    """Adapts in the store; the adapter's uid, and one artifact of each kind."""
    async with world(folder, store=store) as made:
        await made.adapt(taught(20))
        record = made.registry.adapter(TENANT, "words")
        version = made.registry.version(record.uid, 1)
        example = made.registry.all_examples(record.uid)[1][0]
        # As a fine-tune publishes one: the graph's bytes.
        graph = (tiny_backbones.text_export(folder / "network") / GRAPH_FILE).read_bytes()
        network = store.publish(TENANT, record.uid, graph)
    assert version.evidence is not None
    assert example.inputs is not None
    found = (version.artifact, version.evidence, example.segment, example.inputs, network)
    return record.uid, dict(zip(KINDS, found, strict=True))


@pytest.mark.anyio
async def test_every_flipped_bit_is_found_in_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    store = open_store(str(root))
    uid, artifacts = await published(tmp_path, store)
    shelf = Shelf(
        store,
        uid,
        artifacts,
        lambda key: (root / key).read_bytes(),
        lambda key, data: (root / key).write_bytes(data),
    )
    look(shelf, times(8_000, 400))


@pytest.mark.anyio
async def test_every_flipped_bit_is_found_in_a_bucket(
    tmp_path: Path, s3_url: str, s3_options: dict[str, str]
) -> None:
    import obstore
    from obstore.store import S3Store

    store = open_store(s3_url, s3_options)
    uid, artifacts = await published(tmp_path, store)
    beneath = S3Store.from_url(s3_url, config=s3_options, client_options={"allow_http": True})  # type: ignore[arg-type]
    shelf = Shelf(
        store,
        uid,
        artifacts,
        lambda key: bytes(obstore.get(beneath, key).bytes()),
        lambda key, data: obstore.put(beneath, key, data),
    )
    look(shelf, times(2_000, 50))


def look(shelf: Shelf, flips: int) -> None:
    """Flip bits one after the other; every file is whole at the end."""
    rng = random.Random(SEED)
    served = [wrong for number in range(flips) if (wrong := shelf.flip(rng, KINDS[number % len(KINDS)]))]
    assert not served, f"seed {SEED}: {served}"
    for artifact in shelf.artifacts.values():
        shelf.store.read(TENANT, shelf.uid, artifact)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_flipped_file_is_needed_for_is_refused(tmp_path: Path, kind: str) -> None:
    """A fresh process refuses the damaged version; the rest of the adapter still answers."""
    root = tmp_path / "artifacts"
    uid, artifacts = await published(tmp_path, open_store(str(root)))
    path = root / object_key(TENANT, uid, artifacts[kind].name)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, random.Random(f"{SEED}{kind}").randrange(len(whole) * 8)))
    async with world(tmp_path, store=open_store(str(root))) as made:
        if kind == "head":
            with pytest.raises(CorruptArtifact):
                await made.predict(["ba be"])
        else:
            assert await made.labels(["ba be bi", "tan ten tin"]) == ["one", "two"]
        if kind in ("evidence", "segment"):
            with pytest.raises(CorruptArtifact):
                await made.predict(["ba be"], explain=1)
        if kind == "inputs":
            with pytest.raises(CorruptArtifact):
                await made.catalog.example(TENANT, "words", "one0")
        if kind == "network":
            base = Backbone.open(tiny_backbones.text_export(tmp_path / "base"), threads=1)
            with pytest.raises(CorruptArtifact):
                base.with_network(made.store.read(TENANT, uid, artifacts["network"]))
            base.close()


def test_over_http_only_the_damaged_version_is_refused(tmp_path: Path) -> None:
    home, settings = tmp_path / "home", environment(tmp_path)
    with Serving(home, environment=settings) as running, httpx.Client(base_url=running.url) as http:
        for adapter in ("damaged", "other"):
            for number in range(2):
                adapt(http, adapter, number)
    damage(home, "damaged", 1)
    with Serving(home, environment=settings) as running, httpx.Client(base_url=running.url) as http:
        for _ in range(2):
            answer = predict(http, "damaged", 1)
            assert (answer.status_code, answer.json()["code"]) == (500, "corrupt_artifact")
            assert answer.headers["content-type"] == "application/problem+json"
        for adapter, version in (("damaged", 2), ("damaged", None), ("other", 1), ("other", 2)):
            answer = predict(http, adapter, version)
            assert answer.status_code == 200, answer.text
            assert [one["label"] for one in answer.json()["predictions"]] == ["one", "two"]
        # A damaged version does not prevent the next one.
        assert adapt(http, "damaged", 2) == 3
        assert predict(http, "damaged", 3).status_code == 200


def environment(folder: Path) -> dict[str, str]:
    """The settings of a service with the tiny backbones."""
    _, text = tiny_backbones.install(folder / "bentoml", measured=True)
    return {
        "BENTOML_HOME": str(folder / "bentoml"),
        "TOPWORK_BACKBONES": text,
        "TOPWORK_WORKERS": "0",
        "TOPWORK_ACCESS_LOG": "false",
    }


def adapt(http: httpx.Client, adapter: str, number: int) -> int:
    """Adds examples; the number of the version."""
    examples = [
        {"id": f"{number} {posted.id}", "text": str(posted.input), "label": posted.target}
        for posted in taught(10)
    ]
    answer = http.post("/adapt", json={"adapter": adapter, "promote": "always", "examples": examples})
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["version"]
    return version


def predict(http: httpx.Client, adapter: str, version: int | None) -> httpx.Response:
    """Asks for one of each class."""
    inputs = [{"text": "ba be bi"}, {"text": "tan ten tin"}]
    return http.post("/predict", json={"adapter": adapter, "version": version, "inputs": inputs})


def damage(home: Path, adapter: str, number: int) -> None:
    """Turns over one bit of a version's head."""
    registry = Registry(f"sqlite:///{home / 'topwork.db'}")
    try:
        record = registry.adapter("default", adapter)
        artifact = registry.version(record.uid, number).artifact
    finally:
        registry.close()
    path = home / "artifacts" / object_key("default", record.uid, artifact.name)
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, random.Random(SEED).randrange(len(whole) * 8)))
