"""Fine-tuned networks in memory: loaded once, evicted, closed when no longer used."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from adapters.adaptation.catalog import AdapterCatalog
from adapters.adaptation.repository import AdapterRepository
from adapters.cache.aliases import AliasCache
from adapters.cache.networks import NetworkPool
from adapters.registry.errors import UnknownVersion
from adapters.registry.records import Alias, Committed
from adapters.registry.registry import Registry, new_uid
from adapters.storage.artifact import Artifact, MissingArtifact
from adapters.storage.local import LocalStore
from models.backbone import Backbone
from models.batching.batcher import Batcher
from models.batching.request import BatcherClosed
from models.spec import GRAPH_FILE
from tests.support.adapters.records import change, create
from tests.support.adapters.records import version as new_version
from tests.support.conditions import eventually
from tests.support.models.tiny_backbones import TEXT_NAME, sentence, text_backbone

pytestmark = pytest.mark.anyio

TENANT, UID = "acme", new_uid()
ASKED = [sentence(1), sentence(2)]
ROOM_FOR_ALL = 1 << 30


class HeldStore(LocalStore):
    """The real store, which notes what is read and can be held up."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[Artifact] = []
        self.go = threading.Event()
        self.go.set()

    def read(self, tenant: str, adapter_uid: str, artifact: Artifact) -> bytes:
        self.reads.append(artifact)
        self.go.wait(10)
        return super().read(tenant, adapter_uid, artifact)


@dataclass
class Shelf:
    """A store of real tiny networks. made: what loads them. started: the batchers that ran one, in order."""

    root: Path
    store: HeldStore
    base: Backbone
    made: list[NetworkPool] = field(default_factory=list)
    started: list[Batcher] = field(default_factory=list)

    def graph(self, seed: int) -> bytes:
        """The tiny backbone's graph with other weights; as many bytes for every seed."""
        model = onnx.load(self.base.path / GRAPH_FILE)
        (weight,) = [one for one in model.graph.initializer if one.name == "w"]
        shape = numpy_helper.to_array(weight).shape
        drawn = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(drawn, "w"))
        return bytes(model.SerializeToString(deterministic=True))

    def alias(self, seed: int, uid: str = UID) -> Alias:
        """A version whose network, of this seed, is in the store."""
        network = self.store.publish(TENANT, uid, self.graph(seed))
        spec = self.base.spec
        return Alias(
            uid=uid,
            tenant=TENANT,
            name="words",
            backbone=spec.name,
            fingerprint=spec.fingerprint,
            kind="text",
            task="classification",
            version=2,
            artifact=None,
            evidence=None,
            network=network,
            epoch=seed,
        )

    def expected(self, seed: int) -> NDArray[np.float32]:
        """The embeddings of ASKED by the network of this seed."""
        return self.base.with_network(self.graph(seed)).embed(ASKED).embeddings

    def networks(self, room: int | None = None) -> NetworkPool:
        """Room for this number of tiny networks, or for all."""
        size = int(1.5 * len(self.graph(1)))
        self.made.append(NetworkPool(self.store, ROOM_FOR_ALL if room is None else room * size, self.start))
        return self.made[-1]

    def start(self, backbone: Backbone) -> Batcher:
        """A batcher with two threads: one for predicts, one for bulk."""
        batcher = Batcher(backbone, max_queue=100, workers=1)
        self.started.append(batcher)
        return batcher

    def path(self, network: Artifact | None) -> Path:
        """The path of the network's file."""
        assert network is not None
        (found,) = self.root.rglob(network.name)
        return found


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    root = tmp_path / "artifacts"
    shelf = Shelf(root, HeldStore(root), text_backbone(tmp_path))
    yield shelf
    shelf.store.go.set()
    for networks in shelf.made:
        await networks.close()
    assert open_networks() == 0


def open_networks() -> float:
    """How many networks have their threads, of which a worker has four."""
    return sum(thread.name.startswith(TEXT_NAME) for thread in threading.enumerate()) / 4


def let_go(batcher: Batcher) -> bool:
    """True if the batcher's network was released."""
    try:
        batcher.backbone.run([batcher.backbone.preprocess("blank")])
    except RuntimeError:
        return True
    return False


async def use(networks: NetworkPool, shelf: Shelf, alias: Alias) -> NDArray[np.float32]:
    async with networks.running(alias, shelf.base) as batcher:
        return (await batcher.embed(ASKED)).embeddings


