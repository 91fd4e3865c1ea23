"""What the registry reads and writes, as plain immutable records, and how it refuses."""

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

KEPT_VERSIONS = 20
"""How many of an adapter's newest versions are kept; the live one is kept besides."""


class RegistryError(RuntimeError):
    """The registry refuses or fails; `code` is stable, the message tells a person what to do."""

    code = "registry_error"


class UnknownAdapter(RegistryError):
    """The tenant has no such adapter, whether or not another tenant has one of that name."""

    code = "unknown_adapter"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no adapter {name!r}. GET /adapters lists yours; /adapt creates one.")


class UnknownTenant(RegistryError):
    """There is no such tenant."""

    code = "unknown_tenant"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no tenant {name!r}. POST /tenants makes one.")


class UnknownVersion(RegistryError):
    """The adapter has no version of that number, or no longer."""

    code = "unknown_version"

    def __init__(self, number: int) -> None:
        super().__init__(f"There is no version {number}. {KEPT_VERSIONS} are kept, and the live one.")


class UnknownExample(RegistryError):
    """The adapter has no example of that id."""

    code = "unknown_example"

    def __init__(self, example_id: str) -> None:
        super().__init__(f"There is no example {example_id!r}. GET the adapter's examples lists their ids.")


class RevisionMoved(RegistryError):
    """The examples changed since they were read: read them again, merge, refit and commit again."""

    code = "revision_moved"


class AdapterExists(RevisionMoved):
    """Another request created the adapter first: read it, and commit to it instead of creating it."""

    code = "adapter_exists"


class AliasMoved(RegistryError):
    """The alias is no longer where If-Match says that it is."""

    code = "alias_moved"


class UnknownJob(RegistryError):
    """The tenant has no such job, whether or not another tenant has one of that id."""

    code = "unknown_job"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id!r}. GET /jobs lists yours; an adapter's go with it.")


class TooManyJobs(RegistryError):
    """The tenant has as many jobs queued and running as it may."""

    code = "too_many_jobs"


class JobFinished(RegistryError):
    """The job has ended, so that there is nothing left to cancel."""

    code = "job_finished"


class LeaseLost(RegistryError):
    """The attempt has ended, or its lease has: whoever runs it must stop, and can write nothing more."""

    code = "lease_lost"


class RegistryUnavailable(RegistryError):
    """The database did not answer. Of a commit it is then unknown whether it was recorded."""

    code = "registry_unavailable"


class RegistryTooOld(RegistryError):
    """The database has an earlier release's tables, or none."""

    code = "registry_too_old"


class RegistryTooNew(RegistryError):
    """The database was written by a newer release than this one."""

    code = "registry_too_new"


