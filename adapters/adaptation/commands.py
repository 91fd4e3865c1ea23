"""What is asked of an adapter's examples and versions, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Literal

from adapters.adaptation.options import FitOptions
from adapters.adaptation.promotion.decision import Decision, Promote
from adapters.defaults import ADAPTER_EXAMPLES, ADAPTER_LABELS
from adapters.examples.target import Task, Weights
from adapters.examples.validation import PostedExample, RejectedExample, ValidExample
from adapters.finetune.config import FineTuneConfig
from adapters.probe.fit import ProbeConfig
from adapters.registry.records import AdapterRecord, Committed, VersionRecord
from models.errors import CodedError, Conflict, Invalid


class AdapterFull(Conflict):
    """The adapter would hold more examples or labels than are allowed."""

    code = "adapter_full"


class NothingToFit(Invalid):
    """There are no examples to fit a head on."""

    code = "nothing_to_fit"


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Limits of one adapter: kept examples and distinct labels; and how it is fitted."""

    max_examples: int = ADAPTER_EXAMPLES
    max_labels: int = ADAPTER_LABELS
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass(frozen=True, slots=True)
class ExampleEdit:
    """A change to an adapter's examples."""

    upserts: Sequence[ValidExample] = ()
    removals: Sequence[str] = ()  # ids
    clear: bool = False  # forget the examples that are not upserted
    fit: bool = True  # make a version
    promote: Promote = "if_better"
    required: bool = True  # raise an error if the examples cannot be fitted, instead of making no version
    # Ids of the examples stored by an upload that is to replace all others. The others count towards no
    # limit, and `clear` keeps the uploaded ones.
    uploaded: AbstractSet[str] | None = None
    live: int | None = None  # the version that a person makes live with the edit, if none is fitted


@dataclass(frozen=True, slots=True)
class RevisionResult:
    """The result of an edit."""

    committed: Committed
    decision: Decision | None  # None if nothing was fitted
    timings: Mapping[str, float]  # seconds by stage
    truncated: int = 0  # number of the edit's texts of which the backbone reads only the start

    @property
    def adapter(self) -> AdapterRecord:
        """The adapter after the edit."""
        return self.committed.adapter

    @property
    def version(self) -> VersionRecord | None:
        """The version that was fitted, if any."""
        return self.committed.version

    @property
    def live(self) -> bool:
        """Whether the new version is the live one."""
        return self.version is not None and self.adapter.live == self.version.number

    def with_total(self, started: float) -> RevisionResult:
        """Return the result with the seconds since `started`, of time.perf_counter, as the total."""
        return replace(self, timings={**self.timings, "total": time.perf_counter() - started})


Update = Literal["append", "replace"]


class ExamplesRejected(Invalid):
    """No posted example can be used, or the request is strict and at least one cannot.

    `errors`: {pointer, code, detail} of the first 100 rejected examples.
    """

    code = "examples_rejected"

    def __init__(self, rejected: Sequence[RejectedExample], *, strict: bool) -> None:
        reason = "The request is strict, and" if strict else "None can be used:"
        super().__init__(f"{reason} {len(rejected)} examples were rejected. Nothing was stored.")
        self.rejected = tuple(rejected)
        self.errors = _blamed(rejected)


class ContractChanged(CodedError, Conflict):
    """The request contradicts a setting fixed when the adapter was created; `code` says which."""


class FingerprintMismatch(Conflict):
    """The backbone served under this name is not the one that the adapter was taught with."""

    code = "fingerprint_mismatch"

    def __init__(self, backbone: str) -> None:
        super().__init__(
            f"The backbone {backbone!r} served here is not the one that this adapter was taught with, for "
            "example of an earlier release. POST /adapters/{adapter}/rebase with "
            f'{{"backbone": "{backbone}"}} moves the adapter to it.'
        )


@dataclass(frozen=True, slots=True)
class AdaptCommand:
    """A request to /adapt. None: the adapter's own setting, or the default if it is created."""

    adapter: str
    posted: Sequence[PostedExample] = ()
    backbone: str | None = None
    task: Task | None = None
    update: Update = "append"
    promote: Promote = "if_better"
    fit: bool = True
    strict: bool = False
    keep_inputs: bool | None = None
    fine_tune: FineTuneConfig | None = None  # how to train a network, for JobSubmitter.fine_tune
    callback: str | None = None  # URL that is told the end of a job, see check_callback
    uploaded: AbstractSet[str] | None = None  # see ExampleEdit
    # See FitOptions.
    answer_accuracy: float | None = None
    weights: Weights | None = None
    costs: Mapping[str, float] | None = None
    meanings: Mapping[str, str] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # of an upload's table, see layout_of
    began: float = field(default_factory=time.monotonic, compare=False)  # see Creation

    @property
    def options(self) -> FitOptions:
        """What the adapter's versions are to be fitted for."""
        return FitOptions(self.answer_accuracy, self.weights, self.costs, self.meanings)


@dataclass(frozen=True, slots=True)
class AdaptOutcome:
    """The result of an adapt request."""

    revised: RevisionResult
    rejected: Sequence[RejectedExample] = ()
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds by stage


def _blamed(rejected: Sequence[RejectedExample]) -> list[dict[str, str]]:
    return [
        {"pointer": pointer(one.index, one.field), "code": one.code, "detail": one.detail}
        for one in rejected[:100]
    ]


def pointer(index: int, part: str) -> str:
    """Return the JSON pointer (RFC 6901) to an example of a request, or to a part of it."""
    return f"/examples/{index}/{part}" if part else f"/examples/{index}"
