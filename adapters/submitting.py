"""What becomes a job: checks that it can be done, and queues it. The work itself is the worker's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from adapters.adapting import AdaptCommand, Adapting
from adapters.curating import InputsNotKept
from adapters.example import Target
from adapters.keeping import Keeping
from adapters.records import AdapterRecord, JobRecord, UnknownAdapter

FINE_TUNE: Final = "fine_tune"
# Fewer leave nothing to hold out that would say how good the network is.
FEWEST_EXAMPLES = 50
FEWEST_OF_A_LABEL = 5


class CannotTune(RuntimeError):
    """The adapter cannot be fine-tuned as it is; `code` says why, the message what to do."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class TooFewExamples(CannotTune):
    """There is too little to learn from and to measure on."""


def check_tunable(adapter: AdapterRecord, targets: Sequence[Target]) -> None:
    """Raises InputsNotKept, CannotTune or TooFewExamples unless a network can learn from the adapter."""
    if not adapter.keep_inputs:
        raise InputsNotKept("The adapter keeps no inputs, and a network learns from them.")
    if adapter.task != "classification":
        raise CannotTune("task_not_tunable", f"Adapters of {adapter.task} cannot be fine-tuned yet.")
    sizes = Counter(targets)
    if len(targets) < FEWEST_EXAMPLES or len(sizes) < 2 or min(sizes.values()) < FEWEST_OF_A_LABEL:
        raise TooFewExamples(
            "too_few_examples",
            f"A fine-tune needs {FEWEST_EXAMPLES} examples, of two labels or more, and "
            f"{FEWEST_OF_A_LABEL} of each; a linear probe needs two. Send more.",
        )


class Submitting:
    """Queues jobs and tells of them. For one event loop.

    max_open: jobs that a tenant may have queued and running. deadline_seconds: what a job may take from its
    submission on.
    """

    def __init__(self, adapting: Adapting, *, max_open: int, deadline_seconds: float) -> None:
        self._adapting = adapting
        self._keeping: Keeping = adapting.revising.keeping
        self._jobs = self._keeping.registry.jobs
        self._max_open = max_open
        self._deadline_seconds = deadline_seconds

    async def fine_tune(self, tenant: str, command: AdaptCommand) -> JobRecord:
        """Keeps the command's examples, if it has any, and queues a fine-tune of all that is kept then.

        Raises what Adapting.adapt raises, and UnknownAdapter, CannotTune, InputsNotKept, TooManyJobs,
        FingerprintMismatch.
        """
        if command.posted:
            await self._adapting.adapt(tenant, replace(command, fit=False))
        state = await self._keeping.state(tenant, command.adapter)
        if state is None:
            raise UnknownAdapter(command.adapter)
        check_tunable(state.adapter, [example.target for example in state.examples])
        self._adapting.check_served(state.adapter)
        request = {"promote": command.promote, "config": dict(command.fine_tune or {})}
        return await asyncio.to_thread(
            lambda: self._jobs.submit(
                tenant,
                command.adapter,
                FINE_TUNE,
                request,
                deadline_seconds=self._deadline_seconds,
                max_open=self._max_open,
            )
        )

    async def job(self, tenant: str, job_id: str) -> JobRecord:
        """One job. Raises UnknownJob."""
        return await asyncio.to_thread(self._jobs.job, tenant, job_id)

    async def jobs(
        self, tenant: str, adapter: str | None, after: str | None, limit: int
    ) -> Sequence[JobRecord]:
        """The tenant's jobs, the newest first."""
        return await asyncio.to_thread(self._jobs.jobs, tenant, adapter, after, limit)

    async def cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Cancels a queued job, or has a running one end within seconds. Raises UnknownJob, JobFinished."""
        return await asyncio.to_thread(self._jobs.request_cancel, tenant, job_id)