async def test_a_network_is_loaded_once_and_answers_as_itself(shelf: Shelf) -> None:
    networks, first, second = shelf.networks(), shelf.alias(1), shelf.alias(2)
    for _ in range(3):
        np.testing.assert_allclose(await use(networks, shelf, first), shelf.expected(1), atol=1e-6)
        np.testing.assert_allclose(await use(networks, shelf, second), shelf.expected(2), atol=1e-6)
    assert not np.allclose(shelf.expected(1), shelf.expected(2), atol=0.1)
    assert shelf.store.reads == [first.network, second.network]
    assert networks.misses == 2
    assert networks.bytes == 2 * int(1.5 * len(shelf.graph(1)))


async def test_first_uses_at_once_share_one_load(shelf: Shelf) -> None:
    networks, alias = shelf.networks(), shelf.alias(1)
    shelf.store.go.clear()
    waiting = [asyncio.create_task(use(networks, shelf, alias)) for _ in range(8)]
    await eventually(lambda: bool(shelf.store.reads))
    shelf.store.go.set()
    for embeddings in await asyncio.gather(*waiting):
        np.testing.assert_allclose(embeddings, shelf.expected(1), atol=1e-6)
    assert (len(shelf.store.reads), len(shelf.started), networks.misses) == (1, 1, 8)


async def test_what_is_pushed_out_is_closed_at_once_if_nobody_uses_it(shelf: Shelf) -> None:
    networks = shelf.networks(room=2)
    for seed in (1, 2, 1, 3):
        await use(networks, shelf, shelf.alias(seed))
    await eventually(lambda: open_networks() == 2)
    assert [batcher.alive for batcher in shelf.started] == [True, False, True]
    await eventually(lambda: let_go(shelf.started[1]))


async def test_what_is_pushed_out_answers_its_users_until_the_last_has_gone(shelf: Shelf) -> None:
    networks, alias = shelf.networks(room=1), shelf.alias(1)
    async with networks.running(alias, shelf.base) as batcher:
        async with networks.running(alias, shelf.base) as same:
            assert same is batcher
            await use(networks, shelf, shelf.alias(2))
        embeddings = (await batcher.embed(ASKED)).embeddings
        np.testing.assert_allclose(embeddings, shelf.expected(1), atol=1e-6)
        # New callers load it again, and earlier ones keep theirs.
        await use(networks, shelf, alias)
        assert batcher.alive
    await eventually(lambda: open_networks() == 1)
    assert [one.alive for one in shelf.started] == [False, False, True]


async def test_a_network_larger_than_the_cache_is_served_and_dropped(shelf: Shelf) -> None:
    networks, alias = shelf.networks(room=0), shelf.alias(1)
    shelf.store.go.clear()
    waiting = [asyncio.create_task(use(networks, shelf, alias)) for _ in range(3)]
    await eventually(lambda: bool(shelf.store.reads))
    shelf.store.go.set()
    for embeddings in await asyncio.gather(*waiting):
        np.testing.assert_allclose(embeddings, shelf.expected(1), atol=1e-6)
    assert (len(shelf.store.reads), networks.bytes) == (1, 0)
    await eventually(lambda: open_networks() == 0)
    np.testing.assert_allclose(await use(networks, shelf, alias), shelf.expected(1), atol=1e-6)
    assert len(shelf.store.reads) == 2
    await eventually(lambda: open_networks() == 0)


@pytest.mark.parametrize("room", [0, 1])
async def test_a_network_that_all_gave_up_waiting_for_is_kept_or_closed(shelf: Shelf, room: int) -> None:
    networks, alias = shelf.networks(room), shelf.alias(1)
    shelf.store.go.clear()
    waiting = [asyncio.create_task(use(networks, shelf, alias)) for _ in range(3)]
    await eventually(lambda: bool(shelf.store.reads))
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    shelf.store.go.set()
    await eventually(lambda: bool(shelf.started))
    await eventually(lambda: open_networks() == room)


async def test_a_load_that_fails_is_every_waiters_error_and_is_tried_again(shelf: Shelf) -> None:
    networks, alias = shelf.networks(), shelf.alias(1)
    path = shelf.path(alias.network)
    path.rename(path.with_suffix(".away"))
    shelf.store.go.clear()
    waiting = [asyncio.create_task(use(networks, shelf, alias)) for _ in range(3)]
    await eventually(lambda: bool(shelf.store.reads))
    shelf.store.go.set()
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [MissingArtifact] * 3
    assert len(shelf.store.reads) == 1
    path.with_suffix(".away").rename(path)
    np.testing.assert_allclose(await use(networks, shelf, alias), shelf.expected(1), atol=1e-6)


