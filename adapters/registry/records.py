"""Immutable records that the registry reads and writes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from adapters.examples.target import ANSWER_ACCURACY, Target, Task, Weights
from adapters.storage.artifact import Artifact
from models.spec import Kind

JobKind = Literal["fine_tune", "bulk_adapt"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


Standing = tuple[int | None, datetime | None]
"""Number of the live version, and the time of the manual rollback in force. None: there is none."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A tenant's named task. Times are UTC."""

    uid: str  # changes if the adapter is deleted and created again
    tenant: str
    name: str
    backbone: str
    fingerprint: str
    kind: Kind
    task: Task
    keep_inputs: bool
    revision: int  # incremented by every change to the examples or to what versions are fitted for
    live: int | None  # number of the version that /predict uses, if any
    epoch: int  # grows with every commit to the adapter
    examples: int  # number of kept examples
    created_at: datetime
    # Fitting options for the next version, see ProbeConfig.
    answer_accuracy: float = ANSWER_ACCURACY
    weights: Weights = "none"
    # When a person made an older version live. Newer versions are withheld until a person lifts the rollback.
    rolled_back_at: datetime | None = None
    restored_at: datetime | None = None  # when a person last restored a version
    # Descriptions by label, "" for a name alone, and costs by label, for the next version's fit.
    meanings: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def standing(self) -> Standing:
        """The state, besides the examples, that the decision on a new version depends on."""
        return self.live, self.rolled_back_at

    @property
    def etag(self) -> str:
        """Strong entity tag (RFC 9110) of the `live` alias; it changes only when the alias moves."""
        return f'"{self.uid}-{self.live or 0}"'


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """One kept example."""

    id: str
    digest: str  # of its input
    target: Target
    segment: Artifact
    row: int  # index both into the embeddings of `segment` and into `inputs`
    inputs: Artifact | None
    created_at: datetime
    group: str | None = None  # the tenant's name for examples that belong together, see Dataset
    sampled: bool = True  # False if it was chosen for being wrong or hard, see Dataset
    excluded: bool = False  # set aside: kept, but not learned from


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable version."""

    number: int
    revision: int  # of the examples that it was fitted on
    method: str
    # The version's own: after a rebase they differ from the adapter's.
    backbone: str
    fingerprint: str
    artifact: Artifact  # the head
    evidence: Artifact | None  # training embeddings and scores
    network: Artifact | None  # ONNX network of a fine-tuned version; None if the backbone is the network
    report: Mapping[str, Any]
    labels: int  # number of labels, 0 for regression
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Alias:
    """What a prediction needs to know about an adapter: which version answers, and where its head is."""

    uid: str
    tenant: str
    name: str
    # The version's, or the adapter's while no version is live.
    backbone: str
    fingerprint: str
    kind: Kind
    task: Task
    version: int | None  # the live or the requested one; None, as is `artifact`, while no version is live
    artifact: Artifact | None
    evidence: Artifact | None
    network: Artifact | None  # embeds inputs for a fine-tuned version; None if the backbone does
    epoch: int


@dataclass(frozen=True, slots=True)
class Changed:
    """A change by any process, see the table `changes`. State with a lower `epoch` is stale."""

    tenant: str
    name: str
    # The adapter's current ones, None if there is no adapter of this name.
    uid: str | None
    epoch: int | None
    gone: bool = False

    def leaves_behind(self, alias: Alias) -> bool:
        """Return whether the alias shows an older state of the adapter."""
        return self.uid != alias.uid or self.epoch is None or alias.epoch < self.epoch


@dataclass(frozen=True, slots=True)
class Creation:
    """The properties of an adapter that are set at its creation.

    answer_accuracy, weights, meanings and costs may change with any fit, the backbone with a rebase. The rest
    is fixed.
    """

    backbone: str
    fingerprint: str
    kind: Kind
    task: Task
    keep_inputs: bool
    answer_accuracy: float = ANSWER_ACCURACY
    weights: Weights = "none"
    meanings: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    # time.monotonic() when the request had been read. Nothing is created if the tenant was erased since.
    began: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True, slots=True)
class Rebase:
    """The adapter's new backbone. The same change repoints all examples to embeddings by it."""

    backbone: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ExampleWrite:
    """An example to add, or to replace if its id is known. See ExampleRecord."""

    id: str
    digest: str
    target: Target
    segment: Artifact
    row: int
    inputs: Artifact | None = None
    group: str | None = None
    sampled: bool = True
    excluded: bool = False


