"""Files that are published for a change: kept with their rows, and deleted without them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.adaptation.publication import Publication
from adapters.registry.errors import RegistryUnavailable, RevisionMoved
from adapters.registry.records import Change
from tests.support.adapters.adapter_stack import TENANT, World, taught, world
from tests.support.conditions import eventually

pytestmark = pytest.mark.anyio


def stored(here: World) -> set[str]:
    return {found.name for found in here.store.objects()}


async def publish_and_record(here: World, uid: str, write: Callable[[], None]) -> None:
    async with Publication(here.repository, TENANT, uid) as publication:
        await publication.publish([lambda: b"one"])
        await publication.record(write)


async def test_files_are_deleted_after_an_error_and_after_a_refusal(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        uid = (await here.adapt(taught())).revised.adapter.uid
        before = stored(here)

        async def fail() -> None:
            async with Publication(here.repository, TENANT, uid) as publication:
                await publication.publish([lambda: b"one", lambda: b"two"])
                assert {file.name for file in publication.files} == stored(here) - before
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert stored(here) == before

        async def commit() -> None:
            async with Publication(here.repository, TENANT, uid) as publication:
                await publication.publish([lambda: b"one"])
                await publication.commit(Change(TENANT, "words", uid, revision=99))

        with pytest.raises(RevisionMoved):
            await commit()
        assert stored(here) == before


async def test_files_stay_if_their_rows_may_have_been_recorded(tmp_path: Path) -> None:
    def write() -> None:
        raise RegistryUnavailable("The database did not answer.")

    async with world(tmp_path) as here:
        uid = (await here.adapt(taught())).revised.adapter.uid
        before = stored(here)
        with pytest.raises(RegistryUnavailable):
            await publish_and_record(here, uid, write)
        assert len(stored(here) - before) == 1


@pytest.mark.parametrize("refused", [False, True])
async def test_a_caller_that_leaves_does_not_part_files_from_rows(tmp_path: Path, refused: bool) -> None:
    began, told = threading.Event(), threading.Event()

    def write() -> None:
        began.set()
        assert told.wait(10)
        if refused:
            raise RevisionMoved("The adapter changed meanwhile.")

    async with world(tmp_path) as here:
        uid = (await here.adapt(taught())).revised.adapter.uid
        before = stored(here)
        caller = asyncio.create_task(publish_and_record(here, uid, write))
        await asyncio.to_thread(began.wait, 10)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert len(stored(here) - before) == 1
        told.set()
        if refused:
            await eventually(lambda: stored(here) == before)
        else:
            await asyncio.sleep(0.3)
            assert len(stored(here) - before) == 1


async def test_a_caller_that_leaves_while_a_file_is_published_leaves_none(tmp_path: Path) -> None:
    began, told = threading.Event(), threading.Event()

    def encode() -> bytes:
        began.set()
        assert told.wait(10)
        return b"one"

    async with world(tmp_path) as here:
        uid = (await here.adapt(taught())).revised.adapter.uid
        before = stored(here)

        async def publish() -> None:
            async with Publication(here.repository, TENANT, uid) as publication:
                await publication.publish([lambda: b"two"])
                await publication.publish([encode])

        caller = asyncio.create_task(publish())
        await asyncio.to_thread(began.wait, 10)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        told.set()
        await eventually(lambda: not here.repository._tasks)
        assert stored(here) == before