async def test_what_was_prepared_need_not_be_waited_for(shelf: Shelf) -> None:
    networks, alias = shelf.networks(), shelf.alias(1)
    await networks.prepare(alias, shelf.base)
    await networks.prepare(replace(alias, network=None), shelf.base)
    await use(networks, shelf, alias)
    assert (len(shelf.store.reads), networks.misses) == (1, 0)
    # A network that cannot be kept is not loaded.
    small = shelf.networks(room=0)
    await small.prepare(alias, shelf.base)
    assert len(shelf.store.reads) == 1


async def test_closing_ends_all(shelf: Shelf) -> None:
    networks = shelf.networks(room=1)
    async with (
        networks.running(shelf.alias(1), shelf.base) as pushed_out,
        networks.running(shelf.alias(2), shelf.base) as in_use,
    ):
        shelf.store.go.clear()
        loading = asyncio.create_task(use(networks, shelf, shelf.alias(3)))
        await eventually(lambda: len(shelf.store.reads) == 3)
        queued = asyncio.create_task(in_use.embed(ASKED))
        await asyncio.sleep(0)
        closing = asyncio.create_task(networks.close())
        await eventually(lambda: open_networks() == 0)
        np.testing.assert_allclose((await queued).embeddings, shelf.expected(2), atol=1e-6)
        assert not closing.done()
        shelf.store.go.set()
        await closing
        assert networks.bytes == 0
        assert len(shelf.started) == 2
        for batcher in (pushed_out, in_use):
            with pytest.raises(BatcherClosed):
                await batcher.embed(ASKED)
        for late in (loading, asyncio.create_task(use(networks, shelf, shelf.alias(1)))):
            with pytest.raises(BatcherClosed):
                await late
    assert len(shelf.store.reads) == 3
    assert open_networks() == 0


@dataclass
class Process:
    """Caches of aliases and networks, composed as in the service."""

    registry: Registry
    aliases: AliasCache
    networks: NetworkPool
    catalog: AdapterCatalog


@pytest.fixture
def process(shelf: Shelf, tmp_path: Path) -> Iterator[Process]:
    registry = Registry(f"sqlite:///{tmp_path / 'topwork.db'}")
    registry.migrate()
    networks = shelf.networks()

    async def load(alias: Alias) -> None:
        await networks.prepare(alias, shelf.base)

    aliases = AliasCache(registry, load=load)
    repository = AdapterRepository(registry, shelf.store, aliases)
    yield Process(registry, aliases, networks, AdapterCatalog(repository))
    repository.close()
    registry.close()


def tuned(process: Process, shelf: Shelf) -> Committed:
    """An adapter with a live head and, not live, a second version with a network."""
    made = create(process.registry, "words")
    network = shelf.alias(1, made.adapter.uid).network
    return process.registry.commit(replace(change(made.adapter), version=new_version(network=network)))


async def test_a_promoted_network_is_loaded_before_it_is_live(process: Process, shelf: Shelf) -> None:
    committed = tuned(process, shelf)
    assert (await process.aliases.get(TENANT, "words")).version == 1
    shelf.store.go.clear()
    promoting = asyncio.create_task(process.catalog.promote(TENANT, "words", 2, None))
    await eventually(lambda: bool(shelf.store.reads))
    assert (await process.aliases.get(TENANT, "words", min_epoch=committed.adapter.epoch)).version == 1
    assert (await process.catalog.adapter(TENANT, "words")).live == 1
    shelf.store.go.set()
    promoted = await promoting
    assert promoted.live == 2
    for least in (None, promoted.epoch):
        alias = await process.aliases.get(TENANT, "words", min_epoch=least)
        assert (alias.version, alias.epoch) == (2, promoted.epoch)
    await use(process.networks, shelf, alias)
    assert (len(shelf.store.reads), process.networks.misses) == (1, 0)
    assert (await process.catalog.promote(TENANT, "words", 1, None)).live == 1
    with pytest.raises(UnknownVersion):
        await process.catalog.promote(TENANT, "words", 3, None)


async def test_a_network_that_cannot_be_loaded_is_promoted_all_the_same(
    process: Process, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    committed = tuned(process, shelf)
    assert committed.version is not None
    shelf.path(committed.version.network).unlink()
    with caplog.at_level(logging.WARNING, "topwork"):
        assert (await process.catalog.promote(TENANT, "words", 2, None)).live == 2
    assert "MissingArtifact" in caplog.text
    alias = await process.aliases.get(TENANT, "words")
    with pytest.raises(MissingArtifact):
        await use(process.networks, shelf, alias)
