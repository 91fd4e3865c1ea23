"""The examples of a fine-tune, while other requests change the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.adaptation.commands import AdaptCommand, ContractChanged
from adapters.adaptation.options import WeightsLabelUnknown
from adapters.jobs.kept_examples import KeptExamples
from adapters.jobs.submission import CannotTune, JobSubmitter, TooFewExamples
from adapters.registry.records import JobRecord
from adapters.storage.artifact import Artifact, MissingArtifact
from tests.support.adapters.adapter_stack import TENANT, World, other_text_export, taught, world
from tests.support.models.tiny_backbones import text_export

pytestmark = pytest.mark.anyio


def submit(here: World) -> JobRecord:
    return here.registry.jobs.submit(TENANT, "words", "fine_tune", {}, deadline_seconds=600, max_open=3)


def read(here: World, job: JobRecord) -> KeptExamples:
    return KeptExamples.read(here.registry, here.store, job, lambda: None)


async def test_files_that_are_rewritten_meanwhile_are_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(40), fit=False)
        job = submit(here)
        uid = here.registry.adapter(TENANT, "words").uid
        first = here.registry.all_examples(uid)
        await here.editor.remove(TENANT, "words", ["one0"])
        every = here.registry.all_examples
        # The rows are those of before the removal, whose files are gone.
        answers = [first]
        monkeypatch.setattr(
            here.registry, "all_examples", lambda uid: answers.pop() if answers else every(uid)
        )
        kept = read(here, job)
        assert len(kept.examples) == len(kept.embeddings) == len(kept.inputs) == 79


async def test_a_file_that_is_lost_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(40), fit=False)
        job = submit(here)

        def missing(tenant: str, uid: str, artifact: Artifact) -> Any:
            raise MissingArtifact(artifact.name)

        monkeypatch.setattr(here.store, "read", missing)
        with pytest.raises(MissingArtifact):
            read(here, job)


async def test_a_fine_tune_does_not_outlive_the_backbone_it_began_with(tmp_path: Path) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        await here.adapt(taught(40), fit=False)
        kept = read(here, submit(here))
        await here.rebaser.rebase(TENANT, "words", "other-text", "always")
        now = here.registry.adapter(TENANT, "words")
        with pytest.raises(CannotTune) as refused:
            kept.check_unchanged(now, here.registry.all_examples(now.uid)[1])
        assert refused.value.code == "fingerprint_mismatch"


async def test_a_fine_tune_of_kept_examples_cannot_change_the_contract(tmp_path: Path) -> None:
    exports = {"tiny-text": text_export(tmp_path), "other-text": other_text_export(tmp_path)}
    async with world(tmp_path, exports=exports) as here:
        done = await here.adapt(taught(40), fit=False)
        submitter = JobSubmitter(here.pipeline, max_open=3, deadline_seconds=60)
        command = AdaptCommand(done.revised.adapter.name)
        for other, code in (
            (replace(command, backbone="other-text"), "backbone_changed"),
            (replace(command, task="regression"), "task_changed"),
        ):
            with pytest.raises(ContractChanged) as refused:
                await submitter.fine_tune(TENANT, other)
            assert refused.value.code == code
        assert here.registry.jobs.jobs(TENANT) == []
        job, _ = await submitter.fine_tune(TENANT, command)
        assert job.state == "queued"


async def test_a_fine_tune_carries_what_labels_mean_and_cost(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.adapt(taught(40), fit=False, costs={"one": 3.0})
        submitter = JobSubmitter(here.pipeline, max_open=3, deadline_seconds=60)
        command = AdaptCommand("words")
        for wrong, error in (
            ({"costs": {"three": 2.0}}, WeightsLabelUnknown),
            ({"meanings": {"three": ""}}, TooFewExamples),
            ({"meanings": {"ｏne": ""}}, TooFewExamples),
        ):
            with pytest.raises(error):
                await submitter.fine_tune(TENANT, replace(command, **wrong))
        meanings = {"one": "ba be", "two": ""}
        asked = replace(command, posted=taught(41)[-1:], weights="none", costs={}, meanings=meanings)
        job, stored = await submitter.fine_tune(TENANT, asked)
        assert stored is not None
        adapter = here.registry.adapter(TENANT, "words")
        assert (adapter.examples, adapter.meanings, adapter.costs) == (81, {}, {"one": 3.0}), "until it ends"
        kept = read(here, job)
        assert (kept.terms.meanings, kept.terms.costs) == (meanings, {})
        assert kept.fit_probe(range(len(kept.examples))).head.labels == ("one", "two")
        # A name that comes later needs examples too.
        await here.adapt([], meanings={"three": ""}, fit=False)
        with pytest.raises(TooFewExamples):
            read(here, submit(here))
