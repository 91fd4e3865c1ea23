"""Names and costs of labels, from the command to the head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.adaptation.commands import AdapterFull, AdapterLimits, NothingToFit
from adapters.adaptation.example_editor import Amendment, Feedback
from adapters.adaptation.names.label_names import LabelNameEmbedder, LabelsNotReadable
from adapters.adaptation.options import FitOptions, WeightsLabelUnknown, terms_of, with_options
from adapters.examples.meanings import LabelsInvalid, check_spelling, read_costs, read_meanings, readable
from adapters.examples.target import ExampleError
from adapters.examples.validation import PostedExample
from adapters.registry.errors import UnknownAdapter
from adapters.registry.records import Creation
from tests.support.adapters.adapter_stack import TENANT, World, other_text_export, says, taught, world
from tests.support.models.tiny_backbones import image_export, text_export

pytestmark = pytest.mark.anyio
MEANINGS = {"one": "ba be bi", "two": "tan ten tin"}


def meanings(here: World, name: str = "words") -> dict[str, str]:
    return dict(here.registry.adapter(TENANT, name).meanings)


def labels(here: World, name: str = "words") -> int:
    """Number of labels of the newest version."""
    return here.registry.versions(here.registry.adapter(TENANT, name).uid)[0].labels


def test_names_are_read_as_words() -> None:
    for label, text in [
        ("refund", "refund"),
        ("card_arrival", "card arrival"),
        ("card-arrival.late", "card arrival late"),
        ("orderStatus", "order Status"),
        ("HTTPError", "HTTPError"),
        ("c17", "c17"),
        ("größeÄndern", "größeÄndern"),
        ("___", "___"),
        ("返金", "返金"),
    ]:
        assert readable(label) == text
    assert readable("c17", "a refund") == "a refund"


def test_what_is_said_of_labels_is_normal() -> None:
    assert read_meanings({" b ": None, "cafe\u0301": " cafe\u0301 "}) == {"b": "", "café": "café"}
    assert read_meanings(["b", "a"]) == {"a": "", "b": ""}
    assert read_costs({" b ": 2, "a": 0.5}) == {"a": 0.5, "b": 2.0}
    with pytest.raises(LabelsInvalid, match="twice"):
        read_costs({" a": 1.0, "a": 2.0})
    with pytest.raises(LabelsInvalid, match="twice"):
        read_meanings(["a", " a"])
    with pytest.raises(LabelsInvalid, match="looks like"):
        check_spelling(["refund"], ["ｒefund"])
    with pytest.raises(LabelsInvalid, match=r"1,000 characters") as refused:
        read_meanings({"a/b": "x" * 1_001})
    assert refused.value.errors[0]["pointer"] == "/labels/a~1b"


async def test_an_adapter_knows_its_names_until_others_are_given(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        made = await here.adapt([], meanings=MEANINGS)
        assert made.revised.version is not None
        assert (made.revised.version.number, made.revised.live, made.revised.adapter.examples) == (1, True, 0)
        assert made.revised.adapter.backbone == "tiny-text"
        await here.adapt(taught()[:1])
        await here.editor.feedback(TENANT, "words", Feedback("two", says("two", 50), sampled=True))
        await here.editor.amend(TENANT, "words", "one0", Amendment(excluded=True))
        assert (meanings(here), labels(here)) == (MEANINGS, 2)
        # What is left without examples are the names, and they are fitted again.
        gone = await here.editor.remove(TENANT, "words", None)
        assert gone.live
        assert (meanings(here), labels(here), gone.adapter.examples) == (MEANINGS, 2, 0)
        here.check()
        await here.adapt(taught(), meanings={"three": ""})
        assert (meanings(here), labels(here)) == ({"three": ""}, 2)
        await here.adapt([], meanings={})
        assert meanings(here) == {}


async def test_names_without_a_version_wait_for_it(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        with pytest.raises(NothingToFit, match="only one name"):
            await here.adapt([], meanings={"one": ""})
        with pytest.raises(UnknownAdapter):
            await here.adapt([], meanings={})
        kept = await here.adapt([], meanings={"one": "ba be"}, fit=False)
        assert kept.revised.version is None
        assert meanings(here) == {"one": "ba be"}
        assert (await here.adapt([], meanings=MEANINGS)).revised.live


async def test_names_are_embedded_once_and_dropped_with_their_tenant(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt([], meanings=MEANINGS)
        here.embedded.clear()
        await here.adapt(taught()[:1])
        assert sum(here.embedded) == 1, "only the example is new"
        here.embedded.clear()
        await here.adapt([], meanings={**MEANINGS, "two": "tan"})
        assert sum(here.embedded) == 1, "only one text is new"
        here.writer.names.drop_of(TENANT)
        here.embedded.clear()
        await here.adapt([])
        assert sum(here.embedded) == 2
        await here.eraser.tenant(TENANT)
        assert len(here.writer.names._vectors) == 0


async def test_spellings_of_names_and_examples_are_one(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(), meanings={"three": ""})
        with pytest.raises(LabelsInvalid) as refused:
            await here.adapt([], meanings={"ｏne": ""})
        assert refused.value.code == "label_collision"
        text = says("one", 70)
        outcome = await here.adapt([PostedExample(text, "ｔhree", "x"), PostedExample(says("two", 3), "two")])
        assert [one.code for one in outcome.rejected] == ["label_collision"]
        with pytest.raises(ExampleError, match="looks like"):
            await here.editor.feedback(TENANT, "words", Feedback("ｔhree", text))
        with pytest.raises(ExampleError, match="looks like"):
            await here.editor.amend(TENANT, "words", "one0", Amendment("ｔhree"))


async def test_labels_with_names_count(tmp_path: Path) -> None:
    async with world(tmp_path, limits=AdapterLimits(max_labels=3)) as here:
        await here.adapt(taught(), meanings={"one": "", "three": ""})
        with pytest.raises(AdapterFull):
            await here.adapt([], meanings={"three": "", "four": ""})
        with pytest.raises(AdapterFull):
            await here.adapt([PostedExample(says("one", 60), "four", "x")])
        await here.adapt([], meanings={"four": ""})


async def test_a_cost_is_of_a_label_that_is_known(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        with pytest.raises(WeightsLabelUnknown, match="'three'"):
            await here.adapt(taught(), costs={"one": 2.0, "three": 3.0})
        await here.adapt(taught(), costs={"one": 2.0, "three": 3.0}, meanings={"three": "", "two": ""})
        # The cost waits for the label, whose name is gone.
        await here.adapt([], meanings={})
        adapter = here.registry.adapter(TENANT, "words")
        assert adapter.costs == {"one": 2.0, "three": 3.0}
        await here.editor.remove(TENANT, "words", ["one0"])
        await here.adapt([], weights="balanced", costs={})
        adapter = here.registry.adapter(TENANT, "words")
        assert (adapter.weights, adapter.costs) == ("balanced", {})


async def test_names_move_with_a_rebase_and_stay_in_a_rollback(tmp_path: Path) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt(taught(), meanings=MEANINGS)
        moved = await here.rebaser.rebase(TENANT, "words", "other-text", "always")
        assert (moved.live, meanings(here)) == (True, MEANINGS)
        await here.adapt([], "alone", meanings=MEANINGS)
        moved = await here.rebaser.rebase(TENANT, "alone", "other-text", "always")
        assert (moved.live, moved.adapter.backbone) == (True, "other-text")


async def test_names_of_images_need_a_backbone_that_reads_and_one_that_knows_classes(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        with pytest.raises(LabelsNotReadable, match="tiny-image"):
            await here.adapt([], "things", backbone="tiny-image", meanings=MEANINGS)
    async with world(tmp_path, exports={"tiny-image": image_export(tmp_path)}) as here:
        with pytest.raises(LabelsNotReadable):
            await here.adapt([], "things", backbone="tiny-image", meanings=MEANINGS)


async def test_a_name_of_no_known_token_is_left_out_and_said(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        made = await here.adapt(taught(), meanings={**MEANINGS, "three": "xyzzy"})
        assert made.revised.version is not None
        warned = {one["code"]: one["detail"] for one in made.revised.version.report["warnings"]}
        assert "three" in warned["label_name_unknown"]
        with pytest.raises(NothingToFit, match="knows no word"):
            await here.adapt([], "strange", meanings={"one": "xyzzy", "two": "plugh"})


async def test_what_cannot_be_read_any_more_does_not_keep_an_adapter_from_learning(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(), meanings=MEANINGS)
        terms = terms_of(here.registry.adapter(TENANT, "words"))
        alone = LabelNameEmbedder({"tiny-image": here.batchers["tiny-image"]})
        seen = replace(terms, kind="image", backbone="tiny-image", fingerprint="f")
        read = await alone.read(TENANT, seen)
        assert not read.names.directions
        assert [one["code"] for one in read.warnings] == ["labels_not_readable"]


def test_options_of_a_job_come_back_as_they_were() -> None:
    options = FitOptions(0.9, None, {"one": 2.0}, {"one": ""})
    assert FitOptions.of_job({"promote": "always", **options.to_json()}) == options
    assert FitOptions.of_job({"promote": "always", "weights": "balanced"}) == FitOptions(weights="balanced")


def test_options_that_are_not_given_stay() -> None:
    terms = Creation("b", "f", "text", "classification", True, 0.9, "balanced", MEANINGS, {"one": 2.0})
    assert with_options(terms, FitOptions()) == terms
    assert with_options(terms, FitOptions(meanings={}, costs={})) == replace(terms, meanings={}, costs={})