Standing = tuple[int | None, datetime | None]
"""Which version is live, and since when a rollback by hand holds, if one does."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A tenant's named task. `uid` differs when an adapter is deleted and created again.

    `revision` moves with every change of its examples; `epoch` grows with every commit to it;
    `live` is the version that `/predict` uses, if any; `examples` counts what is kept. Times are UTC.
    `answer_accuracy` and `weights` are what its next version is fitted for, see ProbeConfig.
    `rolled_back_at` is when a person made another version live than the newest; newer ones are withheld until
    a person lifts that. `restored_at` is when a person last restored a version.
    """

    uid: str
    tenant: str
    name: str
    backbone: str
    fingerprint: str
    kind: Kind
    task: Task
    keep_inputs: bool
    revision: int
    live: int | None
    epoch: int
    examples: int
    created_at: datetime
    answer_accuracy: float = ANSWER_ACCURACY
    weights: Weights = "none"
    rolled_back_at: datetime | None = None
    restored_at: datetime | None = None

    @property
    def standing(self) -> Standing:
        """What a decision on a new version depends on, besides the examples."""
        return self.live, self.rolled_back_at

    @property
    def etag(self) -> str:
        """Strong entity tag (RFC 9110) of the `live` alias: the same while it points to the same version."""
        return f'"{self.uid}-{self.live or 0}"'


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """One kept example. `row` is its place both among the embeddings of `segment` and among `inputs`.

    `group` is the tenant's name for what belongs together; `sampled` is False for what was chosen for being
    wrong or hard. See Dataset. `excluded` is True for what is set aside: kept, and not learned from.
    """

    id: str
    digest: str
    target: Target
    segment: Artifact
    row: int
    inputs: Artifact | None
    created_at: datetime
    group: str | None = None
    sampled: bool = True
    excluded: bool = False


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable version: `artifact` is its head, `evidence` its training embeddings and scores.

    `network` is the ONNX network of a fine-tuned version, None where the backbone itself is the network.
    It was fitted on the examples as of `revision`. `backbone` and `fingerprint` are the version's own: after
    a rebase they differ from the adapter's. `labels` counts the labels, 0 for regression.
    """

    number: int
    revision: int
    method: str
    backbone: str
    fingerprint: str
    artifact: Artifact
    evidence: Artifact | None
    network: Artifact | None
    report: Mapping[str, Any]
    labels: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Alias:
    """All that a prediction needs to know of an adapter: which version answers, and where its head is.

    `version` is the live one or the one asked for; it and `artifact` are None while nothing is live.
    `network` is what embeds for a fine-tuned version; where it is None, the backbone does.
    `backbone` and `fingerprint` are the version's, or the adapter's while nothing is live.
    """

    uid: str
    tenant: str
    name: str
    backbone: str
    fingerprint: str
    kind: Kind
    task: Task
    version: int | None
    artifact: Artifact | None
    evidence: Artifact | None
    network: Artifact | None
    epoch: int


@dataclass(frozen=True, slots=True)
class Changed:
    """A commit, promotion or deletion, maybe of another process: what knows less than `epoch` is stale.

    uid, epoch: of the adapter as it is now, None where there is none of that name.
    gone: something was erased. Then what is in memory of the adapter goes, and without a name of the tenant.
    """

    tenant: str
    name: str
    uid: str | None
    epoch: int | None
    gone: bool = False

    def leaves_behind(self, alias: Alias) -> bool:
        """Whether the alias is of an older state of the adapter."""
        return self.uid != alias.uid or self.epoch is None or alias.epoch < self.epoch


@dataclass(frozen=True, slots=True)
class Creation:
    """What is decided when an adapter is created: answer_accuracy and weights may change with any fit, a
    rebase moves the backbone, and the rest is fixed.

    began: by time.monotonic(), when its request had been read. What was erased since then is not created.
    """

    backbone: str
    fingerprint: str
    kind: Kind
    task: Task
    keep_inputs: bool
    answer_accuracy: float = ANSWER_ACCURACY
    weights: Weights = "none"
    began: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True, slots=True)
class Rebase:
    """The backbone that all examples, repointed in the same change, are embedded with from now on."""

    backbone: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ExampleWrite:
    """An example to add, or to replace where its id is known. See ExampleRecord."""

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
    """A kept example whose embedding and input now lie elsewhere; nothing else of it changes."""

    id: str
    segment: Artifact
    row: int
    inputs: Artifact | None = None


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version to record; the registry gives it its number, its backbone and its time.

    revision: of the examples that it was fitted on; None for those as they are after the change.
    """

    method: str
    artifact: Artifact
    evidence: Artifact | None
    report: Mapping[str, Any]
    labels: int
    network: Artifact | None = None
    revision: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Everything that one transaction writes to one adapter. Its artifacts are published before.

    uid: of the adapter as it was read, or `new_uid()` together with `create`; artifacts are published under
    it. revision: of the adapter as it was read, 0 together with `create`. create: the adapter is to be
    created, and must not exist. clear_first: forget the examples that `upserts` does not name (update
    "replace"). Versions fitted on them stay,
        so that the replacement can be rolled back.
    upserts: distinct ids.
    removals: ids to erase. Every version that was fitted on one of them goes, the live one included. Where
    other
        examples lie in the same segment, `repoints` (or `upserts`) must move them all to rewritten ones, so
        that the erased bytes go with the old files.
    version, promote: a version fitted on the examples as they are after this change; make it live.
    answer_accuracy, weights: of the adapter from now on; None leaves them. What changes one of them moves the
    revision, for what others fit meanwhile is fitted for what was wanted before.
    fallback: the version to make live instead, where `version` is not promoted; it must stay.
    restores: a person makes `fallback` live with the examples that it learned from. Like `promote` it ends a
    rollback that holds.
    standing: of the adapter when the next live version was decided on; None where none was.
    """

    tenant: str
    name: str
    uid: str
    revision: int
    create: Creation | None = None
    rebase: Rebase | None = None
    clear_first: bool = False
    upserts: tuple[ExampleWrite, ...] = ()
    removals: tuple[str, ...] = ()
    repoints: tuple[Repoint, ...] = ()
    version: NewVersion | None = None
    promote: bool = False
    answer_accuracy: float | None = None
    weights: Weights | None = None
    fallback: int | None = None
    restores: bool = False
    standing: Standing | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit left behind.

    adapter, alias: as of the commit; hand `alias` to `Aliases.put`. version: the recorded one, if any.
    added, replaced, removed: examples. gone: numbers of the versions that went; erased: of those of them that
    had learned from what was removed.
    unreferenced: artifacts that nothing refers to any more; the caller deletes their files now.
    erasure: the id of its receipt, where examples were removed.
    """

    adapter: AdapterRecord
    alias: Alias
    version: VersionRecord | None
    added: int
    replaced: int
    removed: int
    gone: tuple[int, ...]
    unreferenced: tuple[Artifact, ...]
    erasure: str | None = None
    erased: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Work that outlives its request. Times are UTC, None for what has not come to pass.

    `adapter` is the name of the adapter and `adapter_uid` its uid; the job goes when the adapter does.
    `request` and `progress` are JSON objects; the queue reads neither. `attempt` counts the attempts, 0
    before the first, and `released` those of them that ended for reasons outside the job. Whoever runs it has
    it until `lease_until`; a queued one is not begun before that. `version` is the one that a succeeded job
    recorded, if any; `error_code` and `error_detail` say why a failed one failed.
    """

    id: str
    tenant: str
    adapter_uid: str
    adapter: str
    kind: JobKind
    state: JobState
    request: Mapping[str, Any]
    progress: Mapping[str, Any] | None
    attempt: int
    lease_until: datetime | None
    cancel_requested: bool
    deadline_at: datetime | None
    version: int | None
    error_code: str | None
    error_detail: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    released: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one attempt of a job, while its lease lasts. `job` is as it was claimed."""

    job: JobRecord


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What whoever runs a job learns with each heartbeat: either is a reason to end the attempt."""

    cancel_requested: bool
    deadline_passed: bool
