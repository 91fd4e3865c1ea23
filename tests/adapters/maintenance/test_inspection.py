"""Damage of every kind is found, and what can be repaired is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from adapters.maintenance.inspection import Finding
from adapters.registry.records import Change, NewVersion, VersionRecord
from adapters.registry.schema import adapters, examples, versions
from adapters.storage.formats import decode_embeddings
from models.backbone import Backbone
from models.spec import GRAPH_FILE
from tests.support.adapters.adapter_stack import TENANT, World, says, taught
from tests.support.adapters.storage_places import Place, churn
from tests.support.models.tiny_backbones import text_backbone

pytestmark = pytest.mark.anyio

INPUTS = [says("one", 90), says("two", 91)]


@pytest.fixture
def backbone(tmp_path: Path) -> Iterator[Backbone]:
    opened = text_backbone(tmp_path / "backbone")
    yield opened
    opened.close()


def codes(found: list[Finding]) -> list[tuple[str, str, bool]]:
    return [(one.what, one.code, one.repaired) for one in found]


def version(world: World, number: int) -> VersionRecord:
    return world.registry.version(world.registry.adapter(TENANT, "words").uid, number)


async def test_nothing_is_wrong_with_what_is_whole(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt(taught(6))
        await world.editor.remove(TENANT, "words", ["one0", "two5"])
        assert place.examine() == []
        # Examples without any version, and an adapter without examples.
        await world.adapt(taught(2), "stored", fit=False)
        await world.editor.remove(TENANT, "stored", None)
        assert place.examine() == []


async def test_what_changes_meanwhile_is_no_damage(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught(), "steady")
        turned, stop = asyncio.Event(), asyncio.Event()
        busy = asyncio.create_task(churn(world, turned, stop))
        for _ in range(4):
            async with asyncio.timeout(60):
                await turned.wait()
            turned.clear()
            assert await asyncio.to_thread(place.examine) == []
        stop.set()
        await busy


@pytest.mark.parametrize("lost", [False, True], ids=["flipped", "lost"])
async def test_a_damaged_version_goes_and_the_newest_whole_one_is_live(place: Place, lost: bool) -> None:
    async with place.world() as world:
        for count in (2, 3, 4):
            await world.adapt(taught(count), promote="always")
        heads = {number: version(world, number).artifact for number in (2, 3)}
        for head in heads.values():
            place.overwrite(head, None) if lost else place.flip(head)
        code = "missing_artifact" if lost else "corrupt_artifact"
        expected = [("head of version 3", code, False), ("head of version 2", code, False)]
        assert codes(place.examine()) == expected
        assert codes(place.examine()) == expected
        found = place.examine(repair=True)
        assert codes(found) == [(what, code, True) for what, _, _ in expected]
        assert {(one.tenant, one.adapter) for one in found} == {(TENANT, "words")}
        assert place.examine() == []
        epoch = world.registry.adapter(TENANT, "words").epoch
        alias = await world.aliases.get(TENANT, "words", min_epoch=epoch)
        assert alias.version == 1
        assert await world.labels(INPUTS) == ["one", "two"]
        outcome = await world.adapt(taught(5), promote="always")
        assert outcome.revised.version is not None
        assert outcome.revised.version.number == 4


async def test_without_a_whole_version_nothing_is_live(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        place.flip(version(world, 1).artifact)
        assert [one.repaired for one in place.examine(repair=True)] == [True]
        assert world.registry.adapter(TENANT, "words").live is None
        assert place.examine() == []


async def test_lost_evidence_is_done_without(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        evidence = version(world, 1).evidence
        assert evidence is not None
        place.flip(evidence)
        assert codes(place.examine()) == [("evidence of version 1", "corrupt_artifact", False)]
        assert codes(place.examine(repair=True)) == [("evidence of version 1", "corrupt_artifact", True)]
        assert version(world, 1).evidence is None
        assert world.registry.adapter(TENANT, "words").live == 1
        assert place.examine() == []
        assert (await world.adapt(taught(5))).revised.live


async def test_a_damaged_network_takes_its_version_along(place: Place, backbone: Backbone) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        adapter = world.registry.adapter(TENANT, "words")
        graph = (backbone.path / GRAPH_FILE).read_bytes()
        (network,) = await world.repository.publish(TENANT, adapter.uid, [lambda: graph])
        first = version(world, 1)
        tuned = NewVersion("fine_tune", first.artifact, first.evidence, {}, first.labels, network)
        change = Change(TENANT, "words", adapter.uid, adapter.revision, version=tuned, promote=True)
        await world.repository.commit(change, [])
        assert place.examine() == []
        place.flip(network)
        assert codes(place.examine()) == [("network of version 2", "corrupt_artifact", False)]
        assert [one.repaired for one in place.examine(repair=True)] == [True]
        assert world.registry.adapter(TENANT, "words").live == 1
        assert place.examine() == []


async def test_damaged_embeddings_are_embedded_again(place: Place, backbone: Backbone) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt(taught(6))
        adapter = world.registry.adapter(TENANT, "words")
        one = world.registry.example(adapter.uid, "one0")
        before = decode_embeddings(place.store.read(TENANT, adapter.uid, one.segment))
        place.flip(one.segment)
        expected = ("embeddings of 8 examples", "corrupt_artifact")
        assert codes(place.examine()) == [(*expected, False)]
        # The repair needs the backbone.
        (finding,) = place.examine(repair=True)
        assert (finding.repaired, adapter.backbone in finding.detail) == (False, True)
        assert codes(place.examine(lambda name: backbone, repair=True)) == [(*expected, True)]
        assert place.examine() == []
        world.check()
        moved = world.registry.example(adapter.uid, "one0")
        assert (moved.segment != one.segment, moved.inputs, moved.row) == (True, one.inputs, one.row)
        after = decode_embeddings(place.store.read(TENANT, adapter.uid, moved.segment))
        assert abs(after - before).max() < 1e-5
        assert (await world.adapt(taught(7))).revised.live


async def test_a_repair_that_comes_too_late_leaves_no_file(place: Place, backbone: Backbone) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        uid = world.registry.adapter(TENANT, "words").uid
        place.flip(world.registry.example(uid, "one0").segment)

        def open_late(name: str) -> Backbone:
            with place.database.writing() as connection:
                connection.execute(delete(examples).where(examples.c.id == "one0"))
            return backbone

        before = {found.name for found in place.store.objects()}
        (finding,) = place.examine(open_late, repair=True)
        assert (finding.repaired, "changed meanwhile" in finding.detail) == (False, True)
        assert {found.name for found in place.store.objects()} == before


async def test_inputs_that_are_deleted_before_their_repair_do_not_end_it(
    place: Place, backbone: Backbone
) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        uid = world.registry.adapter(TENANT, "words").uid
        one = world.registry.example(uid, "one0")
        place.flip(one.segment)

        def open_late(name: str) -> Backbone:
            assert one.inputs is not None
            place.store.delete(TENANT, uid, [one.inputs])
            return backbone

        (finding,) = place.examine(open_late, repair=True)
        assert (finding.repaired, "changed meanwhile" in finding.detail) == (False, True)


async def test_damaged_inputs_are_done_without(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt(taught(6))
        adapter = world.registry.adapter(TENANT, "words")
        one = world.registry.example(adapter.uid, "one0")
        assert one.inputs is not None
        place.flip(one.inputs)
        assert codes(place.examine()) == [("inputs of 8 examples", "corrupt_artifact", False)]
        assert [found.repaired for found in place.examine(repair=True)] == [True]
        assert place.examine() == []
        world.check()
        assert world.registry.example(adapter.uid, "one0").inputs is None
        assert world.registry.example(adapter.uid, "one5").inputs is not None
        # Those with inputs and those without are merged and rewritten, each with its like.
        for number in range(6, 30):
            await world.adapt(taught(number + 1)[-2:], fit=False)
        await world.editor.remove(TENANT, "words", ["one0", "one5", "two20"])
        assert place.examine() == []
        world.check()


async def test_with_embeddings_and_inputs_lost_only_a_removal_helps(place: Place, backbone: Backbone) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt(taught(6))
        one = world.registry.example(world.registry.adapter(TENANT, "words").uid, "one0")
        assert one.inputs is not None
        place.flip(one.segment)
        place.overwrite(one.inputs, None)
        for options in ({}, {"repair": True}):
            (finding,) = place.examine(lambda name: backbone, **options)
            assert finding.what == "embeddings and inputs of 8 examples"
            assert "restore a backup, or remove the examples" in finding.detail
            assert not finding.repaired
        await world.editor.remove(TENANT, "words", [str(example.id) for example in taught()])
        assert place.examine() == []


async def test_wrong_counts_and_a_live_version_that_is_not_there(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        await world.adapt(taught(6))
        with place.database.writing() as connection:
            connection.execute(update(adapters).values(examples=7, next_version=2, live=5))
        found = {("live version 5", "no_such_version"), ("examples", "wrong_count")}
        found |= {("next version", "number_taken")}
        assert {(one.what, one.code) for one in place.examine()} == found
        assert all(one.repaired for one in place.examine(repair=True))
        assert place.examine() == []
        adapter = world.registry.adapter(TENANT, "words")
        assert (adapter.live, adapter.examples) == (2, 12)
        outcome = await world.adapt(taught(7))
        assert outcome.revised.version is not None
        assert outcome.revised.version.number == 3


async def test_a_head_of_other_labels_is_found(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        with place.database.writing() as connection:
            connection.execute(update(versions).values(labels=3))
        assert codes(place.examine()) == [("head of version 1", "wrong_labels", False)]


async def test_files_that_nothing_refers_to_are_swept_once_old(place: Place) -> None:
    async with place.world() as world:
        await world.adapt(taught())
        uid = world.registry.adapter(TENANT, "words").uid
        await world.repository.publish(TENANT, uid, [lambda: b"left over"])
        assert place.examine() == []
        assert codes(place.examine(older_than=-60)) == [("files", "unreferenced", False)]
        assert codes(place.examine(older_than=-60, repair=True)) == [("files", "unreferenced", True)]
        world.check()
        assert place.examine(older_than=-60) == []
