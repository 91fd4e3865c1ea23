"""Rollbacks by hand hold, versions come back with their examples, and what is set aside teaches nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from adapters.adaptation.commands import AdapterFull, AdapterLimits, AdaptOutcome
from adapters.adaptation.example_editor import Amendment, Feedback
from adapters.adaptation.promotion.decision import as_asked
from adapters.adaptation.revision.writer import RevisionWriter
from adapters.adaptation.rollback import CannotRestore, Missing, Restorer, plan_rollback
from adapters.examples.target import ExampleError, Target
from adapters.examples.validation import PostedExample
from adapters.probe.fit import OneLabel
from adapters.registry.database import Database
from adapters.registry.errors import AliasMoved, RevisionMoved, UnknownExample, UnknownVersion
from adapters.registry.records import AdapterRecord, ExampleRecord, ExampleWrite
from adapters.registry.registry import Registry
from adapters.registry.statements.repair import drop_versions
from adapters.storage.artifact import Artifact
from adapters.storage.formats import Evidence
from adapters.storage.open import open_store
from adapters.storage.sweeper import orphans
from tests.support.adapters.adapter_stack import TENANT, World, other_text_export, says, taught, world
from tests.support.adapters.records import append, change, create, example, refit, version
from tests.support.models.tiny_backbones import text_export

pytestmark = pytest.mark.anyio


def three_versions(registry: Registry) -> AdapterRecord:
    """An adapter with three versions, each with an example of its own: a, b, c."""
    first = create(registry, ids=("a",))
    second = append(registry, first.adapter, "b")
    return append(registry, second.adapter, "c").adapter


# Rows that the registry keeps, in both databases.


def test_any_but_the_newest_version_holds_until_it_is_the_newest_again(registry: Registry) -> None:
    adapter = three_versions(registry)
    assert adapter.rolled_back_at is None
    held = registry.promote(adapter.uid, 1).adapter
    assert held.rolled_back_at is not None
    assert registry.adapter("acme", "pets") == held
    assert registry.promote(adapter.uid, 1).adapter == held, "said twice, it is as said once"
    forward = registry.promote(adapter.uid, 2).adapter
    assert forward.rolled_back_at is not None
    assert registry.promote(adapter.uid, 3).adapter.rolled_back_at is None


def test_a_version_can_be_held_where_it_is(registry: Registry) -> None:
    adapter = three_versions(registry)
    withheld = refit(registry, adapter, promote=False).adapter
    assert (withheld.live, withheld.rolled_back_at) == (3, None)
    held = registry.promote(adapter.uid, 3).adapter
    assert (held.live, held.rolled_back_at is None) == (3, False)
    assert held.epoch > withheld.epoch


def test_a_version_fitted_since_the_rollback_lifts_it_whatever_came_behind(registry: Registry) -> None:
    held = registry.promote(three_versions(registry).uid, 1).adapter
    for _ in range(2):
        held = refit(registry, held, promote=False).adapter
        assert (held.live, held.rolled_back_at is None) == (1, False)
    assert registry.promote(held.uid, 4).adapter.standing == (4, None)


def test_a_commit_that_is_promoted_lifts_it(registry: Registry) -> None:
    held = registry.promote(three_versions(registry).uid, 1).adapter
    assert refit(registry, held).adapter.standing == (4, None)


def test_what_moves_back_by_itself_holds_nothing(registry: Registry) -> None:
    adapter = three_versions(registry)
    moved = registry.commit(replace(change(adapter), version=version(), fallback=1))
    assert moved.adapter.standing == (1, None)


def test_a_rollback_that_was_not_seen_sends_a_commit_back(registry: Registry) -> None:
    seen = three_versions(registry)
    held = registry.promote(seen.uid, 1).adapter
    again = replace(change(seen), version=version(), promote=True, standing=seen.standing)
    with pytest.raises(RevisionMoved):
        registry.commit(again)
    assert registry.adapter("acme", "pets") == held
    registry.commit(replace(again, standing=held.standing))


def test_what_a_removal_leaves_live_is_held_while_there_is_something_older(registry: Registry) -> None:
    adapter = three_versions(registry)
    held = registry.promote(adapter.uid, 2).adapter
    fewer = replace(change(held), removals=("b",), version=version(), fallback=1, standing=held.standing)
    done = registry.commit(fewer)
    assert (done.adapter.live, done.adapter.rolled_back_at) == (1, held.rolled_back_at)
    assert (done.gone, done.erased) == ((2, 3), (2, 3))
    nothing = registry.commit(replace(change(done.adapter), removals=("a",)))
    assert nothing.adapter.standing == (None, None)


def test_a_repair_does_not_bring_back_what_was_rolled_back(registry: Registry, registry_url: str) -> None:
    adapter = three_versions(registry)
    registry.promote(adapter.uid, 2)
    database = Database(registry_url)
    with database.writing() as connection:
        drop_versions(connection, adapter.uid, {2})
    held = registry.adapter("acme", "pets")
    assert (held.live, held.rolled_back_at is None) == (1, False)
    with database.writing() as connection:
        drop_versions(connection, adapter.uid, {1})
    database.close()
    assert registry.adapter("acme", "pets").standing == (3, None)


def aside(name: str, segment: Artifact, row: int = 0) -> ExampleWrite:
    return replace(example(name, segment, row), excluded=True)


def test_set_aside_examples_are_kept_listed_and_counted(registry: Registry) -> None:
    adapter = three_versions(registry)
    (kept,) = [one for one in registry.examples(adapter.uid) if one.id == "b"]
    done = registry.commit(replace(change(adapter), upserts=(aside("b", kept.segment, kept.row),)))
    assert (done.replaced, done.adapter.examples, done.adapter.live) == (1, 3, 3)
    found = registry.example(adapter.uid, "b")
    assert found == replace(kept, excluded=True), "nothing else of it has changed, nor when it came"
    assert [one.id for one in registry.examples(adapter.uid, excluded=True)] == ["b"]
    assert [one.id for one in registry.examples(adapter.uid, excluded=False)] == ["a", "c"]
    assert len(registry.examples(adapter.uid)) == 3


def test_erasing_takes_the_versions_that_learned_from_it_and_no_others(registry: Registry) -> None:
    adapter = three_versions(registry)
    place = registry.example(adapter.uid, "b")
    done = registry.commit(
        replace(change(adapter), upserts=(aside("b", place.segment, place.row),), version=version())
    )
    assert done.version is not None
    assert done.version.number == 4
    after = append(registry, done.adapter, "d").adapter
    # Still the same since it was set aside first.
    after = registry.commit(replace(change(after), upserts=(aside("b", place.segment, place.row),))).adapter
    assert [one.number for one in registry.versions_without(adapter.uid, ["b"])] == [5, 4, 1]
    assert [one.number for one in registry.versions_without(adapter.uid, ["b", "d"])] == [4, 1]
    gone = registry.commit(replace(change(after), removals=("b",)))
    assert (gone.erased, gone.adapter.live) == ((2, 3), 5)


def test_what_was_learned_before_it_was_set_aside_goes_with_it(registry: Registry) -> None:
    """A fine-tune is recorded long after it has read the examples."""
    adapter = three_versions(registry)
    read = adapter.revision
    place = registry.example(adapter.uid, "b")
    now = registry.commit(replace(change(adapter), upserts=(aside("b", place.segment, place.row),))).adapter
    late = registry.commit(replace(change(now), version=replace(version(), revision=read)))
    assert late.version is not None
    assert late.version.revision == read < late.adapter.revision
    assert registry.commit(replace(change(late.adapter), removals=("b",))).erased == (2, 3, 4)


def test_an_always_from_before_a_person_went_back_gives_way(registry: Registry) -> None:
    adapter = three_versions(registry)
    before, now = adapter.created_at, adapter.created_at + timedelta(hours=1)
    assert as_asked("always", before, adapter) == "always"
    held = registry.promote(adapter.uid, 1).adapter
    restored = registry.commit(replace(change(held), fallback=2, restores=True)).adapter
    assert restored.standing == (2, None)
    for gone_back in (held, restored):
        assert as_asked("always", before, gone_back) == "if_better"
        assert as_asked("always", now, gone_back) == "always"
        assert as_asked("never", before, gone_back) == "never"


# Restoring a version's examples.


def kept(name: str, target: Target = "x", *, excluded: bool = False, digest: str = "") -> ExampleRecord:
    place = Artifact("0" * 64, 1, "0" * 16), 0, None
    return ExampleRecord(name, digest or f"{name:0>64}", target, *place, datetime.now(UTC), excluded=excluded)


def proof(*ids: str, targets: tuple[Target, ...] = ()) -> Evidence:
    scores = np.ones(len(ids), np.float32)
    return Evidence(ids, tuple(f"{one:0>64}" for one in ids), targets or ("x",) * len(ids), scores)


def test_only_what_differs_is_changed() -> None:
    here = [
        kept("a"),
        kept("b", excluded=True),
        kept("c", "y"),
        kept("d", "y", excluded=True),
        kept("e"),
        kept("f", excluded=True),
    ]
    found = plan_rollback(here, proof("a", "b", "c", "d"))
    assert {one.id: (one.target, one.excluded) for one in found.changed} == {
        "b": ("x", False),
        "c": ("x", False),
        "d": ("x", False),
        "e": ("x", True),
    }
    assert (found.taken_back, found.relabelled, found.set_aside, found.in_use) == (2, 2, 1, 4)
    assert found.missing == []


def test_what_is_not_kept_or_has_another_input_is_named() -> None:
    found = plan_rollback([kept("a"), kept("b", digest="f" * 64)], proof("a", "b", "c"))
    assert found.missing == [Missing("b", "other_input"), Missing("c", "not_kept")]
    assert [(one.id, one.excluded) for one in found.changed] == [("b", True)]


@pytest.mark.parametrize("targets", [(("m", "n"), ()), (1.5, -2.0)])
def test_targets_of_every_task_come_back(targets: tuple[Target, ...]) -> None:
    now: Target = 7.0 if isinstance(targets[0], float) else ("n",)
    found = plan_rollback([kept("a", now), kept("b", now)], proof("a", "b", targets=targets))
    assert [one.target for one in found.changed] == list(targets)


def test_whether_it_was_measured_on_comes_back() -> None:
    evidence = replace(proof("a"), sampled=(False,))
    assert [one.sampled for one in plan_rollback([kept("a")], evidence).changed] == [False]
    assert plan_rollback([replace(kept("a"), sampled=False)], proof("a")).changed == []


# The flows.


WRONG = [PostedExample(says("one", 100 + seed), "two", f"wrong{seed}") for seed in range(4)]


async def rolled_back(here: World) -> AdapterRecord:
    """Version 1 is live again, after a second one learned from wrong examples."""
    await here.adapt(taught())
    await here.adapt(WRONG, promote="always")
    return await here.catalog.promote(TENANT, "words", 1, None)


def reason(done: AdaptOutcome) -> str:
    decision = done.revised.decision
    assert decision is not None
    return decision.reason


def one(seed: int = 500) -> PostedExample:
    return PostedExample(says("one", seed), "one", f"more{seed}")


async def test_after_a_rollback_every_new_version_is_withheld(tmp_path: Path) -> None:
    other = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=other) as here:
        await rolled_back(here)
        withheld = await here.adapt([one()])
        assert (reason(withheld), withheld.revised.live) == ("rolled_back", False)
        assert withheld.revised.version is not None
        assert withheld.revised.version.report["promotion"]["reason"] == "rolled_back"
        told = await here.editor.feedback(TENANT, "words", Feedback("one", says("one", 501)))
        by_id = await here.editor.feedback(TENANT, "words", Feedback("one", id="one0"))
        amended = await here.editor.amend(TENANT, "words", "wrong0", Amendment("one"))
        fewer = await here.editor.remove(TENANT, "words", ["wrong1"])
        moved = await here.rebaser.rebase(TENANT, "words", "other-text", "if_better")
        for done in (told, by_id, amended, fewer, moved):
            assert done.decision is not None
            assert (done.decision.reason, done.adapter.live) == ("rolled_back", 1)
        everything = await here.adapt(taught(5), update="replace")
        assert (reason(everything), everything.revised.adapter.live) == ("rolled_back", 1)
        assert "withheld" in here.outcomes
        here.check()


async def test_always_and_a_promotion_lift_it(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await rolled_back(here)
        assert reason(await here.adapt([one(1)], promote="never")) == "never"
        lifted = await here.adapt([one(2)], promote="always")
        assert (lifted.revised.live, lifted.revised.adapter.rolled_back_at) == (True, None)
        assert reason(await here.adapt([one(3)])) != "rolled_back"
        await here.catalog.promote(TENANT, "words", 1, None)
        withheld = await here.adapt([one(4)])
        assert reason(withheld) == "rolled_back"
        assert withheld.revised.version is not None
        await here.catalog.promote(TENANT, "words", withheld.revised.version.number, None)
        assert (await here.adapt([one(5)])).revised.live


async def test_a_rollback_during_an_adapt_is_not_lost(tmp_path: Path) -> None:
    """Another process commits between the decision and its commit."""
    async with world(tmp_path) as here, world(tmp_path) as there:
        await here.adapt(taught())
        await here.adapt([one(1)], promote="always")
        uid = here.registry.adapter(TENANT, "words").uid
        moved: list[int] = []

        def roll_back(stage: str, seconds: float) -> None:
            if stage == "fit" and not moved:
                moved.append(1)
                there.registry.promote(uid, 1)

        here.pipeline.writer = RevisionWriter(
            here.repository,
            here.writer.candidates._fitter,
            here.heads,
            here.writer.names,
            AdapterLimits(),
            roll_back,
        )
        done = await here.adapt([one(2)])
        assert moved == [1]
        assert (reason(done), done.revised.adapter.live) == ("rolled_back", 1)
        assert done.revised.version is not None
        assert done.revised.version.number == 3
        here.check()


async def test_rollbacks_beside_adapts_of_two_processes_hold(tmp_path: Path) -> None:
    async with world(tmp_path) as here, world(tmp_path) as there:
        await here.adapt(taught())
        await here.adapt([one(1)], promote="always")
        for number in range(4):
            adapts = [place.adapt([one(10 + 10 * number + at)]) for at, place in enumerate((here, there))]
            moving = there.catalog.promote(TENANT, "words", 1, None)
            await asyncio.gather(*adapts, moving)
            now = here.registry.adapter(TENANT, "words")
            newest = max(version.number for version in here.registry.versions(now.uid))
            assert (now.live, now.rolled_back_at is None) == (1, False)
            assert (await here.adapt([one(1_000 + number)])).revised.adapter.live == 1
            await here.catalog.promote(TENANT, "words", newest + 1, None)


async def test_a_removal_of_what_the_live_version_learned_leaves_an_older_one_or_the_new_one(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        await here.adapt([one(1)], promote="always")
        await here.adapt(WRONG, promote="always")
        await here.catalog.promote(TENANT, "words", 2, None)
        fewer = await here.editor.remove(TENANT, "words", ["more1"])
        assert fewer.decision is not None
        assert (fewer.decision.reason, fewer.adapter.live) == ("rolled_back", 1)
        assert fewer.adapter.rolled_back_at is not None
        # Nothing older is left: what is left of the examples answers, and nothing is held any more.
        last = await here.editor.remove(TENANT, "words", ["one0"])
        assert (last.live, last.adapter.rolled_back_at) == (True, None)
        here.check()


async def test_a_restored_version_has_its_examples_and_later_ones_are_learned_beside_them(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as here:
        await rolled_back(here)
        await here.editor.amend(TENANT, "words", "one0", Amendment("two", fit=False))
        await here.editor.amend(TENANT, "words", "one1", Amendment(excluded=True, fit=False))
        done = await Restorer(here.writer).restore(TENANT, "words", 1)
        found = done.rollback
        assert (found.in_use, found.set_aside, found.taken_back, found.relabelled) == (8, 4, 1, 1)
        assert done.adapter.standing == (1, None)
        assert (done.revised.version, done.adapter.examples) == (None, 12)
        examples = here.registry.examples(done.adapter.uid)
        assert {one.id: one.target for one in examples if not one.excluded} == {
            str(posted.id): posted.target for posted in taught()
        }
        # As soon as it is said, without the wrong ones.
        later = await here.adapt([one()])
        assert (later.revised.live, later.revised.adapter.rolled_back_at) == (True, None)
        texts = [str(posted.input) for posted in taught()]
        assert await here.labels(texts) == [posted.target for posted in taught()]
        assert later.revised.version is not None
        evidence = await here.repository.evidence(later.revised.adapter, later.revised.version.number)
        assert evidence is not None
        assert set(evidence.ids) == {*(str(posted.id) for posted in taught()), "more500"}
        # The same again changes nothing, and what was set aside can be taken back.
        again = await Restorer(here.writer).restore(TENANT, "words", 3)
        assert again.rollback.changed == []
        back = await here.editor.amend(TENANT, "words", "wrong0", Amendment(excluded=False))
        assert back.version is not None
        assert not here.registry.example(back.adapter.uid, "wrong0").excluded
        here.check()


async def test_a_version_of_another_backbone_is_restored_too(tmp_path: Path) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt(taught())
        await here.rebaser.rebase(TENANT, "words", "other-text", "always")
        await here.adapt(WRONG, promote="always")
        done = await Restorer(here.writer).restore(TENANT, "words", 1)
        assert (done.adapter.live, done.adapter.backbone) == (1, "other-text")
        texts = [str(posted.input) for posted in taught()]
        assert await here.labels(texts) == [posted.target for posted in taught()]
        later = await here.adapt([one()])
        assert (later.revised.live, later.revised.adapter.live) == (True, 4)
        assert await here.labels(texts) == [posted.target for posted in taught()]


async def test_the_same_head_comes_of_restored_examples(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        first = await here.adapt(taught())
        await here.adapt(WRONG)
        await Restorer(here.writer).restore(TENANT, "words", 1)
        again = await here.adapt([])
        assert again.revised.version is not None
        assert first.revised.version is not None
        assert again.revised.version.artifact.sha256 == first.revised.version.artifact.sha256


async def test_what_cannot_be_restored(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        restorer = Restorer(here.writer)
        await here.adapt(taught(), promote="always")
        await here.adapt([PostedExample(says("one", 7), "one", "one0"), *taught()[1:4]], update="replace")
        partly = await restorer.restore(TENANT, "words", 1)
        missing = partly.rollback.missing
        assert missing[0] == Missing("one0", "other_input")
        assert {one.reason for one in missing[1:]} == {"not_kept"}
        assert (partly.rollback.in_use, len(missing)) == (3, 5)
        await here.adapt([*WRONG[:1], one()], update="replace")
        with pytest.raises(CannotRestore) as refused:
            await restorer.restore(TENANT, "words", 1)
        assert refused.value.code == "examples_gone"
        with pytest.raises(UnknownVersion):
            await restorer.restore(TENANT, "words", 99)
        adapter = here.registry.adapter(TENANT, "words")
        with pytest.raises(AliasMoved):
            await restorer.restore(TENANT, "words", 2, if_match='"another"')
        (newest, *_) = here.registry.versions(adapter.uid)
        assert newest.evidence is not None
        here.store.delete(TENANT, adapter.uid, [newest.evidence])
        with pytest.raises(CannotRestore) as lost:
            await restorer.restore(TENANT, "words", newest.number)
        assert lost.value.code == "evidence_lost"
        assert here.registry.adapter(TENANT, "words") == adapter


async def test_an_erased_example_takes_its_versions_and_those_without_it_come_back(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        await here.adapt([one()])
        fewer = await here.editor.remove(TENANT, "words", ["more500"])
        assert fewer.committed.erased == (2,)
        with pytest.raises(UnknownVersion):
            await Restorer(here.writer).restore(TENANT, "words", 2)
        assert (await Restorer(here.writer).restore(TENANT, "words", 1)).rollback.missing == []


async def test_set_aside_examples_teach_nothing_and_sent_again_they_do(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        first = await here.adapt(taught())
        await here.adapt(WRONG, promote="always")
        for posted in WRONG:
            fit = posted is WRONG[-1]
            done = await here.editor.amend(TENANT, "words", str(posted.id), Amendment(excluded=True, fit=fit))
        assert done.version is not None
        assert first.revised.version is not None
        assert done.version.artifact.sha256 == first.revised.version.artifact.sha256
        assert (done.adapter.examples, done.live) == (12, True)
        back = await here.adapt(WRONG[:1], fit=False)
        assert (back.revised.committed.replaced, back.revised.committed.added) == (1, 0)
        assert not here.registry.example(done.adapter.uid, "wrong0").excluded
        # Feedback on a stored input changes its example, also when that is excluded.
        await here.editor.feedback(TENANT, "words", Feedback("one", WRONG[1].input, fit=False))
        found = here.registry.example(done.adapter.uid, "wrong1")
        assert (found.target, found.excluded) == ("one", False)
        here.check()


async def test_nothing_else_of_an_example_changes(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt([replace(posted, group="first") for posted in taught()])
        uid = here.registry.adapter(TENANT, "words").uid
        before = here.registry.example(uid, "one0")
        await here.editor.amend(TENANT, "words", "one0", Amendment(excluded=True))
        await here.editor.amend(TENANT, "words", "one0", Amendment(excluded=False))
        assert here.registry.example(uid, "one0") == before
        await here.editor.amend(TENANT, "words", "one0", Amendment(group="second"))
        assert here.registry.example(uid, "one0") == replace(before, group="second")
        await here.editor.amend(TENANT, "words", "one0", Amendment(group=""))
        assert here.registry.example(uid, "one0") == replace(before, group=None)


async def test_amendments_that_cannot_be(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt([*taught(2), PostedExample(says("one", 9), "o\u200bne2", "odd")])
        with pytest.raises(UnknownExample):
            await here.editor.amend(TENANT, "words", "none", Amendment("one"))
        for amendment in (Amendment(5.0), Amendment("tw\u200bo"), Amendment(group="\0")):
            with pytest.raises(ExampleError):
                await here.editor.amend(TENANT, "words", "one0", amendment)
        # A label that is written in another way goes as soon as its last example is set aside.
        await here.editor.amend(TENANT, "words", "odd", Amendment(excluded=True))
        await here.adapt([PostedExample(says("one", 10), "one2", "even")])
        with pytest.raises(ExampleError) as refused:
            await here.editor.amend(TENANT, "words", "odd", Amendment(excluded=False))
        assert refused.value.code == "label_collision"
        await here.editor.amend(TENANT, "words", "odd", Amendment("one2", excluded=False))
        for name in ("two0", "odd", "even"):
            await here.editor.amend(TENANT, "words", name, Amendment(excluded=True, fit=False))
        revision = here.registry.adapter(TENANT, "words").revision
        with pytest.raises(OneLabel):
            await here.editor.amend(TENANT, "words", "two1", Amendment(excluded=True))
        assert here.registry.adapter(TENANT, "words").revision == revision
        await here.editor.amend(TENANT, "words", "two1", Amendment(excluded=True, fit=False))


async def test_limits_count_what_is_set_aside_and_not_its_labels(tmp_path: Path) -> None:
    async with world(tmp_path, limits=AdapterLimits(max_examples=6, max_labels=2)) as here:
        await here.adapt(taught(3))
        for name in ("two0", "two1", "two2"):
            await here.editor.amend(TENANT, "words", name, Amendment(excluded=True, fit=False))
        with pytest.raises(AdapterFull, match="examples"):
            await here.adapt([one()])
        await here.editor.remove(TENANT, "words", ["two0"])
        three = PostedExample(says("two", 50), "three", "three")
        assert (await here.adapt([three])).revised.adapter.examples == 6
        with pytest.raises(AdapterFull, match="labels"):
            await here.editor.amend(TENANT, "words", "two1", Amendment(excluded=False))


async def test_set_aside_examples_survive_a_rebase_and_are_erased_like_others(tmp_path: Path) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt([*taught(), *WRONG], promote="always")
        for posted in WRONG:
            await here.editor.amend(TENANT, "words", str(posted.id), Amendment(excluded=True, fit=False))
        moved = await here.rebaser.rebase(TENANT, "words", "other-text", "always")
        assert moved.version is not None
        evidence = await here.repository.evidence(moved.adapter, moved.version.number)
        assert evidence is not None
        assert len(evidence.ids) == 8
        uid = moved.adapter.uid
        assert [one.id for one in here.registry.examples(uid, excluded=True)] == [
            str(posted.id) for posted in WRONG
        ]
        back = await here.editor.amend(TENANT, "words", "wrong3", Amendment("one", excluded=False))
        assert back.version is not None
        _, example, value = await here.catalog.example(TENANT, "words", "wrong0")
        assert (example.excluded, value) == (True, WRONG[0].input)
        await here.editor.remove(TENANT, "words", ["wrong0"])
        assert "wrong0" not in {one.id for one in here.registry.examples(uid)}
        await here.editor.remove(TENANT, "words", None)
        assert here.registry.examples(uid) == []
        assert here.registry.referenced(uid) == set()
    assert list(orphans(open_store(str(tmp_path / "artifacts")).objects(), lambda uid: set(), -60.0)) == []


@pytest.mark.parametrize("task", ["multilabel", "regression"])
async def test_the_other_tasks_do_it_too(tmp_path: Path, task: str) -> None:
    def target(posted: PostedExample) -> object:
        label = str(posted.target)
        return [label] if task == "multilabel" else float(label == "one")

    right = [replace(posted, target=target(posted)) for posted in taught()]
    wrong = [replace(posted, target=target(posted)) for posted in WRONG]
    async with world(tmp_path) as here:
        first = await here.adapt(right, task=task)
        await here.adapt(wrong, promote="always")
        await here.catalog.promote(TENANT, "words", 1, None)
        more = replace(one(), target=target(one()))
        assert reason(await here.adapt([more])) == "rolled_back"
        other: object = ["one", "two"] if task == "multilabel" else 0.25
        amended = await here.editor.amend(TENANT, "words", "one0", Amendment(other))
        assert amended.decision is not None
        assert amended.decision.reason == "rolled_back"
        done = await Restorer(here.writer).restore(TENANT, "words", 1)
        assert (done.rollback.in_use, done.rollback.set_aside, done.rollback.relabelled) == (8, 5, 1)
        again = await here.adapt([])
        assert again.revised.version is not None
        assert first.revised.version is not None
        assert again.revised.version.artifact.sha256 == first.revised.version.artifact.sha256
        with pytest.raises(ExampleError):
            await here.editor.amend(TENANT, "words", "one0", Amendment("one"))


async def test_another_process_sees_it_at_once(tmp_path: Path) -> None:
    async with world(tmp_path) as here, world(tmp_path) as there:
        await here.adapt(taught())
        await there.adapt(WRONG, promote="always")
        texts = [str(posted.input) for posted in taught()]
        moved = await here.catalog.promote(TENANT, "words", 1, None)
        assert (await there.predict(texts, min_epoch=moved.epoch)).version == 1
        assert reason(await there.adapt([one()])) == "rolled_back"
        restored = await here.adapt([], promote="always")
        back = await Restorer(there.writer).restore(TENANT, "words", 1)
        assert back.adapter.epoch > restored.revised.adapter.epoch
        assert (await here.predict(texts, min_epoch=back.adapter.epoch)).version == 1
        later = await here.adapt([one(9)])
        assert later.revised.version is not None
        evidence = await there.repository.evidence(later.revised.adapter, later.revised.version.number)
        assert evidence is not None
        assert len(evidence.ids) == 9
