"""Requests during which another one changes the adapter's backbone or task."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.adaptation.commands import ExamplesRejected
from adapters.adaptation.example_editor import Feedback
from adapters.adaptation.input_embedder import EmbeddedInputs
from adapters.examples.validation import PostedExample
from tests.support.adapters.adapter_stack import TENANT, World, other_text_export, says, taught, world
from tests.support.models.tiny_backbones import text_export

pytestmark = pytest.mark.anyio


def meanwhile(here: World, monkeypatch: pytest.MonkeyPatch, happens: Callable[[], Awaitable[object]]) -> None:
    """Lets something happen once, just after the next request has embedded its inputs."""
    embed_new = here.pipeline.embedder.embed_new

    async def then(*arguments: Any) -> EmbeddedInputs:
        monkeypatch.setattr(here.pipeline.embedder, "embed_new", embed_new)
        found = await embed_new(*arguments)
        await happens()
        return found

    monkeypatch.setattr(here.pipeline.embedder, "embed_new", then)


def embedded_by(here: World, backbone: str, monkeypatch: pytest.MonkeyPatch) -> list[bytes | str]:
    """The inputs that the backbone embeds from now on."""
    seen: list[bytes | str] = []
    embed = here.batchers[backbone].embed

    async def noted(inputs: Sequence[bytes | str], **options: Any) -> Any:
        seen.extend(inputs)
        return await embed(inputs, **options)

    monkeypatch.setattr(here.batchers[backbone], "embed", noted)
    return seen


async def test_an_adapt_beside_a_rebase_is_embedded_by_the_new_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the embedding of one backbone would be stored as that of the other."""
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt(taught())
        seen = embedded_by(here, "other-text", monkeypatch)
        meanwhile(here, monkeypatch, lambda: here.rebaser.rebase(TENANT, "words", "other-text", "always"))
        done = await here.adapt([PostedExample(says("one", 999), "one", "more")])
        assert done.revised.adapter.backbone == "other-text"
        assert says("one", 999) in seen
        assert here.outcomes == ["promoted", "promoted"]
        here.check()


async def test_a_feedback_beside_a_rebase_is_embedded_by_the_new_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here, world(tmp_path, exports=exports) as there:
        await here.adapt(taught())
        seen = embedded_by(here, "other-text", monkeypatch)
        meanwhile(here, monkeypatch, lambda: there.rebaser.rebase(TENANT, "words", "other-text", "always"))
        done = await here.editor.feedback(TENANT, "words", Feedback("one", input=says("one", 999)))
        assert done.adapter.backbone == "other-text"
        assert seen == [says("one", 999)]
        here.check()


async def test_labels_for_an_adapter_that_has_become_of_another_task_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [replace(one, target=[one.target]) for one in taught()]
    async with world(tmp_path) as here:
        meanwhile(here, monkeypatch, lambda: here.adapt(several, task="multilabel"))
        with pytest.raises(ExamplesRejected):
            await here.adapt([PostedExample(says("one", 999), "one", "more"), *taught()])
        assert here.registry.adapter(TENANT, "words").examples == len(several)
        here.check()