@dataclass(frozen=True, slots=True)
class Repoint:
    """A new location of a kept example's embedding and input; nothing else of the example changes."""

    id: str
    segment: Artifact
    row: int
    inputs: Artifact | None = None


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version to record. The registry sets its number, backbone and time."""

    method: str
    artifact: Artifact
    evidence: Artifact | None
    report: Mapping[str, Any]
    labels: int
    network: Artifact | None = None
    revision: int | None = None  # of the examples that it was fitted on; None: those after the change


@dataclass(frozen=True, slots=True)
class Change:
    """Everything that one transaction writes to one adapter. Its artifacts must be published before."""

    tenant: str
    name: str
    uid: str  # the adapter's when it was read, or `new_uid()` with `create`; artifacts are published under it
    revision: int  # the adapter's when it was read, 0 with `create`
    create: Creation | None = None  # creates the adapter, which must not exist
    rebase: Rebase | None = None
    # Delete the examples that `upserts` does not name (update "replace"). Versions fitted on them stay, so
    # that the replacement can be rolled back.
    clear_first: bool = False
    upserts: tuple[ExampleWrite, ...] = ()  # their ids are distinct
    # Ids of examples to erase. Versions fitted on any of them are deleted, even the live one. `repoints` or
    # `upserts` must move the other examples of their segments to rewritten ones, so that the bytes are erased
    # with the old files.
    removals: tuple[str, ...] = ()
    repoints: tuple[Repoint, ...] = ()
    version: NewVersion | None = None  # fitted on the examples as they are after this change
    promote: bool = False  # make `version` live
    # The adapter's new values; None leaves the old ones. A new value also increments the revision, because
    # concurrent fits were made for the old one.
    answer_accuracy: float | None = None
    weights: Weights | None = None
    meanings: Mapping[str, str] | None = None
    costs: Mapping[str, float] | None = None
    fallback: int | None = None  # the kept version to make live if `version` is not promoted
    # A person makes `fallback` live with the examples that it learned from. As `promote`, ends a rollback.
    restores: bool = False
    standing: Standing | None = None  # the adapter's when the next live version was chosen; None if none was


@dataclass(frozen=True, slots=True)
class Committed:
    """The result of a commit."""

    adapter: AdapterRecord  # as of the commit
    alias: Alias  # as of the commit, for `AliasCache.put`
    version: VersionRecord | None  # the recorded version, if any
    # Numbers of examples.
    added: int
    replaced: int
    removed: int
    gone: tuple[int, ...]  # numbers of the deleted versions
    unreferenced: tuple[Artifact, ...]  # no longer referred to; the caller deletes their files now
    erasure: str | None = None  # id of the erasure's receipt, if examples were removed
    erased: tuple[int, ...] = ()  # those of `gone` that had learned from removed examples


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Work that outlives its request. Times are UTC, and None until the event has happened."""

    id: str
    tenant: str
    adapter_uid: str
    adapter: str  # name of the adapter, with which the job is deleted
    kind: JobKind
    state: JobState
    # JSON objects, whose contents do not affect the queue.
    request: Mapping[str, Any]
    progress: Mapping[str, Any] | None
    attempt: int  # number of attempts so far
    lease_until: datetime | None  # end of a running job's lease; a queued job is not begun before this time
    cancel_requested: bool
    deadline_at: datetime | None
    version: int | None  # number of the version that the job recorded, if any
    # Why a failed job failed.
    error_code: str | None
    error_detail: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    released: int = 0  # attempts that ended for reasons outside the job
    checkpoint: Artifact | None = None  # the newest checkpoint in the store


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one attempt of a job while its lease lasts. `job` is its state when it was claimed."""

    job: JobRecord


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a worker learns from a heartbeat. Either flag is a reason to end the attempt."""

    cancel_requested: bool
    deadline_passed: bool
