"""What ties a checkpoint to its fine-tune."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from adapters.finetune.config import FineTuneConfig
from adapters.finetune.model import TrainingSet
from adapters.jobs.fine_tune import _about
from adapters.jobs.kept_examples import KeptExamples
from adapters.registry.records import AdapterRecord, Creation


def test_a_checkpoint_of_another_backbone_is_not_resumed() -> None:
    adapter = AdapterRecord(
        **cast(Any, dict.fromkeys(("uid", "tenant", "name", "created_at"), "")),
        backbone="one",
        fingerprint="1",
        kind="text",
        task="classification",
        keep_inputs=True,
        revision=1,
        live=None,
        epoch=1,
        examples=0,
    )
    terms = Creation("one", "1", "text", "classification", True)
    kept = KeptExamples(adapter, 1, terms, (), np.empty((0, 4), np.float32), ())
    nothing = np.empty(0, np.bool_)
    training_set = TrainingSet(cast(Any, None), np.empty(0, np.int64), nothing, sampled=nothing)
    about = _about(kept, training_set, FineTuneConfig())
    assert about == _about(replace(kept, revision=2), training_set, FineTuneConfig())
    moved = replace(kept, adapter=replace(adapter, backbone="other", fingerprint="2"))
    assert about != _about(moved, training_set, FineTuneConfig())
