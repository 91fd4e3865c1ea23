"""Predicting: versions side by side, explanations, and errors before any work."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.examples.validation import PostedExample
from adapters.heads.head import Head
from adapters.prediction.predictor import Loaded
from adapters.prediction.scorer import Prediction, shape
from adapters.registry.errors import UnknownAdapter, UnknownVersion
from adapters.storage.artifact import CorruptArtifact
from models.preprocess.limits import InputError
from models.spec import UnknownBackbone
from tests.support.adapters.adapter_stack import TENANT, says, taught, world
from tests.support.models.tiny_backbones import picture, sentence

pytestmark = pytest.mark.anyio


async def test_errors_stand_in_their_places(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        refused = InputError("invalid_base64", "…")
        inputs = [sentence(1), refused, sentence(2), picture(1), "", sentence(3)]
        items = (await here.predict(inputs)).items  # type: ignore[arg-type]
        codes = [item.code if isinstance(item, InputError) else "" for item in items]
        assert codes == ["", "invalid_base64", "", "wrong_kind", "empty_text", ""]
        for index in (0, 2, 5):
            ((alone),) = (await here.predict([inputs[index]])).items  # type: ignore[list-item]
            together = items[index]
            assert isinstance(alone, Prediction)
            assert isinstance(together, Prediction)
            assert alone.confidence == pytest.approx(together.confidence, abs=1e-5)


async def test_no_input_that_can_be_read_asks_no_backbone(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        here.embedded.clear()
        answer = await here.predict([picture(1)])
        assert isinstance(answer.items[0], InputError)
        assert here.embedded == []


async def test_an_adapter_that_is_not_there_costs_no_batch(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        with pytest.raises(UnknownAdapter):
            await here.predict(["x"])
        await here.adapt(taught())
        here.embedded.clear()
        with pytest.raises(UnknownVersion):
            await here.predict(["x"], version=7)
        assert here.embedded == []
        with pytest.raises(UnknownBackbone):
            await here.predictor.embed(TENANT, "nothing", ["x"])


async def test_a_prediction_reads_no_database(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        await here.aliases.close()
        here.registry.close()
        (tmp_path / "registry.db").unlink()
        assert (await here.predict(["x"])).version == 1


async def test_a_damaged_head_is_no_answer(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        done = await here.adapt(taught())
        assert done.revised.version is not None
        name = done.revised.version.artifact.name
    (path,) = (tmp_path / "artifacts").rglob(name)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    async with world(tmp_path) as there:
        with pytest.raises(CorruptArtifact):
            await there.predict(["x"])
        # It is still the adapter's own matter: others answer.
        await there.adapt(taught(), "other")
        assert (await there.predict(["x"], "other")).version == 1


async def test_the_nearest_examples_are_those_of_the_version(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(3))
        await here.adapt([PostedExample(says("one", 999), "one", "late")])
        await here.adapt([PostedExample(says("one", 0), "two", "one0")], promote="never")

        async def nearest(version: int) -> list[tuple[str, object]]:
            (item,) = (await here.predict([says("one", 0)], version=version, explain=20)).items
            assert isinstance(item, Prediction)
            assert item.nearest is not None
            assert item.nearest[0].similarity == pytest.approx(1, abs=1e-5)
            return [(one.id, one.target) for one in item.nearest]

        assert (await nearest(1))[0] == ("one0", "one")
        assert (await nearest(3))[0] == ("one0", "two")
        assert len(await nearest(1)) == 6
        assert "late" in dict(await nearest(2))
        await here.editor.remove(TENANT, "words", ["late"])
        assert "late" not in dict(await nearest(1))
        # Replaced by another input, it is no longer there to be shown.
        await here.adapt([PostedExample(says("two", 77), "two", "two2")])
        assert "two2" not in dict(await nearest(1))


async def test_many_at_once_each_get_their_own(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        swapped = [
            PostedExample(one.input, "two" if one.target == "one" else "one", one.id) for one in taught()
        ]
        await here.adapt(swapped, "other")
        texts = [str(one.input) for one in taught()]
        expected = {name: await here.labels(texts, name) for name in ("words", "other")}
        calls = [(name, index) for name in expected for index in range(len(texts))] * 5
        answers = await asyncio.gather(*(here.labels([texts[index]], name) for name, index in calls))
        for (name, index), answer in zip(calls, answers, strict=True):
            assert answer == [expected[name][index]]
        assert expected["words"] != expected["other"]


async def test_equal_probabilities_come_in_the_order_of_the_labels(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught())
        head: Head = (await here.predictor.load(TENANT, "words")).head
    found = head.predict(np.zeros((1, head.dim), np.float32))
    found.probabilities[:] = 0.5
    (one,) = shape(head, found, top_k=10)
    assert [label for label, _ in one.probabilities] == list(head.labels)


async def test_a_text_without_a_known_token_is_abstained_from(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(8))
        inputs: list[bytes | str] = [says("one", 70), "", "สวัสดี", picture(1), "👋", says("two", 71)]
        items = (await here.predict(inputs)).items
        reasons = [one.abstention_reason if isinstance(one, Prediction) else one.code for one in items]
        assert reasons[1:5] == ["empty_text", "no_known_tokens", "wrong_kind", "no_known_tokens"]
        assert "no_known_tokens" not in (reasons[0], reasons[5])
        unknown = items[2]
        assert isinstance(unknown, Prediction)
        assert unknown.abstained
        assert unknown.label in ("one", "two")


async def test_an_adapter_that_is_not_measured_says_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(8))
        load = here.predictor.load

        async def unmeasured(*arguments: Any) -> Loaded:
            loaded = await load(*arguments)
            return replace(loaded, head=replace(loaded.head, measured=False))

        monkeypatch.setattr(here.predictor, "load", unmeasured)
        items = (await here.predict(["สวัสดี", says("one", 70)])).items
        reasons = [one.abstention_reason for one in items if isinstance(one, Prediction)]
        assert reasons == ["not_measured", "not_measured"]
