"""Adapting, curating and what is on the disk afterwards, with everything real."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest

from adapters.adaptation.adapt import AdaptPipeline
from adapters.adaptation.commands import (
    AdaptCommand,
    AdapterFull,
    AdapterLimits,
    ContractChanged,
    ExamplesRejected,
    FingerprintMismatch,
    NothingToFit,
)
from adapters.adaptation.example_editor import Feedback
from adapters.adaptation.rebase import InputsNotKept
from adapters.examples.validation import PostedExample
from adapters.prediction.predictor import HeadMismatch, NoLiveVersion
from adapters.probe.fit import OneLabel, ProbeConfig, TooCostly
from adapters.registry.errors import UnknownAdapter
from adapters.storage.open import open_store
from adapters.storage.sweeper import sweep
from models.backbone import Backbone, Embedded
from models.batching.batcher import Batcher
from models.preprocess.limits import InputError
from models.spec import UnknownBackbone
from tests.support.adapters.adapter_stack import TENANT, World, other_text_export, says, taught, world
from tests.support.conditions import eventually
from tests.support.models.tiny_backbones import picture, sentence, text_export

pytestmark = pytest.mark.anyio


async def test_what_is_adapted_answers(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        done = await here.adapt(taught())
        assert (done.revised.version and done.revised.version.number, done.revised.live) == (1, True)
        assert done.revised.decision is not None
        texts = [str(one.input) for one in taught()]
        assert await here.labels(texts) == [one.target for one in taught()]
        here.check()
        assert here.outcomes == ["promoted"]


async def test_what_is_stored_is_there_for_the_next_process(tmp_path: Path) -> None:
    texts = [str(one.input) for one in taught()]
    async with world(tmp_path) as here:
        await here.adapt(taught())
        before = await here.predict(texts)
    async with world(tmp_path) as there:
        after = await there.predict(texts)
        assert (after.version, after.items) == (before.version, before.items)
        await there.adapt([PostedExample(says("one", 999), "one")])
        there.check()


async def test_images_and_texts_have_their_own_backbones(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        pictures = [PostedExample(picture(seed), "ab"[seed % 2]) for seed in range(6)]
        done = await here.adapt(pictures, "pictures")
        assert done.revised.adapter.backbone == "tiny-image"
        assert (await here.adapt(taught())).revised.adapter.backbone == "tiny-text"


async def test_known_inputs_are_not_embedded_again(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        here.embedded.clear()
        await here.adapt(taught())
        await here.adapt(taught(), update="replace")
        await here.adapt([])
        assert here.embedded == []
        await here.adapt([*taught(), PostedExample(says("one", 999), "one")])
        assert sum(here.embedded) == 1
        here.check()


async def test_what_another_adapter_of_the_tenant_has_embedded_is_known(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        first = await here.adapt(taught())
        here.embedded.clear()
        await here.adapt(taught(), "again")
        assert here.embedded == []
        texts = [str(one.input) for one in taught()]
        assert await here.labels(texts, "again") == [one.target for one in taught()]
        # Batches are counted once their callers have been answered.
        await asyncio.sleep(0)
        here.embedded.clear()
        await here.pipeline.adapt("somebody-else", AdaptCommand("again", taught()))
        assert sum(here.embedded) == len(taught())
        # Each adapter has its own copy and loses nothing with the other.
        await here.eraser.adapter(TENANT, "words")
        await here.adapt([PostedExample(says("one", 999), "one")], "again")
        await here.adapt(taught())
        here.check()
        assert first.revised.live


async def test_an_embedding_that_is_damaged_elsewhere_is_made_again(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        adapter = here.registry.adapter(TENANT, "words")
        _, examples = here.registry.all_examples(adapter.uid)
        name = examples[0].segment.name
    (path,) = (tmp_path / "artifacts").rglob(name)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    async with world(tmp_path) as there:
        await there.adapt(taught(), "again")
        assert sum(there.embedded) == len(taught())


async def test_nothing_is_left_of_a_refused_adapt(tmp_path: Path) -> None:
    async with world(tmp_path, limits=AdapterLimits(max_examples=10, max_labels=2)) as here:
        with pytest.raises(OneLabel):
            await here.adapt([PostedExample(sentence(seed), "one") for seed in range(3)])
        with pytest.raises(ExamplesRejected):
            await here.adapt([*taught(), PostedExample("", "one")], strict=True)
        with pytest.raises(AdapterFull):
            await here.adapt(taught(6))
        with pytest.raises(AdapterFull):
            await here.adapt([PostedExample(sentence(seed), f"label {seed}") for seed in range(3)])
        with pytest.raises(UnknownBackbone):
            await here.adapt(taught(), backbone="nothing")
        with pytest.raises(UnknownAdapter):
            await here.adapt([])
        assert here.files() == {}
        assert here.registry.adapters(TENANT) == []
        assert here.outcomes == [
            "one_label",
            "examples_rejected",
            "adapter_full",
            "adapter_full",
            "unknown_backbone",
            "unknown_adapter",
        ]


async def test_what_was_fixed_stays(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(), keep_inputs=False)
        for change in ({"task": "multilabel"}, {"backbone": "tiny-image"}, {"keep_inputs": True}):
            with pytest.raises(ContractChanged):
                await here.adapt(taught(), **change)
        with pytest.raises(InputsNotKept):
            await here.rebaser.rebase(TENANT, "words", "tiny-text", "always")


async def test_two_processes_at_one_adapter_lose_nothing(tmp_path: Path, registry_url: str) -> None:
    """Each adapt commits on the revision that it read, or is merged and fitted again."""
    async with world(tmp_path, url=registry_url) as here, world(tmp_path, url=registry_url) as there:
        await here.adapt(taught(1))
        done = await asyncio.gather(
            *(
                process.adapt(
                    [PostedExample(sentence(1000 + 10 * number + index), "one", f"{index}-{number}")]
                )
                for number in range(3)
                for index, process in enumerate((here, there))
            ),
            return_exceptions=True,
        )
        assert not [error for error in done if isinstance(error, BaseException)], done
        assert here.registry.adapter(TENANT, "words").examples == 8
        assert [one.number for one in here.registry.versions(_uid(here))] == [7, 6, 5, 4, 3, 2, 1]
        here.check()


async def test_a_bucket_and_a_shared_database(
    tmp_path: Path, postgres_url: str, s3_url: str, s3_options: dict[str, str]
) -> None:
    store = open_store(s3_url, s3_options)
    async with (
        world(tmp_path, url=postgres_url, store=store) as here,
        world(tmp_path, url=postgres_url, store=store) as there,
    ):
        await here.adapt(taught())
        done = await there.adapt([PostedExample(says("one", 999), "one", "more")])
        assert done.revised.adapter.examples == 9
        await here.editor.remove(TENANT, "words", ["one0", "two3"])
        assert await there.labels([str(taught()[2].input)]) == ["one"]
        assert (await there.catalog.example(TENANT, "words", "more"))[2] == says("one", 999)
        here.check()
        await there.eraser.adapter(TENANT, "words")
        assert here.files() == {}


async def test_two_processes_creating_one_adapter(tmp_path: Path, registry_url: str) -> None:
    async with world(tmp_path, url=registry_url) as here, world(tmp_path, url=registry_url) as there:
        await asyncio.gather(here.adapt(taught(2)), there.adapt(taught(4)[4:]))
        assert here.registry.adapter(TENANT, "words").examples == 8
        here.check()
        assert len(here.files()) == 1


async def test_what_another_process_adapted_is_seen(tmp_path: Path) -> None:
    async with world(tmp_path) as here, world(tmp_path) as there:
        await here.adapt(taught())
        assert (await there.predict(["x"])).version == 1
        done = await here.adapt([], promote="always")
        epoch = done.revised.adapter.epoch
        assert (await there.predict(["x"], min_epoch=epoch)).version == 2


async def test_a_removal_elsewhere_is_noticed_before_the_poll(tmp_path: Path) -> None:
    """The removal takes the head's file along; a process that knows the old alias only asks again."""
    async with world(tmp_path) as here, world(tmp_path) as there:
        await here.adapt(taught())
        assert (await there.aliases.get(TENANT, "words")).version == 1
        await here.editor.remove(TENANT, "words", ["one0"])
        assert (await there.predict(["x"])).version == 2


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144])
async def test_a_cancelled_adapt_is_all_or_nothing(tmp_path: Path, steps: int) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        task = asyncio.ensure_future(here.adapt([PostedExample(says("one", 999), "one", "new")]))
        for _ in range(steps):
            await asyncio.sleep(0.001 if steps > 20 else 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # A commit that has begun ends by itself.
        await asyncio.sleep(0.3)
        adapter = here.registry.adapter(TENANT, "words")
        assert (adapter.examples, adapter.live) in ((8, 1), (9, 2))
        assert (await here.predict(["x"])).version == adapter.live
        sweep(here.store, here.registry, older_than=-1.0)
        here.check()
        assert (await here.adapt([PostedExample(says("two", 998), "two", "newer")])).revised.live
        assert len(here.writer._turns) == 0


async def test_removed_bytes_are_nowhere_on_the_disk(tmp_path: Path) -> None:
    secret = "red green blue " + sentence(5)
    other = "blue blue blue " + sentence(6)
    async with world(tmp_path, store=open_store(str(tmp_path / "files"))) as here:
        await here.adapt([PostedExample(secret, "one", "secret"), *taught()])
        await here.adapt([PostedExample(other, "one", "secret")])
        assert not _holds(tmp_path / "files", secret)
        assert _holds(tmp_path / "files", other)
        await here.editor.remove(TENANT, "words", ["secret"])
        assert not _holds(tmp_path / "files", other)
        assert _holds(tmp_path / "files", str(taught()[3].input))
        here.check()
        record, text = (await here.catalog.example(TENANT, "words", "two1"))[1:]
        assert (record.target, text) == ("two", taught()[3].input)
        await here.eraser.adapter(TENANT, "words")
        assert here.files() == {}


async def test_a_corrected_label_changes_the_answer(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(2))
        first = str(taught(2)[0].input)
        assert await here.labels([first]) == ["one"]
        done = await here.editor.feedback(TENANT, "words", Feedback("two", input=first))
        assert done.live
        assert await here.labels([first]) == ["two"]
        assert done.adapter.examples == 4
        with pytest.raises(InputError):
            await here.editor.feedback(TENANT, "words", Feedback("two", input=picture(1)))
        here.check()


async def test_texts_that_are_known_take_turns_at_being_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces and on a thread that gives way, so that many long ones hold nothing else up."""
    looks: list[tuple[int, int]] = []
    truncated = Backbone.truncated

    def seen(backbone: Backbone, inputs: Sequence[bytes | str]) -> frozenset[int]:
        looks.append((sum(map(len, inputs)), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return truncated(backbone, inputs)

    async with world(tmp_path) as here:
        long = [PostedExample(f"ba{' be' * 9_000} {number}", "one", f"long{number}") for number in range(6)]
        await here.adapt([*taught(), *long])
        with monkeypatch.context() as patch:
            patch.setattr(Backbone, "truncated", seen)
            done = await here.adapt([*taught(), *long])
        assert done.revised.truncated == 6
        assert max(size for size, _ in looks) <= 50_000
        assert len(looks) >= 6
        assert min(niceness for _, niceness in looks) > os.getpriority(os.PRIO_PROCESS, 0)


async def test_a_rebase_moves_everything(tmp_path: Path) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt(taught())
        await here.adapt(
            [PostedExample(says("one", 999), "one", "more"), PostedExample("ba " * 90, "one", "long")]
        )
        before = here.files()
        done = await here.rebaser.rebase(TENANT, "words", "other-text", "always")
        assert (done.adapter.backbone, done.live, done.truncated) == ("other-text", True, 1)
        assert done.version is not None
        assert done.version.backbone == "other-text"
        answer = await here.predict([says("one", 999)], explain=1)
        assert answer.version == 3
        (item,) = answer.items
        assert not isinstance(item, InputError)
        assert item.nearest is not None
        assert item.nearest[0].id == "more"
        # The versions before still answer, each with its own backbone.
        assert (await here.predict(["x"], version=1)).version == 1
        await here.adapt([PostedExample(says("two", 998), "two")])
        assert before != here.files()
        here.check()


async def test_another_backbone_under_the_same_name_is_refused_until_a_rebase(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
    export = other_text_export(tmp_path)
    async with world(tmp_path, exports={"tiny-text": export}) as there:
        with pytest.raises(HeadMismatch):
            await there.predict(["x"])
        with pytest.raises(FingerprintMismatch):
            await there.adapt([PostedExample(says("one", 999), "one")])
        with pytest.raises(FingerprintMismatch):
            await there.editor.feedback(TENANT, "words", Feedback("one", input="x"))
        # Changes that need no embedding still work.
        await there.editor.remove(TENANT, "words", ["one0"])
        done = await there.rebaser.rebase(TENANT, "words", "tiny-text", "if_better")
        assert done.live
        assert await there.labels([str(taught()[1].input)]) == ["two"]


async def test_without_a_live_version_there_is_no_answer(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(), fit=False)
        with pytest.raises(NoLiveVersion):
            await here.predict(["x"])
        assert here.outcomes == ["stored"]
        await here.editor.remove(TENANT, "words", ["one0"])
        with pytest.raises(NoLiveVersion):
            await here.predict(["x"])


def wrong(first: int, count: int) -> list[PostedExample]:
    """Examples of two classes, each with the other's label."""
    return [
        PostedExample(says(label, seed), other, f"wrong-{label}{seed}")
        for seed in range(first, first + count)
        for label, other in (("one", "two"), ("two", "one"))
    ]


async def test_examples_that_disagree_are_withheld_until_they_are_corrected(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(20))
        agrees = await here.adapt([PostedExample(says("one", 900), "one", "right")])
        assert agrees.revised.live
        done = await here.adapt(wrong(100, 10))
        assert done.revised.decision is not None
        assert (done.revised.live, done.revised.decision.reason) == (False, "disagrees")
        assert done.revised.adapter.live == 2
        assert done.revised.version is not None
        told = done.revised.version.report["promotion"]["agreement"]
        assert (told["examples"], told["agreed"] < 0.2 < told["expected"]) == (21, True)
        # They stay with the adapter, and in the way, until they are corrected.
        assert not (await here.adapt([PostedExample(says("two", 901), "two", "more")])).revised.live
        corrected = [
            PostedExample(one.input, "one" if one.target == "two" else "two", one.id)
            for one in wrong(100, 10)
        ]
        assert (await here.adapt(corrected)).revised.live


async def test_whoever_insists_is_not_asked_again(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(20))
        assert not (await here.adapt(wrong(100, 10))).revised.live
        assert (await here.adapt([], promote="always")).revised.live
        assert (await here.adapt([PostedExample(says("one", 900), "one", "right")])).revised.live
    (tmp_path / "by-hand").mkdir()
    async with world(tmp_path / "by-hand") as there:
        await there.adapt(taught(20))
        assert not (await there.adapt(wrong(100, 10))).revised.live
        there.registry.promote(there.registry.adapter(TENANT, "words").uid, 2)
        assert (await there.adapt([PostedExample(says("one", 900), "one", "right")])).revised.live


async def test_after_a_removal_what_is_worse_does_not_follow_the_live_version(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(20))
        await here.adapt(
            [*wrong(100, 20), PostedExample(says("one", 900), "one", "leaves")], promote="always"
        )
        done = await here.editor.remove(TENANT, "words", ["leaves"])
        assert done.decision is not None
        assert (done.live, done.decision.reason) == (False, "disagrees")
        assert done.adapter.live == 1
        assert (await here.predict(["ba be"])).version == 1
        ids = [str(one.id) for one in wrong(100, 20)]
        assert (await here.editor.remove(TENANT, "words", ids)).live
        # Nothing is left that had not learned from this one.
        last = await here.editor.remove(TENANT, "words", ["one0"])
        assert last.decision is not None
        assert (last.live, last.decision.reason) == (True, "example_removed")


async def test_lost_evidence_does_not_keep_from_adapting(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        done = await here.adapt(taught())
        version = done.revised.version
        assert version is not None
        assert version.evidence is not None
        here.store.delete(TENANT, done.revised.adapter.uid, [version.evidence])
        assert (await here.adapt([])).revised.live


def large(seed: int) -> PostedExample:
    """A picture of a few hundred kilobytes."""
    return PostedExample(picture(seed) + bytes(400_000), "ab"[seed % 2], f"p{seed}")


async def test_large_inputs_are_published_while_they_are_embedded(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        pictures = [large(seed) for seed in range(6)]
        await here.adapt(pictures, "pictures")
        here.check("pictures")
        for seed in (0, 5):
            assert (await here.catalog.example(TENANT, "pictures", f"p{seed}"))[2] == pictures[seed].input
        # One of them cannot be read: the file that holds it is not kept.
        broken = PostedExample(bytes(2_000_000), "a", "broken")
        done = await here.adapt([*pictures[:2], large(7), broken, large(8)], "pictures")
        assert [one.code for one in done.rejected] == ["undecodable_image"]
        here.check("pictures")
        assert (await here.catalog.example(TENANT, "pictures", "p8"))[2] == large(8).input


async def test_nothing_is_left_of_large_inputs_that_were_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        with pytest.raises(OneLabel):
            await here.adapt([large(seed) for seed in (0, 2, 4)], "pictures")
        task = asyncio.ensure_future(here.adapt([large(seed) for seed in range(6)], "pictures"))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # A commit that had begun runs to its end.
        for _ in range(3_000):
            if not here.files() or here.registry.adapters(TENANT):
                break
            await asyncio.sleep(0.01)
        if here.registry.adapters(TENANT):
            here.check("pictures")


async def test_two_processes_with_large_inputs_leave_no_file_behind(tmp_path: Path) -> None:
    async with world(tmp_path) as here, world(tmp_path) as there:
        await asyncio.gather(
            *(
                process.adapt([large(seed) for seed in range(first, first + 4)], "pictures")
                for process, first in ((here, 0), (there, 4), (here, 8), (there, 12))
            )
        )
        assert here.registry.adapter(TENANT, "pictures").examples == 16
        here.check("pictures")
        assert len(here.files()) == 1


async def test_an_input_that_went_meanwhile_is_embedded_again(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        known = str(taught()[0].input)
        again, _ = await asyncio.gather(
            here.adapt([PostedExample(known, "one", "again")]),
            here.editor.remove(TENANT, "words", ["one0"]),
        )
        assert again.revised.version is not None
        assert {one.id for one in here.registry.examples(_uid(here))} == {
            *(str(one.id) for one in taught()[1:]),
            "again",
        }
        here.check()


async def test_an_adapter_without_examples_has_nothing_to_rebase(tmp_path: Path) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt(taught())
        await here.editor.remove(TENANT, "words", None)
        with pytest.raises(NothingToFit):
            await here.rebaser.rebase(TENANT, "words", "other-text", "always")


async def test_examples_are_erased_even_if_the_others_take_too_long_to_fit(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
    hasty = AdapterLimits(probe=ProbeConfig(limit_seconds=1e-9))
    async with world(tmp_path, limits=hasty) as here:
        with pytest.raises(TooCostly):
            await here.adapt([PostedExample(says("one", 999), "one")])
        done = await here.editor.remove(TENANT, "words", ["one0"])
        assert (done.committed.removed, done.committed.erased, done.adapter.live) == (1, (1,), None)
        here.check()


def _uid(here: World) -> str:
    return here.registry.adapter(TENANT, "words").uid


def _holds(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


class HeldUp:
    """Embeds as the batcher does, once it is let go."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.backbone = batcher.backbone
        self.asked: Counter[Hashable] = Counter()
        self.tasks: list[asyncio.Task[object] | None] = []  # that asked, in order
        self.let_go = asyncio.Event()

    async def embed(
        self, inputs: Sequence[bytes | str], *, bulk: bool = False, source: Hashable = None
    ) -> Embedded:
        """See Batcher.embed. Counts who asks."""
        self.asked[source] += 1
        self.tasks.append(asyncio.current_task())
        await self.let_go.wait()
        return await self._batcher.embed(inputs, bulk=bulk, source=source)


async def test_a_burst_of_one_tenant_is_worked_on_by_fours(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        held = HeldUp(here.batchers["tiny-text"])
        pipeline = AdaptPipeline(here.writer, {"tiny-text": held})
        burst = [
            asyncio.create_task(pipeline.adapt(TENANT, AdaptCommand(f"words{number}", taught())))
            for number in range(6)
        ]
        await eventually(lambda: held.asked[TENANT] >= 4)
        other = asyncio.create_task(pipeline.adapt("other", AdaptCommand("words", taught())))
        await eventually(lambda: held.asked["other"] == 1)
        assert held.asked == {TENANT: 4, "other": 1}
        # Any four may be the first: the database answers in any order.
        gone = held.tasks[0]
        assert gone in burst
        gone.cancel()
        await eventually(lambda: held.asked[TENANT] == 5)
        held.let_go.set()
        done = await asyncio.gather(other, *(one for one in burst if one is not gone))
        assert all(one.revised.live for one in done)
