"""Groups, sampling and what is wanted of answers, on their way from a request to the fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.adaptation.commands import ExamplesRejected
from adapters.adaptation.example_editor import Feedback
from adapters.adaptation.options import WeightsNotForTask
from adapters.examples.target import ExampleError
from adapters.examples.validation import PostedExample
from adapters.probe.fit import Dataset, FittedProbe, OneLabel, ProbeConfig
from models.backbone import Backbone
from models.preprocess.limits import InputError
from tests.support.adapters.adapter_stack import TENANT, World, other_text_export, says, taught, world
from tests.support.models.tiny_backbones import text_export

pytestmark = pytest.mark.anyio

UNHEARD = "สวัสดี"


@contextmanager
def watched(here: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Dataset, ProbeConfig]]]:
    """The data that is sent to the fitting process meanwhile."""
    fitter, seen = here.writer.candidates._fitter, []
    fit = fitter.fit

    async def fitting(dataset: Dataset, config: ProbeConfig, *, tenant: str) -> FittedProbe:
        seen.append((dataset, config))
        return await fit(dataset, config, tenant=tenant)

    with monkeypatch.context() as patch:
        patch.setattr(fitter, "fit", fitting)
        yield seen


def grouped(count: int = 4) -> list[PostedExample]:
    """Examples of two groups, the second half of each label learned from only."""
    return [
        replace(one, group=f"g{row % 4 // 2}", sampled=row < count) for row, one in enumerate(taught(count))
    ]


def kept(here: World, name: str = "words") -> dict[str, tuple[str | None, bool]]:
    """Group and sampling by example."""
    uid = here.registry.adapter(TENANT, name).uid
    return {one.id: (one.group, one.sampled) for one in here.registry.all_examples(uid)[1]}


async def test_a_fit_knows_groups_sampling_and_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted = grouped()
    ungrouped = PostedExample(says("one", 99), "one", "alone")
    async with world(tmp_path) as here:
        with watched(here, monkeypatch) as seen:
            await here.adapt([*posted, ungrouped], answer_accuracy=0.8, weights="balanced")
        ((dataset, config),) = seen
        expected = {one.input: (one.group or "", one.sampled) for one in [*posted, ungrouped]}
        digests = {one.digest: one.id for one in here.registry.all_examples(_uid(here))[1]}
        names = {one.id: one.input for one in [*posted, ungrouped]}
        rows = zip(dataset.digests, dataset.groups, dataset.sampled, strict=True)
        found = {names[digests[digest]]: (group, sampled) for digest, group, sampled in rows}
        assert found == expected
        assert (config.answer_accuracy, config.balanced) == (0.8, True)
        assert kept(here)["alone"] == (None, True)


def _uid(here: World) -> str:
    return here.registry.adapter(TENANT, "words").uid


async def test_another_group_of_a_known_example_is_a_replacement(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        revised = (await here.adapt(grouped())).revised
        assert (revised.committed.added, revised.committed.replaced) == (0, 8)
        assert kept(here) == {one.id: (one.group, one.sampled) for one in grouped()}
        here.check()


async def test_feedback_is_learned_from_only_unless_it_says_otherwise(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        correction = says("one", 50)
        await here.editor.feedback(TENANT, "words", Feedback("two", correction, group="g"))
        await here.editor.feedback(TENANT, "words", Feedback("two", says("two", 51), sampled=True))
        added = {name: found for name, found in kept(here).items() if len(name) == 64}
        assert sorted(added.values(), key=str) == [("g", False), (None, True)]
        with pytest.raises(ExampleError, match="256") as refused:
            await here.editor.feedback(TENANT, "words", Feedback("two", says("one", 52), group=""))
        assert refused.value.code == "group_invalid"


async def test_a_corrected_example_keeps_its_group_and_its_sampling(tmp_path: Path) -> None:
    posted = grouped()
    async with world(tmp_path) as here:
        await here.adapt(posted)
        told = Feedback("two", id="one0", group="another", sampled=False)
        await here.editor.feedback(TENANT, "words", told)
        told = Feedback("one", posted[-1].input, group="another", sampled=True)
        await here.editor.feedback(TENANT, "words", told)
        assert kept(here) == {one.id: (one.group, one.sampled) for one in posted}


async def test_removing_and_rebasing_leave_groups_and_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted = grouped()
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt(posted, answer_accuracy=0.7, weights="balanced")
        await here.editor.remove(TENANT, "words", ["two0"])
        with watched(here, monkeypatch) as seen:
            done = await here.rebaser.rebase(TENANT, "words", "other-text", "always")
        left = {one.id: (one.group, one.sampled) for one in posted if one.id != "two0"}
        assert kept(here) == left
        ((dataset, config),) = seen
        assert sorted(dataset.groups) == sorted(group or "" for group, _ in left.values())
        assert sorted(dataset.sampled) == sorted(sampled for _, sampled in left.values())
        assert (config.answer_accuracy, config.balanced) == (0.7, True)
        assert (done.adapter.answer_accuracy, done.adapter.weights) == (0.7, "balanced")


async def test_what_is_wanted_stays_until_something_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(), answer_accuracy=0.8)
        with watched(here, monkeypatch) as seen:
            await here.adapt([])
            await here.adapt([], weights="balanced")
            await here.editor.feedback(TENANT, "words", Feedback("one", says("one", 50)))
            await here.adapt([], answer_accuracy=0.9, fit=False)
            await here.adapt([])
            await here.adapt([], answer_accuracy=0.95, weights="none")
        wanted = [(config.answer_accuracy, config.balanced) for _, config in seen]
        assert wanted == [(0.8, False), (0.8, True), (0.8, True), (0.9, True), (0.95, False)]


async def test_a_fit_that_fails_changes_nothing_of_what_is_wanted(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(), answer_accuracy=0.8)
        with pytest.raises(OneLabel):
            await here.adapt(taught()[::2], answer_accuracy=0.6, weights="balanced", update="replace")
        adapter = here.registry.adapter(TENANT, "words")
        assert (adapter.answer_accuracy, adapter.weights) == (0.8, "none")


@pytest.mark.parametrize(("task", "targets"), [("multilabel", (["one"], [])), ("regression", (1.0, 2.0))])
async def test_weights_are_for_classification(
    tmp_path: Path, task: str, targets: tuple[object, object]
) -> None:
    posted = [PostedExample(says("one", seed), targets[seed % 2]) for seed in range(6)]
    async with world(tmp_path) as here:
        with pytest.raises(WeightsNotForTask) as refused:
            await here.adapt(posted, task=task, weights="balanced")
        assert refused.value.code == "weights_not_for_task"
        assert here.registry.adapters(TENANT) == []
        await here.adapt(posted, task=task, weights="none", answer_accuracy=0.9)
        with pytest.raises(WeightsNotForTask):
            await here.adapt([], weights="balanced")


async def test_a_text_without_a_known_token_teaches_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        done = await here.adapt([*taught(), PostedExample(UNHEARD, "one", "unheard")])
        assert [(one.index, one.code, one.field) for one in done.rejected] == [(8, "no_known_tokens", "text")]
        assert "tiny-text" in done.rejected[0].detail
        assert "unheard" not in kept(here)
        for told in (PostedExample(UNHEARD, "one"), PostedExample(f"{UNHEARD} {UNHEARD}", "two")):
            with pytest.raises(ExamplesRejected):
                await here.adapt([told])
        with pytest.raises(InputError) as refused:
            await here.editor.feedback(TENANT, "words", Feedback("one", UNHEARD))
        assert refused.value.code == "no_known_tokens"
        here.check()


async def test_nor_does_one_that_another_adapter_holds_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        with monkeypatch.context() as patch:
            # As an older release took it in.
            patch.setattr(Backbone, "knows_nothing", lambda *arguments: False)
            await here.adapt([*taught(), PostedExample(UNHEARD, "one", "unheard")], "older")
        here.embedded.clear()
        done = await here.adapt([*taught(), PostedExample(UNHEARD, "one", "unheard")])
        assert here.embedded == [], "the embedding is there"
        assert [(one.index, one.code) for one in done.rejected] == [(8, "no_known_tokens")]
        with pytest.raises(InputError) as refused:
            await here.editor.feedback(TENANT, "words", Feedback("one", UNHEARD))
        assert refused.value.code == "no_known_tokens"
        assert "unheard" in kept(here, "older")


async def test_a_rebase_names_the_example_that_the_other_backbone_knows_nothing_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        with monkeypatch.context() as patch:
            patch.setattr(Backbone, "knows_nothing", lambda *arguments: False)
            await here.adapt([*taught(), PostedExample(UNHEARD, "one", "unheard")])
        with pytest.raises(InputError, match="'unheard'") as refused:
            await here.rebaser.rebase(TENANT, "words", "other-text", "always")
        assert refused.value.code == "no_known_tokens"
        here.check()
