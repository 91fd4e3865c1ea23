"""Errors of the registry."""

from __future__ import annotations

from models.errors import Conflict, DomainError, NotFound, Overloaded, PreconditionFailed, Unavailable

KEPT_VERSIONS = 20
"""Number of an adapter's newest versions that are kept, in addition to the live one."""


class UnknownAdapter(NotFound):
    """The tenant has no adapter of this name, whether or not another tenant has one."""

    code = "unknown_adapter"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no adapter {name!r}. GET /adapters lists them; POST /adapt creates one.")


class UnknownTenant(NotFound):
    """There is no tenant of this name."""

    code = "unknown_tenant"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no tenant {name!r}. POST /tenants creates one.")


class UnknownVersion(NotFound):
    """The adapter has no version of this number, or no longer has it."""

    code = "unknown_version"

    def __init__(self, number: int) -> None:
        super().__init__(
            f"There is no version {number}. The {KEPT_VERSIONS} newest are kept, and the live one."
        )


class UnknownExample(NotFound):
    """The adapter has no example with this id."""

    code = "unknown_example"

    def __init__(self, example_id: str) -> None:
        super().__init__(
            f"There is no example {example_id!r}. GET /adapters/{{adapter}}/examples lists the ids."
        )


class RevisionMoved(Conflict):
    """The examples changed since they were read: read them again, merge, refit and commit again."""

    code = "revision_moved"


class AdapterExists(RevisionMoved):
    """Another request created the adapter first: read it, and commit to it instead of creating it."""

    code = "adapter_exists"


class AliasMoved(PreconditionFailed):
    """The alias no longer points to the version that If-Match names."""

    code = "alias_moved"


class UnknownJob(NotFound):
    """The tenant has no job with this id, whether or not another tenant has one."""

    code = "unknown_job"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"There is no job {job_id!r}. GET /jobs lists them; an adapter's jobs are deleted with it."
        )


class TooManyJobs(Overloaded):
    """The tenant has reached its limit of queued and running jobs."""

    code = "too_many_jobs"


class JobFinished(Conflict):
    """The job has ended, so there is nothing left to cancel."""

    code = "job_finished"


class LeaseLost(DomainError):
    """The attempt or its lease has ended: its worker must stop, and can write nothing more."""

    code = "lease_lost"


class RegistryUnavailable(Unavailable):
    """The database did not answer. If this happens during a commit, the change may have been recorded."""

    code = "registry_unavailable"


class RegistryTooOld(DomainError):
    """The database has the tables of an earlier release, or none."""

    code = "registry_too_old"


class RegistryTooNew(DomainError):
    """The database was written by a newer release than this one."""

    code = "registry_too_new"
